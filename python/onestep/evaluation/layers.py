"""What layers are given and what comes out of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onestep._restored import hooked
from onestep._torch_private import is_hooked
from onestep.evaluation.data import Chunk
from onestep.evaluation.module import call_model

# A model is looked at on this many rows of the first chunk, spread over it.
_SAMPLE = 32


def spread(chunk: Chunk) -> Chunk:
    """A few rows of a chunk, at equal distances."""
    return chunk.rows(slice(None, None, max(1, len(chunk) // _SAMPLE)))


def layer_calls(module: nn.Module, layer: nn.Module, chunk: Chunk) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What goes into a layer and comes out of it, for each time it is called, and the module's outputs."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_layer: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], result: Tensor) -> None:
        if args:
            calls.append((args[0], result))

    with hooked([(layer, note)]), torch.no_grad():
        outputs = call_model(module, chunk.inputs)
    return calls, outputs


def ends_model(calls: list[tuple[Tensor, Tensor]], outputs: Tensor) -> bool:
    """Whether a layer was called once and what came out of it are the model's outputs, NaN or not."""
    if len(calls) != 1:
        return False
    result = calls[0][1]
    return result is outputs or torch.equal(result.flatten().nan_to_num(), outputs.flatten().nan_to_num())


def is_untouched(module: nn.Module) -> bool:
    """Whether a module computes what its class says: no hook or patch makes it another."""
    return not is_hooked(module) and "forward" not in vars(module)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes what its class says of its own weight and bias."""
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    return is_untouched(layer) and names in (["weight"], ["weight", "bias"])


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is nn.Linear or a 1×1 convolution, and no more than that."""
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
