"""What fit returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Record:
    """One step.

    Attributes:
        step: from 1.
        loss: after the step, weight decay included; over all rows, or with ``batch_size`` over those that judged it.
        grad_norm: ‖∇loss‖₂ before the step.
        step_norm: ‖step‖₂; 0 if none was accepted.
        damping: with which the step was solved for.
        accepted: whether the parameters changed.
        cg_iterations: products with the curvature matrix, one of them for a start from the last solution; 0 for methods
            that factor.
        seconds: since fit began, over all its sessions if it was resumed.
    """

    step: int
    loss: float
    grad_norm: float
    step_norm: float
    damping: float
    accepted: bool
    cg_iterations: int
    seconds: float


@dataclass
class FitResult:
    """The end of a fit; the parameters are in the model.

    Attributes:
        model: what was trained.
        loss: the last of the history's.
        converged: whether the tolerance was reached.
        method: which method ran.
        choice: why that one.
        reason: why it stopped.
        history: a ``Record`` for each step.
        initial_loss: before the first step.
        steps: how many there were.
        interrupted: whether Ctrl-C ended it.
        reasons: why methods and structures that might have been faster do not apply.
    """

    model: nn.Module
    loss: float
    converged: bool
    method: str
    choice: str
    reason: str
    initial_loss: float
    history: list[Record] = field(default_factory=list)
    reasons: tuple[str, ...] = ()

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the fit."""
        return self.reason == "interrupted"

    @property
    def steps(self) -> int:
        """How many steps were taken, those of earlier sessions included."""
        return len(self.history)

    def __repr__(self) -> str:
        return (
            f"FitResult(loss={self.loss:.6g}, converged={self.converged}, method={self.method!r} ({self.choice}), "
            f"steps={self.steps}, reason={self.reason!r})"
        )

    def plot(self, path: str | PathLike[str]) -> None:
        """Writes a picture of the loss against steps and seconds; the format is the file name's. Needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "FitResult.plot needs matplotlib, which is not installed: pip install 'onestep[fit]'", name="matplotlib"
            ) from error
        losses = [self.initial_loss, *(record.loss for record in self.history)]
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.plot(range(len(losses)), losses, marker="o", markersize=3)
        left.set(xlabel="step", ylabel="loss")
        right.plot([0.0, *(record.seconds for record in self.history)], losses, marker="o", markersize=3)
        right.set(xlabel="seconds")
        for axes in (left, right):
            if min(losses) > 0:
                axes.set_yscale("log")
            axes.grid(color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{self.method}: {self.reason}")
        figure.savefig(path, dpi=150)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "initial_loss": self.initial_loss,
            "converged": self.converged,
            "reason": self.reason,
            "history": [asdict(record) for record in self.history],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over ``state``."""
        self.initial_loss, self.converged, self.reason = state["initial_loss"], state["converged"], state["reason"]
        self.history = [Record(**record) for record in state["history"]]
