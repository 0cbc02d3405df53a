"""Steps by conjugate gradients: what Gauss-Newton and Newton share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from onestep.curvature._conjugate_gradient import conjugate_gradient
from onestep.evaluation.parameters import ParameterVector
from onestep.optim._objective import Objective, Preconditioner
from onestep.optim._optimizer import DampedOptimizer, Proposal, QuadraticModel

# How much of the last direction the next solve starts from, and how long squared gradients are remembered
# (Martens and Sutskever, Training deep and recurrent networks with Hessian-free optimization, 2012).
_WARM_START = 0.95
_MEMORY = 0.9


class MatrixFreeOptimizer(DampedOptimizer):
    """Solves (B + damping·I) s = -∇loss by preconditioned CG, warm-started from the last solution.

    The preconditioner is the objective's own, or (average of squared gradients)^½, scaled to mean 1, plus damping.
    """

    hessian = False

    def __init__(
        self, params: Iterable[Any], *, damping: float, weight_decay: float, cg_iterations: int, cg_tolerance: float
    ) -> None:
        if cg_iterations < 1:
            raise ValueError(f"cg_iterations={cg_iterations}; expected at least 1")
        if not 0 <= cg_tolerance < 1:
            raise ValueError(f"cg_tolerance={cg_tolerance}; expected a number from 0, less than 1")
        super().__init__(params, {"damping": damping, "weight_decay": weight_decay})
        self.cg_iterations, self.cg_tolerance = cg_iterations, cg_tolerance

    def quadratic_model(
        self, objective: Objective, parameters: ParameterVector, gradient: Tensor, decay: Tensor | None
    ) -> QuadraticModel:
        """Products only: nothing larger than a few vectors is held."""
        return _ProductModel(
            objective.curvature(parameters, hessian=self.hessian),
            gradient,
            decay,
            self.read_state("direction", parameters),
            self,
            objective.preconditioner(parameters) or self._diagonal(parameters, gradient),
        )

    def _diagonal(self, parameters: ParameterVector, gradient: Tensor) -> Preconditioner:
        """The preconditioner that gradients tell of."""
        squared, before = gradient.square(), self.read_state("squared_gradient", parameters)
        if before is not None:
            squared = before.lerp_(squared, 1 - _MEMORY)
        self.write_state("squared_gradient", parameters, squared)
        root = squared.sqrt()
        diagonal = root / root.mean().clamp_min(torch.finfo(root.dtype).tiny)

        def preconditioner(damping: float) -> Callable[[Tensor], Tensor]:
            inverse = 1 / (diagonal + damping)
            return lambda v: inverse * v

        return preconditioner

    def accepted(self, parameters: ParameterVector, step: Tensor, gradient: Tensor) -> None:
        """Remembers the direction."""
        self.write_state("direction", parameters, step)


class _ProductModel(QuadraticModel):
    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        gradient: Tensor,
        decay: Tensor | None,
        direction: Tensor | None,
        settings: MatrixFreeOptimizer,
        preconditioner: Preconditioner,
    ) -> None:
        self.product, self.gradient, self.decay = product, gradient, decay
        self.start = None if direction is None else direction * _WARM_START
        self.settings, self.preconditioner = settings, preconditioner
        self.reduction: float | None = None

    def decrement(self) -> float:
        """What the first solve promised, if CG ended and damping was small beside the curvature along the step."""
        return math.inf if self.reduction is None else self.reduction

    def propose(self, damping: float) -> Proposal | None:
        def damped(v: Tensor) -> Tensor:
            image = self.product(v).add_(v, alpha=damping)
            return image if self.decay is None else image.addcmul_(self.decay, v)

        b = -self.gradient
        solve = conjugate_gradient(
            damped,
            b,
            start=self.start,
            precondition=self.preconditioner(damping),
            tolerance=self.settings.cg_tolerance,
            max_iterations=self.settings.cg_iterations,
        )
        # xᵀ(B + damping I)x = xᵀ(b - residual): the model without damping needs no further product.
        quadratic = torch.dot(solve.x, b - solve.residual) - damping * torch.dot(solve.x, solve.x)
        predicted = (torch.dot(b, solve.x) - 0.5 * quadratic).item()
        if self.reduction is None:
            light = damping * torch.dot(solve.x, solve.x) <= quadratic and not solve.negative_curvature
            ended = solve.iterations < self.settings.cg_iterations
            self.reduction = predicted if light and ended and predicted > 0 else math.inf
        products = solve.iterations + (self.start is not None)
        # A later trial has more damping and should not start from a solution that was too long.
        self.start = None
        if not bool(solve.x.isfinite().all()):
            return None
        return Proposal(solve.x, predicted, products)
