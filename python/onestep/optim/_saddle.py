"""A way down from a point whose gradient is zero, where there is one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onestep.curvature.conjugate_gradient import conjugate_gradient

# Conjugate gradients meet a direction of negative curvature before their residual is as small as this,
_TOLERANCE = 1e-6
# or they give up after this many products,
MOST_ITERATIONS = 100
# or this many where a test of convergence asks for the direction.
FEW_ITERATIONS = 30


def concave_direction(
    product: Callable[[Tensor], Tensor], like: Tensor, most_iterations: int, idle: Tensor | None = None
) -> Tensor | None:
    """A direction d (p,) of elements of size 1 with dᵀAd ≤ 0, of a symmetric A, given as v ↦ Av; None if none is found.

    Conjugate gradients for Ax = b with a random b meet one, if there is one and they have iterations enough: with
    probability 1 b has a part along every eigenvector (Steihaug, SIAM J. Numer. Anal. 20, 1983).

    Args:
        like: of the vectors' length, dtype and device.
        most_iterations: a product each.
        idle: which elements (p,) of the direction are zero, whose rows and columns of A are zero or diagonal.
    """
    b = torch.randn(len(like), generator=torch.Generator().manual_seed(0)).to(like)
    b = b if idle is None else b.masked_fill(idle, 0.0)
    solve = conjugate_gradient(
        product, b, tolerance=_TOLERANCE, max_iterations=min(len(like), most_iterations), least_progress=0.0
    )
    if solve.direction is None:
        return None
    return solve.direction / solve.direction.square().mean().sqrt()
