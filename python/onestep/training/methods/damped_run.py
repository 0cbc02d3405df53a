"""A run of a damped method: its steps, and the tests that end a fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import from_first, summed, together
from onestep.evaluation.losses import widened
from onestep.evaluation.module import call_model
from onestep.optim import NonFiniteError, StepReport
from onestep.optim.decrement import MOST_DENSE
from onestep.optim.gradient_descent import GradientDescent
from onestep.optim.optimizer import DampedOptimizer
from onestep.training.methods.base import Run, Taken, Verdict
from onestep.training.methods.precise import MOST_ROUNDED, look
from onestep.training.methods.separation import (
    SEPARATED,
    WITHOUT_MINIMUM,
    is_separated,
    may_be_separated,
    may_run_away,
    moves_on,
)
from onestep.training.objective import DataObjective
from onestep.training.plan import FitPlan
from onestep.training.structures.affine import explained, why_not_affine

_BY_ROUNDING = "the loss can be lowered by no more than rounding the parameters changes it"
# Losses that are convex in the outputs. The squared error is left to Gauss-Newton methods, which take the same steps.
CONVEX = ("cross_entropy", "weighted_cross_entropy", "bce", "poisson")
# A loss is zero to rounding if its root is under this many ε of the first loss's root. A change of a loss by this many
# ε of it is noise.
_ROUNDINGS = 10
# A squared error whose root is so many ε of the targets may be rounding of their size within the model.
_NOISE = 100
# After this many mini-batches in a row that gave no step, fit gives up.
_MOST_FAILURES = 10
# Where no step succeeds although the undamped model promises this part of the loss, the method is stuck.
_FAR = 1e-3
# After this many steps in a row that met the test for a minimum and still moved some outputs by much, there is none.
_RUNAWAY_STEPS = 3
# How far around a point a plateau is looked for, relative to each parameter.
_NEARBY = 1e-3


class DampedRun(Run):
    """Steps of one optimiser over the rows of a plan.

    Attributes:
        report: of the step just taken.
    """

    def __init__(self, plan: FitPlan, optimizer: DampedOptimizer) -> None:
        self.plan, self.optimizer = plan, optimizer
        self.whole = self._all_rows() if plan.settings.batch_size is None else None
        self.report: StepReport | None = None
        self.failures = 0
        self.first_loss = math.nan
        # Steps and products so far, and after how many steps a look in float64 is taken again.
        self.taken = self.products = self.next_look = 0
        # The parameters before the last step that was accepted, and how many steps in a row went on at a minimum.
        self.before: Tensor | None = None
        self.runaway = 0
        # The next step, where the last one ended at a saddle or float32 saw no further one.
        self.way_down: Tensor | None = None
        # Newton's step from where the last one ended, where a look in float64 has found it to be a minimum.
        self.newton: Tensor | None = None
        # The number of the step that formed the optimiser's kept inverse ("step"), and the place in the data before it
        # ("source"): a checkpoint has these instead of the inverse.
        self.formed: dict[str, Any] = {}
        # Where the loss can be lowered by less than this part of it, the optimiser spends time on how much it is, which
        # the test for a minimum asks. On mini-batches there is no such test.
        eps = torch.finfo(plan.parameters.dtype).eps
        optimizer.settled = max(plan.settings.tol**2, _ROUNDINGS * eps) if plan.settings.batch_size is None else 0.0

    def _all_rows(self) -> DataObjective:
        return self.plan.objective(self.plan.source.all, self.plan.source.all, fixed=True)

    def _batch(self, step: int, size: int) -> DataObjective:
        """The mean loss over the rows of a step."""
        source, rows = self.plan.source, self.plan.curvature_rows
        batch = source.batch(step, size)
        whole = min(size, source.known_rows or size)
        curvature = batch if rows is None else _leading(batch, rows, whole)
        # A step fits the noise of its own rows too, so others judge it.
        trial = source.others(step, size)
        return self.plan.objective(_again(batch), _again(curvature), fixed=False, trial_chunks=_again(trial))

    def _objective(self, step: int) -> DataObjective:
        size, rows = self.plan.settings.batch_size, self.plan.curvature_rows
        if size is not None:
            return together(partial(self._batch, step, size))
        assert self.whole is not None
        if rows is not None:
            sample = together(partial(self.plan.source.sample, step, rows))
            self.whole.curvature_chunks = _again(sample)
        return self.whole

    def step(self, number: int) -> Taken:
        """One damped step, on all rows or on those of the step."""
        place, inverse = self.plan.source.state(), self.optimizer.kept.get("inverse")
        start = self.plan.parameters.read()
        self.objective = self._objective(number)
        if self.way_down is not None:
            return self._go_down(self.way_down)
        if self.optimizer.hessian and self._is_convex:
            # Negative curvature is rounding there, of which the Gauss-Newton matrix, the same one, has none.
            self.optimizer.hessian = False
        try:
            self.optimizer.step(self.objective)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {number + 1}, {error}") from error
        except NotImplementedError as error:
            if "onestep" in str(error):
                raise
            raise NotImplementedError(
                f"the model or the loss has no derivative that {self.plan.method.name!r} takes ({explained(error)}): "
                "use method='gradient_descent' or 'polar', which take gradients alone"
            ) from error
        if self.optimizer.kept.get("inverse") is not inverse:
            self.formed = {"step": number, "source": place}
        report = self.optimizer.report
        assert report is not None
        self.report, self.newton = report, None
        self.taken, self.products = number + 1, self.products + report.cg_iterations
        if report.accepted:
            self.before = start
        if math.isnan(self.first_loss):
            self.first_loss = abs(report.loss)
        failed = not report.accepted and report.grad_norm > 0
        self.failures = self.failures + 1 if failed else 0
        return Taken(
            before=report.loss,
            loss=report.new_loss,
            grad_norm=report.grad_norm,
            step_norm=report.step_norm,
            damping=report.damping,
            accepted=report.accepted,
            cg_iterations=report.cg_iterations,
        )

    def verdict(self) -> Verdict:
        """Stops at a minimum, as far as the quadratic model tells, or where no step lowers the loss."""
        report = self.report
        assert report is not None
        eps = torch.finfo(self.plan.parameters.dtype).eps
        if self.plan.settings.batch_size is not None:
            if self.failures >= _MOST_FAILURES:
                return Verdict(f"no step lowered the loss on {_MOST_FAILURES} batches in a row")
            return Verdict()
        is_zero = self._is_zero(report.new_loss, (_ROUNDINGS * eps) ** 2)
        test = "the loss is zero to rounding" if is_zero else self._test(report)
        if (test or self.failures) and self._is_separated():
            return Verdict(SEPARATED)
        if is_zero:
            return Verdict(test, converged=True)
        if not test and self.failures:
            stuck = report.decrement > _FAR * abs(report.new_loss)
            looked = self._looked("no step lowers the loss, although it may not be at a minimum", stuck=stuck)
        elif not test:
            return Verdict()
        else:
            certain = self.optimizer.certain and not self._is_narrow
            if certain and not self._may_hide_runaways and test != _BY_ROUNDING:
                looked = Verdict(test, converged=True)
            else:
                looked = self._looked(test, certain=certain)
        if not looked.converged:
            return looked
        test = looked.reason
        if self._moves_on():
            self.runaway += 1
            return Verdict(WITHOUT_MINIMUM) if self.runaway >= _RUNAWAY_STEPS else Verdict()
        self.runaway = 0
        # Without a gradient, the optimiser has looked for a way itself.
        if report.grad_norm > 0 and self._finds_way_down():
            return Verdict()
        if report.grad_norm == 0 and self._is_plateau():
            return Verdict(f"{test}, but the loss is the same all around: not necessarily a minimum")
        lost = report.without_influence
        if lost:
            lost -= self._of_no_use(self.optimizer.never_used(self.plan.parameters))
        if lost:
            count = f"{lost} of {len(self.plan.parameters)} parameters have"
            return Verdict(f"{test}, but {count} no influence on the outputs here: not necessarily a minimum")
        return Verdict(test, converged=True)

    def _looked(self, test: str, *, certain: bool = False, stuck: bool | None = None) -> Verdict:
        """What a look in float64 tells where float32 cannot: a minimum, or a step that the fit goes on with.

        Args:
            test: that is met, or why no step was taken, where it is not known what is left to gain.
            certain: whether the test stands where the model does not run in float64.
            stuck: for the latter, whether another method may go on.
        """
        failed = stuck is not None
        if self.plan.parameters.dtype == torch.float64 or self.whole is None:
            return Verdict(test, converged=not failed, stuck=bool(stuck))
        if self.taken < self.next_look:
            return Verdict()
        assert self.report is not None
        least = self._least(self.report)
        found = look(
            self.plan,
            least,
            self.products,
            hessian=self.optimizer.hessian,
            loss=self._known_loss,
            noise=self._noise,
            idle=self.optimizer.idle,
        )
        self.newton = found.newton
        if certain and not found.ran:
            return Verdict(test, converged=True)
        if found.converged and found.rounding:
            return Verdict(_BY_ROUNDING, converged=True)
        if found.converged:
            test = f"the loss can be lowered by no more than {least:.0e} of itself" if failed else test
            return Verdict(test, converged=True)
        if found.step is not None and isinstance(self.optimizer, GradientDescent):
            # The baseline takes no such step. It goes on, and is looked at again after twice as many steps.
            self.next_look = 2 * self.taken
            return Verdict(test, stuck=bool(stuck)) if failed else Verdict()
        if found.step is not None:
            self.way_down = found.step
            return Verdict()
        if failed:
            return Verdict(f"{test}: {found.why}" if found.why else test, stuck=bool(stuck))
        return Verdict(f"{test} as far as {_name(self.plan.parameters.dtype)} tells, which is not certain: {found.why}")

    def _known_loss(self) -> float:
        loss = self.loss()
        assert loss is not None
        return loss

    def _is_zero(self, loss: float, rounding: float) -> bool:
        """Whether a loss is no more than rounding makes of it: of the first loss, and for "mse" of outputs of the
        targets' size (of size 1 where all targets are 0).
        """
        if self.plan.loss.name not in ("mse", "cross_entropy") or loss > rounding * min(1.0, self.first_loss):
            return False
        return self.plan.loss.name == "cross_entropy" or loss <= rounding * (self._mean_square_of_targets or 1.0)

    @cached_property
    def _noise(self) -> float:
        """The squared error that rounding makes of outputs of the targets' size, with some hundred ε of them lost."""
        if self.plan.loss.name != "mse":
            return 0.0
        return float((_NOISE * torch.finfo(self.plan.parameters.dtype).eps) ** 2 * self._mean_square_of_targets)

    @cached_property
    def _mean_square_of_targets(self) -> float:
        def terms() -> tuple[Tensor, list[float]]:
            total = count = 0.0
            for chunk in self.plan.source.all():
                total += chunk.target.double().square().sum().item()
                count += chunk.target.numel()
            return torch.empty(0), [total, count]

        total, count = summed(terms)[1]
        return total / count

    @cached_property
    def _is_narrow(self) -> bool:
        """Whether outputs have 16 bits, as under autocast: their gradients are no more exact."""

        def narrow() -> bool:
            with torch.no_grad():
                outputs = call_model(self.plan.model, next(self.plan.source.all()).rows(slice(0, 1)).inputs)
            return widened(outputs).dtype != outputs.dtype

        return from_first(narrow)

    @cached_property
    def _may_hide_runaways(self) -> bool:
        """Whether Newton's step in float64, which few parameters take, tells what steps in float32 cannot.

        Far along a direction in which the loss falls for ever, rounding stops them before they move outputs by much.
        """
        parameters = self.plan.parameters
        few = len(parameters) <= MOST_DENSE and parameters.dtype != torch.float64
        return few and may_run_away(self.plan) and self._is_affine

    @cached_property
    def _is_affine(self) -> bool:
        """Whether outputs are affine in the parameters, as the first process's first rows tell."""
        plan = self.plan
        return from_first(lambda: not why_not_affine(plan.model, plan.parameters, next(plan.source.all())))

    @property
    def _is_convex(self) -> bool:
        """Whether the loss is convex in the parameters, as the first process's first rows tell."""
        return self.plan.loss.name in ("mse", *CONVEX) and self._is_affine

    def _finds_way_down(self) -> bool:
        """Whether this is a saddle, from which the next step goes on along negative curvature.

        A Gauss-Newton matrix has none, so its methods end at saddles, as between two terms that started equal.
        """
        # A convex loss has no saddle.
        if not self._is_convex:
            self.way_down = self.optimizer.way_down(self.objective)
        return self.way_down is not None

    def _go_down(self, way: Tensor) -> Taken:
        report, parameters = self.report, self.plan.parameters
        assert report is not None
        point = parameters.read()
        parameters.write((point + way).to(point.dtype))
        loss = self.loss()
        assert loss is not None
        self.way_down, self.failures, self.before = None, 0, None
        self.report = replace(
            report, loss=report.new_loss, new_loss=loss, accepted=True, decrement=math.inf, resolution=0.0
        )
        return Taken(
            before=report.new_loss,
            loss=loss,
            grad_norm=report.grad_norm,
            step_norm=way.norm().item(),
            damping=report.damping,
        )

    def _least(self, report: StepReport) -> float:
        """By what part of itself the loss may still be lowered at a minimum."""
        eps = torch.finfo(self.plan.parameters.dtype).eps
        return max(self.plan.settings.tol**2, eps if report.accepted else _ROUNDINGS * eps)

    def _test(self, report: StepReport) -> str:
        """Which test for a minimum is met, if one is."""
        least = self._least(report)
        if report.grad_norm == 0 and not report.accepted:
            return "the gradient is zero"
        if report.decrement <= least * abs(report.new_loss):
            return f"the loss can be lowered by no more than {least:.0e} of itself"
        if report.decrement <= report.resolution <= max(MOST_ROUNDED * abs(report.new_loss), self._noise):
            return _BY_ROUNDING
        return ""

    def without_minimum(self) -> str:
        """Says so where planes separate the classes. That takes a pass over the data, so mini-batches are not asked."""
        return SEPARATED if self.plan.settings.batch_size is None and self._is_separated() else ""

    def _is_separated(self) -> bool:
        return may_be_separated(self.plan) and self._is_affine and is_separated(self.plan)

    def _moves_on(self) -> bool:
        """Whether steps of an affine model still change its outputs by much, though they hardly lower the loss."""
        plan, report = self.plan, self.report
        assert report is not None
        if not may_run_away(plan) or not self._is_affine:
            return False
        start = plan.parameters.read()
        if self.newton is not None and self._may_hide_runaways:
            return moves_on(plan, start - self.newton.to(start.dtype))
        if self.before is None or not moves_on(plan, self.before):
            return False
        # The last step may end so near to a minimum that no further one lowers the loss: Newton's tells.
        newton = self.optimizer.newton if self.newton is None else self.newton
        return report.accepted or newton is None or moves_on(plan, start - newton.to(start.dtype))

    def _of_no_use(self, candidates: Tensor) -> int:
        """The number of candidates if changing all of them leaves the loss as it is; else 0.

        A feature that is always zero has such parameters, and so has a key's bias, but for rounding: outputs that are
        wrong by some ε of the first loss's root change a loss by that, times its root.
        """
        size = self.plan.parameters.read().square().mean().sqrt().clamp_min(1.0)
        rounding = _NOISE * torch.finfo(size.dtype).eps * math.sqrt(self.first_loss)
        return int(candidates.sum()) if self._is_constant(candidates * size, rounding) else 0

    def _is_plateau(self) -> bool:
        """Whether the loss does not change with the parameters nearby, as where exponentials have underflowed."""
        return self._is_constant(_NEARBY * self.plan.parameters.read().abs().clamp_min(1.0))

    def _is_constant(self, sizes: Tensor, rounding: float = 0.0) -> bool:
        """Whether the loss is the same at parameters that are off by numbers of these sizes, one for each.

        Roots of losses may differ by ``rounding``.
        """
        parameters = self.plan.parameters
        start = parameters.read()
        noise = torch.randn(len(start), generator=torch.Generator().manual_seed(0)).to(start) * sizes
        losses = set()
        try:
            for sign in (0, 1, -1):
                parameters.write(start + sign * noise)
                losses.add(self.objective.value(parameters))
        finally:
            parameters.write(start)
        return len(losses) == 1 or max(losses) - min(losses) <= rounding * math.sqrt(abs(max(losses)))

    def loss(self) -> float | None:
        """With weight decay, where every step sees all rows."""
        if self.whole is None:
            return None
        point = self.plan.parameters.read()
        penalty = 0.5 * self.plan.settings.weight_decay * torch.dot(point, point).item()
        return self.whole.value(self.plan.parameters) + penalty

    def state(self) -> dict[str, Any]:
        """The optimiser's, and what the tests compare with."""
        return {
            "optimizer": self.optimizer.state_dict(),
            # What the inverse (p,p) can be formed of again: without it a resumed fit would go on with other bits.
            "kept": {k: kept for k, kept in self.optimizer.kept.items() if k != "inverse" or not self.formed},
            "formed": self.formed,
            "failures": self.failures,
            "first_loss": self.first_loss,
            "way_down": self.way_down,
            "runaway": self.runaway,
            "products": self.products,
            "next_look": self.next_look,
            "before": self.before if self.runaway else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.kept = state["kept"]
        self.failures = state["failures"]
        self.first_loss = state["first_loss"]
        self.way_down = state.get("way_down")
        self.runaway, self.before = state.get("runaway", 0), state.get("before")
        self.products, self.next_look = state.get("products", 0), state.get("next_look", 0)
        # Older checkpoints have the inverse itself in "kept".
        self.formed = state.get("formed", {})
        if self.formed:
            self._form_again()

    def _form_again(self) -> None:
        """The optimiser's inverse, where and over the rows of which it was formed."""
        parameters = self.plan.parameters
        reached = parameters.read()
        self.plan.source.restore(self.formed["source"])
        try:
            parameters.write(self.optimizer.kept["point"])
            self.optimizer.form_again(self._objective(self.formed["step"]), parameters)
        finally:
            parameters.write(reached)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _again(chunks: list[Chunk]) -> Callable[[], list[Chunk]]:
    """A function that gives these chunks each time."""
    return lambda: chunks


def _leading(batch: list[Chunk], rows: int, whole: int) -> list[Chunk]:
    """The first rows of each piece of a batch: of a piece with n rows, n · rows / whole, rounded up."""
    lengths: Counter[int] = Counter()
    for chunk in batch:
        lengths[chunk.piece] += len(chunk)
    left = {piece: -(-length * rows // whole) for piece, length in lengths.items()}
    chunks = []
    for chunk in batch:
        part = chunk.rows(slice(0, left[chunk.piece]))
        left[chunk.piece] -= len(part)
        if len(part):
            chunks.append(part)
    return chunks
