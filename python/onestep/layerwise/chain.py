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
from onestep._torch_private import version
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
    each a second time on something else. All other batches are looked at when their states are kept: by what the blocks
    are given, and, where arguments are not those of the first of them, once more with something else from it.

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
        self._models, self._batches, self._layers = models, batches, layers
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
                yield [Masks.of(batch, model) for model in self._models], self._inside(runs)
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
                padding = Padding(Masks.of(batch, model))
                elsewhere = self._elsewhere(*place) if model is self._models[0] else _Elsewhere([], [])
                with within(), replaced(padding.hooks(model, blocks[:1])), replaced(elsewhere.hooks()):
                    found = _Followed(blocks, padding.here)
                    with replaced(found.hooks()):
                        call(model, batch)
                with within():
                    # Arguments that are the first one's do not depend on what it returns.
                    linked = found.linked and not elsewhere.found
                    linked = linked and (found.alike or _is_apart(model, batch, blocks, found.calls))
                # Batches that take another way through the model than the first are no chain's.
                hidden = found.calls[0].first if linked else None
                size += hidden.nbytes if isinstance(hidden, Tensor) else 0
                if not isinstance(hidden, Tensor) or size > _MOST_KEPT:
                    self._chains.remove(place[0])
                    self._forget()
                    return
                kept.append(_Kept(hidden, [given.without_first() for given in found.calls], found.masks))
            self._kept.append(kept)

    def _elsewhere(self, chain: str, start: int) -> _Elsewhere:
        """Looks for calls of the chain's layers outside the block that each was called in by the first batch."""
        blocks = self._blocks(chain, start)[0]
        inside = {name: place for name, places in self._places.items() for place in places if len(places) == 1}
        layers = [
            (self._layers[name].module, place[1] - start)
            for name, place in inside.items()
            if place is not None and place[0] == chain and place[1] >= start
        ]
        return _Elsewhere(blocks, layers)

    def _advance(self) -> None:
        assert self._at is not None
        blocks = self._blocks(*self._at)
        for kept in self._kept:
            for one, block, within in zip(kept, blocks, self._within, strict=True):
                with within():
                    one.hidden = _first_of(one.calls.pop(0).run(block[0], one.hidden))
        self._at = (self._at[0], self._at[1] + 1)


class _Elsewhere:
    """Whether layers are called outside their blocks, each given with the number of its block."""

    def __init__(self, blocks: Sequence[nn.Module], layers: Sequence[tuple[nn.Module, int]]) -> None:
        self._blocks, self._layers = blocks, layers
        self._running: list[int] = []
        self.found = False

    def hooks(self) -> list[Entry]:
        """What ``replaced`` takes while the model runs."""
        entries = hooks([(block, partial(self._enter, place)) for place, block in enumerate(self._blocks)], before=True)
        # The block itself may be the layer.
        entries += hooks([(module, partial(self._call, place)) for module, place in self._layers], before=True)
        return entries + hooks([(block, self._leave) for block in self._blocks])

    def _enter(self, place: int, *unused: Any) -> None:
        self._running.append(place)

    def _leave(self, *unused: Any) -> None:
        self._running.pop()

    def _call(self, place: int, *unused: Any) -> None:
        self.found = self.found or not self._running or self._running[-1] != place


class _Followed:
    """Whether blocks are called once each, in order, with what the one before returned, which nobody writes into.

    Attributes:
        linked: so it is, once the model has run.
        alike: the other arguments of all are the same objects, which nobody writes into either.
        calls: what each is called with, in the order of the calls; the hidden state of the first alone.
        masks: what ``here`` says when the first is called.
    """

    def __init__(self, blocks: Sequence[nn.Module], here: Callable[[], Masks] = Masks) -> None:
        self.calls: list[_Call] = []
        self.masks = Masks()
        self.returned: Any = None
        self.alike = True
        self._first: Any = None
        self._blocks, self._here, self._linked = blocks, here, True
        self._version = 0

    @property
    def linked(self) -> bool:
        return self._linked and len(self.calls) == len(self._blocks)

    def hooks(self) -> list[Entry]:
        """What ``replaced`` takes while the model runs."""
        pairs = [(block, self._after) for block in self._blocks]
        return hooks([(block, self._before) for block in self._blocks], before=True) + hooks(pairs)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _Call.of(args, kwargs)
        in_order = len(self.calls) < len(self._blocks) and module is self._blocks[len(self.calls)]
        self._linked = self._linked and in_order and isinstance(given.first, Tensor)
        if self._linked and self.calls:
            self._linked = given.first is self.returned and _version(given.first) == self._version
        if self._linked:
            self._version = _version(given.first)
            self.masks = self.masks if self.calls else self._here()
            marks = _objects((given.rest, *given.keywords.items()))
            self.alike = self.alike and (not self.calls or marks == self._first)
            self._first = self._first if self.calls else marks
            self.calls.append(given.without_first() if self.calls else given)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = _Call.of(args, kwargs).first
        if self._linked:
            self._linked = _version(given) == self._version
        self.returned = _first_of(output)
        self._version = _version(self.returned)


def _version(x: Any) -> int:
    """Changes when a tensor is written into."""
    return version(x) if isinstance(x, Tensor) and not x.is_inference() else 0


def _objects(value: Any) -> Any:
    """What is equal for the same tensors, and tuples of them, as long as nobody has written into them."""
    if isinstance(value, Tensor):
        return id(value), _version(value)
    if isinstance(value, tuple):
        return tuple(map(_objects, value))
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
    return (type(value), value) if plain else object()


def _is_apart(model: nn.Module, batch: Any, blocks: list[nn.Module], calls: list[_Call]) -> bool:
    """Whether the other arguments of blocks do not depend on what the first returns.

    Args:
        model: that runs.
        batch: that it is run with once more.
        blocks: of the chain.
        calls: of the blocks.
    """

    def halved(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return (output[0] / 2, *output[1:]) if isinstance(output, (tuple, list)) else output / 2

    with hooked([(blocks[0], halved)]):
        others = _calls_of(model, batch, blocks)
    return len(others) == len(calls) and all(
        _same(one.rest, other.rest) and _same(one.keywords, other.keywords)
        for one, other in zip(calls, others, strict=True)
    )


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


def _calls_of(model: nn.Module, batch: Any, blocks: list[nn.Module]) -> list[_Call]:
    """What each block is called with on one batch but for the hidden state, in the order of the calls."""
    calls: list[_Call] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call.of(args, kwargs).without_first())

    with hooked([(block, before) for block in blocks], before=True):
        call(model, batch)
    return calls


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
    found = _Followed(blocks)
    marks: list[tuple[float, float]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = _Call.of(args, kwargs).first
        marks.append(_mark(first) if isinstance(first, Tensor) else (0.0, 0.0))

    with replaced(found.hooks()), hooked([(block, note) for block in blocks], before=True):
        call(model, batch)
    calls = found.calls
    if not found.linked or not _is_apart(model, batch, blocks, calls):
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
    return _mark(hidden) == _mark(found.returned)


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
