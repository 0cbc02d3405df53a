"""CPU kernel of the op on sparse matrices: allocate the result and call csrc/sparse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import register
from onestep.ops.sparse import schema

_MULTIPLY: dict[torch.dtype, Callable[..., None]] = {
    torch.float32: _native.sparse_multiply_f32,
    torch.float64: _native.sparse_multiply_f64,
}


@register(schema.sparse_multiply, device="cpu")
def _sparse_multiply(offsets: Tensor, indices: Tensor, values: Tensor, V: Tensor) -> Tensor:
    out = schema.multiply_results(offsets, indices, values, V)
    offsets, indices, values, V = (tensor.contiguous() for tensor in (offsets, indices, values, V))
    _MULTIPLY[values.dtype](
        n=out.shape[0],
        d=V.shape[0],
        k=V.shape[1],
        elements=len(values),
        offsets=offsets.data_ptr(),
        indices=indices.data_ptr(),
        wide=offsets.dtype == torch.int64,
        values=values.data_ptr(),
        v=V.data_ptr(),
        out=out.data_ptr(),
    )
    return out
