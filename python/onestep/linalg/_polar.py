"""The orthogonal polar factor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from onestep.linalg._dlpack import takes_arrays
from onestep.ops import polar as ops
from onestep.ops.operands import check_dense


class PolarResult(NamedTuple):
    """What ``polar_ex`` returns.

    Attributes:
        factor: U (…,n,m), NaN where info is not 0.
        info: (…), int32: 0, or positive where M is not finite.
    """

    factor: Tensor
    info: Tensor


@takes_arrays
def polar_ex(M: Tensor, *, iterations: int = 2, lower: float = 1e-2) -> PolarResult:
    """``polar`` with a status for every matrix instead of an error. Never waits for a GPU."""
    check_dense("M", M)
    return PolarResult(*ops.polar(M, iterations, lower))


@takes_arrays
def polar(M: Tensor, *, iterations: int = 2, lower: float = 1e-2) -> Tensor:
    """Computes the orthogonal polar factor U Vᵀ of M = U S Vᵀ, batched, by QDWH with Cholesky.

    X₀ = M/‖M‖, X ← (b/c)X + (a − b/c)(I + cXXᵀ)⁻¹X: each iteration maps the singular values from [l, 1] into [l′, 1],
    with a, b, c for the largest l′ (Nakatsukasa, Bai and Gygi, "Optimizing Halley's iteration for computing the matrix
    polar decomposition", 2010). ‖M‖ is bounded by ‖MMᵀ‖^½ in Frobenius' norm. I + cXXᵀ is at least 1 in every
    direction, so that its Cholesky factor exists for every finite M, of any rank.

    Singular values from ``lower``·‖M‖ up go to 1: with 2 iterations and ``lower`` = 1e-2 into [0.995, 1], with 3 into
    [1 − 1e-8, 1]. Smaller ones grow 54-fold and then 4-fold at most. Take more iterations, or a smaller ``lower``, for
    matrices whose small singular values count.

    Args:
        M: (…,n,m) float32, float64, bfloat16 or float16. n > m is computed by columns. On a GPU 16-bit matrices are
            multiplied in their dtype (singular values then come out in [0.98, 1.02]).
        iterations: 1 or more.
        lower: the smallest singular value over the largest that is to go to 1; from 0 (not itself) to 1.

    Returns:
        (…,n,m), of M's dtype, or float32 for 16-bit M. 0 for M = 0.

    Raises:
        LinAlgError: M holds NaN or Inf. Looking waits for a GPU; ``polar_ex`` does not look.
        ValueError, TypeError: a shape, option or dtype is not one of those above.
        NotImplementedError: a derivative is asked for.
    """
    factor, info = polar_ex(M, iterations=iterations, lower=lower)
    ops.raise_if_failed(info)
    return factor
