"""CPU kernels of the ops on perceptrons: allocate the results and call csrc/mlp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import register
from onestep.ops.mlp import schema

Entries = dict[torch.dtype, Callable[..., None]]

_GRADIENT: Entries = {torch.float32: _native.mlp_gradient_f32, torch.float64: _native.mlp_gradient_f64}
_PRODUCT: Entries = {torch.float32: _native.mlp_product_f32, torch.float64: _native.mlp_product_f64}
_JACOBIAN: Entries = {torch.float32: _native.mlp_jacobian_f32, torch.float64: _native.mlp_jacobian_f64}


@register(schema.mlp_gradient, device="cpu")
def _gradient(
    X: Tensor,
    y: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss, gradient = schema.gradient_results(X, y, parameters, widths, activations, biased, wants_gradient)
    parameters = parameters.contiguous()
    _GRADIENT[X.dtype](
        widths=widths,
        activations=activations,
        biased=biased,
        n=X.shape[0],
        x=(X.data_ptr(), X.stride(), X),
        y=(y.data_ptr(), y.stride(), y),
        parameters=parameters.data_ptr(),
        loss=loss.data_ptr(),
        gradient=gradient.data_ptr() if wants_gradient else 0,
    )
    return loss, gradient


@register(schema.mlp_product, device="cpu")
def _product(
    X: Tensor,
    parameters: Tensor,
    v: Tensor | None,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
) -> Tensor:
    product = schema.product_results(X, parameters, v, widths, activations, biased)
    parameters = parameters.contiguous()
    v = None if v is None else v.contiguous()
    _PRODUCT[X.dtype](
        widths=widths,
        activations=activations,
        biased=biased,
        n=X.shape[0],
        x=(X.data_ptr(), X.stride(), X),
        parameters=parameters.data_ptr(),
        v=0 if v is None else v.data_ptr(),
        product=product.data_ptr(),
    )
    return product


@register(schema.mlp_jacobian, device="cpu")
def _jacobian(
    X: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    scale: float,
) -> Tensor:
    jacobian = schema.jacobian_results(X, parameters, widths, activations, biased, scale)
    parameters = parameters.contiguous()
    _JACOBIAN[X.dtype](
        widths=widths,
        activations=activations,
        biased=biased,
        n=X.shape[0],
        x=(X.data_ptr(), X.stride(), X),
        parameters=parameters.data_ptr(),
        scale=scale,
        jacobian=jacobian.data_ptr(),
    )
    return jacobian
