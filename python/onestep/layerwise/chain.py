"""Passes through one block of a model at a time, where its blocks are called one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onestep._restored import Entry, hooked, hooks, replaced
from onestep.layerwise.layers import Layer, call
from onestep.layerwise.padding import Masks, Padding

# What is kept of the hidden states of all batches, bytes: beyond it every pass is a whole one.
_MOST_KEPT = 1 << 32

# Of each model, which places of a batch are not padding, and what sends the batch through it.
Runs = tuple[list[Masks], list[Callable[[], object]]]
# A chain, and the number of a block in it.
Place = tuple[str, int]
Within = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class _Call:
    """What a block is called with: its first argument, and the others."""

    first: Any
    rest: tuple[Any, ...]
    keywords: dict[str, Any]
    name_of_first: str | None  # None: it is positional

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        if args:
            return _Call(args[0], args[1:], kwargs, None)
        name = next(iter(kwargs), "")
        return _Call(kwargs.get(name), (), {key: value for key, value in kwargs.items() if key != name}, name)

    def without_first(self) -> _Call:
        return _Call(None, self.rest, self.keywords, self.name_of_first)

    def run(self, block: nn.Module, first: Tensor) -> Any:
        """What the block returns for another first argument."""
        if self.name_of_first is None:
            return block(first, *self.rest, **self.keywords)
        return block(**{self.name_of_first: first}, **self.keywords)


@dataclass
class _Kept:
    """Of one batch in one model: what the block that is worked on is given, and the other arguments from it on."""

    hidden: Tensor
    calls: list[_Call]
    masks: Masks


class Passes:
    """Sends batches through models as far as some layers need it.

    A pass is whole, or through one block of a chain: a container whose blocks are called once each, in order, with what
    the one before returned, and with other arguments that do not depend on it. The hidden states in front of the block
    that is worked on are kept, of all batches. Whether a container is a chain is seen on the first batch: by what its
    blocks are given, by what they are given when the first returns something else, and by running one after the other,
    each a second time on something else.

    Args:
        models: in eval mode while this is used; layers and containers have the same names in all.
        batches: can be gone through again.
        layers: that will be asked for, by name.
        within: for each model what makes the context that it runs in.
        whole: there are whole passes only, as where the models have other names for their blocks.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        batches: Iterable[Any],
        layers: Mapping[str, Layer],
        *,
        within: Sequence[Within] | None = None,
        whole: bool = False,
    ) -> None:
        self._models, self._batches = models, batches
        self._within: Sequence[Within] = within or [nullcontext] * len(models)
        first = next(iter(batches))
        self._chains = [] if whole else _chains(models, first, list(layers))
        self._places = _places(models[0], first, layers, self._chains) if self._chains else {}
        # The chain and the block that the kept states are of.
        self._at: Place | None = None
        self._kept: list[list[_Kept]] = []

    def of(self, layers: Iterable[str]) -> Iterator[Runs]:
        """For each batch what runs each model through these layers, with what they are given now."""
        place = self._place(layers)
        if place is None:
            # What is kept may depend on the layers, which are about to change.
            self._forget()
        elif self._at is None or self._at[0] != place[0] or self._at[1] > place[1]:
            self._capture(place)
        while self._at is not None and place is not None and self._at[1] < place[1]:
            self._advance()
        if self._at is None:
            for batch in self._batches:
                runs = [partial(call, model, batch) for model in self._models]
                yield [Masks.of(batch)] * len(runs), self._inside(runs)
            return
        blocks = self._blocks(*self._at)
        for kept in self._kept:
            yield (
                [one.masks for one in kept],
                self._inside(
                    [partial(one.calls[0].run, block[0], one.hidden) for one, block in zip(kept, blocks, strict=True)]
                ),
            )

    def _inside(self, runs: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
        return [partial(_run_within, within, run) for within, run in zip(self._within, runs, strict=True)]

    def _place(self, layers: Iterable[str]) -> Place | None:
        """The chain and the block that all layers are called in, and nowhere else."""
        places = set().union(*(self._places.get(name, {None}) for name in layers))
        place = places.pop() if len(places) == 1 else None
        return place if place is not None and place[0] in self._chains else None

    def _blocks(self, chain: str, start: int) -> list[list[nn.Module]]:
        """Of each model, the blocks from one on."""
        return [_children(model, chain)[start:] for model in self._models]

    def _forget(self) -> None:
        self._at, self._kept = None, []

    def _capture(self, place: Place) -> None:
        self._forget()
        self._at = place
        size = 0
        for batch in self._batches:
            kept = []
            for model, blocks, within in zip(self._models, self._blocks(*place), self._within, strict=True):
                padding = Padding(Masks.of(batch))
                with within(), replaced(padding.hooks(model, blocks[:1])):
                    calls, masks = _calls_of(model, batch, blocks, padding.here)
                # Batches that take another way through the model than the first are no chain's.
                hidden = calls[0].first if len(calls) == len(blocks) else None
                size += hidden.nbytes if isinstance(hidden, Tensor) else 0
                if not isinstance(hidden, Tensor) or size > _MOST_KEPT:
                    self._chains.remove(place[0])
                    self._forget()
                    return
                kept.append(_Kept(hidden, [given.without_first() for given in calls], masks))
            self._kept.append(kept)

    def _advance(self) -> None:
        assert self._at is not None
        blocks = self._blocks(*self._at)
        for kept in self._kept:
            for one, block, within in zip(kept, blocks, self._within, strict=True):
                with within():
                    one.hidden = _first_of(one.calls.pop(0).run(block[0], one.hidden))
        self._at = (self._at[0], self._at[1] + 1)


def _run_within(within: Within, run: Callable[[], object]) -> object:
    with within():
        return run()


def _places(
    model: nn.Module, batch: Any, layers: Mapping[str, Layer], chains: list[str]
) -> dict[str, set[Place | None]]:
    """For each layer the blocks of chains that it is called in on one batch; None: elsewhere.

    A layer that is not reached, such as an expert, is in the blocks that have it as a child.
    """
    found: dict[str, set[Place | None]] = {}
    running: list[Place] = []

    def enter(place: Place) -> Callable[..., None]:
        return lambda module, args, kwargs: running.append(place)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running.pop()

    def seen(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: found.setdefault(name, set()).add(running[-1] if running else None)

    blocks = [(block, (chain, i)) for chain in chains for i, block in enumerate(_children(model, chain))]
    entries = hooks([(block, enter(place)) for block, place in blocks], before=True)
    entries += hooks([(layer.module, seen(name)) for name, layer in layers.items()], before=True)
    # The block itself may be the layer.
    entries += hooks([(block, leave) for block, _ in blocks])
    with replaced(entries):
        call(model, batch)
    within: dict[int, set[Place | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        chain = next((chain for chain in chains if _is_within(name, chain) and name != chain), None)
        place = None if chain is None else (chain, int(name[len(chain) :].lstrip(".").split(".")[0]))
        within.setdefault(id(module), set()).add(place)
    return {name: found.get(name) or within[id(layer.module)] for name, layer in layers.items()}


def _first_of(output: Any) -> Any:
    """The hidden state among what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _children(model: nn.Module, name: str) -> list[nn.Module]:
    return list(model.get_submodule(name).children())


def _calls_of(
    model: nn.Module, batch: Any, blocks: list[nn.Module], here: Callable[[], Masks] = Masks
) -> tuple[list[_Call], Masks]:
    """What each block is called with on one batch, in the order of the calls; the hidden state of the first alone.

    And what ``here`` says when the first is called.
    """
    calls: list[_Call] = []
    masks = Masks()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal masks
        given = _Call.of(args, kwargs)
        masks = masks if calls else here()
        calls.append(given.without_first() if calls else given)

    with hooked([(block, before) for block in blocks], before=True):
        call(model, batch)
    return calls, masks


def _is_within(name: str, outer: str) -> bool:
    return not outer or name.startswith(outer + ".")


def _chains(models: Sequence[nn.Module], batch: Any, names: list[str]) -> list[str]:
    """The containers that are chains in all models, most blocks that have layers first; none lies within another."""
    found: list[tuple[int, str]] = []
    for name, module in models[0].named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            start = name + "." if name else ""
            used = {layer[len(start) :].split(".")[0] for layer in names if layer.startswith(start)}
            whole = [child for child, _ in module.named_children()] == [str(i) for i in range(len(module))]
            if len(used) > 1 and whole:
                found.append((len(used), name))
    chains: list[str] = []
    for _, name in sorted(found, key=lambda entry: -entry[0]):
        apart = not any(_is_within(name, other) or _is_within(other, name) for other in chains)
        different = {id(model): model for model in models}.values()
        if apart and all(_is_chain(model, batch, _children(model, name)) for model in different):
            chains.append(name)
    return chains


def _is_chain(model: nn.Module, batch: Any, blocks: list[nn.Module]) -> bool:
    calls: list[_Call] = []
    marks: list[tuple[float, float]] = []
    returned: Any = None
    linked = True

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal linked
        given = _Call.of(args, kwargs)
        in_order = len(calls) < len(blocks) and module is blocks[len(calls)] and isinstance(given.first, Tensor)
        linked = linked and in_order and (not calls or given.first is returned)
        if linked:
            marks.append(_mark(given.first))
            calls.append(given.without_first() if calls else given)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal returned
        returned = _first_of(output)

    with hooked([(block, before) for block in blocks], before=True), hooked([(block, after) for block in blocks]):
        call(model, batch)
    if not linked or len(calls) != len(blocks):
        return False

    def halved(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return (output[0] / 2, *output[1:]) if isinstance(output, (tuple, list)) else output / 2

    with hooked([(blocks[0], halved)]):
        others, _ = _calls_of(model, batch, blocks)
    if len(others) != len(calls) or not all(
        _same(one.rest, other.rest) and _same(one.keywords, other.keywords)
        for one, other in zip(calls, others, strict=True)
    ):
        return False
    hidden = calls[0].first
    for block, given, mark in zip(blocks, calls, marks, strict=True):
        if _mark(hidden) != mark:
            return False
        result = _first_of(given.run(block, hidden))
        # Run once more on something else: what is written into the argument, or left in the model, would show.
        given.run(block, hidden / 2)
        if _mark(hidden) != mark:
            return False
        hidden = result
    return _mark(hidden) == _mark(returned)


def _mark(x: Tensor) -> tuple[float, float]:
    """Two sums that other values do not have."""
    return float(x.sum(dtype=torch.float64)), float(x.double().square().sum())


def _same(one: Any, other: Any) -> bool:
    """Equal, and of kinds that a call does not write into, as it does into a cache of keys."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and (one is other or torch.equal(one, other))
    if isinstance(one, (tuple, list)):
        alike = type(one) is type(other) and len(one) == len(other)
        return alike and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    plain = isinstance(one, (int, float, str, torch.dtype, torch.device))
    return one is other if one is None else plain and type(one) is type(other) and one == other


def without_caches(models: Sequence[nn.Module]) -> list[Entry]:
    """What ``replaced`` takes so that models of transformers keep no keys and values, which nobody reads here."""
    configs = [getattr(module, "config", None) for model in models for module in model.modules()]
    held = {id(config): vars(config) for config in configs if hasattr(config, "__dict__")}
    return [(values, "use_cache", False) for values in held.values() if values.get("use_cache") is True]
