"""What a model gives its blocks by their place in the container, which others have when blocks are taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from onestep._restored import Entry, hooked, replaced
from onestep.layerwise.layers import call

# Where configurations of transformers have the kind of each block, such as "sliding_attention".
_KINDS = "layer_types"


class _Read(list[Any]):
    """A list that knows which of its places were read."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__(values)
        self.places: set[int] = set()

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, SupportsIndex) and not isinstance(place, Tensor):
            self.places.add(place.__index__())
        return super().__getitem__(place)


class Places:
    """Refuses a run of blocks to be replaced where later ones would be given what is another's.

    Args:
        model: with the map in its container.
        batch: that the model is run with.
        where: the name of the container, for messages.
        container: nn.Sequential or nn.ModuleList.
        first: the place of the map.
        count: how many blocks it stands for.
    """

    def __init__(self, model: nn.Module, batch: Any, where: str, container: Any, first: int, count: int) -> None:
        self._model, self._batch, self._where, self._container = model, batch, where, container
        self._first, self._count = first, count
        self._later = list(container)[first + 1 :] if count > 1 else []
        self._whole = len(container) + count - 1
        self._kinds: list[_Read] = []

    def run(self) -> None:
        """Runs the model, and looks which of the kinds of blocks that its configuration lists it reads."""
        # A model may have several configurations, such as of its towers: those of modules around the container.
        inside = self._container
        around = [module for module in self._model.modules() if any(part is inside for part in module.modules())]
        held = {id(vars(module)["config"]): vars(module)["config"] for module in around if "config" in vars(module)}
        entries: list[Entry] = []
        for config in held.values():
            values = getattr(config, "__dict__", {}).get(_KINDS)
            # More, where blocks were replaced before.
            if isinstance(values, (list, tuple)) and len(values) >= self._whole:
                self._kinds.append(_Read(values))
                entries.append((vars(config), _KINDS, self._kinds[-1]))
        with replaced(entries):
            call(self._model, self._batch)

    def check_kinds(self) -> None:
        """Looks what has been read by place.

        What blocks are given does not tell: the mask of a sliding window is that of all places where the data are
        shorter than the window.

        Raises:
            ValueError: kinds of blocks that are gone have been read, and later blocks are of other kinds.
        """
        # Blocks that read their own place do not read those of blocks that are gone.
        gone = range(self._first + 1, self._first + self._count)
        for read in self._kinds:
            moved = [place for place in range(len(self._later)) if not self._keeps(read, place, self._count)]
            if moved and any(place in read.places for place in gone):
                old = self._first + self._count + moved[0]
                raise ValueError(
                    f"the model reads the kinds of blocks by their place ({_KINDS} of its configuration), and "
                    f"{self._where}.{old} would become {list.__getitem__(read, old - self._count + 1)!r} where it is "
                    f"{list.__getitem__(read, old)!r}: replace {self._counts(read)} blocks from "
                    f"{self._where}.{self._first} on, so that later ones keep theirs, or other blocks"
                )

    def check_arguments(self, in_tuple: int) -> None:
        """Compares what later blocks are given with what they are given in their old places.

        Args:
            in_tuple: as ``LinearBlock.count``.

        Raises:
            ValueError: they are given other tensors beside the hidden state, which is the same.
        """
        if not self._later:
            return
        found = self._given()
        kept = list(self._container)
        skips = [Skip(in_tuple) for _ in range(self._count - 1)]
        fill(self._container, [*kept[: self._first + 1], *skips, *self._later])
        try:
            wanted = self._given()
        finally:
            fill(self._container, kept)
        for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
            if not _same(one, other):
                raise ValueError(
                    f"the model gives {self._where}.{self._first + self._count + place} other arguments than before "
                    "once it has another place, such as the mask or the positions of another kind of block: replace "
                    "other blocks, or one at a time"
                )

    def _given(self) -> list[list[Any]]:
        """What each later block is given but for its hidden state."""
        given: list[list[Any]] = [[] for _ in self._later]

        def hook(place: int) -> Any:
            def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = list(kwargs.items()) if args else list(kwargs.items())[1:]
                given[place].append([args[1:], dict(rest)])

            return record

        with hooked([(block, hook(place)) for place, block in enumerate(self._later)], before=True):
            call(self._model, self._batch)
        return given

    def _keeps(self, kinds: _Read, place: int, count: int) -> bool:
        """Whether a block of the list's end is of the same kind when it is ``count`` − 1 places further ahead."""
        old = self._first + count + place
        return bool(list.__getitem__(kinds, old) == list.__getitem__(kinds, old - count + 1))

    def _counts(self, kinds: _Read) -> str:
        """How many blocks from the first on can be replaced."""
        counts = [
            count
            for count in range(1, self._whole - self._first + 1)
            if all(self._keeps(kinds, place, count) for place in range(self._whole - self._first - count))
        ]
        return ", ".join(map(str, counts[:-1])) + " or " * (len(counts) > 1) + str(counts[-1])


class Skip(nn.Module):
    """A block that returns its first argument, and None for all else that it would return."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, hidden: Tensor, *unused: Any, **also_unused: Any) -> Any:
        """hidden (…, d), as it is."""
        return (hidden, *[None] * (self.count - 1)) if self.count else hidden


def fill(container: Any, modules: Sequence[nn.Module]) -> None:
    """Gives a container these modules instead of those that it has."""
    for _ in range(len(container)):
        del container[-1]
    container.extend(modules)


def _same(one: Any, other: Any) -> bool:
    """Whether tensors, and what holds them, are equal; objects of other kinds, such as caches, are let pass."""
    if (one is None) != (other is None) or isinstance(one, Tensor) != isinstance(other, Tensor):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one == other if isinstance(one, (str, bool, float)) else True
