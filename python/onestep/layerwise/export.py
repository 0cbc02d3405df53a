"""Results on disk that load without onestep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestep._files import is_regular, replacing
from onestep._fork import one_thread_after_fork, safe_after_fork
from onestep.layerwise.checks import check_path
from onestep.layerwise.layers import Layer, every_layer
from onestep.layerwise.pairs import MAP, places_of

# Of the metadata, what ``replace_blocks`` replaced.
BLOCKS = "onestep.blocks"


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix as codes: W = scale[:, group] · (codes − zero[:, group]).

    Attributes:
        codes: (outputs, features) uint8, under 2^bits.
        scale: (outputs, groups), positive; in the dtype that ``quantize`` was told, float32 unless it was.
        zero: (outputs, groups), in scale's dtype: the code of 0, a whole number.
        group: (features,) int64, the group of each feature.
        bits: 2 to 8.

    Examples:
        >>> import torch
        >>> from onestep.layerwise import quantize
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3))
        >>> weight = quantize(model, [torch.eye(2)], bits=4, progress=False).quantized["0"]
        >>> weight.codes.shape, torch.equal(weight.dequantize(), model[0].weight)
        (torch.Size([3, 2]), True)
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor
    bits: int

    @safe_after_fork
    def dequantize(self) -> Tensor:
        """W, (outputs, features), in scale's dtype."""
        return self.scale[:, self.group] * (self.codes - self.zero[:, self.group])


@one_thread_after_fork()
def save(model: nn.Module, path: str | Path, quantized: Mapping[str, QuantizedWeight] | None = None) -> None:
    """Writes a model's parameters and buffers as safetensors, which ``safetensors.torch.load_file`` reads.

    ``onestep.layerwise.load`` reads the file into a model that was built anew, with or without codes, and with the maps
    that ``replace_blocks`` has put in the place of blocks (the metadata's ``onestep.blocks``).

    Without ``quantized`` every weight is written as it is, dequantised, and ``model.load_state_dict`` takes the file.
    With it (``report.quantized``) the weights named there are written as ``NAME.codes`` (uint8; up to 4 bits two to a
    byte, the even column low), ``NAME.scale``, ``NAME.zero`` and ``NAME.group``; the metadata's ``onestep`` is a JSON
    object of NAME → bits, shape, and, where it is so, ``tied``, the other parameters that are this weight, and
    ``transposed``: the parameter is Wᵀ (Conv1D), ``stacked``: NAME is an expert of a stack; they are written one by
    one.
    W = scale[:, group] · (codes − zero[:, group]).

    Args:
        model: tied parameters are written once, under the first of their names (``safetensors.torch.load_model`` takes
            such files), or as the codes of the layer that was quantised.
        path: the file; it is replaced in one step and keeps its mode, and a link to a file stays.
        quantized: what ``quantize`` reported, of the weights as they still are, or as they are in another dtype:
            ``refit``, ``edit`` or ``replace_blocks`` have made others of them.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        ValueError: a name is no layer of the model, or its codes are not the weights that the layer has now.
        TypeError: an argument is something else, or a module's extra state is no tensor.

    Examples:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file
        >>> from onestep.layerwise import quantize, save
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
        >>> report = quantize(model, torch.randn(100, 16), bits=4, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/small.safetensors", report.quantized)
        ...     sorted(load_file(f"{folder}/small.safetensors"))
        ['0.bias', '0.codes', '0.group', '0.scale', '0.zero']
    """
    try:
        from safetensors.torch import save as serialized
        from safetensors.torch import save_file
    except ModuleNotFoundError:
        raise ModuleNotFoundError("layerwise.save needs safetensors: pip install safetensors") from None
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected torch.nn.Module")
    check_path("path", path)
    if quantized is not None:
        if not isinstance(quantized, Mapping):
            raise TypeError(f"quantized is {type(quantized).__name__}; expected report.quantized")
        for name, weight in quantized.items():
            if not isinstance(weight, QuantizedWeight):
                raise TypeError(f"quantized[{name!r}] is {type(weight).__name__}; expected QuantizedWeight")
    tensors: dict[str, Tensor] = {}
    same: dict[Any, list[str]] = {}
    held: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the model's state has {name!r}, {type(value).__name__}; expected tensors, as safetensors holds "
                "nothing else: return a tensor from get_extra_state, or torch.save(model.state_dict(), path)"
            )
        place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype) if value.numel() else name
        if place not in same:
            plain = value.detach().contiguous()
            # Part of another one, such as a buffer that is a view of a weight: safetensors writes no memory twice.
            storage = plain.untyped_storage().data_ptr()
            tensors[name] = plain.clone() if storage in held else plain
            held |= {storage} if value.numel() else set()
        same.setdefault(place, []).append(name)
    about: dict[str, dict[str, Any]] = {}
    names = {name: group for group in same.values() for name in group}
    every = every_layer(model)
    tied = _take_out(tensors, names, quantized or {})
    for name, weight in (quantized or {}).items():
        _check_codes(name, every, weight)
        codes = weight.codes
        if weight.bits <= 4:
            even, odd = codes[:, 0::2], codes[:, 1::2]
            codes = even | torch.nn.functional.pad(odd, (0, even.shape[1] - odd.shape[1])) << 4
        parts = {"codes": codes, "scale": weight.scale, "zero": weight.zero, "group": weight.group}
        tensors |= {part_of(name, part): value.contiguous() for part, value in parts.items()}
        about[name] = {"bits": weight.bits, "shape": list(weight.codes.shape)}
        if not isinstance(every[name].module, nn.Linear) and every[name].stack is None:
            about[name]["transposed"] = True
        if every[name].stack is not None:
            about[name]["stacked"] = True
        if tied.get(name):
            about[name]["tied"] = tied[name]
    metadata = {"format": "pt", "onestep": json.dumps(about)}
    replaced = _replaced(model)
    if replaced:
        metadata[BLOCKS] = json.dumps(replaced)
    with replacing(Path(path)) as file:
        if is_regular(file):
            # No copy of all tensors is made.
            save_file(tensors, file.name, metadata=metadata)
        else:
            file.write(serialized(tensors, metadata=metadata))


def _replaced(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of containers that lost blocks: which blocks each module stands for, and how the maps among them return."""
    found: dict[str, dict[str, Any]] = {}
    for name, container in model.named_modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            places = places_of(container)
            maps = {at: getattr(container[at], "count", None) for at, place in enumerate(places) if place[0] == MAP}
            if maps:
                found[name] = {"places": places, "maps": maps}
    return found


def _check_codes(name: str, every: Mapping[str, Layer], quantized: QuantizedWeight) -> None:
    """Refuses codes of other weights than the layer has."""
    if name not in every:
        raise ValueError(f"quantized names {name!r}, which is no linear layer of the model")
    weight, codes = every[name].weight.cpu(), quantized.dequantize().cpu()
    # The model may have been moved to another dtype since, and from there to the one that it has.
    between = (weight.dtype, torch.float32, torch.bfloat16, torch.float16)
    if weight.shape != codes.shape or not any(torch.equal(weight, codes.to(d).to(weight.dtype)) for d in between):
        raise ValueError(
            f"quantized[{name!r}] has other weights than the layer {name!r}, which was changed since it was quantised, "
            "as by refit, edit or replace_blocks, or is another layer now: quantise it again, or save without quantized"
        )


def part_of(name: str, part: str) -> str:
    """The name of a module's part; the model itself has none."""
    return f"{name}.{part}" if name else part


def _take_out(
    tensors: dict[str, Tensor], names: Mapping[str, list[str]], quantized: Mapping[str, QuantizedWeight]
) -> dict[str, list[str]]:
    """Removes the weights that are written as codes: a layer's own, or a stack whose experts are all among them.

    Args:
        tensors: by the first of their names.
        names: for each name all names of the same tensor.
        quantized: by the layers' names.

    Returns:
        For each layer the other names of its weight.
    """
    stacks: dict[str, set[str]] = {}
    tied: dict[str, list[str]] = {}
    for name in quantized:
        stack, _, expert = name.rpartition(".")
        weight = part_of(name, "weight")
        if weight in names and names[weight][0] in tensors:
            del tensors[names[weight][0]]
            tied[name] = [other for other in names[weight] if other != weight]
        elif stack in tensors and expert.isdigit():
            stacks.setdefault(stack, set()).add(expert)
        else:
            raise ValueError(f"quantized names {name!r}, which is no layer of the model")
    for stack, experts in stacks.items():
        if len(experts) != len(tensors[stack]):
            raise ValueError(f"quantized names {len(experts)} experts of {stack!r}; expected all {len(tensors[stack])}")
        del tensors[stack]
    return tied
