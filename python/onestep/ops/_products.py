"""Matrix products of 16-bit operands with a result in float32, on any device.

torch's ``@`` rounds the result to the operands' dtype. Where a product is a term of a sum, or goes into an exponential,
that is where the digits are lost: cuBLAS accumulates in float32 anyway and can store that.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, for matrices a and b of one dtype, out of the same or of float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for matrices a and b of one dtype, total of the same or of float32."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif not a.is_cuda:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)
    elif _adds_to_float32():
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += torch.ops.aten.mm.dtype(a, b, total.dtype)


@functools.cache
def _adds_to_float32() -> bool:
    """Whether torch's addmm of 16-bit matrices takes a float32 matrix to add to; torch 2.10 did not."""
    small = torch.zeros(8, 8, dtype=torch.bfloat16, device="cuda")
    total = torch.zeros(8, 8, device="cuda")
    try:
        torch.ops.aten.addmm.dtype_out(total, small, small, torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def batched_product(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """A @ B of two batches of matrices of one dtype, in that dtype or in float32."""
    if A.dtype == dtype:
        return torch.bmm(A, B)
    if A.is_cuda:
        product: Tensor = torch.ops.aten.bmm.dtype(A, B, dtype)
        return product
    return torch.bmm(A.to(dtype), B.to(dtype))


def batched_product_into(out: Tensor, A: Tensor, B: Tensor) -> None:
    """out = A @ B, for batches of matrices A and B of one dtype, out of the same or of float32."""
    if A.dtype == out.dtype:
        torch.bmm(A, B, out=out)
    elif A.is_cuda:
        torch.ops.aten.bmm.dtype_out(A, B, out.dtype, out=out)
    else:
        torch.bmm(A.to(out.dtype), B.to(out.dtype), out=out)
