"""A whole language model under cross-entropy: its loss and curvature without the scores of all words in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from onestep._restored import hooked
from onestep.curvature.products import outer_products
from onestep.evaluation.data import Chunk
from onestep.evaluation.layers import ends_model, is_plain, layer_calls, spread
from onestep.evaluation.losses import IGNORED, Loss
from onestep.evaluation.module import call_model
from onestep.evaluation.parameters import ParameterVector
from onestep.functional import linear_cross_entropy, linear_cross_entropy_ggnvp
from onestep.training.objective import DataObjective
from onestep.training.structures.base import Mismatch, ObjectiveType, Structure

if TYPE_CHECKING:
    from onestep.training.facts import Facts

# With fewer classes torch's own cross-entropy is faster, and the scores are small.
_LEAST_CLASSES = 1024


class HeadOperands(NamedTuple):
    """What a linear layer multiplies: input (n,…,D), weight (V,D) and bias (V,)."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None


def find_vocabulary_head(module: nn.Module, loss: Loss, chunk: Chunk) -> nn.Linear | Mismatch:
    """The linear layer of many classes whose outputs are the model's, under cross-entropy; or why there is none."""
    if loss.name != "cross_entropy":
        return Mismatch(f"the loss is {loss.name!r}, not 'cross_entropy'")
    if chunk.target.is_floating_point():
        return Mismatch("the targets are probabilities")
    why = f"no plain linear layer has {_LEAST_CLASSES} outputs or more"
    for layer in module.modules():
        if type(layer) is not nn.Linear or layer.out_features < _LEAST_CLASSES or not is_plain(layer):
            continue
        if not layer.weight.is_cpu or layer.weight.dtype not in (torch.float32, torch.float64):
            why = "its layer is not on a CPU in float32 or float64"
            continue
        calls, outputs = layer_calls(module, layer, spread(chunk))
        if not (ends_model(calls, outputs) and calls[0][1].shape == outputs.shape):
            why = "the outputs are not those of a linear layer that is called once"
        elif outputs.shape[1:-1] != chunk.target.shape[1:]:
            why = "the target is not one class for each position of the outputs"
        else:
            return layer
    return Mismatch(why)


class VocabularyHead(Structure):
    """A linear layer of many classes ends the model, under cross-entropy."""

    name: ClassVar[str] = "vocabulary head"

    def objective(self, facts: Facts, method: str) -> ObjectiveType | Mismatch:
        """Loss and products without the scores of all classes in memory; Levenberg-Marquardt needs none of them."""
        if method == "levenberg_marquardt":
            return Mismatch("levenberg_marquardt forms rows of the Jacobian")
        layer = find_vocabulary_head(facts.model, facts.loss, facts.first)
        return layer if isinstance(layer, Mismatch) else partial(VocabularyObjective, layer=layer)


class _ReachedError(Exception):
    """Ends a forward pass where the head would begin."""

    def __init__(self, operands: HeadOperands) -> None:
        super().__init__()
        self.operands = operands


class VocabularyObjective(DataObjective):
    """The loss of a model that ends in a linear layer of many classes, through ``linear_cross_entropy``."""

    def __init__(self, *args: Any, layer: nn.Linear, **options: Any) -> None:
        super().__init__(*args, **options)
        self.layer = layer

    def _operands(self, chunk: Chunk, values: dict[str, Tensor] | None = None) -> HeadOperands:
        """The model up to its head."""

        def stop(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _ReachedError(HeadOperands(args[0], layer.weight, layer.bias))

        try:
            with hooked([(self.layer, stop)], before=True):
                call_model(self.module, chunk.inputs, values)
        except _ReachedError as reached:
            return reached.operands
        raise ValueError("the model did not come to its last layer for some rows; pass a function as loss")

    def chunk_loss(self, chunk: Chunk, values: dict[str, Tensor] | None = None) -> Tensor:
        """The loss summed over a chunk."""
        h, weight, bias = self._operands(chunk, values)
        return linear_cross_entropy(h, weight, chunk.target, bias, ignore_index=IGNORED, reduction="sum")

    def multiplier(
        self, parameters: ParameterVector, point: Tensor, chunk: Chunk, *, hessian: bool
    ) -> Callable[[Tensor], Tensor]:
        """JᵀHJ v: J of the head's operands, and between the two the head's part by ``linear_cross_entropy_ggnvp``."""
        if hessian:
            return super().multiplier(parameters, point, chunk, hessian=True)
        values = self.values(parameters)

        def operands(vector: Tensor) -> tuple[Tensor, ...]:
            return tuple(operand for operand in self._operands(chunk, values(vector)) if operand is not None)

        def curved(at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, weight, bias = HeadOperands(*at)
            vector = HeadOperands(*along)
            parts = linear_cross_entropy_ggnvp(
                h, weight, chunk.target, vector, bias, ignore_index=IGNORED, reduction="sum"
            )
            return tuple(part for part in parts if part is not None)

        return outer_products(operands, curved, point, keep=True, route=self.route)
