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
        >>> import lightning, torch
        >>> from onestep.integrations.lightning import SolveHead
        >>> class Module(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        ...
        ...     def forward(self, x):
        ...         return self.model(x)
        ...
        ...     def training_step(self, batch):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> loader = torch.utils.data.DataLoader([(torch.ones(2) * i, i % 2) for i in range(6)], batch_size=3)
        >>> head = SolveHead("cross_entropy", when="after", weight_decay=0.1, progress=False)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = lightning.Trainer(max_epochs=1, callbacks=[head], enable_model_summary=False, **quiet)
        >>> trainer.fit(Module(), loader)
        >>> len(head.results)
        1
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
