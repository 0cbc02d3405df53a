"""A preconditioner for Gauss-Newton that knows the model's linear layers: K-FAC."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import debug_unwrap

import onestep.linalg as linalg
from onestep._restored import hooked
from onestep.evaluation.parameters import ParameterVector, flatten

# A larger factor is kept as its diagonal: that of a vocabulary would take most of a step's time, and V² of memory.
_LARGEST_FACTOR = 2048
# Rounding makes a factor's eigenvalues wrong by some ε of their sum. Damping of this many ε leaves all positive.
_ROUNDINGS = 10


class LinearLayer(NamedTuple):
    """Where a linear layer's weight, and its bias if it is trained too, are among the parameters."""

    weight: int
    bias: int | None


def linear_layers(module: nn.Module, parameters: ParameterVector) -> dict[nn.Module, LinearLayer]:
    """The linear layers whose weight is trained."""
    places = {id(tensor): place for place, tensor in enumerate(parameters.tensors)}
    layers: dict[nn.Module, LinearLayer] = {}
    for layer in module.modules():
        if type(layer) is nn.Linear and id(layer.weight) in places:
            layers[layer] = LinearLayer(places.pop(id(layer.weight)), places.pop(id(layer.bias), None))
    return layers


class Factors:
    """Sums over rows of what the Kronecker factors are made of.

    For a layer y = Wx, the Gauss-Newton block of W is approximated by E[xxᵀ] ⊗ E[ggᵀ], g the gradient in y of the loss
    of an output drawn from the model (Martens and Grosse, ICML 2015; rows of a sequence count as independent). Of other
    parameters only the mean square of their gradient is kept.
    """

    def __init__(self, module: nn.Module, parameters: ParameterVector) -> None:
        self.layers = linear_layers(module, parameters)
        self.parameters = parameters
        self.inputs: dict[nn.Module, Tensor] = {}
        self.slopes: dict[nn.Module, Tensor] = {}
        self.positions: dict[nn.Module, float] = dict.fromkeys(self.layers, 0.0)
        for layer, (weight, bias) in self.layers.items():
            out, d = parameters.tensors[weight].shape
            d += bias is not None
            self.inputs[layer] = _empty_factor(d, parameters)
            self.slopes[layer] = _empty_factor(out, parameters)
        self.squares = torch.zeros(len(parameters.tensors), dtype=parameters.dtype, device=parameters.device)
        # Set once the forward pass is over: a model may run backward passes of its own in it.
        self.backward = False

    def collecting(self) -> AbstractContextManager[None]:
        """Sums over what the layers are given, and what comes back to them, meanwhile."""
        return hooked([(layer, self._collect) for layer in self.layers])

    def _collect(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self.backward:
            # Activation checkpoints compute layers anew.
            return
        x = args[0] if args else kwargs["input"]
        if debug_unwrap(x) is not x or debug_unwrap(output) is not output:
            # Inside a transform of torch.func that the model calls itself, these are not the values of rows.
            return
        x = x.detach()
        x = x.reshape(-1, x.shape[-1])
        if self.layers[layer].bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        _add_rows(x, self.inputs[layer])
        self.positions[layer] += len(x)

        def back(slope: Tensor) -> None:
            if self.backward:
                _add_rows(slope.detach().reshape(-1, slope.shape[-1]), self.slopes[layer])

        if output.requires_grad:
            output.register_hook(back)

    def add_gradient(self, parts: tuple[Tensor | None, ...]) -> None:
        """The gradient of the drawn outputs' loss, summed over independent rows: squared, the sum of their squares."""
        for place, part in enumerate(parts):
            if part is not None:
                self.squares[place] += part.square().mean()

    def packed(self) -> tuple[Tensor, list[float]]:
        """All sums, to be added up over processes."""
        return flatten([*self.inputs.values(), *self.slopes.values(), self.squares]), list(self.positions.values())

    def unpack(self, sums: Tensor, positions: list[float]) -> None:
        """The sums that ``packed`` made."""
        targets = [*self.inputs.values(), *self.slopes.values(), self.squares]
        for target, part in zip(targets, sums.split([target.numel() for target in targets]), strict=True):
            target.copy_(part.view_as(target))
        self.positions = dict(zip(self.layers, positions, strict=True))

    def preconditioner(self, count: float, damping: float) -> Callable[[Tensor], Tensor]:
        """v ↦ (approximate Gauss-Newton matrix of the mean over ``count`` + damping I)⁻¹ v."""
        parameters = self.parameters
        inverses: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            if self.positions[layer]:
                A, G = self.inputs[layer] / self.positions[layer], self.slopes[layer] / count
                inverses[layer] = _damped_inverses(A, G, damping)
        scales = 1 / (self.squares / count + damping)

        def apply(v: Tensor) -> Tensor:
            parts = parameters.split(v)
            result = [part * scale for part, scale in zip(parts, scales, strict=True)]
            for layer, (left, right) in inverses.items():
                weight, bias = self.layers[layer]
                block = parts[weight]
                if bias is not None:
                    block = torch.cat([block, parts[bias][:, None]], 1)
                block = right @ block if right.dim() == 2 else right[:, None] * block
                block = block @ left if left.dim() == 2 else block * left
                result[weight] = block[:, : parts[weight].shape[1]]
                if bias is not None:
                    result[bias] = block[:, -1]
            return flatten(result)

        return apply


def _empty_factor(size: int, like: ParameterVector) -> Tensor:
    """Zeros (n,n), or (n,) for a diagonal."""
    shape = (size, size) if size <= _LARGEST_FACTOR else (size,)
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _add_rows(rows: Tensor, factor: Tensor) -> None:
    """factor += Σ rrᵀ over the rows, or the diagonal of that."""
    factor += rows.mT @ rows if factor.dim() == 2 else rows.square().sum(0)


def _trace(factor: Tensor) -> float:
    return (factor.trace() if factor.dim() == 2 else factor.sum()).item()


def _damped_inverses(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A + π√damping I)⁻¹ and (G + √damping/π I)⁻¹, π² the ratio of their mean eigenvalues (ibid., section 6.3)."""
    a, g = _trace(A), _trace(G)
    tiny = torch.finfo(A.dtype).tiny
    ratio, root = math.sqrt(max(a / len(A), tiny) / max(g / len(G), tiny)), math.sqrt(damping)
    return _inverse(A, ratio * root), _inverse(G, root / ratio)


def _inverse(factor: Tensor, shift: float) -> Tensor:
    """(factor + shift I)⁻¹, with at least the shift that rounding asks for; a diagonal for a factor kept as one."""
    info = torch.finfo(factor.dtype)
    shift = max(shift, _ROUNDINGS * info.eps * _trace(factor), info.tiny)
    if factor.dim() == 1:
        return 1 / (factor + shift)
    shifted = factor.clone()
    shifted.diagonal().add_(shift)
    return linalg.cholesky_solve(
        torch.eye(len(factor), dtype=factor.dtype, device=factor.device), linalg.cholesky(shifted)
    )
