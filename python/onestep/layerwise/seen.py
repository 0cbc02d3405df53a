"""What hooks see of layers during one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from onestep import linalg
from onestep._restored import Entry, hooks, replaced
from onestep._torch_private import version
from onestep.layerwise.experts import ExpertCalls, expert_of
from onestep.layerwise.layers import Layer
from onestep.layerwise.padding import Masks, Padding
from onestep.layerwise.sums import InputSums, Storage, TargetSums

Before = Callable[[str, Tensor], None]
After = Callable[[str, Tensor, Any], None]
# Two contexts, for one with statement.
Watch = tuple[AbstractContextManager[None], AbstractContextManager[Any]]


class Enough(Exception):
    """Ends a forward pass when all that was waited for has been seen."""


class Seen:
    """What the hooks see during one forward pass of a model, and of its teacher before.

    Args:
        layers: of the model, by name.
        dtype: of the sums.
        awaited: layers after whose calls the pass may end; None: none.
        storage: where the sums are kept.
        sums: False: inputs are numbered, and nothing is added up.
        lacks: sums with a teacher are of what each layer lacks of its outputs.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        dtype: torch.dtype,
        awaited: set[str] | None,
        storage: Storage,
        *,
        sums: bool = True,
        lacks: bool = False,
    ) -> None:
        self.dtype, self.awaited = dtype, awaited
        self._layers, self._storage, self._adds, self._lacks = layers, storage, sums, lacks
        self._padding, self._running = Padding(Masks()), layers
        self.sums: dict[int, InputSums] = {}  # by the number of the inputs
        # Of inputs, in the order that they came in: a tensor that is changed in place is another one afterwards.
        self.numbers: dict[tuple[int, int], int] = {}
        self.given: dict[str, list[int]] = {}
        # Layers whose inputs have rows that may be padding, with a shape of them.
        self.untold: dict[str, tuple[int, ...]] = {}
        self.crossed: dict[str, TargetSums] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self._kept: list[Tensor] = []  # so that ids stay theirs

    def of_model(self, model: nn.Module, masks: Masks) -> Watch:
        """Two contexts in which the model's layers are seen."""
        self._padding, self._running = Padding(masks), self._layers
        return watching(
            self._layers, before=self._take_input, more=self._hooks(model, self._layers), others=self._padding.expert
        )

    def of_teacher(self, teacher: nn.Module, layers: Mapping[str, Layer], masks: Masks) -> Watch:
        """Two contexts in which the outputs of a teacher's layers are seen, by their names in the model."""
        self._padding, self._running = Padding(masks), layers
        self._outputs = {name: [] for name in layers}
        return watching(layers, after=self._take_target, more=self._hooks(teacher, layers), others=self._padding.expert)

    def _hooks(self, model: nn.Module, layers: Mapping[str, Layer]) -> list[Entry]:
        return self._padding.hooks(model, [layer.module for layer in layers.values()]) if self._adds else []

    def _kept_of(self, name: str, x: Tensor) -> Tensor | None:
        layer = self._running[name]
        return self._padding.kept(
            x, layer.module, None if layer.stack is None else expert_of(layer.module, layer.expert)
        )

    def _rows(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """(rows, d) of the sums' dtype, padding left out; 16 bits that gram reads in place stay as they are."""
        rows = x.reshape(-1, x.shape[-1])
        if kept is not None:
            rows = rows[kept]
        in_place = self.dtype == torch.float32 and rows.dtype in (torch.bfloat16, torch.float16)
        return rows if in_place else rows.to(self.dtype)

    def _take_target(self, name: str, x: Tensor, output: Any) -> None:
        # Of a block, what is first in what it returns.
        out = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(x, Tensor) or not isinstance(out, Tensor) or out.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"the teacher's counterpart of layer {name!r} returns {_shape(out)} for {_shape(x)}; expected a tensor "
                "with as many rows"
            )
        rows, kept = out.reshape(-1, out.shape[-1]), self._kept_of(name, x)
        # A copy: what follows in the model, such as nn.ReLU(inplace=True), may write into it.
        self._outputs[name].append(rows.clone() if kept is None else rows[kept])

    def _take_input(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"layer {name!r} is called with {type(x).__name__}; expected a tensor")
        key = self.numbers.setdefault((id(x), 0 if x.is_inference() else version(x)), len(self.numbers))
        rows = None
        if not self._adds:
            self._kept.append(x)
        elif key not in self.sums:
            rows = self._rows(x, self._told(name, x))
            gram = self._storage.keep(linalg.gram(rows)[0])
            self.sums[key] = InputSums(gram, rows.sum(0, dtype=self.dtype), len(rows))
            self._kept.append(x)
        calls = self.given.setdefault(name, [])
        if name in self._outputs:
            self._cross(name, self._rows(x, self._kept_of(name, x)) if rows is None else rows, len(calls))
        calls.append(key)
        if self.awaited is not None:
            self.awaited.discard(name)
            if not self.awaited:
                raise Enough

    def _told(self, name: str, x: Tensor) -> Tensor | None:
        """The rows that are not padding; the name of the layer is kept where they cannot be told."""
        kept = self._kept_of(name, x)
        if kept is None and self._padding.untold(x, self._running[name].module):
            self.untold.setdefault(name, tuple(x.shape))
        return kept

    def _cross(self, name: str, rows: Tensor, index: int) -> None:
        outputs = self._outputs[name]
        if index >= len(outputs) or len(outputs[index]) != len(rows):
            raise ValueError(
                f"layer {name!r} has {len(rows)} rows in call {index + 1}; expected those of the teacher's layer: "
                "the two models send rows to it differently. Leave it out, such as by layers=['*', '!*.experts.*']"
            )
        rows, target = rows.to(self.dtype), outputs[index].to(self.dtype)
        whole = None
        if self._lacks:
            layer, whole = self._layers[name], target.square().sum()
            target = torch.addmm(target, rows, layer.weight.mT.to(self.dtype), alpha=-1)
            if layer.bias is not None:
                target -= layer.bias.to(self.dtype)
        added = TargetSums(self._storage.keep(rows.mT @ target), target.sum(0), target.square().sum(), whole)
        self.crossed[name] = self.crossed[name].plus(added, self._storage) if name in self.crossed else added


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def watching(
    layers: Mapping[str, Layer],
    *,
    before: Before | None = None,
    after: After | None = None,
    more: list[Entry] | None = None,
    others: Callable[[tuple[int, int], Tensor], None] | None = None,
) -> Watch:
    """Two contexts, for one ``with`` statement, in which layers are watched.

    Args:
        layers: by name.
        before: called with the name and the input of each call.
        after: called with the name, the input and the output.
        more: what is replaced besides, first.
        others: called with the rows of other weights of stacked experts (``ExpertCalls``).
    """
    plain = [(layer.module, name) for name, layer in layers.items() if layer.stack is None]
    entries = list(more or [])
    if before is not None:
        entries += hooks([(module, _before(before, name)) for module, name in plain], before=True)
    if after is not None:
        entries += hooks([(module, _after(after, name)) for module, name in plain])
    stacked = {name: layer for name, layer in layers.items() if layer.stack is not None}
    if not stacked:
        return replaced(entries), nullcontext()
    names = {layer.weight.data_ptr(): name for name, layer in stacked.items()}
    modules = {id(layer.module): layer.module for layer in stacked.values()}.values()
    calls = ExpertCalls(names, modules, before=before, after=after, others=others)
    return replaced(entries + calls.forwards()), calls


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _before(take: Before, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(name, _input(args, kwargs))

    return hook


def _after(take: After, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        take(name, _input(args, kwargs), output)

    return hook
