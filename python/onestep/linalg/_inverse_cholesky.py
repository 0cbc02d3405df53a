"""The Cholesky factor of an inverse, without the inverse."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from onestep.linalg._arguments import floating
from onestep.linalg.damping import damped_factor
from onestep.linalg.dlpack import takes_arrays
from onestep.ops import compensated as ops


class InverseCholeskyResult(NamedTuple):
    """What ``inverse_cholesky`` returns.

    Attributes:
        U: (…,n,n) in A's dtype (float32 for 16 bits), upper triangular (lower, where ``upper`` is False); NaN where
            ``damping`` is NaN.
        info: (…) int32, of A with the damping that was asked for: 0; k > 0 where the trailing minor of order k is not
            positive definite, or singular: the last k features are dependent; −1 where A holds NaN or infinity.
        damping: (…), in U's dtype, what U was computed with: as asked for where info is 0, more where info is positive;
            NaN where there is no U.

    Examples:
        >>> import torch
        >>> from onestep.linalg import inverse_cholesky
        >>> result = inverse_cholesky(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        >>> result.U, result.info.item(), result.damping.item()
        (tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]]), 0, 0.0)
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

    ``damping``·mean(diag A) is added to the diagonal. Where A is singular, damping goes up tenfold, from at least 1e-6
    (float64: 1e-12) to 1, until it is not; the result says how far. Inside a transform (vmap, jvp, torch.compile) and
    while a CUDA graph is captured, it does not. Matrices near the ends of the dtype's range are scaled by powers of two
    meanwhile.

    On a GPU it is a composition: the Cholesky factor of A reversed, by a kernel of ours to n = 168 and for several
    matrices of up to 2,048, else by cuSOLVER; then torch's triangular solve. The statuses are waited for, since damping
    may have to go up.

    A is singular where a pivot is at most 8 ε of its diagonal element, or the least eigenvalue at most 8 ε with the
    diagonal scaled to 1, which is asked of U. Rounding moves that of dependent features by about ε: all of them were
    found in Gram matrices in which one feature is a combination of up to 1,000 others, of which the rule for pivots
    finds half. An A whose least eigenvalue is that small for other reasons has a U that is mostly rounding, too.

    Args:
        A: (…,n,n) symmetric, of which the lower triangle is read; float32 or float64 (16-bit: computed in float32).
        damping: 0 or more: a number, or one for each matrix (…). A constant to derivatives.
        upper: False for the lower triangular factor L = Uᵀ, A⁻¹ = LLᵀ.

    Returns:
        ``InverseCholeskyResult(U, info, damping)``. U is differentiable in A to every order, with gradient 0 where it
        is NaN. On the CPU the same bits for any number of threads, and from any thread; a matrix that fails leaves the
        others' alone.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or damping, or ``upper`` is neither True nor False.
        NotImplementedError: A is on a device that there are no kernels for.

    Examples:
        >>> import torch
        >>> from onestep.linalg import inverse_cholesky
        >>> U, info, damping = inverse_cholesky(torch.tensor([[4.0, 0.0], [0.0, 0.25]]))
        >>> U.diagonal().tolist(), info.item(), damping.item()
        ([0.5, 2.0], 0, 0.0)
        >>> inverse_cholesky(torch.ones(2, 2)).info.item()  # of rank 1
        2
    """
    if not isinstance(upper, bool):
        raise TypeError(f"upper is {upper!r}; expected True or False")
    U, info, used = damped_factor(ops.inverse_cholesky, floating("A", A), damping)
    return InverseCholeskyResult(U if upper else U.mT, info, used)
