"""Files of ``save``, read into a model that was built anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestep._fork import one_thread_after_fork
from onestep.layerwise.checks import check_path
from onestep.layerwise.export import BLOCKS, QuantizedWeight, part_of
from onestep.layerwise.pairs import MAP, Places, keep_places, places_of
from onestep.layerwise.places import fill
from onestep.layerwise.replacing import LinearBlock, cached_by


@one_thread_after_fork()
def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Reads a file of ``save`` into a model of the same kind, such as ``AutoModelForCausalLM.from_config(config)``.

    Runs of blocks that ``replace_blocks`` replaced become linear maps in the model, too, which transformers'
    ``from_pretrained`` does not know: it builds such blocks anew, with random weights. Codes become weights.

    Args:
        model: with the parameters that the saved one had before any blocks were replaced; changed in place.
        path: the file.

    Returns:
        The model. ``refit`` finds its layers in a teacher as in the model that was saved.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        OSError: the file cannot be read.
        ValueError: it is no file of ``save``, or of a model with other parameters or blocks; the model is as it was.
        TypeError: an argument is something else.

    Examples:
        >>> import copy, tempfile, torch
        >>> from torch import nn
        >>> from onestep.layerwise import load, replace_blocks, save
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> fresh, X = copy.deepcopy(model), torch.randn(100, 4)
        >>> _ = replace_blocks(model, X, ["0", "1"], progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/short.safetensors")
        ...     len(load(fresh, f"{folder}/short.safetensors")), torch.equal(fresh(X), model(X))
        (2, True)
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise ModuleNotFoundError("layerwise.load needs safetensors: pip install safetensors") from None
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected torch.nn.Module")
    check_path("path", path)
    if Path(path).is_dir():
        raise IsADirectoryError(f"path is {str(path)!r}, a folder; expected a file of layerwise.save")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a function of the file)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of layerwise.save, or damaged: {error}") from error
    if "onestep" not in metadata:
        raise ValueError(f"{path} is no file of layerwise.save: read it with model.load_state_dict")
    state = _dequantized(tensors, json.loads(metadata["onestep"]))
    whole: dict[str, tuple[list[nn.Module], Places]] = {}
    try:
        for name, blocks in json.loads(metadata.get(BLOCKS, "{}")).items():
            container = _container(model, name, blocks["places"], path)
            if container is not None:
                whole[name] = list(container), places_of(container)
                places = [tuple(place) for place in blocks["places"]]
                like = next(model.parameters())
                maps = {}
                for at, count in blocks["maps"].items():
                    gone = [container[place] for place in places[int(at)] if place != MAP]
                    maps[int(at)] = _map(state, f"{name}.{at}".lstrip("."), count, like, gone)
                for map_ in maps.values():
                    map_.train(model.training)
                fill(container, [maps[at] if at in maps else container[place[-1]] for at, place in enumerate(places)])
                keep_places(container, places)
        _check(model, state, path)
    except BaseException:
        for name, (modules, places) in whole.items():
            fill(model.get_submodule(name), modules)
            keep_places(model.get_submodule(name), places)
        raise
    # Of parameters that are tied the file has one.
    model.load_state_dict(state, strict=False)
    return model


def _container(model: nn.Module, name: str, places: list[list[int]], path: str | Path) -> Any:
    """The container that lost blocks; None where it has lost them already."""
    try:
        container = model.get_submodule(name)
    except AttributeError:
        container = None
    found = None if container is None else len(list(container.children()))
    wanted = 1 + max(place[-1] for place in places)
    if isinstance(container, (nn.ModuleList, nn.Sequential)):
        if places_of(container) == [tuple(place) for place in places]:
            return None
        if found == wanted and places_of(container) == [(place,) for place in range(wanted)]:
            return container
    raise ValueError(
        f"{path} has {len(places)} blocks in {name!r}, of which there were {wanted} before some were replaced; the "
        f"model has {'no such module' if found is None else found}: build it as it was, such as from its configuration"
    )


def _map(state: Mapping[str, Tensor], name: str, count: int | None, like: Tensor, gone: list[nn.Module]) -> nn.Module:
    """A map in the place of blocks that are gone: nn.Linear where ``count`` is None."""
    weight = state[f"{name}.weight" if count is None else f"{name}.map.weight"]
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=like.dtype, device=like.device)
    return linear if count is None else LinearBlock(linear, count, cached_by(gone))


def _dequantized(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights in the place of codes, by the names of parameters."""
    state = dict(tensors)
    experts: dict[str, dict[int, Tensor]] = {}
    for name, said in about.items():
        codes, scale, zero, group = (state.pop(part_of(name, part)) for part in ("codes", "scale", "zero", "group"))
        if said["bits"] <= 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, : len(group)]
        weight = QuantizedWeight(codes, scale, zero, group, said["bits"]).dequantize()
        if said.get("stacked"):
            stack, _, expert = name.rpartition(".")
            experts.setdefault(stack, {})[int(expert)] = weight
            continue
        weight = weight.mT if said.get("transposed") else weight
        state |= dict.fromkeys([part_of(name, "weight"), *said.get("tied", [])], weight)
    for stack, weights in experts.items():
        state[stack] = torch.stack([weights[expert] for expert in range(len(weights))])
    return state


def _check(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises where the model has other parameters than the file."""
    own = model.state_dict()
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    held = {value.data_ptr() for name, value in tensors.items() if name in state and value.numel()}
    lacking = [
        name for name in own if name not in state and (name not in tensors or tensors[name].data_ptr() not in held)
    ]
    unknown = [name for name in state if name not in own]
    if lacking or unknown:
        what = f"has no {lacking[0]!r}" if lacking else f"has {unknown[0]!r}, which the model has not"
        raise ValueError(f"{path} is of another model: it {what}")
    for name, value in state.items():
        if name in tensors and value.shape != own[name].shape:
            raise ValueError(
                f"{path} is of another model: {name!r} has shape {tuple(value.shape)}; expected "
                f"{tuple(own[name].shape)}"
            )
    # Views of one memory with other strides or dtypes are other tensors, as for ``save``.
    first: dict[Any, str] = {}
    for name, value in state.items():
        if name not in tensors or value.numel() == 0:
            continue
        mine = tensors[name]
        other = first.setdefault((mine.data_ptr(), tuple(mine.shape), mine.stride(), mine.dtype), name)
        if not torch.equal(state[other], value):
            raise ValueError(
                f"{path} is of another model: {other!r} and {name!r}, which are one parameter of the model, are two "
                "in the file: build the model as it was, such as with tie_word_embeddings=False"
            )
