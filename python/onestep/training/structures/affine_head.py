"""The linear layer that ends a model and holds all that is trained."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from onestep.evaluation.data import Chunk
from onestep.evaluation.layers import ends_model, is_linear, layer_calls, spread
from onestep.evaluation.parameters import ParameterVector
from onestep.training.structures.base import Mismatch


class Head(NamedTuple):
    """The one layer that is trained, whose outputs are the model's."""

    layer: nn.Module
    weight: Tensor
    bias: Tensor | None = None


def find_head(module: nn.Module, parameters: ParameterVector, chunk: Chunk) -> Head | Mismatch:
    """The linear layer or 1×1 convolution that holds all that is trained and ends the model, or why there is none."""
    trained = {id(tensor) for tensor in parameters.tensors}
    why = "no linear layer holds all that is trained, and nothing else"
    for layer in module.modules():
        own = {id(p) for p in layer.parameters(recurse=False)}
        if own != trained or not is_linear(layer):
            continue
        head = Head(layer, *layer.parameters(recurse=False))
        calls, outputs = layer_calls(module, layer, spread(chunk))
        if ends_model(calls, outputs):
            return head
        why = "the outputs are not those of the one linear layer that is trained"
    return Mismatch(why)


def features_and_outputs(head: Head, module: nn.Module, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
    """What the head is given for a chunk and what comes out of it; None if its outputs are not the model's."""
    calls, outputs = layer_calls(module, head.layer, chunk)
    return calls[0] if ends_model(calls, outputs) else None
