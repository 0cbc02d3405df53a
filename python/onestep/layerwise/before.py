"""A model as it was before some of its layers were written to."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from onestep._restored import Entry, replaced
from onestep._torch_private import own_parameters
from onestep.layerwise.layers import Layer


class Before:
    """The weights that a model's layers had, which ``there`` puts back for the time of a ``with`` statement.

    So a model can be its own teacher, at the cost of a copy of each weight that is written to.

    Args:
        model: whose layers will be written to.
    """

    def __init__(self, model: nn.Module) -> None:
        # Where each parameter is, which is in several places where it is tied.
        self._places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            held = own_parameters(module)
            for name, parameter in held.items():
                if parameter is not None:
                    self._places.setdefault(id(parameter), []).append((held, name))
        self._entries: dict[int, list[Entry]] = {}

    def keep(self, layer: Layer) -> None:
        """Copies the weight of a layer that is about to be written to."""
        weight = getattr(layer.module, layer.stack or "weight")
        if id(weight) not in self._entries:
            copy = nn.Parameter(weight.detach().clone(), requires_grad=False)
            self._entries[id(weight)] = [(held, name, copy) for held, name in self._places[id(weight)]]

    def there(self) -> AbstractContextManager[None]:
        """The model has the weights that it had."""
        return replaced([entry for entries in self._entries.values() for entry in entries])
