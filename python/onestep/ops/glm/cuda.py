"""CUDA kernels of the ops on generalised linear models.

Few columns: one kernel reads X once (csrc/glm/cuda). Many columns: for a chunk of rows torch's GEMM computes XV, a
kernel of ours applies the curvature, and torch's GEMM multiplies by Xᵀ. Nothing waits for the GPU: a bad target or a
negative weight makes the results NaN, and the status stands behind the curvature (``schema.CURVATURE_SLACK``;
``GLMPoint.info``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onestep.ops._cuda import entry, native, place, workspace
from onestep.ops._library import register
from onestep.ops.glm import schema
from onestep.ops.operands import Operand, check_not_negative

# Bytes of X and of its outputs that one GEMM takes: long enough to hide the launches, far less than X.
_CHUNK_BYTES = 256 << 20

# Without it this file is not imported.
assert native is not None
_CHUNK_LOSSES = native.glm_chunk_losses


def _whole(tensor: Tensor | None) -> Operand | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.stride(), tensor)


def _targets(y: Tensor) -> tuple[Operand | None, Operand | None]:
    """y, or class labels, as the kernels take them."""
    return (_whole(y), None) if y.is_floating_point() else (None, _whole(y.squeeze(-1)))


def _one_pass(X: Tensor, k: int, m: int, intercept: bool) -> Tensor | None:
    """Workspace of one pass over X with m·k columns; None if there are too many for one."""
    n, d = X.shape
    size = entry("glm_workspace", X.dtype)(intercept=intercept, n=n, d=d, k=k, m=m, device=place(X)["device"])
    return None if size < 0 else workspace(X, size)


def _chunks(X: Tensor, columns: int, dtype: torch.dtype) -> list[slice]:
    n, d = X.shape
    rows = max(_CHUNK_BYTES // ((d + columns) * dtype.itemsize), 1)
    return [slice(first, min(first + rows, n)) for first in range(0, n, rows)]


def _outputs(x: Tensor, right: Tensor, d: int) -> Tensor:
    """XV of a chunk of rows, in contiguous rows; right has one row more with an intercept."""
    return torch.mm(x, right) if right.shape[0] == d else torch.addmm(right[d], x, right[:d])


def _multiply_back(x: Tensor, middle: Tensor, total: Tensor, d: int) -> None:
    """total += Xᵀ·middle of a chunk of rows."""
    inner = total[:d]
    torch.addmm(inner, x.mT, middle, out=inner)
    if total.shape[0] > d:
        total[d] += middle.sum(0)


@register(schema.glm_point, device="cuda")
def _point(X: Tensor, y: Tensor, W: Tensor, weight: Tensor | None, family: int, intercept: bool) -> schema.Point:
    schema.check_point(X, y, W, weight, family, intercept)
    batch = schema.batches((X, 2), (y, 2), (W, 2), (weight, 1))
    if batch:
        return schema.point_by_matrix(_point, batch, X, y, W, weight, family, intercept)
    loss, gradient, curvature = schema.point_results(X, y, W, weight, family, intercept)
    (n, d), k = X.shape, W.shape[1]
    curvature[n * k :] = 0
    schema.check_values(y, family, k)
    check_not_negative("weight", weight)
    info = curvature.data_ptr() + n * k * curvature.itemsize
    scratch = _one_pass(X, k, 1, intercept)
    if scratch is not None:
        entry("glm_point", X.dtype)(
            family,
            intercept,
            _whole(X),
            *_targets(y),
            _whole(weight),
            _whole(W),
            n,
            d,
            k,
            loss.data_ptr(),
            gradient.data_ptr(),
            curvature.data_ptr(),
            info,
            scratch.data_ptr(),
            **place(X),
        )
        return loss, gradient, curvature
    chunks = _chunks(X, k, W.dtype)
    counts = [_CHUNK_LOSSES(rows.stop - rows.start) for rows in chunks]
    losses = torch.empty(sum(counts), dtype=torch.float64, device=X.device)
    statuses = torch.empty(sum(counts), dtype=torch.int32, device=X.device)
    gradient.zero_()
    done = 0
    for rows, count in zip(chunks, counts, strict=True):
        x = X[rows].to(W.dtype)
        middle = _outputs(x, W, d)
        entry("glm_chunk_point", W.dtype)(
            family,
            *_targets(y[rows]),
            None if weight is None else _whole(weight[rows]),
            len(x),
            k,
            middle.data_ptr(),
            curvature[rows.start * k :].data_ptr(),
            losses[done:].data_ptr(),
            statuses[done:].data_ptr(),
            **place(X),
        )
        _multiply_back(x, middle, gradient, d)
        done += count
    entry("glm_sum_losses", W.dtype)(done, losses.data_ptr(), statuses.data_ptr(), loss.data_ptr(), info, **place(X))
    return loss, gradient, curvature


@register(schema.glm_product, device="cuda")
def _product(
    V: Tensor, X: Tensor, W: Tensor, weight: Tensor | None, curvature: Tensor, family: int, intercept: bool
) -> Tensor:
    schema.check_product(V, X, W, weight, curvature, family, intercept)
    batch = schema.batches((V, 3), (X, 2), (W, 2), (weight, 1), (curvature, 1))
    if not schema.shares_one_point(batch, V, X, W, weight, curvature):
        return schema.product_by_matrix(_product, batch, V, X, W, weight, curvature, family, intercept)
    V, shape = V.reshape((math.prod(V.shape[:-2]), *V.shape[-2:])), V.shape
    check_not_negative("weight", weight)
    # The kernel reads it as one array; vmap may hand over a strided view.
    curvature = curvature.contiguous()
    (n, d), (m, height, k) = X.shape, V.shape
    scratch = _one_pass(X, k, m, intercept)
    if scratch is not None:
        product = schema.product_results(V, X, W, weight, curvature, family, intercept)
        entry("glm_product", X.dtype)(
            family,
            intercept,
            _whole(X),
            _whole(weight),
            curvature.data_ptr(),
            _whole(V),
            m,
            n,
            d,
            k,
            product.data_ptr(),
            scratch.data_ptr(),
            **place(X),
        )
        return product.reshape(shape)
    right = V.movedim(0, 1).reshape(height, m * k)
    total = torch.zeros_like(right)
    for rows in _chunks(X, m * k, W.dtype):
        x = X[rows].to(W.dtype)
        middle = _outputs(x, right, d)
        entry("glm_chunk_product", W.dtype)(
            family,
            None if weight is None else _whole(weight[rows]),
            len(x),
            k,
            m,
            middle.data_ptr(),
            curvature[rows.start * k :].data_ptr(),
            **place(X),
        )
        _multiply_back(x, middle, total, d)
    return total.reshape(height, m, k).movedim(1, 0).reshape(shape)
