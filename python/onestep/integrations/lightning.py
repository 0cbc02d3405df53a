"""A callback for Lightning that solves for a model's head before or after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lightning":
        raise
    raise ModuleNotFoundError(
        "onestep.integrations.lightning needs lightning, which is not installed: pip install lightning",
        name="lightning",
    ) from error

from onestep.integrations.head import Pairs, check_when, solve_head
from onestep.training import FitResult


class SolveHead(Callback):
    """Fits the linear layer that ends a LightningModule, on the features of the frozen rest, before or after training.

    The module's ``forward`` must give the outputs (n, …, k), and batches of the training data must be pairs (inputs,
    target): target (n, …) int64 under "cross_entropy", -100 where a row does not count, else (n, …, k) in the dtype of
    the outputs. The features of all rows, (n, d) in that dtype, are kept while the head is fitted. A head that is
    solved for before fine-tuning does not distort the features (Kumar et al., Fine-Tuning can Distort Pretrained
    Features, ICLR 2022).

    ``onestep.optim.PolarGrad`` needs no callback: return it from ``configure_optimizers``, automatic optimisation calls
    it as any other. LevenbergMarquardt, GaussNewton and NewtonCG compute the loss anew for trial steps, which automatic
    optimisation's closure, with its backward pass, is not made for: set ``automatic_optimization = False``, and in
    ``training_step`` call ``self.optimizers().optimizer.step(lambda: self(x) - y)``: residuals, or what else the
    optimiser's closure may return.

    Args:
        loss: as for ``onestep.fit``.
        when: "before", "after" or "both".
        options: of ``onestep.fit`` (progress is False unless it is given), such as ``weight_decay``, without which
            classes that planes separate have no best head.

    Attributes:
        results: a ``FitResult`` for each solve.

    Raises:
        ValueError: no nn.Linear ends the model, or an argument is not what it should be.

    Examples:
        A module whose head is solved for after training::

            trainer = lightning.Trainer(max_epochs=3, callbacks=[SolveHead("cross_entropy", when="after")])
            trainer.fit(module, loader)
    """

    def __init__(
        self,
        loss: str | Callable[[Tensor, Any], Tensor] = "cross_entropy",
        when: Literal["before", "after", "both"] = "before",
        **options: Any,
    ) -> None:
        check_when(when)
        self.loss, self.when, self.options = loss, when, options
        self.results: list[FitResult] = []

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Solves, if when is "before" or "both"."""
        if self.when in ("before", "both"):
            self._solve(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Solves, if when is "after" or "both"."""
        if self.when in ("after", "both"):
            self._solve(trainer, pl_module)

    def _solve(self, trainer: Any, module: nn.Module) -> None:
        loader = trainer.train_dataloader
        self.results.append(solve_head(module, lambda: Pairs(loader, tuple), self.loss, **self.options))
