"""A small multilayer perceptron under squared error: loss, gradient and Jacobian by the ``mlp`` kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import onestep.linalg as linalg
from onestep.curvature.jacobian import jacobian_parts
from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import summed
from onestep.evaluation.layers import is_plain, is_untouched
from onestep.evaluation.losses import Loss, like_outputs
from onestep.evaluation.parameters import ParameterVector, flatten
from onestep.ops.mlp import ACTIVATIONS, MOST_LAYERS, mlp_gradient, mlp_jacobian, mlp_product
from onestep.optim.objective import CurvatureRoot
from onestep.training.objective import DataObjective, SummedRoot
from onestep.training.structures.base import Mismatch, ObjectiveType, Structure

if TYPE_CHECKING:
    from onestep.training.facts import Facts

_CODES = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
# What does nothing in eval mode.
_SILENT = (nn.Identity, nn.Dropout)
# Wider layers are matrix products that torch is faster at.
_WIDEST = 256


class Perceptron(NamedTuple):
    """Linear layers, each with a code of ``ACTIVATIONS``."""

    layers: list[nn.Linear]
    activations: list[int]

    @property
    def widths(self) -> list[int]:
        """Inputs, then the outputs of each layer."""
        return [self.layers[0].in_features, *(layer.out_features for layer in self.layers)]

    @property
    def biased(self) -> list[bool]:
        """Whether each layer has a bias."""
        return [layer.bias is not None for layer in self.layers]

    def tensors(self) -> list[Tensor]:
        """The parameters, in the kernels' order."""
        return [p for layer in self.layers for p in layer.parameters(recurse=False)]


def find_perceptron(module: nn.Module, loss: Loss, chunk: Chunk) -> Perceptron | Mismatch:
    """The module as linear layers with activations between, under squared error; or why it is anything else."""
    X, y = chunk.inputs, chunk.target
    if loss.name != "mse":
        return Mismatch(f"the loss is {loss.name!r}, not 'mse'")
    if not (isinstance(X, Tensor) and isinstance(y, Tensor)) or X.dim() != 2:
        return Mismatch("the data is not a matrix of inputs with a tensor of targets")
    layers: list[nn.Linear] = []
    activations: list[int] = []
    for part in _parts(module):
        if type(part) is nn.Linear:
            layers.append(part)
            activations.append(ACTIVATIONS["identity"])
        elif type(part) in _CODES and layers and activations[-1] == ACTIVATIONS["identity"]:
            activations[-1] = ACTIVATIONS[_CODES[type(part)]]
        elif type(part) not in _SILENT:
            return Mismatch(f"the model is not nn.Sequential of nn.Linear, ReLU, Tanh, Sigmoid: {type(part).__name__}")
        if not is_untouched(part):
            return Mismatch(f"a hook or a patch changes what {type(part).__name__} computes")
    found = Perceptron(layers, activations)
    if not 1 <= len(layers) <= MOST_LAYERS:
        return Mismatch(f"the model has {len(layers)} linear layers, not 1 to {MOST_LAYERS}")
    if max(found.widths) > _WIDEST:
        return Mismatch(f"a layer is {max(found.widths)} wide, more than {_WIDEST}")
    tensors = [X, y, *found.tensors()]
    if X.dtype not in (torch.float32, torch.float64) or not all(t.is_cpu and t.dtype == X.dtype for t in tensors):
        return Mismatch("data and parameters are not all on a CPU in float32, or all in float64")
    others = {id(p) for p in module.parameters()} - {id(t) for t in tensors}
    if others or len({id(t) for t in tensors}) < len(tensors) or not all(map(is_plain, layers)):
        return Mismatch("layers share parameters, or hold other ones than weight and bias")
    if X.shape[1] != found.widths[0] or y.numel() != len(X) * found.widths[-1]:
        return Mismatch("inputs or target have another number of columns than the layers")
    if not all(a.out_features == b.in_features for a, b in pairwise(layers)):
        return Mismatch("layers do not fit on each other")
    return found


class SmallPerceptron(Structure):
    """Linear layers of at most 256 outputs with activations between, under squared error."""

    name: ClassVar[str] = "perceptron"

    def objective(self, facts: Facts, method: str) -> ObjectiveType | Mismatch:
        """Loss, gradient, Jacobian and Gauss-Newton products by the ``mlp`` kernels."""
        network = find_perceptron(facts.model, facts.loss, facts.first)
        return network if isinstance(network, Mismatch) else partial(PerceptronObjective, network=network)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a module runs one after the other, as far as nn.Sequential tells."""
    if type(module) is nn.Sequential and is_untouched(module):
        for part in module:
            yield from _parts(part)
    else:
        yield module


class PerceptronObjective(DataObjective):
    """The squared error of a perceptron; products with its Hessian are torch's."""

    def __init__(self, *args: Any, network: Perceptron, **options: Any) -> None:
        super().__init__(*args, **options)
        self.network = network
        self.shape = network.widths, network.activations, network.biased
        self.tensors = network.tensors()
        self.ids = [id(t) for t in self.tensors]

    def _operands(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        X = chunk.inputs
        y = like_outputs(X.new_empty(()).expand(len(X), self.network.widths[-1]), chunk.target)
        return X, y, flatten([t.detach() for t in self.tensors])

    def _is_all(self, parameters: ParameterVector) -> bool:
        """Whether the optimiser's parameters are the network's, in the kernels' order."""
        return self.ids == [id(t) for t in parameters.tensors]

    def _trained(self, vector: Tensor, parameters: ParameterVector) -> Tensor:
        """Those elements (…,p) that are the optimiser's parameters, in its order."""
        if self._is_all(parameters):
            return vector
        parts = dict(zip(self.ids, vector.split([t.numel() for t in self.tensors], dim=-1), strict=True))
        return torch.cat([parts[id(t)] for t in parameters.tensors], dim=-1)

    def chunk_gradient(self, chunk: Chunk, parameters: ParameterVector) -> tuple[float, Tensor]:
        """The loss summed over a chunk and its gradient (p,)."""
        with torch.no_grad():
            loss, gradient = mlp_gradient(*self._operands(chunk), *self.shape, True)
        return loss.item(), self._trained(gradient, parameters)

    def chunk_loss(self, chunk: Chunk, values: dict[str, Tensor] | None = None) -> Tensor:
        """The loss summed over a chunk."""
        if values is not None or torch.is_grad_enabled():
            return super().chunk_loss(chunk, values)
        loss: Tensor = mlp_gradient(*self._operands(chunk), *self.shape, False)[0]
        return loss

    def _direction(self, v: Tensor, parameters: ParameterVector) -> Tensor:
        """A vector (p,) as the kernels take it, with zeros for what is not trained."""
        if self._is_all(parameters):
            return v
        parts = dict(zip(map(id, parameters.tensors), parameters.split(v), strict=True))
        return flatten([parts.get(id(t), t.new_zeros(()).expand(t.shape)) for t in self.tensors])

    def multiplier(
        self, parameters: ParameterVector, point: Tensor, chunk: Chunk, *, hessian: bool
    ) -> Callable[[Tensor], Tensor]:
        """2 JᵀJ v in one pass over the chunk's rows; the Hessian by torch."""
        if hessian:
            return super().multiplier(parameters, point, chunk, hessian=True)
        # Whatever is not trained has its present values.
        values = dict(zip(map(id, parameters.tensors), parameters.split(point), strict=True))
        at = flatten([values.get(id(t), t.detach()) for t in self.tensors])

        def product(v: Tensor) -> Tensor:
            along = self._direction(v, parameters)
            return self._trained(mlp_product(chunk.inputs, at, along, *self.shape), parameters)

        return product

    def curvature_root(self, parameters: ParameterVector) -> CurvatureRoot | None:
        """Products cost so little that no rows of the Jacobian are kept."""
        if not self.sampled:
            return None
        chunks: list[Chunk] = []

        def local() -> tuple[Tensor, list[float]]:
            chunks.extend(self.curvature_chunks())
            return torch.empty(0), [sum(map(self._elements, chunks))]

        count = int(summed(local)[1][0])
        return _PerceptronRoot(self, chunks, parameters, count) if count else None

    def root_jacobian(self, parameters: ParameterVector, chunk: Chunk) -> Iterator[Tensor]:
        """Rows R with RᵀR the sum of 2 JᵀJ over rows of the chunk, a piece at a time."""
        yield from self.jacobian_at(flatten([t.detach() for t in self.tensors]), parameters, chunk)

    def jacobian_at(self, vector: Tensor, parameters: ParameterVector, chunk: Chunk) -> Iterator[Tensor]:
        """The same where the network's parameters have other values."""
        for part in jacobian_parts(chunk, self.network.widths[-1] * len(parameters) * chunk.inputs.element_size()):
            J = mlp_jacobian(part.inputs, vector, *self.shape, math.sqrt(2.0))
            yield self._trained(J, parameters).reshape(-1, len(parameters))


class _PerceptronRoot(SummedRoot):
    """By the kernels, at the present parameters."""

    def __init__(
        self, objective: PerceptronObjective, chunks: list[Chunk], parameters: ParameterVector, count: int
    ) -> None:
        point = parameters.read()
        super().__init__(point, objective.pieces, count)
        self.objective, self.chunks, self.parameters = objective, chunks, parameters
        self.at = flatten([t.detach() for t in objective.tensors])
        self.multipliers = [objective.multiplier(parameters, point, chunk, hessian=False) for chunk in chunks]

    def diagonals(self) -> Iterator[tuple[int, Tensor]]:
        for chunk in self.chunks:
            diagonal = mlp_product(chunk.inputs, self.at, None, *self.objective.shape)
            yield chunk.piece, self.objective._trained(diagonal, self.parameters)

    def products(self, v: Tensor) -> Iterator[tuple[int, Tensor]]:
        return ((chunk.piece, product(v)) for chunk, product in zip(self.chunks, self.multipliers, strict=True))

    def matrices(self) -> Iterator[tuple[int, Tensor]]:
        for chunk in self.chunks:
            # The parameters may have moved on since.
            for rows in self.objective.jacobian_at(self.at, self.parameters, chunk):
                yield chunk.piece, linalg.gram(rows)[0]
