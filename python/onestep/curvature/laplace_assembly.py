"""The blocks of a model's Gauss-Newton matrix, summed over all rows of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import vmap

from onestep._restored import hooked
from onestep.curvature.glm import GLMPoint, glm
from onestep.curvature.jacobian import root_jacobian, root_of_loss
from onestep.curvature.kernels import differentiable_kernels
from onestep.curvature.laplace_blocks import Block, DenseBlocks, DiagonalBlock, KroneckerBlock
from onestep.curvature.products import Route
from onestep.evaluation.data import Chunk
from onestep.evaluation.exclusive import exclusive
from onestep.evaluation.layers import columns, ends_model, is_plain, layer_calls, spread
from onestep.evaluation.losses import IGNORED, Loss, are_probabilities, like_outputs, scores_and_classes
from onestep.evaluation.module import call_model
from onestep.evaluation.parameters import ParameterVector
from onestep.linalg import gram

Structure: TypeAlias = Literal["exact", "block", "kronecker", "diagonal"]
STRUCTURES: tuple[Structure, ...] = ("exact", "block", "kronecker", "diagonal")

_FAMILIES = {"cross_entropy": "softmax", "poisson": "poisson", "bce": "logistic"}
# A larger matrix, of 2 GiB in float64, is refused.
_LARGEST = 16384


@dataclass(frozen=True)
class LastLayer:
    """The linear layer whose outputs are the model's."""

    layer: nn.Linear

    @property
    def index(self) -> Tensor:
        """Places of weight and bias among the layer's parameters, (outputs, inputs + 1), or without the last column."""
        outputs, inputs = self.layer.weight.shape
        weight = torch.arange(outputs * inputs).view(outputs, inputs)
        if self.layer.bias is None:
            return weight
        return torch.cat([weight, (outputs * inputs + torch.arange(outputs))[:, None]], 1)

    def features(self, module: nn.Module, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """What the layer is given for a chunk, (n,…,d), and the model's outputs."""
        calls, outputs = layer_calls(module, self.layer, chunk)
        if not ends_model(calls, outputs):
            raise ValueError("the model's outputs are not those of its last layer for some rows; use parameters='all'")
        return calls[0][0], outputs


def find_last_layer(module: nn.Module, chunk: Chunk) -> LastLayer:
    """The linear layer that ends the model.

    Raises:
        ValueError: there is none.
    """
    few = spread(chunk)
    for layer in reversed(list(module.modules())):
        if type(layer) is nn.Linear and is_plain(layer) and ends_model(*layer_calls(module, layer, few)):
            return LastLayer(layer)
    raise ValueError("parameters='last_layer', but no nn.Linear layer ends the model; expected one, or 'all'")


class Sums:
    """The blocks, and what else is summed over the rows.

    Attributes:
        loss: the sum of the loss.
        elements: of the loss.
        log_constants: what the likelihood has besides the loss: -Σ log y! for counts.
    """

    def __init__(
        self, module: nn.Module, loss: Loss, parameters: ParameterVector, names: list[str], head: LastLayer | None
    ) -> None:
        self.module, self.loss_function, self.parameters, self.names, self.head = module, loss, parameters, names, head
        self.loss, self.elements, self.log_constants = 0.0, 0.0, 0.0
        self.route = Route()

    def blocks(self, structure: Structure, chunks: Callable[[], Iterator[Chunk]]) -> list[Block]:
        """Reads all rows."""
        p = len(self.parameters)
        dense = structure == "exact" and not (self.head and self.loss_function.name == "mse")
        if dense and p > _LARGEST:
            raise ValueError(
                f"structure='exact' holds a matrix of {p} x {p} numbers, {p * p * 8 / 2**30:.1f} GiB; expected at most "
                f"{_LARGEST} parameters, or structure='kronecker'"
            )
        with torch.no_grad():
            if self.head is not None:
                return [self._of_head(self.head, structure, chunks)]
            if structure == "kronecker":
                return self._by_layers(chunks)
            return self._by_rows(structure, chunks)

    def _count(self, chunk: Chunk, outputs: Tensor) -> None:
        self.loss += self.loss_function.sum(outputs, chunk.target).item()
        self.elements += self.loss_function.elements(chunk.target, len(chunk))
        if self.loss_function.name == "poisson":
            self.log_constants -= torch.lgamma(chunk.target.double() + 1).sum().item()

    # ------------------------------------------------------------------------------------------------ a last layer

    def _of_head(self, head: LastLayer, structure: Structure, chunks: Callable[[], Iterator[Chunk]]) -> Block:
        terms: list[Tensor] | None = None
        for chunk in chunks():
            features, outputs = head.features(self.module, chunk)
            self._count(chunk, outputs)
            more = self._head_terms(head, structure, chunk, columns(head.layer, features), outputs)
            terms = more if terms is None else [total.add_(term) for total, term in zip(terms, more, strict=True)]
        assert terms is not None
        index, k = head.index, len(head.layer.weight)
        if self.loss_function.name == "mse":
            # H is the same for each output: 2 ΦᵀΦ.
            inner, twice = terms[0], 2 * torch.eye(k, dtype=torch.float64, device=terms[0].device)
            if structure == "diagonal":
                return DiagonalBlock(index, 2 * inner.diagonal().expand(k, -1))
            return KroneckerBlock(index, twice, inner)
        if structure == "exact":
            # The GLM's order is (inputs + 1, outputs).
            d = index.shape[1]
            matrix = terms[0].view(d, k, d, k).permute(1, 0, 3, 2).reshape(1, k * d, k * d)
            return DenseBlocks(index, matrix)
        if structure == "block":
            return DenseBlocks(index, terms[0])
        if structure == "diagonal":
            return DiagonalBlock(index, terms[0].mT)
        return KroneckerBlock(index, terms[1] / terms[2], terms[0])

    def _head_terms(
        self, head: LastLayer, structure: Structure, chunk: Chunk, features: Tensor, outputs: Tensor
    ) -> list[Tensor]:
        """What is summed over chunks, in float64."""
        if self.loss_function.name == "mse":
            return [_bordered(features, head).double()]
        point, weight = self._glm(head, chunk, features, outputs)
        if structure == "exact":
            return [point.gram().double()]
        if structure == "block":
            return [point.gram_blocks().double()]
        if structure == "diagonal":
            return [point.gram_diagonal().double()]
        curvature = point.output_curvature().double()
        counted = features.new_ones(len(features)) if weight is None else weight
        if self.loss_function.name == "cross_entropy":
            weighted = curvature * counted.double()[:, None]
            left = weighted.sum(0).diag() - weighted.mT @ curvature
        else:
            left = curvature.sum(0).diag()
        return [_bordered(features, head, weight).double(), left, counted.double().sum()]

    def _glm(self, head: LastLayer, chunk: Chunk, features: Tensor, outputs: Tensor) -> tuple[GLMPoint, Tensor | None]:
        """The layer as a generalised linear model, and the weights of its rows."""
        weight, name = None, self.loss_function.name
        if name != "cross_entropy":
            target = columns(head.layer, like_outputs(outputs, chunk.target)).to(outputs.dtype)
        elif are_probabilities(outputs, chunk.target):
            target = columns(head.layer, chunk.target)
        else:
            target = scores_and_classes(outputs, chunk.target)[1]
            if bool((target == IGNORED).any()):
                weight = (target != IGNORED).to(features.dtype)
                target = target.clamp_min(0)
        W = head.layer.weight.detach().mT
        if head.layer.bias is not None:
            W = torch.cat([W, head.layer.bias.detach()[None]])
        bias = head.layer.bias is not None
        point = glm(features, target, W.contiguous(), _FAMILIES[name], weight=weight, intercept=bias)
        return point, weight

    # --------------------------------------------------------------------------------------------- all parameters

    def _rows(self, chunk: Chunk, names: list[str]) -> Iterator[Tensor]:
        """R (m,p) with RᵀR the sum of JᵀHJ, J in the parameters of these names."""
        by_name = dict(zip(self.names, self.parameters.tensors, strict=True))
        some = ParameterVector([by_name[name] for name in names])
        for rows in root_jacobian(
            self.module,
            self.loss_function,
            chunk,
            some.read(),
            lambda vector: dict(zip(names, some.split(vector), strict=True)),
            self.route,
        ):
            yield rows.reshape(-1, len(some))

    def _by_rows(self, structure: Structure, chunks: Callable[[], Iterator[Chunk]]) -> list[Block]:
        p, device = len(self.parameters), self.parameters.device
        groups = {"exact": [torch.arange(p)], "block": list(self._layers().values())}.get(structure, [])
        matrices = [torch.zeros(len(g), len(g), dtype=torch.float64, device=device) for g in groups]
        squares = torch.zeros(p, dtype=torch.float64, device=device)
        for chunk in chunks():
            self._count(chunk, call_model(self.module, chunk.inputs))
            with exclusive(), differentiable_kernels():
                for rows in self._rows(chunk, self.names):
                    for index, matrix in zip(groups, matrices, strict=True):
                        some = rows if len(index) == p else rows[:, index]
                        matrix += gram(some.double())[0]
                    if not groups:
                        squares += rows.double().square().sum(0)
        if not groups:
            return [DiagonalBlock(torch.arange(p), squares)]
        return [DenseBlocks(index, matrix[None]) for index, matrix in zip(groups, matrices, strict=True)]

    def _places(self) -> dict[str, Tensor]:
        """The places of each parameter in the vector."""
        return dict(zip(self.names, torch.arange(len(self.parameters)).split(self.parameters.sizes), strict=True))

    def _layers(self) -> dict[str, Tensor]:
        """The places of each module's own parameters."""
        layers: dict[str, list[Tensor]] = {}
        for name, places in self._places().items():
            layers.setdefault(name.rpartition(".")[0], []).append(places)
        return {name: torch.cat(parts) for name, parts in layers.items()}

    def _by_layers(self, chunks: Callable[[], Iterator[Chunk]]) -> list[Block]:
        """Kronecker factors of linear layers, diagonals of other parameters."""
        places = self._places()
        layers: dict[nn.Linear, tuple[str, ...]] = {}
        shared = _used_twice(self.module)
        for name, layer in self.module.named_modules():
            own = tuple(f"{name}.{part}" if name else part for part in ("weight", "bias"))
            known = tuple(key for key in own if key in places)
            alone = not any(id(parameter) in shared for parameter in layer.parameters(recurse=False))
            if type(layer) is nn.Linear and is_plain(layer) and known[:1] == own[:1] and alone:
                layers[layer] = known
        factors: dict[nn.Module, _LayerFactors] = {}
        for layer, known in layers.items():
            factors[layer] = _LayerFactors(layer, bias=len(known) > 1)
        taken = {name for known in layers.values() for name in known}
        others = [name for name in self.names if name not in taken]
        squares = torch.zeros(sum(len(places[name]) for name in others), dtype=torch.float64)
        for chunk in chunks():
            self._count(chunk, _add_factors(self.module, self.loss_function, chunk, factors))
            if others:
                with exclusive(), differentiable_kernels():
                    for rows in self._rows(chunk, others):
                        squares += rows.double().square().sum(0)
        blocks: list[Block] = [
            KroneckerBlock(_layer_index(layer, [places[name] for name in known]), *factors[layer].pair())
            for layer, known in layers.items()
        ]
        if others:
            blocks.append(DiagonalBlock(torch.cat([places[name] for name in others]), squares))
        return blocks


def _bordered(features: Tensor, head: LastLayer, weight: Tensor | None = None) -> Tensor:
    """ΦᵀDΦ, with a column of ones in Φ if the layer has a bias."""
    if head.layer.bias is None:
        return gram(features, weight=weight)[0]
    inner, border = gram(features, features.new_ones(len(features), 1), weight=weight)
    total = features.new_tensor([[len(features)]]) if weight is None else weight.sum().reshape(1, 1)
    return torch.cat([torch.cat([inner, border], 1), torch.cat([border.mT, total], 1)])


def _layer_index(layer: nn.Module, parts: list[Tensor]) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    table = parts[0].view(weight.shape)
    return torch.cat([table, parts[1][:, None]], 1) if len(parts) > 1 else table


def _used_twice(module: nn.Module) -> set[int]:
    """The identities of parameters that several modules hold."""
    counts = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    return {identity for identity, count in counts.items() if count > 1}


class _LayerFactors:
    """Σ xxᵀ of what a layer is given and Σ ggᵀ of what comes back to it, g through each column of the loss's root.

    (Martens and Grosse, ICML 2015, with the exact sum over outputs; positions of a sequence count as independent.)
    """

    def __init__(self, layer: nn.Linear, *, bias: bool) -> None:
        out, d = layer.weight.shape
        self.bias, self.positions = bias, 0
        options: dict[str, Any] = {"dtype": torch.float64, "device": layer.weight.device}
        self.inputs = torch.zeros(d + bias, d + bias, **options)
        self.slopes = torch.zeros(out, out, **options)

    def add_inputs(self, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).double()
        if self.bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.inputs += gram(x)[0]
        self.positions += len(x)

    def add_slopes(self, slope: Tensor) -> None:
        self.slopes += gram(slope.reshape(-1, slope.shape[-1]).double())[0]

    def pair(self) -> tuple[Tensor, Tensor]:
        """Factors whose Kronecker product approximates the layer's block."""
        return self.slopes, self.inputs / max(self.positions, 1)


def _add_factors(module: nn.Module, loss: Loss, chunk: Chunk, factors: dict[nn.Module, _LayerFactors]) -> Tensor:
    """Adds a chunk to the factors, and returns the model's outputs."""
    given: list[tuple[_LayerFactors, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        factors[layer].add_inputs(args[0] if args else kwargs["input"])
        given.append((factors[layer], output))

    with hooked([(layer, note) for layer in factors]), torch.enable_grad():
        outputs = call_model(module, chunk.inputs)
    flat, shape = outputs.detach().reshape(len(chunk), -1), outputs.shape[1:]
    roots = vmap(lambda z, target: root_of_loss(loss, z, shape, target))(flat, chunk.target)
    results = [output for _, output in given]
    for column in range(roots.shape[1]):
        slope = roots[:, column].reshape(outputs.shape)
        found = torch.autograd.grad(outputs, results, slope, retain_graph=True, allow_unused=True)
        for (factor, _), slope in zip(given, found, strict=True):
            if slope is not None:
                factor.add_slopes(slope)
    return outputs.detach()
