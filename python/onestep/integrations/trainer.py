"""A callback for Hugging Face's Trainer that solves for a model's head before or after training."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "onestep.integrations.trainer needs transformers, which is not installed: pip install transformers accelerate",
        name="transformers",
    ) from error

from onestep.integrations.head import Pairs, check_when, solve_head
from onestep.training import FitResult


class SolveHead(TrainerCallback):
    """Fits the linear layer that ends the model, on the features of the frozen rest, when training begins or ends.

    Before training it is the linear probe from which fine-tuning does not distort the features (Kumar et al.,
    Fine-Tuning can Distort Pretrained Features, ICLR 2022); after it, the best head for the features that training has
    made. All rows of the data go through the model once; the head is solved for as by ``onestep.fit``.

    For models that give ``logits`` and batches that hold ``labels``: sequence and token classification, and regression.
    With one label, or problem_type="regression", the loss is "mse", otherwise "cross_entropy"; labels of -100 do not
    count. Logits are (n, C) or (n, tokens, C) for C labels, ``labels`` are (n,) or (n, tokens) int64, and for
    regression (n,) or (n, C) in the dtype of the logits. The features, (n, d) in that dtype, are kept while the head is
    fitted.

    Args:
        when: "before", "after" or "both".
        data: a Dataset for the Trainer's collator, or a DataLoader; None for the Trainer's training data.
        weight_decay: adds ½ weight_decay ‖head‖² to the mean loss, without which classes that planes separate have no
            best head.
        options: others of ``onestep.fit``; progress is False unless it is given.

    Attributes:
        results: a ``FitResult`` for each solve.

    Raises:
        NotImplementedError: the model predicts the next token, whose labels it shifts; or several labels a row.
        ValueError: no nn.Linear ends the model, or an argument is not what it should be.

    Examples:
        >>> import tempfile, torch
        >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
        >>> from onestep.integrations.trainer import SolveHead
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=2, **sizes))
        >>> data = [{"input_ids": torch.tensor([i, i + 1]), "labels": i % 2} for i in range(8)]
        >>> head = SolveHead("before", progress=False)  # before the model is fine-tuned
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
        ...     output = Trainer(model=model, args=args, train_dataset=data, callbacks=[head]).train()
        {'train_runtime': ...}
        >>> len(head.results)
        1
    """

    def __init__(
        self,
        when: Literal["before", "after", "both"] = "before",
        data: Dataset[Any] | DataLoader[Any] | None = None,
        *,
        weight_decay: float = 1e-4,
        **options: Any,
    ) -> None:
        check_when(when)
        self.when, self.data = when, data
        self.options = {"weight_decay": weight_decay, **options}
        self.results: list[FitResult] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Solves, if when is "before" or "both"."""
        if self.when in ("before", "both"):
            self._solve(kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Solves, if when is "after" or "both"."""
        if self.when in ("after", "both"):
            self._solve(kwargs)

    def _solve(self, kwargs: dict[str, Any]) -> None:
        model = kwargs["model"]
        loader = _in_order(self.data, kwargs.get("train_dataloader"))
        self.results.append(solve_head(_Logits(model), lambda: Pairs(loader, _split), _loss_of(model), **self.options))


class _Logits(nn.Module):
    """A model that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        logits = self.model(**inputs).logits
        if not isinstance(logits, Tensor):
            raise TypeError(f"the model's logits are {type(logits).__name__}; expected a tensor")
        return logits


def _split(batch: Any) -> tuple[Any, Tensor]:
    if "labels" not in batch:
        raise ValueError(f"a batch holds {', '.join(map(str, batch))}; expected 'labels', too")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return inputs, batch["labels"]


def _loss_of(model: nn.Module) -> str:
    config, name = getattr(model, "config", None), type(model).__name__
    problem = getattr(config, "problem_type", None)
    if name.endswith(("ForCausalLM", "LMHeadModel")) or problem == "multi_label_classification":
        raise NotImplementedError(
            f"SolveHead does not take {name} (problem_type={problem!r}): expected a model for classification or "
            "regression, one label a row or token"
        )
    one = getattr(config, "num_labels", 2) == 1
    return "mse" if problem == "regression" or (problem is None and one) else "cross_entropy"


def _in_order(data: Any, loader: Any) -> Any:
    """All rows, in the order of the dataset."""
    if data is not None and not isinstance(data, Dataset):
        return data
    dataset = getattr(loader, "dataset", None) if data is None else data
    if dataset is None or isinstance(dataset, IterableDataset) or loader is None:
        raise ValueError("SolveHead needs a dataset that can be read again; expected data=a Dataset or a DataLoader")
    return DataLoader(dataset, batch_size=loader.batch_size or 8, collate_fn=loader.collate_fn)
