"""Which layer of a teacher belongs to which layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from onestep.layerwise.layers import Layer, every_layer

# What ``replace_blocks`` leaves at a container: for each of its blocks the places that it stands for.
_PLACES = "_onestep_places"
# Comes first among the places of a map.
MAP = -1

Places = list[tuple[int, ...]]


def places_of(container: Any) -> Places:
    """For each block of a container the places of the blocks that it stands for, before any were replaced."""
    places: Places | None = getattr(container, _PLACES, None)
    return places if places is not None and len(places) == len(container) else [(i,) for i in range(len(container))]


def map_of(places: Places) -> tuple[int, ...]:
    """The places of a map that takes the place of these blocks."""
    return (MAP, *(place for block in places for place in block if place != MAP))


def keep_places(container: Any, places: Places) -> None:
    """Leaves them at a container, where copies of the model have them."""
    setattr(container, _PLACES, places)


def check_names(names: Any) -> None:
    """Refuses what is no mapping from names to names, or None."""
    if names is None:
        return
    if not isinstance(names, Mapping):
        raise TypeError(f"names is {type(names).__name__}; expected a mapping from the model's names to the teacher's")
    for mine, theirs in names.items():
        if not isinstance(mine, str) or not (theirs is None or isinstance(theirs, str)):
            raise TypeError(
                f"names[{mine!r}] is {theirs!r}; expected a name of the teacher, or None for no counterpart"
            )


def paired(
    model: nn.Module, layers: Mapping[str, Layer], teacher: nn.Module, names: Mapping[str, str | None] | None
) -> dict[str, Layer]:
    """For each of the model's layers that has a counterpart the teacher's: a layer, or a block that returns as much.

    Args:
        model: that has the layers.
        layers: by name.
        teacher: that is looked into.
        names: of modules of the model, and what they are called in the teacher; None for what has no counterpart.

    Raises:
        ValueError: the teacher has no such layer, one with another number of outputs, or names may have shifted.
    """
    every = every_layer(teacher)
    modules = dict(teacher.named_modules())
    for given in names or {}:
        if not any(is_at(name, given) for name in layers):
            raise ValueError(
                f"names has {given!r}; expected names of layers, or of modules with layers, that are solved"
            )
    found: dict[str, Layer] = {}
    for name, layer in layers.items():
        theirs = _given(name, names)
        if theirs == "":
            theirs, is_map = _counterpart(model, teacher, name)
        elif theirs is None:
            continue
        else:
            # A layer whose counterpart is no layer, such as a map that replaced blocks.
            is_map = theirs not in every and theirs in modules
        if is_map:
            found[name] = Layer(theirs, modules[theirs])
            continue
        if theirs not in every:
            called = "" if theirs == name else f", which is {theirs!r} there"
            some = ", ".join(list(every)[:4]) or "none"
            raise ValueError(
                f"no linear layer of the teacher matches {name!r}{called}; it has {len(every)} ({some}, ...): pass "
                f"names={{{name!r}: ...}}, the teacher's name of it, or leave the layer out, layers=['*', '!{name}']"
            )
        found[name] = every[theirs]
        outputs, mine = found[name].weight.shape[0], layer.weight.shape[0]
        if outputs != mine:
            raise ValueError(f"layer {name!r} of the teacher has {outputs} outputs; expected {mine}, the model's")
    return found


def is_at(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".") or not outer


def _given(name: str, names: Mapping[str, str | None] | None) -> str | None:
    """What ``names`` says of a layer, by the longest name that it lies within; "": nothing."""
    fitting = [outer for outer in names or {} if is_at(name, outer)]
    if names is None or not fitting:
        return ""
    outer = max(fitting, key=len)
    theirs = names[outer]
    return None if theirs is None else theirs + name[len(outer) :]


def _counterpart(model: nn.Module, teacher: nn.Module, name: str) -> tuple[str, bool]:
    """The teacher's name of a layer, and whether it is a block whose output is meant."""
    parts = name.split(".")
    mine: Any = model
    theirs: Any = teacher
    found: list[str] = []
    for depth, part in enumerate(parts):
        if isinstance(mine, (nn.ModuleList, nn.Sequential)) and isinstance(theirs, type(mine)) and part.isdigit():
            here, there = places_of(mine), places_of(theirs)
            where = ".".join(parts[:depth])
            recorded = hasattr(mine, _PLACES) or hasattr(theirs, _PLACES)
            if len(here) != len(there) and not recorded:
                _check_lengths(name, where, len(here), len(there), part)
            if here != there and recorded:
                place = here[int(part)]
                index = next((i for i, other in enumerate(there) if other[-1] == place[-1]), None)
                is_map = place[0] == MAP and (index is None or there[index] != place)
                if index is None or (there[index] != place and not is_map):
                    raise ValueError(
                        f"layer {name!r} is in block {place[-1]} of {where!r} as it was, which the teacher has not as "
                        f"it was: pass names={{{where + '.' + part!r}: ...}}, the teacher's name of it, or None"
                    )
                found.append(str(index))
                if is_map:
                    return ".".join(found), True
                part = str(index)
                mine, theirs = mine[int(parts[depth])], theirs[index]
                continue
        found.append(part)
        mine, theirs = getattr(mine, part, None), getattr(theirs, part, None)
    return ".".join(found), False


def _check_lengths(name: str, where: str, mine: int, theirs: int, part: str) -> None:
    if int(part) < theirs:
        container = repr(where) if where else "the outermost container"
        block = f"{where}.{part}".lstrip(".")
        raise ValueError(
            f"{container} has {mine} blocks in the model and {theirs} in the teacher, so that {name!r} may be another "
            f"layer there: pass names={{{block!r}: ...}}, for each block the teacher's name of it"
        )
