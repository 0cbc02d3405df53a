"""What fit returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Record:
    """One step.

    Attributes:
        step: from 1.
        loss: after the step, weight decay included; over all rows, or with ``batch_size`` over those that judged it.
            Of the polar method, before the step, over its rows.
        grad_norm: ‖∇loss‖₂ before the step.
        step_norm: ‖step‖₂; 0 if none was accepted, NaN where the method does not take it.
        damping: with which the step was solved for.
        accepted: whether the parameters changed.
        cg_iterations: products with the curvature matrix, one of them for a start from the last solution; 0 for methods
            that factor.
        seconds: since fit began, over all its sessions if it was resumed.
        validation_loss: after the step, on ``validation``; None where it was not taken.

    Examples:
        >>> import torch, onestep
        >>> X = torch.linspace(0, 1, 20)[:, None]
        >>> record = onestep.fit(torch.nn.Linear(1, 1), (X, 3 * X - 1), progress=False).history[0]
        >>> record.step, record.accepted, record.damping
        (1, True, 0.0)
    """

    step: int
    loss: float
    grad_norm: float
    step_norm: float
    damping: float
    accepted: bool
    cg_iterations: int
    seconds: float
    validation_loss: float | None = None


@dataclass
class FitResult:
    """The end of a fit; the parameters are in the model.

    Attributes:
        model: what was trained.
        loss: the last of the history's; of the polar method the mean of the last eight.
        converged: whether the tolerance was reached.
        method: which method ran.
        choice: why that one.
        reason: why it stopped.
        history: a ``Record`` for each step.
        initial_loss: before the first step; at zeros, if ``choice`` says that the fit started there.
        steps: how many there were.
        interrupted: whether Ctrl-C ended it.
        reasons: why methods and structures that might have been faster do not apply.
        make_covariance: what ``covariance`` calls; None where the fit has no likelihood.

    Examples:
        >>> import torch, onestep
        >>> X = torch.linspace(0, 1, 20)[:, None]
        >>> result = onestep.fit(torch.nn.Linear(1, 1), (X, 3 * X - 1), progress=False)
        >>> result.converged, result.steps, [record.accepted for record in result.history]
        (True, 1, [True])
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
    # Makes the covariance from model, data and loss; not kept by copies and pickles.
    make_covariance: Callable[[], Tensor] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "make_covariance": None}

    def covariance(self) -> Tensor:
        """The covariance (p,p) of the trained parameters, in the order of ``model.parameters()``, in float64.

        (Σᵢ Jᵢᵀ Hᵢ Jᵢ)⁻¹ over all rows of the data, at the parameters that the model has now; Jᵢ is the Jacobian of a
        row's outputs, Hᵢ the Hessian of -log p(yᵢ) in them: of the loss under "cross_entropy", "poisson" and "bce",
        where it is what maximum likelihood programs report. For "mse" it is σ²(JᵀJ)⁻¹ with σ² the sum of squares over
        (residuals - p), what least-squares programs report (Bates and Watts, Nonlinear Regression Analysis and Its
        Applications, 1988). Weight decay counts as the prior that it is (Laplace's approximation), and parameters that
        it holds back count for less than one each. The roots of the diagonal are standard deviations.

        Where the fit did not converge this is no covariance of anything. The result keeps the data for it.

        Raises:
            ValueError: a loss whose distribution is not known, more than 4,096 parameters, too few rows, or a result
                that was copied or loaded.
            LinAlgError: the data does not determine all parameters.
            NotImplementedError: torch.distributed runs on several processes.

        Examples:
            >>> import torch, onestep
            >>> X = torch.arange(5.0)[:, None]
            >>> result = onestep.fit(torch.nn.Linear(1, 1), (X, 2 * X + X % 2), "mse", progress=False)
            >>> [round(value, 3) for value in result.covariance().diagonal().sqrt().tolist()]
            [0.2, 0.49]
        """
        if self.make_covariance is None:
            raise ValueError("this result was copied or loaded, without the data; expected the one that fit returned")
        return self.make_covariance()

    @property
    def validation_loss(self) -> float | None:
        """The lowest on ``validation``, which is the model's where a ``patience`` was given; None without."""
        losses = [record.validation_loss for record in self.history if record.validation_loss is not None]
        return min(losses) if losses else None

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
        """Writes a picture of the loss against steps and seconds.

        Args:
            path: of the file; the format is that of its name, such as loss.png.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: the file's name has a format that matplotlib does not write.
            OSError: the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "FitResult.plot needs matplotlib, which is not installed: pip install matplotlib", name="matplotlib"
            ) from error
        losses = [self.initial_loss, *(record.loss for record in self.history)]
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.plot(range(len(losses)), losses, marker="o", markersize=3, label="training")
        left.set(xlabel="step", ylabel="loss")
        right.plot([0.0, *(record.seconds for record in self.history)], losses, marker="o", markersize=3)
        right.set(xlabel="seconds")
        looks = [record for record in self.history if record.validation_loss is not None]
        if looks:
            held_out = [record.validation_loss for record in looks]
            left.plot([record.step for record in looks], held_out, marker=".", label="validation")
            right.plot([record.seconds for record in looks], held_out, marker=".")
            left.legend(frameon=False)
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
        """Takes over what another result's ``state()`` gave.

        Args:
            state: with the keys "initial_loss", "converged", "reason" and "history".

        Raises:
            KeyError: one of them is missing.
        """
        self.initial_loss, self.converged, self.reason = state["initial_loss"], state["converged"], state["reason"]
        self.history = [Record(**record) for record in state["history"]]
