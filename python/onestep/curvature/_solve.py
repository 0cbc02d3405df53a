"""(A + damping·I) x = b for an operator A: densely, by conjugate gradients, or by MINRES."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from onestep.curvature.conjugate_gradient import conjugate_gradient, power_of_two

# With at most this many parameters the matrix is formed, in one pass over the data, and decomposed.
MOST_DENSE = 128
# With at most this many it is formed where iterations cost as much, or do not converge: decomposing 2,000 takes 5 s.
MOST_FORMED = 2000
# Columns of the identity that a larger matrix is formed by at a time, and what the product of such a block costs for a
# column, in products of one vector (0.1 to 0.45 measured, on perceptrons of 121 to 1,003 parameters).
_FORMED_BLOCK = 32
_BLOCK_COST = 1 / 3
# A caller who allows few iterations wants a rough answer: no more columns than this many for each.
_COLUMNS_PER_ITERATION = 8
# Random vectors behind the diagonal preconditioner, and its least element relative to the mean.
_DIAGONAL_SAMPLES = 16
_LEAST_DIAGONAL = 1e-3

Product: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SolveReport:
    """How ``solve`` ended. For a block, what holds of all its columns, and below of each.

    Attributes:
        iterations: of conjugate gradients and MINRES, each one pass over the data; 0 where there was none before the
            matrix was decomposed.
        relative_residual: ‖b - (A + damping·I) x‖ / ‖b‖, the largest of all columns, with the residual computed anew
            from x.
        converged: whether that is at most the tolerance.
        negative_curvature: whether a direction was met along which A + damping·I is not positive.
        method: "dense", "conjugate_gradients" or "minres".
        relative_residuals: of each right-hand side.
        negative_curvatures: met by each right-hand side; a dense solve knows all of the matrix.

    Examples:
        >>> import torch
        >>> from onestep.curvature import GaussNewtonOperator
        >>> G = GaussNewtonOperator(torch.nn.Linear(1, 1), (torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)), "mse")
        >>> x, report = G.solve(torch.ones(2), damping=1.0)
        >>> report.method, report.converged, report.negative_curvature
        ('dense', True, False)
    """

    iterations: int
    relative_residual: float
    converged: bool
    negative_curvature: bool
    method: str
    relative_residuals: tuple[float, ...]
    negative_curvatures: tuple[bool, ...]


def solve(
    product: Product,
    b: Tensor,
    damping: float,
    *,
    tolerance: float,
    max_iterations: int,
    precondition: Product | None,
    indefinite: Literal["raise", "minres"],
) -> tuple[Tensor, SolveReport]:
    """x and its report, for b (p,) or (p,k); ``product`` is of A alone."""
    columns = b.shape[1] if b.dim() == 2 else 1
    scale = power_of_two(b)
    B = b / scale
    iterations, method = 0, "dense"
    dense = precondition is None and len(b) <= min(MOST_DENSE, max_iterations)
    if not dense:

        def damped(v: Tensor) -> Tensor:
            return product(v).add_(v, alpha=damping)

        formable = len(b) <= min(MOST_FORMED, _COLUMNS_PER_ITERATION * max_iterations * columns)
        most = max_iterations
        if formable and precondition is None:
            # As much as forming the matrix costs: what is spent is at most twice the cheaper of the two.
            most = min(most, math.ceil(_BLOCK_COST * len(b) / max(1.0, _BLOCK_COST * columns)))
        x, iterations, negative = _conjugate_gradients(damped, B, tolerance, most, precondition)
        method = "conjugate_gradients"
        if any(negative):
            _raise_if(indefinite == "raise", negative, damping)
            method = "minres"
            # MINRES takes one right-hand side after the other, and for these matrices most of what it may.
            dense = formable and _BLOCK_COST * len(b) <= max_iterations * sum(negative)
            vectors = [B] if B.dim() == 1 else [*B.mT]
            for index in (index for index in range(columns) if negative[index] and not dense):
                found, more = minres(damped, vectors[index], tolerance, max_iterations)
                iterations += more
                if B.dim() == 1:
                    x = found
                else:
                    x[:, index] = found
        if not dense:
            residual = B - damped(x)
            dense = formable and not bool((residual.norm(dim=0) <= tolerance * B.norm(dim=0)).all())
    if dense:
        x, residual, negative = _dense(product, B, damping, indefinite, tolerance)
        method = "dense"
    # b was scaled so that nothing overflows on the way. When x is scaled back it may, or lose digits near zero.
    lost = (x * scale / scale - x).norm(dim=0)
    fits = (lost <= tolerance * x.norm(dim=0)).reshape(-1).tolist()
    norms = B.norm(dim=0).reshape(-1).double()
    relative = (residual.norm(dim=0).reshape(-1).double() / norms.clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    relative = [value if fit else math.inf for value, fit in zip(relative, fits, strict=True)]
    met = [value <= tolerance for value in relative]
    report = SolveReport(
        iterations, max(relative, default=0.0), all(met), any(negative), method, tuple(relative), tuple(negative)
    )
    if not all(met):
        remedy = "a larger damping, tolerance or max_iterations, or a preconditioner"
        if not all(fits):
            remedy = f"a smaller b or float64: the solution is beyond the range of {b.dtype}"
        elif method == "dense":
            remedy = (
                f"a larger damping, or parameters of more digits than {B.dtype}: the matrix is singular, or near it"
            )
        warnings.warn(
            f"solve: {met.count(False)} of {columns} right-hand sides ended above tolerance={tolerance:g}, at a "
            f"relative residual of up to {report.relative_residual:.2g} after {iterations} iterations: expected "
            f"{remedy}",
            stacklevel=4,
        )
    return x * scale, report


def _raise_if(wanted: bool, negative: list[bool], damping: float, detail: str = "") -> None:
    if wanted:
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"A + damping·I with damping={damping:g} is not positive definite{detail}: negative curvature for "
            f"{sum(negative)} of {len(negative)} right-hand sides. Expected more damping, GaussNewtonOperator, or "
            "indefinite='minres' for the solution of the indefinite system"
        )


def _dense(
    product: Product, B: Tensor, damping: float, indefinite: str, tolerance: float
) -> tuple[Tensor, Tensor, list[bool]]:
    """x, its residual and whether the matrix has negative eigenvalues, from its eigenvectors in float64."""
    p = len(B)
    identity = torch.eye(p, dtype=B.dtype, device=B.device)
    blocks = identity.split(p if p <= MOST_DENSE else _FORMED_BLOCK, dim=1)
    A = torch.cat([product(block) for block in blocks], dim=1).double()
    A = (A + A.mT) / 2
    A.diagonal().add_(damping)
    values, vectors = torch.linalg.eigh(A)
    rounding = p * torch.finfo(B.dtype).eps * values.abs().max()
    negative = [bool(values[0] < -rounding)] * (B.shape[1] if B.dim() == 2 else 1)
    least = f" (its least eigenvalue is {values[0]:.3g})"
    _raise_if(any(negative) and indefinite == "raise", negative, damping, least)

    def solved(least: Tensor) -> tuple[Tensor, Tensor]:
        inverse = torch.where(values.abs() > least, 1 / values, 0.0)
        x = (vectors @ (inverse[:, None] * (vectors.mT @ B.double().reshape(p, -1)))).reshape(B.shape).to(B.dtype)
        return x, B.double() - A @ x.double()

    # A singular matrix gives the shortest solution, and its residual tells if there is none. Eigenvalues that may be
    # rounding count where a solution needs them.
    x, residual = solved(rounding)
    whole, rest = solved(torch.finfo(torch.float64).eps * p * values.abs().max())
    norm, goal = residual.norm(dim=0), tolerance * B.norm(dim=0)
    needed = (norm > goal) & (rest.norm(dim=0) < norm / 10)
    return torch.where(needed, whole, x), torch.where(needed, rest, residual), negative


def _conjugate_gradients(
    damped: Product, B: Tensor, tolerance: float, max_iterations: int, precondition: Product | None
) -> tuple[Tensor, int, list[bool]]:
    """The recursion's residual drifts from the true one: where that is not small enough yet, it starts again there."""
    goal = tolerance * B.norm(dim=0)
    x, norm, iterations = None, B.norm(dim=0), 0
    while True:
        result = conjugate_gradient(
            damped,
            B,
            start=x,
            precondition=precondition,
            tolerance=tolerance,
            max_iterations=max_iterations - iterations,
            least_progress=0.0,
        )
        iterations += result.iterations
        x, before = result.x, norm
        if result.negative_curvature.any():
            break
        norm = (B - damped(x)).norm(dim=0)
        far = norm > goal
        halved = bool((norm[far] <= before[far] / 2).all())
        if not bool(far.any()) or iterations >= max_iterations or not halved:
            break
    return x, iterations, result.negative_curvature.tolist()


def minres(product: Product, b: Tensor, tolerance: float, max_iterations: int) -> tuple[Tensor, int]:
    """x of least ‖b - Ax‖ in the Krylov space, A symmetric, and the iterations (Paige and Saunders 1975)."""
    x, w, before_w = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b)
    previous, y = torch.zeros_like(b), b.clone()
    size = beta = b.norm().item()
    left, last_beta = size, 0.0
    cos, sin, above, corner = -1.0, 0.0, 0.0, 0.0
    iteration = 0
    while iteration < max_iterations and left > tolerance * size and beta > 0:
        # Lanczos: v is the next basis vector, alpha and beta the tridiagonal matrix.
        v = y / beta
        image = product(v)
        iteration += 1
        if last_beta:
            image = image - (beta / last_beta) * previous
        alpha = torch.dot(v, image).item()
        image = image - (alpha / beta) * y
        previous, y = y, image
        last_beta, beta = beta, image.norm().item()
        # A Givens rotation makes it upper triangular.
        two_above, one_above = corner, cos * above + sin * alpha
        bar = sin * above - cos * alpha
        corner, above = sin * beta, -cos * beta
        diagonal = math.hypot(bar, beta)
        if diagonal == 0:
            break
        cos, sin = bar / diagonal, beta / diagonal
        w, before_w = (v - two_above * before_w - one_above * w) / diagonal, w
        x = x + (cos * left) * w
        left *= abs(sin)
    return x, iteration


def as_preconditioner(given: Any, damping: float, diagonal_of: Callable[[int], Tensor]) -> Product | None:
    """What ``solve`` was given as preconditioner, as a function that is checked.

    Args:
        diagonal_of: number of samples → an estimate of the matrix's diagonal.
    """
    if isinstance(given, str) and given == "diagonal":
        diagonal = diagonal_of(_DIAGONAL_SAMPLES).abs()
        floor = _LEAST_DIAGONAL * diagonal.mean().item()
        inverse = 1 / (diagonal.clamp_min(floor) + damping)
        return lambda v: (inverse if v.dim() == 1 else inverse[:, None]).to(v.dtype) * v
    if not (given is None or callable(given)):
        raise TypeError(f"preconditioner is {given!r}; expected None, 'diagonal' or a function")
    if given is None:
        return None

    def checked(r: Tensor) -> Tensor:
        z = given(r)
        if not isinstance(z, Tensor) or z.shape != r.shape:
            what = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"preconditioner returned {what} for {tuple(r.shape)}; expected the same shape")
        power = torch.linalg.vecdot(r, z, dim=0)
        if not bool((power > 0).logical_or(r.norm(dim=0) == 0).all()):
            raise ValueError(f"preconditioner M⁻¹ has rᵀM⁻¹r = {power.min().item():g}; expected positive definite")
        return z

    return checked
