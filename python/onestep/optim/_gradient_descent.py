"""Gradient descent with the damping rule of the others, as their baseline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from onestep.evaluation.parameters import ParameterVector
from onestep.optim._objective import Objective
from onestep.optim._optimizer import DampedOptimizer, Proposal, QuadraticModel


class GradientDescent(DampedOptimizer):
    """θ ← θ - ∇loss / damping. The closure returns the loss."""

    takes_scalar = True

    def __init__(self, params: Iterable[Any], *, damping: float = 1.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"damping": damping, "weight_decay": weight_decay})

    def quadratic_model(
        self, objective: Objective, parameters: ParameterVector, gradient: Tensor, decay: Tensor | None
    ) -> QuadraticModel:
        """A ball of curvature ``damping``."""
        return _Ball(gradient)


class _Ball(QuadraticModel):
    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def propose(self, damping: float) -> Proposal:
        return Proposal(self.gradient / -damping, 0.5 / damping * torch.dot(self.gradient, self.gradient).item())
