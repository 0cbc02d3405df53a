"""Levenberg-Marquardt: the Gauss-Newton matrix itself, factored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import onestep.linalg as linalg
from onestep.evaluation.parameters import ParameterVector
from onestep.optim._objective import Objective
from onestep.optim._optimizer import DampedOptimizer, Proposal, QuadraticModel

# Without damping the factor may not exist: this much, relative to a unit diagonal, stands in for none.
_UNDAMPED = 1e-12


class LevenbergMarquardt(DampedOptimizer):
    """θ ← θ - (A + damping·D)⁻¹∇loss with A = JᵀHJ the Gauss-Newton matrix and D = diag A, in float64 by Cholesky.

    For least squares, A = 2/m JᵀJ (Levenberg 1944; Marquardt 1963); for other convex losses H is the loss's Hessian in
    the outputs. D never falls (Moré, Lecture Notes in Mathematics 630, 1978), which makes the method indifferent to the
    units of the parameters. Memory p², time m p² + p³ a step: for thousands of parameters.

    The closure returns the residuals, whose mean square is minimised, or (outputs, loss_of_outputs).

    Args:
        params: parameters or param groups, as for any torch optimiser.
        damping: initial damping, relative to D. It is then set by the gain ratio.
        weight_decay: adds ½ weight_decay ‖θ‖² to the loss.
        momentum: the part of the last step that is added to each (heavy ball, Polyak 1964). It carries a fit on where
            curvature comes from a sample of the rows or the model has kinks; 0 is the classical method.

    Examples:
        >>> import torch
        >>> from onestep.optim import LevenbergMarquardt
        >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = LevenbergMarquardt([x])
        >>> for _ in range(30):
        ...     loss = optimizer.step(lambda: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]))
        >>> x.detach().round(decimals=6)
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(
        self, params: Iterable[Any], *, damping: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.0
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}; expected a number from 0, less than 1")
        super().__init__(params, {"damping": damping, "weight_decay": weight_decay})
        self.momentum = momentum

    def quadratic_model(
        self, objective: Objective, parameters: ParameterVector, gradient: Tensor, decay: Tensor | None
    ) -> QuadraticModel:
        """A, assembled in chunks of rows by the Gram kernel."""
        A = objective.gauss_newton_matrix(parameters)
        if decay is not None:
            A = A + torch.diag(decay.double())
        scale = self._scale(parameters, A.diagonal())
        last = self.read_state("direction", parameters) if self.momentum else None
        carried = None if last is None else last * self.momentum
        return _FactoredModel(A, gradient.double(), scale, parameters.dtype, carried)

    def accepted(self, parameters: ParameterVector, step: Tensor, gradient: Tensor) -> None:
        """Remembers the step for the momentum."""
        if self.momentum:
            self.write_state("direction", parameters, step)

    def _scale(self, parameters: ParameterVector, diagonal: Tensor) -> Tensor:
        """D: the greatest diagonal of A so far. Its root is kept, which cannot overflow the parameters' type."""
        before = self.read_state("scale", parameters)
        if before is not None:
            diagonal = torch.maximum(diagonal, before.double().square())
        self.write_state("scale", parameters, diagonal.sqrt())
        return diagonal

    def never_used(self, parameters: ParameterVector) -> Tensor:
        """Which parameters (p,) the outputs have not depended on at any step."""
        scale = self.read_state("scale", parameters)
        return torch.zeros(len(parameters), dtype=torch.bool) if scale is None else scale == 0


class _FactoredModel(QuadraticModel):
    def __init__(self, A: Tensor, gradient: Tensor, scale: Tensor, dtype: torch.dtype, carried: Tensor | None) -> None:
        diagonal = A.diagonal()
        self.without_influence = int((diagonal <= torch.finfo(A.dtype).eps * scale).sum())
        self.system = _Scaled(A, gradient, scale)
        self.present = A, gradient, diagonal
        self.dtype, self.carried = dtype, carried

    def decrement(self) -> float:
        """½gᵀA⁻¹g, in the scale that A has now."""
        system = _Scaled(*self.present)
        step = system.solve(_UNDAMPED)
        return math.inf if step is None else -0.5 * torch.dot(system.gradient, step).item()

    def resolution(self, point: Tensor) -> float:
        """With each parameter off by ε of itself, and outputs no more than linear in it."""
        _, gradient, diagonal = self.present
        off = torch.finfo(self.dtype).eps * point.double().abs()
        return (torch.dot(gradient.abs(), off) + 0.5 * torch.dot(diagonal.sqrt(), off).square()).item()

    def propose(self, damping: float) -> Proposal | None:
        step = self.system.solve(damping)
        if step is None:
            return None
        # The model of the step as it will be added, in the parameters' own precision.
        rounded = (step * self.system.inverse_root).to(self.dtype)
        if self.carried is not None:
            rounded = rounded + self.carried
        # If this trial fails, the next one should not run on with the same momentum.
        self.carried = None
        step = rounded.double() / self.system.inverse_root
        predicted = -torch.dot(self.system.gradient + 0.5 * (self.system.matrix @ step), step).item()
        return Proposal(rounded, predicted)


class _Scaled:
    """A and the gradient in coordinates in which D is the identity."""

    def __init__(self, A: Tensor, gradient: Tensor, scale: Tensor) -> None:
        # A parameter that nothing depends on has no gradient either: any scale will do.
        self.inverse_root = torch.where(scale > 0, scale, 1.0).rsqrt()
        self.matrix = A * self.inverse_root[:, None] * self.inverse_root
        self.gradient = gradient * self.inverse_root

    def solve(self, damping: float) -> Tensor | None:
        damped = self.matrix.clone()
        damped.diagonal().add_(damping)
        solution, info, *_ = linalg.solve_spd_ex(damped, self.gradient[:, None])
        return None if info.item() != 0 else -solution[:, 0]
