"""Which layers have rows that depend on what other layers put out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from onestep._restored import hooked
from onestep.layerwise.layers import Layer, call
from onestep.layerwise.seen import watching

Shapes = dict[str, list[tuple[int, ...]]]


def shapes_of(model: nn.Module, layers: Mapping[str, Layer], batch: Any) -> Shapes:
    """For each layer that one batch reaches the shapes of its rows, call by call; what is no tensor is left out."""
    found: Shapes = {}

    def take(name: str, x: Tensor) -> None:
        if isinstance(x, Tensor):
            found.setdefault(name, []).append(tuple(x.shape[:-1]))

    seen, calls = watching(layers, before=take)
    with seen, calls:
        call(model, batch)
    return found


def routed(model: nn.Module, layers: Mapping[str, Layer], batch: Any, shapes: Shapes) -> Collection[str]:
    """Layers that get other numbers of rows where these layers put out something else: experts of a mixture.

    Args:
        model: in eval mode.
        layers: by name.
        batch: to run the model on.
        shapes: ``shapes_of`` them.
    """

    def changed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return -output.roll(1, -1) if isinstance(output, Tensor) and output.dim() > 0 else output

    modules = {id(layer.module): layer.module for layer in layers.values()}.values()
    try:
        with hooked([(module, changed) for module in modules]):
            others = shapes_of(model, layers, batch)
    except (RuntimeError, ValueError, TypeError, IndexError):
        # A model that does not run on such values tells nothing.
        return []
    return [name for name in layers if shapes.get(name) != others.get(name)]
