"""Gradient descent with the damping rule of the others, as their baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from onestep.evaluation.parameters import ParameterVector
from onestep.optim.decrement import newton_decrement, without_influence
from onestep.optim.objective import Objective
from onestep.optim.optimizer import DampedOptimizer
from onestep.optim.quadratic_model import Proposal, QuadraticModel


class GradientDescent(DampedOptimizer):
    """θ ← θ - ∇loss / damping. The closure returns the loss."""

    takes_scalar = True

    def __init__(self, params: Iterable[Any], *, damping: float = 1.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"damping": damping, "weight_decay": weight_decay})

    def quadratic_model(
        self, objective: Objective, parameters: ParameterVector, loss: float, gradient: Tensor, decay: Tensor | None
    ) -> QuadraticModel:
        """A ball of curvature ``damping``."""
        return _Ball(objective, parameters, gradient, decay, lambda: self.kept["greatest_slope"])


class _Ball(QuadraticModel):
    def __init__(
        self,
        objective: Objective,
        parameters: ParameterVector,
        gradient: Tensor,
        decay: Tensor | None,
        greatest_slope: Callable[[], Tensor],
    ) -> None:
        self.objective, self.parameters, self.gradient, self.decay = objective, parameters, gradient, decay
        self.greatest_slope = greatest_slope

    def decrement(self, enough: float, *, final: bool) -> float:
        """That of the Hessian at the start of the step: a small gradient does not say how far the minimum is."""
        if self.promise > enough:
            return math.inf
        product = self.objective.curvature(self.parameters, hessian=True)

        def with_decay(v: Tensor) -> Tensor:
            return product(v) if self.decay is None else product(v).addcmul_(self.decay, v)

        found, self.certain, self.newton = newton_decrement(with_decay, self.gradient, None, enough)[:3]
        if math.isfinite(found):
            self.flat = without_influence(with_decay, self.gradient, self.greatest_slope(), self.parameters.read())
        return found

    def propose(self, damping: float) -> Proposal:
        predicted = 0.5 / damping * torch.dot(self.gradient, self.gradient).item()
        self.promise = max(self.promise, predicted)
        return Proposal(self.gradient / -damping, predicted)
