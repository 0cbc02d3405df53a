"""The protocol of methods: what planning asks of one, and what the loop asks of a run of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from onestep.training.structures import OBJECTIVES
from onestep.training.structures.base import Mismatch, ObjectiveType

if TYPE_CHECKING:
    from onestep.training.facts import Facts, Settings
    from onestep.training.plan import FitPlan

# The most steps where neither steps nor passes are given.
_STEPS = 50


class Cut(NamedTuple):
    """How a method wants the rows.

    A batch is cut into pieces, and each process computes some of them; sums over pieces are added up in their order. So
    the number of pieces must not depend on that of processes, where results are to have the same bits on any number.
    The rows of a piece are computed chunk by chunk.

    Attributes:
        chunk_rows: the most rows that are computed together.
        curvature_rows: over how many curvature is taken; None for all of the step.
        pieces: how many pieces a batch is cut into; there are as many as processes at least.
        least: the fewest rows of a piece; a batch of few rows has fewer pieces.
    """

    chunk_rows: int
    curvature_rows: int | None = None
    pieces: int = 1
    least: int = 1


class Taken(NamedTuple):
    """What one step did, for history and progress.

    Attributes:
        before: the loss before it, weight decay included.
        loss: after it, on the rows that judge it.
        grad_norm: ‖∇loss‖₂ before it; NaN if the method does not know.
        step_norm: ‖step‖₂; 0 if none was accepted.
        damping: with which it was solved for; 0 without any.
        accepted: whether the parameters changed.
        cg_iterations: products with the curvature matrix.
    """

    before: float
    loss: float
    grad_norm: float
    step_norm: float
    damping: float = 0.0
    accepted: bool = True
    cg_iterations: int = 0


class Verdict(NamedTuple):
    """Whether to stop after a step.

    Attributes:
        reason: why to stop; empty to go on.
        converged: whether the tolerance was reached.
        stuck: whether the method stops far from a minimum, where another one may go on.
    """

    reason: str = ""
    converged: bool = False
    stuck: bool = False


class Run(ABC):
    """One fit by one method, and all that changes in it. The loop calls ``step`` and ``verdict`` in turn."""

    @abstractmethod
    def step(self, number: int) -> Taken:
        """Takes the step of this number, from 0. The parameters change only if it returns.

        Raises:
            NonFiniteError: NaN or infinity, with the step's number in the message.
        """

    @abstractmethod
    def verdict(self) -> Verdict:
        """Whether to stop after the step just taken."""

    def without_minimum(self) -> str:
        """Why the loss has no minimum, if that is so: asked where a fit ends because its steps are used up."""
        return ""

    def loss(self) -> float | None:
        """The loss at the present parameters, to compare with that of a checkpoint's last step.

        None if steps give losses that it cannot be compared with, such as those over mini-batches.
        """
        return None

    def finish(self) -> float | None:
        """The loss at the end of a fit, where it is not that of the last step."""
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run, besides the model and the place in the data."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``.

        Raises:
            ValueError, RuntimeError: it is of other parameters.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, the checkpoint has {sorted(state)}")


class Method(ABC):
    """A way to fit. It holds no state: that is in the runs that ``setup`` makes."""

    name: ClassVar[str]
    # The greatest number of steps that makes sense; None for as many as are asked for.
    most_steps: ClassVar[int | None] = None
    # Whether the method reads the data in one pass, the one that planning has begun. Such a fit writes no checkpoints.
    one_pass: ClassVar[bool] = False

    # Whether it asks for outputs, which a model that returns its own loss does not show.
    needs_outputs: ClassVar[bool] = True
    # Whether it differentiates the model; another one can solve for parameters that outputs are affine in without that.
    needs_gradient: ClassVar[bool] = True
    # Whether its steps make sense for parameters of 16 bits, to which small steps are rounded away.
    takes_halves: ClassVar[bool] = False
    # Whether layers keep the mode that the user gave them, and may draw random numbers and learn statistics.
    keeps_modes: ClassVar[bool] = False

    @abstractmethod
    def suits(self, facts: Facts, settings: Settings) -> str | Mismatch:
        """Why ``method="auto"`` may take this method, or why not. The first method of the table that suits is taken."""

    def refusal(self, facts: Facts, settings: Settings) -> str:
        """Why the method cannot do what is asked, as a whole error message; empty if it can."""
        return ""

    def cut(self, facts: Facts, settings: Settings) -> Cut:
        """How many rows are computed together and curvature is taken over, and into how many pieces they are cut."""
        return Cut(settings.chunk_size or facts.chunk_rows, settings.curvature_batch_size)

    def batch_size(self, facts: Facts, settings: Settings) -> int | None:
        """How many rows a step takes; None for all."""
        return settings.batch_size

    def most_steps_of(self, facts: Facts, settings: Settings) -> int | None:
        """The greatest number of steps. None, which only methods that end by time give: until ``max_seconds``."""
        if settings.epochs is not None:
            steps = self.steps_of_epochs(settings.epochs, facts, settings)
            if steps is None:
                raise ValueError("epochs is given for data of unknown length; expected max_steps or max_seconds")
            return steps
        return settings.max_steps or _STEPS

    def steps_of_epochs(self, epochs: float, facts: Facts, settings: Settings) -> int | None:
        """How many steps so many passes over the data are; None if the length of the data is not known."""
        source, size = facts.source, self.batch_size(facts, settings)
        if size is None:
            return math.ceil(epochs)
        batches = source.known_batches(size)
        return None if batches is None else max(1, math.ceil(epochs * batches))

    def objective(self, facts: Facts) -> tuple[ObjectiveType | None, tuple[str, ...]]:
        """The objective of the first structure that recognises the model, or None; and why those before it do not."""
        reasons: list[str] = []
        for structure in OBJECTIVES:
            found = structure.objective(facts, self.name)
            if not isinstance(found, Mismatch):
                return found, tuple(reasons)
            reasons.append(f"no {structure.name}: {found.why}")
        return None, tuple(reasons)

    @abstractmethod
    def setup(self, plan: FitPlan) -> Run:
        """A run that has not taken a step yet."""
