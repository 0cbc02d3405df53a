"""CPU kernels of the ops on generalised linear models: allocate the results and call csrc/glm."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import register
from onestep.ops.glm import schema
from onestep.ops.operands import Operand

Entries = dict[torch.dtype, Callable[..., None]]

_POINT: Entries = {
    torch.float32: _native.glm_point_f32,
    torch.float64: _native.glm_point_f64,
    torch.bfloat16: _native.glm_point_bf16,
}
_PRODUCT: Entries = {
    torch.float32: _native.glm_product_f32,
    torch.float64: _native.glm_product_f64,
    torch.bfloat16: _native.glm_product_bf16,
}


def _whole_operand(tensor: Tensor | None) -> Operand | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.stride(), tensor)


@register(schema.glm_point, device="cpu")
def _point(X: Tensor, y: Tensor, W: Tensor, weight: Tensor | None, family: int, intercept: bool) -> schema.Point:
    schema.check_point(X, y, W, weight, family, intercept)
    batch = schema.batches((X, 2), (y, 2), (W, 2), (weight, 1))
    if batch:
        return schema.point_by_matrix(_point, batch, X, y, W, weight, family, intercept)
    loss, gradient, curvature = schema.point_results(X, y, W, weight, family, intercept)
    curvature[-schema.CURVATURE_SLACK :] = 0
    labelled = not y.is_floating_point()
    schema.check_values(y, family, W.shape[-1])
    _POINT[X.dtype](
        family=family,
        intercept=intercept,
        x=_whole_operand(X),
        y=None if labelled else _whole_operand(y),
        labels=_whole_operand(y.squeeze(-1)) if labelled else None,
        weight=_whole_operand(weight),
        w=_whole_operand(W),
        n=X.shape[0],
        d=X.shape[1],
        k=W.shape[-1],
        loss=loss.data_ptr(),
        gradient=gradient.data_ptr(),
        curvature=curvature.data_ptr(),
    )
    return loss, gradient, curvature


@register(schema.glm_product, device="cpu")
def _product(
    V: Tensor, X: Tensor, W: Tensor, weight: Tensor | None, curvature: Tensor, family: int, intercept: bool
) -> Tensor:
    schema.check_product(V, X, W, weight, curvature, family, intercept)
    batch = schema.batches((V, 3), (X, 2), (W, 2), (weight, 1), (curvature, 1))
    if not schema.shares_one_point(batch, V, X, W, weight, curvature):
        return schema.product_by_matrix(_product, batch, V, X, W, weight, curvature, family, intercept)
    # One point for the whole batch: its right-hand sides share one pass.
    V, shape = V.reshape((math.prod(V.shape[:-2]), *V.shape[-2:])), V.shape
    product = schema.product_results(V, X, W, weight, curvature, family, intercept)
    # The kernel reads it as one array; vmap may hand over a strided view.
    curvature = curvature.contiguous()
    _PRODUCT[X.dtype](
        family=family,
        intercept=intercept,
        x=_whole_operand(X),
        weight=_whole_operand(weight),
        curvature=curvature.data_ptr(),
        v=_whole_operand(V),
        m=V.shape[0],
        n=X.shape[0],
        d=X.shape[1],
        k=V.shape[-1],
        product=product.data_ptr(),
    )
    return product.reshape(shape)
