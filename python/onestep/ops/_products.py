"""Matrix products of 16-bit operands with a result in float32, on any device.

torch's ``@`` rounds the result to the operands' dtype. Where a product is a term of a sum, or goes into an exponential,
that is where the digits are lost: cuBLAS accumulates in float32 anyway and can store that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onestep._torch_private import adds_to_float32


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, for matrices a and b of one dtype, out of the same or of float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for matrices a and b of one dtype, total of the same or of float32."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif not a.is_cuda:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)
    elif adds_to_float32(total.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


def batched_product(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """A @ B of two batches of matrices of one dtype, in that dtype or in float32."""
    if A.dtype == dtype:
        return torch.bmm(A, B)
    if A.is_cuda:
        return torch.bmm(A, B, out_dtype=dtype)
    return torch.bmm(A.to(dtype), B.to(dtype))


def batched_product_into(out: Tensor, A: Tensor, B: Tensor) -> None:
    """out = A @ B, for batches of matrices A and B of one dtype, out of the same or of float32."""
    if A.dtype == out.dtype:
        torch.bmm(A, B, out=out)
    elif A.is_cuda:
        torch.bmm(A, B, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(A.to(out.dtype), B.to(out.dtype), out=out)
