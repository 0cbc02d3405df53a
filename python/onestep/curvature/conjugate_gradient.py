"""Preconditioned conjugate gradients, for one right-hand side or for several that share their products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Stop when the quadratic's last K iterations, K = max(10, a tenth of all), brought less than K times this, relatively
# (Martens, Deep learning via Hessian-free optimization, ICML 2010).
_LEAST_PROGRESS = 5e-4

# One number for each right-hand side of a block (k,), or a float for a vector; and truth values likewise.
Numbers: TypeAlias = Any
Flags: TypeAlias = Any


@dataclass(frozen=True)
class Solve:
    """x ≈ A⁻¹b, its residual b - Ax as the recursion has it, and how it was reached.

    Attributes:
        iterations: products taken, besides that with ``start``.
        converged: (k,), for each right-hand side, whether its residual came to the goal.
        negative_curvature: (k,), whether a direction d with dᵀAd ≤ 0 was met.
        direction: those directions, each descending from x, and zeros for the other right-hand sides; None if there are
            none.
        image: A direction.
        lengths, ratios: for a single right-hand side, the coefficients of its iterations: x += length·d,
            d = z + ratio·d. They make the Lanczos matrix of M⁻¹A.
    """

    x: Tensor
    residual: Tensor
    iterations: int
    converged: NDArray[np.bool_]
    negative_curvature: NDArray[np.bool_]
    direction: Tensor | None = None
    image: Tensor | None = None
    lengths: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def smallest_ritz_value(self) -> float:
        """The least eigenvalue of the Lanczos matrix: an upper bound of that of M⁻¹A, close after many iterations."""
        if not self.lengths:
            return np.inf
        lengths, ratios = np.array(self.lengths), np.array(self.ratios[: len(self.lengths) - 1])
        diagonal = 1 / lengths
        diagonal[1:] += ratios / lengths[:-1]
        beside = np.sqrt(ratios) / lengths[:-1]
        return float(np.linalg.eigvalsh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))[0])


def power_of_two(b: Tensor) -> Tensor:
    """For each column, or for the vector, a power of two near its greatest element, 1 for zeros.

    Dividing by it changes no digit, and keeps squares from underflow and overflow.
    """
    exponent = torch.frexp(b.abs().amax(0)).exponent if len(b) else b.new_zeros(b.shape[1:], dtype=torch.int32)
    # The power above the greatest number of the dtype is infinite: the one below stands in for it.
    most = math.frexp(torch.finfo(b.dtype).max)[1] - 1
    return torch.ldexp(torch.ones_like(exponent, dtype=b.dtype), exponent.clamp_max(most))


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    start: Tensor | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tolerance: float,
    max_iterations: int,
    least_progress: float = _LEAST_PROGRESS,
) -> Solve:
    """Minimises ½xᵀAx - bᵀx (Hestenes and Stiefel 1952), A (p,p) symmetric, given as v ↦ Av.

    b is (p,) or (p,k). The k columns are solved side by side, each on its own course, and those that have ended take no
    part in further products: ``product`` and ``precondition`` get (p,), or (p,j) with j ≤ k. They are linear, and b is
    scaled to a size near 1.

    A column stops at ‖b - Ax‖ ≤ tolerance·‖b‖, when the quadratic hardly falls any more, or at a direction of negative
    curvature (Steihaug 1983), with the x that was found before it.
    """
    inverse = precondition or (lambda R: R)
    many = b.dim() == 2
    scale = power_of_two(b)
    B = b / scale
    X = torch.zeros_like(B) if start is None else start / scale
    R = B.clone() if start is None else B - product(X)
    goal = tolerance * _norms(B)
    Z = inverse(R)
    D = Z.clone()
    power = _dots(R, Z)
    values = [_values(X, B, R)]
    live = np.arange(b.shape[1] if many else 1)
    solution, residual = torch.empty_like(B), torch.empty_like(B)
    converged, negative = np.zeros(len(live), bool), np.zeros(len(live), bool)
    direction = image_of_direction = None
    lengths: list[float] = []
    ratios: list[float] = []
    iteration = 0

    def put(target: Tensor, source: Tensor, which: Flags) -> None:
        """Source's columns that ``which`` names, in their places in target."""
        if many:
            target[:, live[which]] = source[:, which]
        else:
            target.copy_(source)

    def leave(stays: Flags) -> None:
        """Ends the other columns."""
        nonlocal B, X, R, D, goal, power, values, live
        leaving = np.logical_not(stays)
        put(solution, X, leaving)
        put(residual, R, leaving)
        met = _norms(R) <= goal
        if many:
            converged[live[leaving]] = met[leaving]
            B, X, R, D = B[:, stays], X[:, stays], R[:, stays], D[:, stays]
            goal, power, live = goal[stays], power[stays], live[stays]
            values = [value[stays] for value in values]
        else:
            converged[0], live = met, live[:0]

    while len(live):
        # NaN compares false, and ends a column.
        stays = (_norms(R) > goal) & (power > 0)
        if not _all(stays):
            leave(stays)
        if iteration == max_iterations or not len(live):
            break
        image = product(D)
        iteration += 1
        curvature = _dots(D, image)
        stays = curvature > 0
        if not _all(stays):
            leaving = np.logical_not(stays)
            negative[live[leaving] if many else 0] = True
            if direction is None or image_of_direction is None:
                direction, image_of_direction = torch.zeros_like(solution), torch.zeros_like(solution)
            put(direction, D, leaving)
            put(image_of_direction, image, leaving)
            leave(stays)
            if not len(live):
                break
            image, curvature = image[:, stays], curvature[stays]
        length = power / curvature
        _add(X, D, length)
        _add(R, image, -length)
        Z = inverse(R)
        previous, power = power, _dots(R, Z)
        ratio = power / previous
        D = _times(D, ratio).add_(Z)
        if not many:
            lengths.append(length)
            ratios.append(ratio)
        if least_progress:
            values.append(_values(X, B, R))
            window = max(10, (iteration - 1) // 10)
            if iteration > window:
                progress = values[-1 - window] - values[-1]
                stays = np.logical_not((progress >= 0) & (progress < -values[-1] * window * least_progress))
                if not _all(stays):
                    leave(stays)
    if len(live):
        leave(np.zeros(len(live), bool))
    return Solve(
        solution.mul_(scale),
        residual.mul_(scale),
        iteration,
        converged,
        negative,
        None if direction is None else direction.mul_(scale),
        None if image_of_direction is None else image_of_direction.mul_(scale),
        lengths,
        ratios,
    )


# Numbers are kept on the host: an iteration on one vector asks the device for three of them, and does the rest with
# Python's, which cost a tenth of an array's operations.


def _dots(a: Tensor, b: Tensor) -> Numbers:
    if a.dim() == 1:
        return torch.dot(a, b).item()
    return torch.linalg.vecdot(a, b, dim=0).double().cpu().numpy()


def _norms(a: Tensor) -> Numbers:
    return a.norm().item() if a.dim() == 1 else a.norm(dim=0).double().cpu().numpy()


def _all(flags: Flags) -> bool:
    return bool(flags if isinstance(flags, bool) else flags.all())


def _values(X: Tensor, B: Tensor, R: Tensor) -> Numbers:
    """½xᵀAx - bᵀx of each column, with Ax = b - residual."""
    return -0.5 * (_dots(X, B) + _dots(X, R))


def _times(x: Tensor, numbers: Numbers) -> Tensor:
    """x·number, in place."""
    return x.mul_(numbers if x.dim() == 1 else torch.from_numpy(numbers).to(x))


def _add(x: Tensor, d: Tensor, lengths: Numbers) -> None:
    """x += d·length."""
    if x.dim() == 1:
        x.add_(d, alpha=lengths)
    else:
        x.addcmul_(d, torch.from_numpy(lengths).to(x))
