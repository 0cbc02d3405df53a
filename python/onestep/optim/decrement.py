"""How much the quadratic model could still lower the loss: the test of convergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from onestep._serial_torch import eigh
from onestep.curvature.conjugate_gradient import conjugate_gradient

# Up to so many parameters the matrix is formed, by as many products.
MOST_DENSE = 128
# Rounds of products with random signs that scale the matrix.
_ROUNDS = 5
# Vectors of random signs in a round.
_SIGNS = 6
# The square of a gradient that rounding may have made, in ε of what is enough.
_NOISE = 4.0
# The least eigenvalue (of a matrix scaled to a unit diagonal) of which rounding leaves a digit, in p ε.
_RESOLVED = 10.0
# Eigenvalues of directions that are flat to rounding are at most so many times p ε of the largest.
_FLAT = 1e3
# Conjugate gradients start at this tolerance,
_FIRST_TOLERANCE = 1e-2
# tighten it by this factor where it does not settle the question,
_TIGHTER = 1e-2
# and give up after this many iterations.
_MOST_ITERATIONS = 400


class Decrement(NamedTuple):
    """What an undamped step would lower the model by.

    Attributes:
        value: ½gᵀA⁻¹g; infinity where it is not known to be small.
        certain: whether rounding cannot hide a direction along which the loss falls.
        step: -A⁻¹g (p,), without directions that are flat to rounding; None where it was not found.
        flat: projects points on directions that are flat to rounding (p,p); None where there are none, or many
            parameters.
        hidden: the square of the scaled gradient along directions whose curvature is made of rounding. If it is not
            rounding itself, the loss may fall by any amount.
    """

    value: float
    certain: bool = False
    step: Tensor | None = None
    flat: Tensor | None = None
    hidden: float = 0.0


def newton_decrement(
    product: Callable[[Tensor], Tensor],
    gradient: Tensor,
    precondition: Callable[[Tensor], Tensor] | None,
    enough: float,
    *,
    stored: torch.dtype | None = None,
    most_products: int = _MOST_ITERATIONS,
) -> Decrement:
    """½gᵀA⁻¹g, or infinity where it is not known to be at most ``enough``.

    For few parameters A (p,p) is formed, scaled to a unit diagonal and decomposed. For many, conjugate gradients x give
    ½gᵀx, a lower bound, and what is missing is at most ½rᵀM⁻¹r / μ, with M the preconditioner and μ the least
    eigenvalue of M⁻¹A, for which the least Ritz value stands. A gradient that is small for its scale alone (a parameter
    of the size 1e-6 beside one of the size 1e3) has a large residual in M's norm, if M has the scale of A. Where
    ``precondition`` is None, M is a diagonal that random products tell.

    Where the matrix is nearly singular, an eigenvalue and the gradient along it may both be made of rounding, though
    much of the loss hangs on their quotient: that is not certain. Beyond few parameters nothing in float32 is.

    Args:
        product: v ↦ Av, undamped.
        gradient: g (p,).
        precondition: M⁻¹ of the scale of A.
        enough: what the caller would take for converged.
        stored: the dtype of the parameters, if not the gradient's: negative curvature that it could not tell is none.
        most_products: for many parameters, after so many the answer is not known.
    """
    if not bool(gradient.any()):
        return Decrement(0.0, certain=True)
    try:
        if len(gradient) <= MOST_DENSE:
            found = _dense(product, gradient, enough, stored or gradient.dtype)
        else:
            found = _by_conjugate_gradients(product, gradient, precondition, enough, most_products)
    except NotImplementedError:
        return Decrement(math.inf)
    return found if found.value <= enough else found._replace(value=math.inf)


def without_influence(product: Callable[[Tensor], Tensor], gradient: Tensor, greatest: Tensor, point: Tensor) -> Tensor:
    """Which parameters (p,) have neither a slope nor curvature, as on a plateau.

    Both are measured by the greatest slope that the parameter has had: exponentials fall to 1e-20 before they are zero.

    Args:
        product: v ↦ Av, undamped.
        gradient: g (p,).
        greatest: |g| (p,), the greatest so far.
        point: the parameters (p,), which tell of how much a parameter may change.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(len(gradient), generator=generator, dtype=torch.float64).to(gradient)
    least = torch.finfo(torch.float64).eps * greatest
    return (gradient.abs() <= least) & (product(probe * point.abs().clamp_min(1.0)).abs() <= least)


def _dense(product: Callable[[Tensor], Tensor], gradient: Tensor, enough: float, stored: torch.dtype) -> Decrement:
    p = len(gradient)
    A = torch.stack([product(column) for column in torch.eye(p, dtype=gradient.dtype, device=gradient.device)]).double()
    if not bool(A.isfinite().all()):
        return Decrement(math.inf)
    A = (A + A.mT) / 2
    diagonal = A.diagonal()
    rounding, coarse = p * torch.finfo(gradient.dtype).eps, p * torch.finfo(stored).eps
    # A parameter without curvature has a gradient only if the loss falls without end.
    if bool((diagonal < 0).any()) or bool(gradient[diagonal == 0].any()):
        return Decrement(math.inf)
    inverse_root = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    values, vectors = eigh(A * inverse_root[:, None] * inverse_root)
    if values[0] < -coarse * values[-1]:
        return Decrement(math.inf)
    along = vectors.mT @ (gradient.double() * inverse_root)
    # Eigenvalues under this are made of rounding. Where the gradient along them is more than that, the loss may fall
    # by any amount. (Rounding leaves some ε of the root of the loss, of which ``enough`` is some ε.)
    least = rounding * values[-1]
    hidden = along[values <= least].square().sum().item()
    if hidden > _NOISE * torch.finfo(stored).eps * enough:
        return Decrement(math.inf)
    value = float(0.5 * (along.square() / values.clamp_min(least)).sum())
    # Parameters without curvature have eigenvalues of zero, which nothing hides behind.
    bent = int((diagonal > 0).sum())
    certain = bool(values[p - bent] > _RESOLVED * least)
    step = -inverse_root * (vectors @ torch.where(values > least, along / values, 0.0))
    null = vectors[:, values <= _FLAT * least]
    flat = (inverse_root[:, None] * null) @ (null / inverse_root[:, None]).mT if null.numel() else None
    return Decrement(value, certain, step, flat, hidden)


def _by_conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    gradient: Tensor,
    precondition: Callable[[Tensor], Tensor] | None,
    enough: float,
    most_products: int,
) -> Decrement:
    # In float64, what conjugate gradients do not see in a gradient is not there.
    exact = gradient.dtype == torch.float64
    inverse = precondition or _equilibration(product, gradient)
    b, start = -gradient, None
    tolerance, iterations = _FIRST_TOLERANCE, 0
    least = math.inf
    while iterations < most_products:
        solve = conjugate_gradient(
            product,
            b,
            start=start,
            precondition=inverse,
            tolerance=tolerance,
            max_iterations=most_products - iterations,
            least_progress=0.0,
        )
        iterations += solve.iterations + 1
        least = min(least, solve.smallest_ritz_value())
        if solve.negative_curvature.any() or not bool(solve.x.isfinite().all()):
            return Decrement(math.inf)
        known = 0.5 * torch.dot(b + solve.residual, solve.x).item()
        missing = 0.5 * torch.dot(solve.residual, inverse(solve.residual)).item() / least
        if known + missing <= enough:
            return Decrement(known + missing, exact, solve.x)
        if known > enough or not solve.converged[0]:
            return Decrement(math.inf, False, solve.x)
        start, tolerance = solve.x, tolerance * _TIGHTER
    return Decrement(math.inf, False, start)


def _equilibration(product: Callable[[Tensor], Tensor], like: Tensor) -> Callable[[Tensor], Tensor]:
    """M⁻¹ = S² with the rows of SAS of about one length, estimated (Bradley and Murray 2011; Ruiz 2001)."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones_like(like)
    for _ in range(_ROUNDS):
        squares = torch.zeros_like(like)
        for _ in range(_SIGNS):
            signs = torch.randint(2, (len(like),), generator=generator).to(like) * 2 - 1
            squares += (scale * product(scale * signs)).square()
        lengths = (squares / _SIGNS).sqrt()
        scale = scale * torch.where(lengths > 0, lengths, 1.0).rsqrt()
    return lambda v: scale.square() * v
