"""CUDA kernel of ``polar``: products by torch, batches of inverses by csrc/polar/cuda.

16-bit matrices are multiplied in their dtype and summed up in float32: the Gram matrix of what was rounded is positive
semi-definite, so that its Cholesky pivots cannot fail, and singular values come out in [0.98, 1.02]
(bench/gpu/polar.py), where five Newton-Schulz iterations leave [0.7, 1.2]. float32 and float64 keep their precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.ops._cuda import entry, native, place
from onestep.ops._library import register
from onestep.ops._products import batched_product, batched_product_into
from onestep.ops.polar import schema

assert native is not None
_MOST_INVERSE_ORDER: int = native.most_inverse_order

# Where I + cXXᵀ of 16-bit X has a condition of at most 1 + this, rounding the inverse's products to bfloat16 costs no
# more than X's rounding did; from this order of blocks on it is faster.
_MOST_NARROW_C = 16.0
_LEAST_NARROW_ORDER = 512


class _Inverse:
    """The inverses of a batch of positive definite matrices: a kernel's to order 128, by blocks beyond."""

    def __init__(self, info: Tensor, narrow: bool) -> None:
        self.info, self.narrow = info, narrow

    def __call__(self, A: Tensor, inverse: Tensor, offset: int = 0) -> None:
        """Writes A⁻¹ (B,n,n) over ``inverse``; rows of both are contiguous."""
        n = A.shape[-1]
        if n <= _MOST_INVERSE_ORDER:
            self._kernel(A, inverse, offset)
            return
        # [[A₁, B], [Bᵀ, A₂]]: W = A₁⁻¹B, S = A₂ − BᵀW; the inverse is [[A₁⁻¹ + WS⁻¹Wᵀ, −WS⁻¹], [.., S⁻¹]].
        cut = -(-n // (2 * _MOST_INVERSE_ORDER)) * _MOST_INVERSE_ORDER
        B = A[:, :cut, cut:]
        first, W = A.new_empty(len(A), cut, cut), A.new_empty(len(A), cut, n - cut)
        self(A[:, :cut, :cut], first, offset)
        self._multiply(W, first, B)
        S = A.new_empty(len(A), n - cut, n - cut)
        self._multiply(S, B.mT, W, plus=A[:, cut:, cut:], alpha=-1)
        last, border = inverse[:, cut:, cut:], inverse[:, :cut, cut:]
        self(S, last, offset + cut)
        self._multiply(border, W, last, alpha=-1)
        self._multiply(inverse[:, :cut, :cut], border, W.mT, plus=first, alpha=-1)
        inverse[:, cut:, :cut] = border.mT

    def _multiply(self, out: Tensor, A: Tensor, B: Tensor, plus: Tensor | None = None, alpha: int = 1) -> None:
        """out = plus + alpha·AB."""
        if self.narrow and min(*A.shape[1:], B.shape[2]) >= _LEAST_NARROW_ORDER:
            product = batched_product(A.bfloat16(), B.bfloat16(), out.dtype)
            if plus is None:
                torch.mul(product, alpha, out=out)
            else:
                torch.add(plus, product, alpha=alpha, out=out)
        else:
            beta = 0 if plus is None else 1
            torch.baddbmm(out if plus is None else plus, A, B, beta=beta, alpha=alpha, out=out)

    def _kernel(self, A: Tensor, inverse: Tensor, offset: int) -> None:
        entry("spd_inverse", A.dtype)(
            batch=A.shape[0],
            n=A.shape[-1],
            a=A.data_ptr(),
            a_matrix=A.stride(0),
            a_row=A.stride(1),
            inverse=inverse.data_ptr(),
            inverse_matrix=inverse.stride(0),
            inverse_row=inverse.stride(1),
            info=self.info.data_ptr(),
            offset=offset,
            **place(A),
        )


@register(schema.polar, device="cuda")
def _polar(M: Tensor, iterations: int, lower: float) -> tuple[Tensor, Tensor]:
    U, info = schema.polar_results(M, iterations, lower)
    if U.numel() == 0:
        return U, info.zero_()
    rows, columns = M.shape[-2:]
    tall = rows > columns
    X = schema.to_unit_range(M.reshape(-1, rows, columns))
    result = U.reshape(-1, rows, columns)
    if tall:
        X, result = X.mT, result.mT
    info.zero_()
    steps = schema.coefficients(iterations, lower)
    for step, (a, b, c) in enumerate(steps):
        A = batched_product(X, X.mT, U.dtype)
        root: Tensor | float = 1.0
        if step == 0:
            # As on the CPU.
            norm = torch.linalg.matrix_norm(A, keepdim=True)
            norm = torch.where(norm == 0, 1.0, norm)
            A *= c / norm
            root = norm.sqrt()
        else:
            A *= c
        A.diagonal(dim1=-2, dim2=-1).add_(1.0)
        # P = (b/c)I + (a − b/c)A⁻¹, over the norm.
        P = torch.empty_like(A)
        _Inverse(info.view(-1), narrow=X.dtype != U.dtype and c < _MOST_NARROW_C)(A, P)
        P *= (a - b / c) / root
        P.diagonal(dim1=-2, dim2=-1).add_((b / c) / (root[..., 0] if isinstance(root, Tensor) else root))
        if step + 1 < len(steps):
            X = torch.bmm(P.to(X.dtype), X)
        else:
            batched_product_into(result, P.to(X.dtype), X)
    return U, info
