"""Whether modules are given (sequences, places, …) or (places, sequences, …), where the shape does not tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onestep._restored import hooked, replaced
from onestep.layerwise.layers import call, evaluating, padded

# For the id of a module, and None for what the model returns, whether the places come first; None: it cannot be told.
Layouts = dict[int | None, bool | None]

# Of torch.nn's transformers, which have one element for each two places.
_BETWEEN_PLACES = {"mask", "src_mask", "tgt_mask", "memory_mask"}


def layouts_of(model: nn.Module, batch: Any, count: int) -> Layouts:
    """What modules are given with one sequence less, in a batch of as many sequences as places.

    Of a batch's tensors the first dimension is that of the sequences; of those of floats with three dimensions, such as
    torch's encoders take, it may be the second one, which is tried, too. Modules of which the two say different things
    are not told.

    Args:
        model: that is run on the batch without its last sequence.
        batch: as ``call`` takes it.
        count: of its sequences, more than 1, and of places.
    """
    found: Layouts = {}
    tried: list[Any] = []
    for dim in (0, 1):
        cut = _cut(batch, count, dim)
        if tried and _shapes(cut) == _shapes(tried[0]):
            break
        tried.append(cut)
        seen: dict[int | None, set[bool | None]] = {}

        def note(key: int | None, value: Any, seen: dict[int | None, set[bool | None]] = seen) -> None:
            shape = tuple(value.shape[:2]) if isinstance(value, Tensor) and value.dim() > 2 else None
            if shape in ((count - 1, count), (count, count - 1)):
                seen.setdefault(key, set()).add(shape == (count, count - 1))

        def hook(module: nn.Module, args: Any, kwargs: Any, note: Any = note) -> None:
            note(id(module), args[0] if args else next(iter(kwargs.values()), None))

        pairs = [(module, hook) for module in model.modules()]
        try:
            with evaluating(model), torch.no_grad(), replaced(padded([model])), hooked(pairs, before=True):
                result = call(model, cut)
        except Exception:
            # A model may fail in any way on a batch that was cut along the wrong dimension.
            continue
        values = result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple) else [result]
        for value in values:
            note(None, value)
        for key, said in seen.items():
            one = said.pop() if len(said) == 1 else None
            found[key] = one if found.get(key, one) is one else None
    return found


def without_last(batch: Any, count: int) -> Any:
    """A batch without the last of its ``count`` sequences, the first dimension of its tensors."""
    return _cut(batch, count, 0)


def _cut(batch: Any, count: int, dim: int) -> Any:
    """The batch without its last sequence, which is the last along ``dim`` of tensors of floats (…, …, features)."""

    def shorter(name: Any, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or name in _BETWEEN_PLACES:
            return value
        free = value.dim() == 3 and value.is_floating_point() and not str(name).endswith("mask")
        along = dim if free else 0
        return value.narrow(along, 0, count - 1) if value.shape[along] == count else value

    if isinstance(batch, Mapping):
        return {name: shorter(name, value) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [shorter(None, value) for value in batch]
    return shorter(None, batch)


def _shapes(batch: Any) -> list[Any]:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list) else [batch]
    return [tuple(value.shape) if isinstance(value, Tensor) else None for value in values]
