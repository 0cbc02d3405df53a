"""Schema of the op on sparse matrices: checks of operands, shape of the result. Formulas in csrc/sparse/sparse.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.ops._library import define
from onestep.ops.operands import check_dims, check_floating, check_like


def multiply_results(offsets: Tensor, indices: Tensor, values: Tensor, V: Tensor) -> Tensor:
    """Checks the operands; returns XV (n,k), empty."""
    check_floating("values", values)
    check_like("V", V, values)
    for name, tensor in (("offsets", offsets), ("indices", indices), ("values", values)):
        if tensor.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected one dimension")
    check_dims("V", V, 2, "(d, k)")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets has dtype {offsets.dtype}; expected torch.int32 or torch.int64")
    if indices.dtype != offsets.dtype:
        raise TypeError(f"indices has dtype {indices.dtype}; expected {offsets.dtype}, like offsets")
    for name, tensor in (("offsets", offsets), ("indices", indices)):
        if tensor.device != values.device:
            raise ValueError(f"{name} is on device {tensor.device}; expected {values.device}, like the other operands")
    if len(offsets) == 0:
        raise ValueError("offsets has shape (0,); expected n + 1 numbers for n rows")
    if len(indices) != len(values):
        raise ValueError(f"indices has {len(indices)} elements, values has {len(values)}; expected as many")
    return values.new_empty((len(offsets) - 1, V.shape[1]))


# X V for X (n,d) in CSR form, V (d,k).
sparse_multiply = define(
    "sparse_multiply(Tensor offsets, Tensor indices, Tensor values, Tensor V) -> Tensor", fake=multiply_results
)
