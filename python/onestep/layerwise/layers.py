"""The linear layers of a model by the patterns of their names, and batches as the model takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

# What a layer pattern is: "*.mlp.*", or several, of which those that begin with "!" leave layers out.
Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    Attributes:
        name: its name in the model.
        module: an nn.Linear, or a Conv1D of transformers, whose weight is transposed.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """(outputs, features), a view of the module's parameter without its graph."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight if isinstance(self.module, nn.Linear) else weight.mT

    @property
    def bias(self) -> Tensor | None:
        """(outputs,), or None."""
        bias = self.module.bias
        return bias.detach() if isinstance(bias, Tensor) else None

    def write(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replaces the values of the weight, and of the bias where one is given, in place."""
        with torch.no_grad():
            self.weight.copy_(weight)
            if bias is not None and self.bias is not None:
                self.bias.copy_(bias)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an nn.Linear or a Conv1D of transformers."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def find_layers(model: nn.Module, patterns: Patterns) -> dict[str, Layer]:
    """The linear layers whose names match, in the order of the model.

    A layer whose weight is also another module's parameter, such as a head that is tied to an embedding, is left out
    unless it is named in full.

    Raises:
        TypeError: the model is no nn.Module, or a pattern no string.
        ValueError: no layer matches.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected torch.nn.Module")
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in listed):
        raise TypeError(f"layers is {patterns!r}; expected a pattern such as '*.mlp.*', or several")
    wanted = [pattern for pattern in listed if not pattern.startswith("!")] or ["*"]
    unwanted = [pattern[1:] for pattern in listed if pattern.startswith("!")]
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found = {}
    names = []
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        names.append(name)
        tied = uses[id(module.weight)] > 1 and name not in wanted
        if not tied and _matches(name, wanted) and not _matches(name, unwanted):
            found[name] = Layer(name, module)
    if not found:
        some = ", ".join(names[:4]) or "none"
        raise ValueError(f"no linear layer of the model matches {patterns!r}; it has {len(names)} ({some}, ...)")
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def batches_of(data: Any) -> Iterable[Any]:
    """The batches of ``data``, which can be gone through again: a tensor or a mapping is one batch.

    Raises:
        TypeError: an iterator, which would be used up by the first pass.
    """
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        raise TypeError(
            f"data is {type(data).__name__}; expected batches that can be gone through more than once: a list, a "
            "DataLoader, a tensor, or a mapping of the model's keyword arguments"
        )
    return data


def count_of(batches: Iterable[Any]) -> int | None:
    """How many batches there are, where that is known."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def call(model: nn.Module, batch: Any) -> Any:
    """The model on one batch: a tensor, the positional arguments in a tuple or list, or a mapping of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def mask_of(batch: Any) -> Tensor | None:
    """Which places of the batch are not padding, (sequences, places), where it says so (``attention_mask``)."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
