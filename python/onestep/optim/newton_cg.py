"""Newton's method by conjugate gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onestep.optim._matrix_free import MatrixFreeOptimizer


class NewtonCG(MatrixFreeOptimizer):
    """θ ← θ - (∇²loss + damping·I)⁻¹∇loss, matrix-free, with truncated CG (Steihaug, SIAM J. Numer. Anal. 20, 1983).

    At home on convex losses, where it converges quadratically; elsewhere negative curvature ends a solve early.

    The closure returns the loss, a scalar.

    Args:
        params: parameters or param groups, as for any torch optimiser; of one floating dtype and device.
        damping: initial damping; then set by the gain ratio.
        weight_decay: adds ½ weight_decay ‖θ‖² to the loss.
        cg_iterations: at most so many iterations a solve, of a product each.
        cg_tolerance: relative residual at which a solve ends.

    Raises:
        ValueError: a setting is out of its range.
        TypeError, NonFiniteError: (``step``) the closure returns something else, or NaN or infinity; nothing has
            changed then.

    Examples:
        >>> import torch
        >>> from onestep.optim import NewtonCG
        >>> x = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = NewtonCG([x])
        >>> for _ in range(10):
        ...     loss = optimizer.step(lambda: (x[0] - 1).cosh() + (x[1] - 2).cosh())
        >>> x.detach().round(decimals=4)
        tensor([1., 2.], dtype=torch.float64)
    """

    takes_scalar = True
    hessian = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        damping: float = 1e-4,
        weight_decay: float = 0.0,
        cg_iterations: int = 100,
        cg_tolerance: float = 1e-2,
    ) -> None:
        super().__init__(
            params,
            damping=damping,
            weight_decay=weight_decay,
            cg_iterations=cg_iterations,
            cg_tolerance=cg_tolerance,
        )
