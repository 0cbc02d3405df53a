"""The linear layer that ends a model, and what it is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onestep.evaluation.data import Chunk
from onestep.evaluation.module import call_model
from onestep.evaluation.parameters import ParameterVector
from onestep.training.objective import DataObjective

# What the model is found out to be on this many rows of the first chunk, spread over it.
_SAMPLE = 32


class Head(NamedTuple):
    """The one layer that is trained, whose outputs are the model's."""

    layer: nn.Module
    weight: Tensor
    bias: Tensor | None = None


def find_head(module: nn.Module, parameters: ParameterVector, chunk: Chunk) -> Head | None:
    """The linear layer or 1×1 convolution that holds all that is trained and ends the model, if there is one."""
    trained = {id(tensor) for tensor in parameters.tensors}
    for layer in module.modules():
        own = {id(p) for p in layer.parameters(recurse=False)}
        if own != trained or not _is_linear(layer):
            continue
        head = Head(layer, *layer.parameters(recurse=False))
        calls, outputs = _calls(module, layer, spread(chunk))
        if _ends(calls, outputs):
            return head
    return None


def last_linear(module: nn.Module, layer: nn.Module, chunk: Chunk) -> Tensor | None:
    """The module's outputs on some rows if they are a layer's, in its shape."""
    calls, outputs = _calls(module, layer, spread(chunk))
    return outputs if _ends(calls, outputs) and calls[0][1].shape == outputs.shape else None


def spread(chunk: Chunk) -> Chunk:
    return chunk.rows(slice(None, None, max(1, len(chunk) // _SAMPLE)))


def _ends(calls: list[tuple[Tensor, Tensor]], outputs: Tensor) -> bool:
    """Whether a layer was called once and what came out of it are the outputs, NaN or not."""
    if len(calls) != 1:
        return False
    result = calls[0][1]
    return result is outputs or torch.equal(result.flatten().nan_to_num(), outputs.flatten().nan_to_num())


def _calls(module: nn.Module, layer: nn.Module, chunk: Chunk) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What goes into a layer and comes out of it, for each time it is called, and the module's outputs."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_layer: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        if args:
            calls.append((args[0], result))

    handle = layer.register_forward_hook(note)
    try:
        with torch.no_grad():
            outputs = call_model(module, chunk.inputs)
    finally:
        handle.remove()
    return calls, outputs


def is_untouched(module: nn.Module) -> bool:
    """Whether a module computes what its class says: no hook or patch makes it another."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in vars(module)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes what its class says of its own weight and bias."""
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    return is_untouched(layer) and names in (["weight"], ["weight", "bias"])


def _is_linear(layer: nn.Module) -> bool:
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) or not is_plain(layer):
        return False
    if isinstance(layer, nn.Linear):
        return True
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ones = {*layer.kernel_size, *layer.stride, layer.groups}
    padded = layer.padding == "same" or any(p != 0 for p in layer.padding)
    return ones == {1} and not padded


def columns(layer: nn.Module, value: Tensor) -> Tensor:
    """(rows, features): a convolution's features are its second dimension, a linear layer's the last."""
    if not isinstance(layer, nn.Linear):
        value = value.movedim(1, -1)
    return value.reshape(-1, value.shape[-1])


def features_and_outputs(head: Head, objective: DataObjective, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
    """What the head is given for a chunk and what comes out of it; None if its outputs are not the model's."""
    calls, outputs = _calls(objective.module, head.layer, chunk)
    return calls[0] if _ends(calls, outputs) else None
