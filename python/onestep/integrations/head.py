"""The last layer of a model solved for on what the rest of it makes of the data: shared by the callbacks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from onestep._restored import eval_mode
from onestep.curvature.laplace_assembly import find_last_layer
from onestep.evaluation.data import Chunk
from onestep.evaluation.layers import ends_model, layer_calls
from onestep.training import FitResult, fit

WHEN = ("before", "after", "both")


def check_when(when: str) -> None:
    """Raises if ``when`` is none of the moments at which a callback may solve."""
    if when not in WHEN:
        raise ValueError(f"when={when!r}; expected one of {', '.join(map(repr, WHEN))}")


def solve_head(
    module: nn.Module,
    batches: Callable[[], Iterable[tuple[Any, Tensor]]],
    loss: str | Callable[[Tensor, Any], Tensor],
    **options: Any,
) -> FitResult:
    """Fits the nn.Linear that ends a module to the features that the data gives it, everything else as it is.

    The features (n,d) of all rows are made once, in eval mode, and kept; the layer is then fitted by ``onestep.fit``:
    in closed form under "mse", by Newton's method under "cross_entropy". Positions of a sequence are rows; those with
    target -100 are left out.

    Args:
        module: inputs → a tensor.
        batches: gives the data, pairs (inputs, target), from the beginning each time it is called.
        loss: as for ``onestep.fit``.
        options: of ``onestep.fit``.

    Raises:
        ValueError: no nn.Linear ends the module, or there are no batches.
    """
    first = next(iter(batches()), None)
    if first is None:
        raise ValueError("the data holds no batches; expected at least one")
    device = next(module.parameters()).device
    with torch.no_grad(), eval_mode(module):
        layer = find_last_layer(module, Chunk(*first).on(device)).layer
        rows = [_rows(module, layer, Chunk(*batch).on(device)) for batch in batches()]
    X, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    trained = list(layer.parameters())
    put_back = map(Tensor.requires_grad_, trained, [parameter.requires_grad for parameter in trained])
    try:
        for parameter in trained:
            parameter.requires_grad_(True)
        return fit(layer, (X, y), loss, **{"progress": False, **options})
    finally:
        # One call into C, in which no interrupt comes.
        deque(put_back, maxlen=0)


def _rows(module: nn.Module, layer: nn.Linear, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The features (n,d) of the rows that count, and their targets."""
    calls, outputs = layer_calls(module, layer, chunk)
    if not ends_model(calls, outputs):
        raise ValueError("the model's outputs are not those of its last layer for some rows")
    features, target = calls[0][0].detach(), chunk.target
    if features.dim() > 2 and target.shape == features.shape[:-1] and not target.is_floating_point():
        counted = target != -100
        return features[counted], target[counted]
    return features.reshape(-1, features.shape[-1]), target.reshape(-1, *target.shape[features.dim() - 1 :])


class Pairs:
    """Batches as pairs (inputs, target) of an iterable that can be read again."""

    def __init__(self, batches: Iterable[Any], split: Callable[[Any], tuple[Any, Tensor]]) -> None:
        self.batches, self.split = batches, split

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return map(self.split, self.batches)
