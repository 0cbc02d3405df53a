"""The Cholesky factor of an inverse, without the inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onestep.linalg._arguments import floating, number, values_are_known
from onestep.linalg.dlpack import takes_arrays
from onestep.ops import compensated as ops
from onestep.ops.operands import check_size

# Where a matrix is not positive definite, damping goes up tenfold from at least this, the dtype's own noise, to 1.
_LEAST_DAMPING = {torch.float32: 1e-6, torch.float64: 1e-12}
_MOST_DAMPING = 1.0


class InverseCholeskyResult(NamedTuple):
    """What ``inverse_cholesky`` returns.

    Attributes:
        U: (…,n,n), upper triangular (lower, where ``upper`` is False); NaN where ``damping`` is NaN.
        info: (…) int32, of A with the damping that was asked for: 0; k > 0 where the trailing minor of order k is not
            positive definite: the last k features are dependent; −1 where A holds NaN or infinity.
        damping: (…), what U was computed with: as asked for where info is 0, more where info is positive; NaN where
            there is no U.
    """

    U: Tensor
    info: Tensor
    damping: Tensor


@takes_arrays
def inverse_cholesky(A: Tensor, *, damping: float | Tensor = 0.0, upper: bool = True) -> InverseCholeskyResult:
    """Factors the inverse, A⁻¹ = UᵀU with U upper triangular, without computing it.

    The Cholesky factor of A with its rows and columns reversed, Ã = LLᵀ, then L⁻¹, which reversed is U: both in one
    elimination of [Ã | 1], 2n³/3 operations where Cholesky, inverse and Cholesky again take 4n³/3. It is what the
    compensated sweeps of GPTQ and SparseGPT take from a layer's Gram matrix (Frantar et al. 2022, 2023).

    ``damping``·mean(diag A) is added to the diagonal. Where A is not positive definite (a pivot is under 8 ε of its
    diagonal element), damping goes up tenfold, from at least 1e-6 (float64: 1e-12) to 1, until it is; the result says
    how far. Inside a transform (vmap, jvp, torch.compile) and on tensors whose values are not known, it does not.

    Args:
        A: (…,n,n) symmetric, of which the lower triangle is read; float32 or float64 (16-bit: computed in float32).
        damping: 0 or more: a number, or one for each matrix (…). A constant to derivatives.
        upper: False for the lower triangular factor L = Uᵀ, A⁻¹ = LLᵀ.

    Returns:
        ``InverseCholeskyResult(U, info, damping)``. U is differentiable in A to every order, with gradient 0 where it
        is NaN. The same bits for any number of threads, and from any thread; a matrix that fails leaves the others'
        alone.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or damping.
        NotImplementedError: A is not on the CPU.

    Examples:
        >>> import torch
        >>> from onestep.linalg import inverse_cholesky
        >>> U, info, damping = inverse_cholesky(torch.tensor([[4.0, 0.0], [0.0, 0.25]]))
        >>> U.diagonal().tolist(), info.item(), damping.item()
        ([0.5, 2.0], 0, 0.0)
        >>> inverse_cholesky(torch.ones(2, 2)).info.item()  # of rank 1
        2
    """
    A = floating("A", A)
    if A.dim() < 2:
        raise ValueError(f"A has shape {tuple(A.shape)}; expected square matrices (..., n, n)")
    check_size("A", A, -2, A.shape[-1], "square matrices (..., n, n)")
    asked = _damping(damping, A)
    U, info = ops.inverse_cholesky(A, asked)
    used = asked.expand(info.shape).clone()
    if values_are_known(A) and bool((info > 0).any()):
        used = _escalated(A.detach(), info, used)
        U = ops.inverse_cholesky(A, used.nan_to_num(nan=0.0))[0]
    else:
        used = torch.where(info == 0, used, torch.nan)
    return InverseCholeskyResult(U if upper else U.mT, info, torch.where(info < 0, torch.nan, used))


def _damping(damping: float | Tensor, A: Tensor) -> Tensor:
    if isinstance(damping, Tensor):
        asked = damping.detach().to(dtype=A.dtype, device=A.device)
        if values_are_known(asked) and not bool(((asked >= 0) & asked.isfinite()).all()):
            raise ValueError("damping has values that are negative or not finite; expected 0 or more")
        return asked
    amount = number("damping", damping, 0.0, torch.finfo(A.dtype).max, "a finite number of 0 or more")
    return torch.tensor(amount, dtype=A.dtype, device=A.device)


def _escalated(A: Tensor, info: Tensor, asked: Tensor) -> Tensor:
    """For each matrix that is not positive definite the damping with which it is; NaN where none is."""
    least = _LEAST_DAMPING[A.dtype]
    flat, tried = A.reshape(-1, *A.shape[-2:]), asked.reshape(-1)
    failed = (info.reshape(-1) > 0).nonzero().squeeze(-1)
    while len(failed):
        tried[failed] = (10.0 * tried[failed]).clamp(min=least)
        over = tried[failed] > _MOST_DAMPING * 1.001
        tried[failed[over]] = torch.nan
        failed = failed[~over]
        failed = failed[ops.inverse_cholesky(flat[failed], tried[failed])[1] != 0]
    return tried.reshape(asked.shape)
