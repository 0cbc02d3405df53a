"""Ops on multilayer perceptrons under squared error: ``mlp_gradient``, ``mlp_product`` (of the Gauss-Newton matrix,
or its diagonal) and ``mlp_jacobian``.

A network is its ``widths`` (inputs, then each layer's outputs), a code of ``ACTIVATIONS`` a layer, and whether each
layer is ``biased``; its parameters are one vector: W₁ (outputs × inputs, by rows), b₁, W₂, ... ``onestep.fit`` takes
small networks through these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import define, register_not_differentiable
from onestep.ops._operands import check_dims, check_floating, check_like

# csrc/mlp/mlp.hpp, MlpActivation
ACTIVATIONS = {"identity": 0, "relu": 1, "tanh": 2, "sigmoid": 3}
# csrc/mlp/mlp.hpp, kMostMlpLayers
MOST_LAYERS = 32

_GRADIENT = {torch.float32: _native.mlp_gradient_f32, torch.float64: _native.mlp_gradient_f64}
_PRODUCT = {torch.float32: _native.mlp_product_f32, torch.float64: _native.mlp_product_f64}
_JACOBIAN = {torch.float32: _native.mlp_jacobian_f32, torch.float64: _native.mlp_jacobian_f64}


def _check(
    X: Tensor, parameters: Tensor, widths: Sequence[int], activations: Sequence[int], biased: Sequence[bool]
) -> None:
    check_floating("X", X)
    check_like("parameters", parameters, X)
    layers = len(activations)
    if not 1 <= layers <= MOST_LAYERS or len(widths) != layers + 1 or len(biased) != layers:
        raise ValueError(
            f"widths, activations and biased have {len(widths)}, {layers} and {len(biased)} elements; expected m + 1, "
            f"m and m for m from 1 to {MOST_LAYERS} layers"
        )
    if min(widths) < 1:
        raise ValueError(f"widths={list(widths)}; expected numbers of 1 or more")
    unknown = set(activations) - set(ACTIVATIONS.values())
    if unknown:
        raise ValueError(f"activations={list(activations)}; expected codes from {ACTIVATIONS}")
    if X.dim() != 2 or X.shape[1] != widths[0]:
        raise ValueError(f"X has shape {tuple(X.shape)}; expected (n, {widths[0]})")
    pairs = zip(widths[:-1], widths[1:], biased, strict=True)
    count = sum(outputs * (inputs + bias) for inputs, outputs, bias in pairs)
    check_dims("parameters", parameters, 1, f"({count},)")
    if parameters.shape != (count,):
        raise ValueError(f"parameters has shape {tuple(parameters.shape)}; expected ({count},)")


def _gradient_fake(
    X: Tensor,
    y: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    _check(X, parameters, widths, activations, biased)
    check_like("y", y, X)
    if y.shape != (X.shape[0], widths[-1]):
        raise ValueError(f"y has shape {tuple(y.shape)}; expected ({X.shape[0]}, {widths[-1]})")
    return X.new_empty((), dtype=torch.float64), parameters.new_empty(parameters.shape[0] if wants_gradient else 0)


def _gradient_cpu(
    X: Tensor,
    y: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss, gradient = _gradient_fake(X, y, parameters, widths, activations, biased, wants_gradient)
    parameters = parameters.contiguous()
    _GRADIENT[X.dtype](
        widths,
        activations,
        biased,
        X.shape[0],
        (X.data_ptr(), X.stride(), X),
        (y.data_ptr(), y.stride(), y),
        parameters.data_ptr(),
        loss.data_ptr(),
        gradient.data_ptr() if wants_gradient else 0,
    )
    return loss, gradient


define(
    "mlp_gradient(Tensor X, Tensor y, Tensor parameters, int[] widths, int[] activations, bool[] biased, "
    "bool wants_gradient) -> (Tensor, Tensor)",
    cpu=_gradient_cpu,
    fake=_gradient_fake,
)


def _product_fake(
    X: Tensor,
    parameters: Tensor,
    v: Tensor | None,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
) -> Tensor:
    _check(X, parameters, widths, activations, biased)
    if v is not None:
        check_like("v", v, X)
        if v.shape != parameters.shape:
            raise ValueError(f"v has shape {tuple(v.shape)}; expected {tuple(parameters.shape)}, as parameters")
    return torch.empty_like(parameters, memory_format=torch.contiguous_format)


def _product_cpu(
    X: Tensor,
    parameters: Tensor,
    v: Tensor | None,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
) -> Tensor:
    product = _product_fake(X, parameters, v, widths, activations, biased)
    parameters = parameters.contiguous()
    v = None if v is None else v.contiguous()
    _PRODUCT[X.dtype](
        widths,
        activations,
        biased,
        X.shape[0],
        (X.data_ptr(), X.stride(), X),
        parameters.data_ptr(),
        0 if v is None else v.data_ptr(),
        product.data_ptr(),
    )
    return product


define(
    "mlp_product(Tensor X, Tensor parameters, Tensor? v, int[] widths, int[] activations, bool[] biased) -> Tensor",
    cpu=_product_cpu,
    fake=_product_fake,
)


def _jacobian_fake(
    X: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    scale: float,
) -> Tensor:
    _check(X, parameters, widths, activations, biased)
    return X.new_empty((X.shape[0], widths[-1], parameters.shape[0]))


def _jacobian_cpu(
    X: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    scale: float,
) -> Tensor:
    jacobian = _jacobian_fake(X, parameters, widths, activations, biased, scale)
    parameters = parameters.contiguous()
    _JACOBIAN[X.dtype](
        widths,
        activations,
        biased,
        X.shape[0],
        (X.data_ptr(), X.stride(), X),
        parameters.data_ptr(),
        scale,
        jacobian.data_ptr(),
    )
    return jacobian


define(
    "mlp_jacobian(Tensor X, Tensor parameters, int[] widths, int[] activations, bool[] biased, float scale) -> Tensor",
    cpu=_jacobian_cpu,
    fake=_jacobian_fake,
)

for _name in ("mlp_gradient", "mlp_product", "mlp_jacobian"):
    register_not_differentiable(_name, "write the network in torch's ops where derivatives of it are wanted")
