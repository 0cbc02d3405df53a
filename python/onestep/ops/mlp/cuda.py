"""The ops on perceptrons on a GPU: compositions of torch's ops, layer by layer; there is no kernel of ours.

Formulas in csrc/mlp/mlp.hpp. Activations of all rows are kept, as in autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onestep.ops._library import register
from onestep.ops.mlp import schema
from onestep.ops.mlp.schema import ACTIVATIONS


@dataclass
class _Layer:
    """One layer at the rows: its weights, what it gets, and φ′ of its outputs (None: 1)."""

    weight: Tensor
    bias: Tensor | None
    given: Tensor
    slope: Tensor | None

    def before_activation(self, delta: Tensor) -> Tensor:
        return delta if self.slope is None else delta * self.slope


def _activated(z: Tensor, activation: int) -> tuple[Tensor, Tensor | None]:
    """φ(z) and φ′(z); None for 1."""
    if activation == ACTIVATIONS["identity"]:
        return z, None
    if activation == ACTIVATIONS["relu"]:
        return z.relu(), (z > 0).to(z.dtype)
    if activation == ACTIVATIONS["tanh"]:
        a = z.tanh()
        return a, 1 - a * a
    a = z.sigmoid()
    return a, a * (1 - a)


def _unpacked(vector: Tensor, widths: Sequence[int], biased: Sequence[bool]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weights and bias of each layer, as views of a vector of parameters."""
    at = 0
    for inputs, outputs, has_bias in zip(widths[:-1], widths[1:], biased, strict=True):
        end = at + inputs * outputs
        bias = vector[end : end + outputs] if has_bias else None
        yield vector[at:end].view(outputs, inputs), bias
        at = end + (outputs if has_bias else 0)


def _forward(
    X: Tensor, parameters: Tensor, widths: Sequence[int], activations: Sequence[int], biased: Sequence[bool]
) -> tuple[list[_Layer], Tensor]:
    """The layers at the rows X, and the outputs."""
    layers, a = [], X
    for (weight, bias), activation in zip(_unpacked(parameters, widths, biased), activations, strict=True):
        z = torch.nn.functional.linear(a, weight, bias)
        outputs, slope = _activated(z, activation)
        layers.append(_Layer(weight, bias, a, slope))
        a = outputs
    return layers, a


def _deltas(layers: list[_Layer], delta: Tensor) -> Iterator[tuple[_Layer, Tensor]]:
    """From the last layer to the first: the layer, and the derivative with respect to its z."""
    for layer in reversed(layers):
        delta = layer.before_activation(delta)
        yield layer, delta
        delta = delta @ layer.weight


def _gradient_of(layers: list[_Layer], delta: Tensor, *, squared: bool = False) -> Tensor:
    """Σ over rows of δ's outer products with what the layers get; or of their squares."""
    parts: list[Tensor] = []
    for layer, of_z in _deltas(layers, delta):
        given = layer.given.square() if squared else layer.given
        rows = of_z.square() if squared else of_z
        bias = [] if layer.bias is None else [rows.sum(0)]
        parts = [(rows.mT @ given).reshape(-1), *bias, *parts]
    return torch.cat(parts)


@register(schema.mlp_gradient, device="cuda")
def _gradient(
    X: Tensor,
    y: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    schema.gradient_results(X, y, parameters, widths, activations, biased, False)
    layers, outputs = _forward(X, parameters, widths, activations, biased)
    error = outputs - y
    loss = error.square().sum(dtype=torch.float64)
    return loss, _gradient_of(layers, 2 * error) if wants_gradient else parameters.new_empty(0)


@register(schema.mlp_product, device="cuda")
def _product(
    X: Tensor,
    parameters: Tensor,
    v: Tensor | None,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
) -> Tensor:
    schema.product_results(X, parameters, v, widths, activations, biased)
    layers, outputs = _forward(X, parameters, widths, activations, biased)
    if v is None:
        diagonal = torch.zeros_like(parameters, memory_format=torch.contiguous_format)
        for index in range(outputs.shape[1]):
            unit = torch.zeros_like(outputs)
            unit[:, index] = 1
            diagonal += _gradient_of(layers, unit, squared=True)
        return 2 * diagonal
    tangent: Tensor | None = None
    for layer, (weight, bias) in zip(layers, _unpacked(v, widths, biased), strict=True):
        moved = torch.nn.functional.linear(layer.given, weight, bias)
        if tangent is not None:
            moved = moved + tangent @ layer.weight.mT
        tangent = layer.before_activation(moved)
    assert tangent is not None
    return _gradient_of(layers, 2 * tangent)


@register(schema.mlp_jacobian, device="cuda")
def _jacobian(
    X: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    scale: float,
) -> Tensor:
    jacobian = schema.jacobian_results(X, parameters, widths, activations, biased, scale)
    layers, outputs = _forward(X, parameters, widths, activations, biased)
    for index in range(outputs.shape[1]):
        unit = torch.zeros_like(outputs)
        unit[:, index] = scale
        end = parameters.shape[0]
        for layer, of_z in _deltas(layers, unit):
            if layer.bias is not None:
                end -= of_z.shape[1]
                jacobian[:, index, end : end + of_z.shape[1]] = of_z
            end -= layer.weight.numel()
            outer = of_z[:, :, None] * layer.given[:, None, :]
            jacobian[:, index, end : end + layer.weight.numel()] = outer.flatten(1)
    return jacobian
