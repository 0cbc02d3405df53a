"""Preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Stop when the quadratic's last K iterations, K = max(10, a tenth of all), brought less than K times this, relatively
# (Martens, Deep learning via Hessian-free optimization, ICML 2010).
_LEAST_PROGRESS = 5e-4


@dataclass(frozen=True)
class Solve:
    """x ≈ A⁻¹b, its residual b - Ax, and how it was reached."""

    x: Tensor
    residual: Tensor
    iterations: int
    negative_curvature: bool


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    start: Tensor | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tolerance: float,
    max_iterations: int,
) -> Solve:
    """Minimises ½xᵀAx - bᵀx (Hestenes and Stiefel 1952), A (p,p) symmetric, given as v ↦ Av.

    Stops at ‖b - Ax‖ ≤ tolerance·‖b‖, when the quadratic hardly falls any more, or at a direction of negative curvature
    (Steihaug 1983), with what was found before it, or that direction itself if it is the first.
    """
    x = torch.zeros_like(b) if start is None else start.clone()
    residual = b.clone() if start is None else b - product(x)
    goal = tolerance * b.norm().item()
    z = residual if precondition is None else precondition(residual)
    direction = z.clone()
    power = torch.dot(residual, z).item()
    values = [_value(x, b, residual)]
    for iteration in range(max_iterations):
        if residual.norm().item() <= goal or power <= 0:
            return Solve(x, residual, iteration, False)
        image = product(direction)
        curvature = torch.dot(direction, image).item()
        if not curvature > 0:
            if iteration == 0 and start is None:
                x = direction.clone()
                residual = b - image
            return Solve(x, residual, iteration + 1, True)
        length = power / curvature
        x.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        z = residual if precondition is None else precondition(residual)
        previous, power = power, torch.dot(residual, z).item()
        direction.mul_(power / previous).add_(z)
        values.append(_value(x, b, residual))
        window = max(10, iteration // 10)
        progress = values[max(0, iteration + 1 - window)] - values[-1]
        if iteration >= window and 0 <= progress < -values[-1] * window * _LEAST_PROGRESS:
            return Solve(x, residual, iteration + 1, False)
    return Solve(x, residual, max_iterations, False)


def _value(x: Tensor, b: Tensor, residual: Tensor) -> float:
    """½xᵀAx - bᵀx, with Ax = b - residual."""
    return -0.5 * (torch.dot(x, b) + torch.dot(x, residual)).item()
