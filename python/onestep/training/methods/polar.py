"""Whole networks by mini-batches: polar steps for hidden matrices, Adam for the rest; rates warm up and decay."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onestep._restored import own_modes
from onestep.evaluation.data import IndexedSource
from onestep.evaluation.distributed import from_first, same_everywhere, share, summed, together
from onestep.evaluation.exclusive import exclusive
from onestep.evaluation.losses import check_range
from onestep.evaluation.module import explain
from onestep.optim import NonFiniteError, PolarGrad
from onestep.training.facts import Facts, Settings
from onestep.training.methods.base import Cut, Method, Run, Taken, Verdict
from onestep.training.methods.damped import MOST_DENSE
from onestep.training.plan import FitPlan
from onestep.training.structures.base import Mismatch

# Positions, such as characters of a text, that a step takes where the batch is not given.
_POSITIONS = 1024
# The same where a row is one position: networks on tables and small pictures, whose steps take little more time for
# more rows. Fewer, down to 128, where the passes that were asked for would have less than `_LEAST_STEPS` steps.
_MOST_ROWS, _FEWEST_ROWS = 2048, 128
# Rates are those for 1,024 positions a step. They go with the root of how many there are, since gradients over fewer
# are noisier (Malladi, Lyu, Panigrahi and Arora, "On the SDEs and scaling rules for adaptive gradient algorithms",
# 2022), but are divided or multiplied by no more than this.
_MOST_FACTOR = 2.0
# A pass over few rows has at least so many steps.
_LEAST_STEPS_A_PASS = 8
# Passes over the data where neither steps, passes nor seconds are given.
_PASSES = 40
# The fewest steps that these passes may come to,
_LEAST_STEPS = 300
# and the most.
_MOST_STEPS = 3000
# The rate rises over so many steps, and falls to zero in proportion to what is left.
_WARM_UP = 20
# The rise takes no more than this part of all steps.
_WARM_UP_PART = 0.1
# A step moves hidden matrices by about this part of their first size (root mean square). Adam's rates are half of that.
_PART_OF_WEIGHTS = 0.1
# The rate is no less than this,
_LEAST_RATE = 1e-2
# and no more than this: weights that are large have been trained, or are scaled in another way.
_MOST_RATE = 5e-2
# PolarGrad moves the elements of a matrix by this times the rate (root mean square).
_STEP_OF_RATE = 0.2
# The loss of a fit is the mean of the last batches'.
_LAST = 8


class PolarSteps(Method):
    """Mini-batches and ``onestep.optim.PolarGrad``."""

    name: ClassVar[str] = "polar"
    keeps_modes: ClassVar[bool] = True
    takes_halves: ClassVar[bool] = True
    needs_outputs: ClassVar[bool] = False

    def suits(self, facts: Facts, settings: Settings) -> str | Mismatch:
        """For networks that are not small, unless an argument says how a matrix of curvature is to be solved with."""
        p = len(facts.parameters)
        if facts.loss.name == "model":
            return "the loss is the model's own"
        if p <= MOST_DENSE:
            return Mismatch(f"{p} parameters are few enough for curvature")
        for name in ("damping", "cg_iterations", "curvature_batch_size"):
            if getattr(settings, name) is not None:
                return Mismatch(f"{name} is not for it")
        if not facts.not_affine:
            return Mismatch("outputs are affine in the parameters")
        if not any(group["polar"] for group in PolarGrad(facts.model).param_groups):
            return Mismatch("no parameter is a hidden weight matrix")
        return f"{p} parameters of a network: a step that solves for each layer, on mini-batches"

    def refusal(self, facts: Facts, settings: Settings) -> str:
        """Where an argument is for curvature."""
        for name in ("damping", "cg_iterations", "curvature_batch_size"):
            if getattr(settings, name) is not None:
                return f"{name}={getattr(settings, name)} is not for method='polar', which takes no curvature"
        return ""

    def cut(self, facts: Facts, settings: Settings) -> Cut:
        """Each process's rows of a batch together, as far as memory goes."""
        return Cut(settings.chunk_size or facts.chunk_rows, None, facts.share.size)

    def batch_size(self, facts: Facts, settings: Settings) -> int:
        """Rows with about ``_POSITIONS`` positions (tokens) in all; of a DataLoader one batch, as it comes."""
        if settings.batch_size is not None:
            return settings.batch_size
        source = facts.source
        if not isinstance(source, IndexedSource):
            return 1
        positions = _positions(facts.first.target)
        rows = max(1, _POSITIONS // positions)
        if positions == 1:
            rows = _MOST_ROWS
            if settings.epochs is not None:
                rows = min(rows, max(_FEWEST_ROWS, int(settings.epochs * source.rows / _LEAST_STEPS)))
        return max(1, min(rows, source.rows // _LEAST_STEPS_A_PASS))

    def most_steps_of(self, facts: Facts, settings: Settings) -> int | None:
        """As asked for in steps, passes or seconds; None for as many as there is time for."""
        if settings.max_steps is None and settings.epochs is None and settings.max_seconds is None:
            of_data = self.steps_of_epochs(_PASSES, facts, settings)
            return min(max(of_data or _LEAST_STEPS, _LEAST_STEPS), _MOST_STEPS)
        if settings.max_steps is None and settings.epochs is None:
            return None
        return super().most_steps_of(facts, settings)

    def setup(self, plan: FitPlan) -> Run:
        """A run before its first step."""
        return PolarRun(plan)


def _positions(target: Any) -> int:
    """How many places of its outputs a row's loss is taken over, such as the characters of a text."""
    if not isinstance(target, Tensor) or target.dim() < 2:
        return 1
    classes = not target.is_floating_point()
    shape = target.shape[1:] if classes else target.shape[1:-1]
    return max(1, math.prod(shape))


class PolarRun(Run):
    """Steps of PolarGrad on mini-batches."""

    def __init__(self, plan: FitPlan) -> None:
        self.plan = plan
        several = share().size > 1
        rate = _rate(plan.model)
        self.optimizer = PolarGrad(
            plan.model,
            lr=rate,
            adam_lr=rate / 2,
            process_group=dist.group.WORLD if several else None,
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._buffers = list(plan.model.buffers()) if several else []
        # Whether the model draws random numbers, as dropout does; not known before the first step.
        self._draws: bool | None = None
        self._began: float | None = None
        # What part of the schedule was over when this call began.
        self._before, self._over = 0.0, 0.0
        self._losses: list[float] = []

    def _factor(self, number: int) -> float:
        """What the rates are multiplied by: a warm-up, then in proportion to what is left of steps or seconds."""
        settings, most = self.plan.settings, self.plan.max_steps
        over = 0.0 if most is None else number / most
        if settings.max_seconds is not None:
            now = from_first(time.perf_counter)
            self._began = now if self._began is None else self._began
            elapsed = (now - self._began) / settings.max_seconds
            over = max(over, self._before + (1 - self._before) * elapsed)
        self._over = min(over, 1.0)
        warm = _WARM_UP if most is None else max(1.0, min(_WARM_UP, _WARM_UP_PART * most))
        return min(1.0, (number + 1) / warm) * (1 - self._over)

    def step(self, number: int) -> Taken:
        """A gradient over the batch, and a step."""
        plan = self.plan
        source, model = plan.source, plan.model
        size = plan.batch_size
        assert size is not None
        batch = together(lambda: source.batch(number, size))
        objective = plan.objective(lambda: batch, lambda: batch, fixed=False)
        if len(batch) == 1:
            # A batch in one chunk is not weighted by its rows.
            objective.row_means = None

        def local() -> tuple[Tensor, list[float]]:
            total, numbers = None, [0.0, 0.0, 0.0]
            for chunk in batch:
                check_range(plan.loss, chunk.target)
                value, gradient = objective.chunk_gradient(chunk, plan.parameters)
                if not math.isfinite(value):
                    raise NonFiniteError(f"step {number + 1}, {explain(chunk, number, f'the loss is {value}')}")
                total = gradient if total is None else total.add_(gradient)
                elements, positions = plan.loss.elements(chunk.target, len(chunk)), _positions(chunk.target)
                numbers = [numbers[0] + value, numbers[1] + elements, numbers[2] + len(chunk) * positions]
            return torch.zeros_like(plan.parameters.read()) if total is None else total, numbers

        with own_modes(model), self._random_numbers(number):
            gradient, (loss, count, positions) = summed(local)
        if not count:
            raise ValueError("every target of the batch is ignored; there is no loss to minimise")
        gradient.div_(count)
        value, decay = loss / count, plan.settings.weight_decay
        if decay:
            # A part of what is minimised, as with all methods; that of the optimiser would be decoupled.
            point = plan.parameters.read()
            value += 0.5 * decay * torch.dot(point, point).item()
            gradient.add_(point, alpha=decay)
        same_everywhere(self._buffers)
        factor = self._factor(number) * min(max(math.sqrt(positions / _POSITIONS), 1 / _MOST_FACTOR), _MOST_FACTOR)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._move(gradient, number)
        self._losses = [*self._losses[1 - _LAST :], value]
        return Taken(
            before=value,
            loss=value,
            grad_norm=torch.linalg.vector_norm(gradient).item(),
            step_norm=math.nan,
        )

    def _move(self, gradient: Tensor, number: int) -> None:
        """A step of the optimiser, after which parameters have the ``grad`` that the user left in them."""
        tensors = self.plan.parameters.tensors
        kept = [tensor.grad for tensor in tensors]
        try:
            for tensor, part in zip(tensors, self.plan.parameters.split(gradient), strict=True):
                tensor.grad = part
            self.optimizer.step()
        except NonFiniteError as error:
            raise NonFiniteError(f"step {number + 1}, batch {number}: {error}") from error
        finally:
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.grad = before

    @contextmanager
    def _random_numbers(self, number: int) -> Iterator[None]:
        """Random numbers depend on the step and the process alone in here, so that a resumed fit draws the same ones.

        Afterwards the caller's random state is as it was.
        """
        if self._draws is False:
            yield
            return
        place = share()
        with exclusive(), torch.random.fork_rng(devices=_devices(self.plan)):
            torch.manual_seed((self.plan.settings.seed * 1_000_003 + number) * place.size + place.rank)
            before = torch.get_rng_state()
            yield
            if self._draws is None:
                self._draws = self.plan.parameters.device.type != "cpu" or not torch.equal(
                    before, torch.get_rng_state()
                )

    def verdict(self) -> Verdict:
        """Never by itself: a mini-batch does not tell a minimum."""
        return Verdict()

    def finish(self) -> float | None:
        """The mean of the last batches' losses."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    def state(self) -> dict[str, Any]:
        """The optimiser's, and how far the schedule is."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "rates": self._rates,
            "over": self._over,
            "losses": self._losses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._rates, self._before, self._losses = state["rates"], state["over"], state["losses"]


def _rate(model: nn.Module) -> float:
    """The rate of hidden matrices, from the geometric mean of their sizes (root mean squares)."""
    hidden = [p for group in PolarGrad(model, gram_every=None).param_groups if group["polar"] for p in group["params"]]
    sizes = [math.log(max(p.detach().float().square().mean().sqrt().item(), 1e-8)) for p in hidden]
    size = math.exp(sum(sizes) / len(sizes)) if sizes else 0.0
    return min(max(_PART_OF_WEIGHTS * size / _STEP_OF_RATE, _LEAST_RATE), _MOST_RATE)


def _devices(plan: FitPlan) -> list[torch.device]:
    device = plan.parameters.device
    return [device] if device.type == "cuda" else []
