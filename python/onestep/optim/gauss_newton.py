"""Gauss-Newton by conjugate gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onestep.optim._matrix_free import MatrixFreeOptimizer


class GaussNewton(MatrixFreeOptimizer):
    """θ ← θ - (JᵀHJ + damping·I)⁻¹∇loss, matrix-free (Schraudolph 2002; Martens, ICML 2010).

    For any number of parameters: a step holds a few vectors of their size and one gradient's activations.

    The closure returns the residuals, whose mean square is minimised, or (outputs, loss_of_outputs) with a loss that is
    convex in the outputs.

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
        >>> from onestep.optim import GaussNewton
        >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = GaussNewton([x])
        >>> for _ in range(20):
        ...     loss = optimizer.step(lambda: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]))
        >>> x.detach().round(decimals=4)
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        damping: float = 1e-2,
        weight_decay: float = 0.0,
        cg_iterations: int = 50,
        cg_tolerance: float = 1e-2,
    ) -> None:
        super().__init__(
            params,
            damping=damping,
            weight_decay=weight_decay,
            cg_iterations=cg_iterations,
            cg_tolerance=cg_tolerance,
        )
