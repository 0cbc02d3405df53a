"""Steps by conjugate gradients: what Gauss-Newton and Newton share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from onestep.curvature.conjugate_gradient import Solve, conjugate_gradient
from onestep.evaluation.parameters import ParameterVector
from onestep.optim.decrement import MOST_DENSE, newton_decrement, without_influence
from onestep.optim.idle import projected, still_idle, without_sizes
from onestep.optim.objective import Objective, Preconditioner
from onestep.optim.optimizer import LEAST_DAMPING, DampedOptimizer
from onestep.optim.quadratic_model import Proposal, QuadraticModel

# How much of the last direction the next solve starts from, and how long squared gradients are remembered
# (Martens and Sutskever, Training deep and recurrent networks with Hessian-free optimization, 2012).
_WARM_START = 0.95
_MEMORY = 0.9
# Where a direction of negative curvature leads too far, the step without it is tried if it promises this part of what
# was promised with it. With less, steps would crawl where more damping finds a way.
_WORTH = 0.02
# A test of convergence that failed is made again when a step's promise has fallen to this part.
_LESS = 0.25


class MatrixFreeOptimizer(DampedOptimizer):
    """Solves (B + damping·I) s = -∇loss by preconditioned CG, warm-started from the last solution.

    The preconditioner is the objective's own, or (average of squared gradients)^½, scaled to mean 1, plus damping.
    """

    def __init__(
        self, params: Iterable[Any], *, damping: float, weight_decay: float, cg_iterations: int, cg_tolerance: float
    ) -> None:
        settings = {
            "damping": damping,
            "weight_decay": weight_decay,
            "cg_iterations": cg_iterations,
            "cg_tolerance": cg_tolerance,
        }
        super().__init__(params, settings)

    def quadratic_model(
        self, objective: Objective, parameters: ParameterVector, loss: float, gradient: Tensor, decay: Tensor | None
    ) -> QuadraticModel:
        """Products only: nothing larger than a few vectors is held."""
        slope = gradient if decay is None else gradient - decay * parameters.read()
        self.idle = idle = self._idle(objective, parameters, slope)
        if idle is not None:
            gradient = torch.where(idle, 0.0 if decay is None else gradient - slope, gradient)
        product = projected(objective.curvature(parameters, hessian=self.hessian), idle)
        preconditioner = objective.preconditioner(parameters)
        # A penalty bends those directions, too.
        seen = objective.without_flat(parameters) if decay is None else None
        if seen is not None:
            gradient, product = seen(gradient), _between(seen, product)
            preconditioner = None if preconditioner is None else _of_seen(seen, preconditioner)
        return _ProductModel(
            product,
            parameters,
            gradient,
            decay,
            self.read_state("direction", parameters),
            self,
            preconditioner,
            lambda: self._diagonal(parameters, gradient),
        )

    def _idle(self, objective: Objective, parameters: ParameterVector, slope: Tensor) -> Tensor | None:
        """Which parameters (p,) change the outputs by rounding alone; None for none."""
        known = without_sizes(objective, parameters, slope, self.read_state("known", parameters))
        if known is None:
            return None
        self.write_state("known", parameters, known)
        greatest = max(self.kept.get("greatest_slope", slope).abs().max().item(), slope.abs().max().item())
        idle = still_idle(known, slope.abs(), greatest)
        return idle if bool(idle.any()) else None

    def never_used(self, parameters: ParameterVector) -> Tensor:
        """With those that change the outputs by rounding alone."""
        never = super().never_used(parameters)
        return never if self.idle is None or self._flat is None else never | (self._flat & self.idle)

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


def _between(seen: Callable[[Tensor], Tensor], product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda v: seen(product(seen(v)))


def _of_seen(seen: Callable[[Tensor], Tensor], preconditioner: Preconditioner) -> Preconditioner:
    return lambda damping: _between(seen, preconditioner(damping))


class _ProductModel(QuadraticModel):
    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        parameters: ParameterVector,
        gradient: Tensor,
        decay: Tensor | None,
        direction: Tensor | None,
        settings: MatrixFreeOptimizer,
        of_objective: Preconditioner | None,
        of_gradients: Callable[[], Preconditioner],
    ) -> None:
        self.product, self.parameters, self.gradient, self.decay = product, parameters, gradient, decay
        self.start = None if direction is None else direction * _WARM_START
        self.settings, self.of_objective = settings, of_objective
        self.of_gradients = cache(of_gradients)
        self.first_damping: float | None = None
        self.concave = False
        self.taken = 0
        self.matrix: Tensor | None = None

    def _product(self, v: Tensor) -> Tensor:
        """By the matrix, once a step has taken as many products as form it: a hard step takes hundreds."""
        if self.matrix is None and len(v) <= min(self.taken, MOST_DENSE):
            self.matrix = torch.stack([self.product(column) for column in torch.eye(len(v)).to(v)])
        if self.matrix is not None:
            return self.matrix @ v
        self.taken += 1
        return self.product(v)

    def _undamped(self, v: Tensor) -> Tensor:
        image = self._product(v)
        return image if self.decay is None else image.addcmul_(self.decay, v)

    def decrement(self, enough: float, *, final: bool) -> float:
        """By a solve of its own, without damping and to the accuracy that the answer needs."""
        if self.concave or self.promise > enough or not (final or self._is_worth_a_test()):
            return math.inf
        scale, before = self._of_objective(self.first_damping or LEAST_DAMPING), self.taken
        found, self.certain, self.newton = newton_decrement(self._undamped, self.gradient, scale, enough)[:3]
        if math.isinf(found):
            record = [self.promise, self.taken - before, 0.0]
            self.settings.kept["failed_test"] = torch.tensor(record, dtype=torch.float64)
        else:
            greatest = self.settings.kept["greatest_slope"]
            self.flat = without_influence(self._undamped, self.gradient, greatest, self.parameters.read())
        return found

    def _is_worth_a_test(self) -> bool:
        """After a test that failed, once steps promise a quarter of what they did, or have cost what the test did."""
        failed = self.settings.kept.get("failed_test")
        if failed is None:
            return True
        promise, cost, since = failed.tolist()
        return bool(self.promise <= _LESS * promise or since >= cost)

    def _of_objective(self, damping: float) -> Callable[[Tensor], Tensor] | None:
        """The objective's preconditioner, unless there is none or with so little damping it cannot be factored."""
        try:
            inverse = None if self.of_objective is None else self.of_objective(damping)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return None
        idle, shift = self.settings.idle, damping if self.decay is None else self.decay + damping
        if inverse is None or idle is None:
            return inverse
        return lambda v: torch.where(idle, v / shift, inverse(v.masked_fill(idle, 0.0)))

    def propose(self, damping: float) -> Proposal | None:
        b = -self.gradient
        precondition = self._of_objective(damping) or self.of_gradients()(damping)

        def solved(start: Tensor | None) -> Solve:
            return conjugate_gradient(
                lambda v: self._undamped(v).add_(v, alpha=damping),
                b,
                start=start,
                precondition=precondition,
                tolerance=self.settings.setting("cg_tolerance"),
                max_iterations=self.settings.setting("cg_iterations"),
            )

        if self.first_damping is None:
            self.first_damping = damping
        taken = self.taken
        solve, products = solved(self.start), int(self.start is not None)
        products += solve.iterations
        if solve.direction is not None and self.start is not None:
            # The last direction is no descent by itself: without it, the first direction is.
            solve = solved(None)
            products += solve.iterations
        # A later trial has more damping and should not start from a solution that was too long.
        self.start = None
        failed = self.settings.kept.get("failed_test")
        if failed is not None:
            self.settings.kept["failed_test"] = failed + failed.new_tensor([0.0, 0.0, self.taken - taken])
        x, residual = solve.x, solve.residual
        proposal = self._proposal(x, b, residual, damping)
        if solve.direction is not None and solve.image is not None:
            # On along the direction of negative curvature, as far as if its curvature were positive.
            d, slope = solve.direction, torch.dot(residual, solve.direction).item()
            curvature = max(abs(torch.dot(d, solve.image).item()), damping * torch.dot(d, d).item())
            if slope > 0 and curvature > 0:
                self.concave = True
                far, beyond = x + (slope / curvature) * d, residual - (slope / curvature) * solve.image
                farther = self._proposal(far, b, beyond, damping)
                if farther is not None:
                    worth = proposal is not None and proposal.predicted > _WORTH * farther.predicted
                    proposal = replace(farther, concave=True, shorter=proposal if worth else None)
        return None if proposal is None else replace(proposal, products=products)

    def _proposal(self, x: Tensor, b: Tensor, residual: Tensor, damping: float) -> Proposal | None:
        if not bool(x.isfinite().all()):
            return None
        # xᵀ(B + damping I)x = xᵀ(b - residual): the model without damping needs no further product.
        quadratic = torch.dot(x, b - residual) - damping * torch.dot(x, x)
        predicted = (torch.dot(b, x) - 0.5 * quadratic).item()
        self.promise = max(self.promise, predicted)
        return Proposal(x, predicted)
