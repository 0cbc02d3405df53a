"""A linear head under cross-entropy: preconditioned L-BFGS on features that are computed once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from onestep._serial_torch import eigh
from onestep.curvature import glm
from onestep.evaluation.data import Chunk
from onestep.evaluation.errors import NonFiniteError
from onestep.solvers.multinomial import Descent, constant_loss
from onestep.training.facts import Facts, Settings
from onestep.training.methods.base import Method, Run, Taken, Verdict
from onestep.training.methods.separation import RUNAWAY, SEPARATED
from onestep.training.plan import FitPlan
from onestep.training.structures.affine_head import Head, features_and_outputs, find_head
from onestep.training.structures.base import Mismatch, ObjectiveType
from onestep.training.structures.softmax_rows import SoftmaxRows, gather, unsuitable

# Iterations of a step. Each is a pass over the features: ten of them take about as long as a Newton step by conjugate
# gradients.
_ITERATIONS = 10
# L-BFGS knows the decrement from a few pairs: it must be so many times smaller than what is asked for.
_MARGIN = 0.1
# A loss that rounding does not let fall further is at its minimum if the decrement is below so many ε of it.
_ROUNDINGS = 10
# A mean loss below this may be on its way to zero.
_SMALL_LOSS = 1e-3
# Newton's step is taken for no more weights than this,
_MOST_WEIGHTS = 256
# and where rows times weights are no more than this.
_MOST_PRODUCTS = 1e8
# A loss that rises by more than this part of itself tells that rounding has taken over.
_RISE = 1e-3
# The part of the loss that a step to a minimum at infinity lowers it by, at most.
_LITTLE = 1e-4
# Rows whose scores are formed at a time.
_ROWS = 8192


def head_of(facts: Facts) -> Head | Mismatch:
    """The linear head under cross-entropy that the multinomial solver can fit, or why there is none."""
    if facts.loss.cross_entropy is None:
        return Mismatch(f"the loss is {facts.loss.name!r}, not a cross-entropy")
    if facts.share.size > 1:
        return Mismatch("there are several processes")
    if facts.parameters.device.type != "cpu" or facts.parameters.dtype not in (torch.float32, torch.float64):
        return Mismatch("the parameters are not on a CPU in float32 or float64")
    if facts.not_affine:
        return Mismatch(facts.not_affine)
    head = facts.head
    if isinstance(head, Mismatch):
        return head
    found = features_and_outputs(head, facts.model, facts.first.rows(slice(0, 2)))
    if found is None:
        return Mismatch("the outputs are not those of the last layer")
    if found[0].dtype != facts.parameters.dtype:
        return Mismatch(f"the layer is given {found[0].dtype}")
    return unsuitable(facts.loss, head, found[1], facts.first.target) or head


class QuasiNewton(Method):
    """L-BFGS from one factor of the features' Gram matrix (`onestep.solvers.multinomial`)."""

    name: ClassVar[str] = "quasi_newton"

    def suits(self, facts: Facts, settings: Settings) -> str | Mismatch:
        """For a head under cross-entropy, on all rows."""
        for option in ("batch_size", "curvature_batch_size", "damping", "cg_iterations"):
            if getattr(settings, option) is not None:
                return Mismatch(f"{option} is given")
        head = head_of(facts)
        if isinstance(head, Mismatch):
            return head
        return "a linear head under cross-entropy, whose features are computed once"

    def refusal(self, facts: Facts, settings: Settings) -> str:
        """For all that does not suit."""
        suits = self.suits(facts, settings)
        if not isinstance(suits, Mismatch):
            return ""
        return f"method='quasi_newton' fits a linear head under cross-entropy: {suits.why}; use method='newton_cg'"

    def objective(self, facts: Facts) -> tuple[ObjectiveType | None, tuple[str, ...]]:
        """None: the solver has an objective of its own, over the rows of the head."""
        return None, ()

    def setup(self, plan: FitPlan) -> Run:
        """A run that has read nothing yet."""
        return _Run(plan)


@dataclass
class HeadFit:
    """A descent over the rows of a head, in units of the loss that fit was given.

    Attributes:
        kept: the rows.
        descent: of their mean loss by weight, over weights in the coordinates of the rows.
        initial_loss: at the parameters that the model had, weight decay included.
    """

    kept: SoftmaxRows
    descent: Descent
    initial_loss: float
    plan: FitPlan
    head: Head

    @staticmethod
    def of(plan: FitPlan, chunks: Iterable[Chunk], *, tol: float) -> HeadFit | Mismatch:
        """Runs the model once over the rows."""
        iterator = iter(chunks)
        first = next(iterator, None)
        if first is None:
            raise ValueError("data gives no rows; expected at least one")
        head = find_head(plan.model, plan.parameters, first)
        if isinstance(head, Mismatch):
            return head
        decay = plan.settings.weight_decay

        def rest() -> Iterable[Chunk]:
            yield first
            yield from iterator

        kept = gather(head, plan.model, plan.loss, rest())
        if isinstance(kept, Mismatch):
            return kept
        descent = Descent(
            kept.rows, decay / kept.factor, tol=0.0, decrement=_MARGIN * tol, penalise_intercept=decay > 0
        )
        penalty = 0.5 * decay * plan.parameters.read().double().square().sum().item()
        return HeadFit(kept, descent, kept.initial_loss + penalty, plan, head)

    def begin(self) -> None:
        """At the model's parameters, if they are better than the best constant scores."""
        better = self.initial_loss < self.kept.factor * constant_loss(self.kept.rows)
        self.descent.begin(self._V() if better else None)

    def _V(self) -> Tensor:
        weight = self.head.weight.detach()
        W = weight.reshape(len(weight), -1).mT
        if self.head.bias is not None:
            W = torch.cat((W, self.head.bias.detach()[None]))
        return self.kept.rows.coordinates.invert(W)

    @property
    def loss(self) -> float:
        """Weight decay included."""
        return self.kept.factor * self.descent.point.loss

    @property
    def grad_norm(self) -> float:
        """The norm of the gradient with respect to the parameters."""
        slopes = self.kept.rows.coordinates.push_forward(self.descent.point.gradient)
        return self.kept.factor * slopes.square().sum().sqrt().item()

    def write(self) -> float:
        """Sets the parameters; the length of the step."""
        start = self.plan.parameters.read()
        W = self.kept.rows.coordinates.weights(self.descent.point.V, self.plan.parameters.dtype)
        weight, bias = (W, None) if self.head.bias is None else (W[:-1], W[-1])
        with torch.no_grad():
            self.head.weight.copy_(weight.mT.reshape(self.head.weight.shape))
            if bias is not None and self.head.bias is not None:
                self.head.bias.copy_(bias)
        return float((self.plan.parameters.read() - start).norm())

    def separates(self) -> bool:
        """Whether every row with weight has its class's score above all others."""
        rows = self.kept.rows
        if not self.kept.hard:
            return False
        W = rows.coordinates.weights(self.descent.point.V, rows.dtype)
        for start in range(0, rows.count, _ROWS):
            some = slice(start, start + _ROWS)
            scores = rows.X[some] @ W[: rows.X.shape[1]]
            if rows.coordinates.intercept:
                scores += W[-1]
            y = rows.y[some, None]
            own = scores.gather(1, y)[:, 0]
            wrong = scores.scatter(1, y, -math.inf).amax(1) >= own
            if rows.weight is not None:
                wrong &= rows.weight[some] > 0
            if bool(wrong.any()):
                return False
        return True

    def runs_away(self) -> bool:
        """Whether another step would move the scores of some row by much and lower the loss by little.

        So it is where there is no minimum. L-BFGS knows little of directions in which hardly anything bends; for few
        weights, Newton's step is taken.
        """
        rows = self.kept.rows
        V = self.descent.point.V
        if not self.kept.hard or V.numel() > _MOST_WEIGHTS or rows.count * V.numel() > _MOST_PRODUCTS:
            return self.descent.moves_on()
        weight = None if rows.weight is None else rows.weight.double()
        intercept = rows.coordinates.intercept
        W = rows.coordinates.weights(V, torch.float64)
        point = glm(rows.X.double(), rows.y, W, "softmax", weight=weight, intercept=intercept)
        values, vectors = eigh(point.gram())
        # Scores have a shift in common that changes nothing.
        bent = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
        slopes = (vectors.mT @ point.grad.reshape(-1))[bent]
        if 0.5 * (slopes.square() / values[bent]).sum() > _LITTLE * point.loss:
            return False
        step = (vectors[:, bent] @ (slopes / values[bent])).view(W.shape)
        moved = rows.X.double() @ (step[:-1] if intercept else step) + (step[-1] if intercept else 0.0)
        moved = moved - moved.mean(1, keepdim=True)
        counted = moved if weight is None else moved[weight > 0]
        return bool((counted.abs() > RUNAWAY).any())


class _Run(Run):
    def __init__(self, plan: FitPlan) -> None:
        self.plan = plan
        eps = torch.finfo(plan.parameters.dtype).eps
        self.least = max(plan.settings.tol**2, eps)
        self.fit: HeadFit | None = None
        self.failed = False
        # The loss of the parameters as they are; None before the first step.
        self.reached: float | None = None

    def _prepared(self) -> HeadFit:
        if self.fit is None:
            found = HeadFit.of(self.plan, self.plan.source.all(), tol=self.least)
            if isinstance(found, Mismatch):
                raise ValueError(f"method='quasi_newton' cannot go on: {found.why}; use method='newton_cg'")
            self.fit = found
        return self.fit

    def step(self, number: int) -> Taken:
        """Ten iterations, fewer at the end."""
        try:
            fit = self._prepared()
        except NonFiniteError as error:
            raise NonFiniteError(f"step {number + 1}, {error}") from error
        descent = fit.descent
        if number == 0:
            fit.begin()
        before = fit.initial_loss if self.reached is None else self.reached
        grad_norm, first = fit.grad_norm, descent.iterations
        while not descent.ended and descent.iterations < first + _ITERATIONS:
            descent.step()
        if not math.isfinite(fit.loss):
            raise NonFiniteError(f"step {number + 1}: the loss is {fit.loss}")
        if fit.loss > before:
            # What rounding has made of a minimum, or of scores that have lost all digits: the parameters stay.
            self.reached, self.failed = before, fit.loss > before + _RISE * abs(before)
            return Taken(before, before, grad_norm, 0.0, accepted=False)
        self.reached = fit.loss
        return Taken(before, fit.loss, grad_norm, fit.write(), cg_iterations=descent.iterations - first)

    def verdict(self) -> Verdict:
        """At the minimum, or where there is none."""
        fit = self._prepared()
        descent = fit.descent
        if self.failed:
            return Verdict("no step lowers the loss, although it may not be at a minimum", stuck=True)
        free = self.plan.settings.weight_decay == 0
        if free and (descent.ended or fit.loss < _SMALL_LOSS) and (fit.separates() or fit.runs_away()):
            return Verdict(SEPARATED)
        if descent.converged:
            return Verdict(f"the loss can be lowered by no more than {self.least:.0e} of itself", converged=True)
        if not descent.ended:
            return Verdict()
        rounding = _ROUNDINGS * torch.finfo(self.plan.parameters.dtype).eps
        if descent.decrement() <= rounding * fit.descent.point.loss:
            return Verdict(f"the loss can be lowered by no more than {rounding:.0e} of itself", converged=True)
        return Verdict("no step lowers the loss, although it may not be at a minimum", stuck=True)

    def loss(self) -> float | None:
        """That of the parameters that the model has when the rows are read: a checkpoint's, when it is compared."""
        fit = self._prepared()
        return fit.initial_loss

    def state(self) -> dict[str, Any]:
        """The descent's, and the loss that it has reached."""
        return {} if self.fit is None else {"descent": self.fit.descent.state(), "reached": self.reached}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``."""
        fit = self._prepared()
        fit.descent.restore(state["descent"])
        self.reached = state.get("reached", fit.loss)
