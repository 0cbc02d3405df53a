"""The orthogonal polar factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from onestep._torch_private import transforms_active
from onestep.linalg.dlpack import takes_arrays
from onestep.ops import polar as ops
from onestep.ops.operands import check_dense, check_dims


class PolarResult(NamedTuple):
    """What ``polar_ex`` returns.

    Attributes:
        factor: U (…,n,m) in M's dtype (float32 for 16 bits), NaN where info is not 0.
        info: (…), int32: 0, or positive where M is not finite.

    Examples:
        >>> import torch
        >>> from onestep.linalg import polar_ex
        >>> result = polar_ex(torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[float("nan"), 0.0], [0.0, 1.0]]]))
        >>> result.info > 0, torch.allclose(result.factor[0], torch.eye(2), atol=1e-2)
        (tensor([False,  True]), True)
    """

    factor: Tensor
    info: Tensor


@overload
def polar_ex(M: Tensor, *, iterations: int = 2, lower: float = 1e-2) -> PolarResult: ...
@overload
def polar_ex(M: Sequence[Tensor], *, iterations: int = 2, lower: float = 1e-2) -> list[PolarResult]: ...
@takes_arrays
def polar_ex(
    M: Tensor | Sequence[Tensor], *, iterations: int = 2, lower: float = 1e-2
) -> PolarResult | list[PolarResult]:
    """``polar`` with a status for every matrix instead of an error. Never waits for a GPU.

    Args:
        M: (…,n,m) or a list of such tensors, as in ``polar``.
        iterations: 1 or more.
        lower: as in ``polar``.

    Returns:
        ``PolarResult``: the factors, NaN for a matrix that failed, and the status of each; of a list, a list of them.

    Raises:
        ValueError, TypeError: a shape, option or dtype is not one of those that ``polar`` takes.
        NotImplementedError: a derivative is asked for.

    Examples:
        >>> import torch
        >>> from onestep.linalg import polar_ex
        >>> U, info = polar_ex(torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)]))
        >>> info > 0
        tensor([False,  True])
    """
    if isinstance(M, (list, tuple)):
        return _of_list(M, iterations, lower)
    check_dense("M", M)
    assert isinstance(M, Tensor)
    return PolarResult(*ops.polar(M, iterations, lower))


def _of_list(matrices: Sequence[Tensor], iterations: int, lower: float) -> list[PolarResult]:
    """Those of equal shape, dtype and device in one batch."""
    batches: dict[tuple[Any, ...], list[int]] = {}
    for number, M in enumerate(matrices):
        check_dense(f"M[{number}]", M)
        check_dims(f"M[{number}]", M, 2, "(..., n, m)")
        batches.setdefault((M.shape[-2:], M.dtype, M.device), []).append(number)
    results: dict[int, PolarResult] = {}
    for (shape, _, _), numbers in batches.items():
        own = [matrices[number].reshape(math.prod(matrices[number].shape[:-2]), *shape) for number in numbers]
        counts = [len(part) for part in own]
        U, info = ops.polar(own[0] if len(own) == 1 else torch.cat(own), iterations, lower)
        for number, factor, status in zip(numbers, U.split(counts), info.split(counts), strict=True):
            batch = matrices[number].shape[:-2]
            results[number] = PolarResult(factor.reshape(*batch, *shape), status.reshape(batch))
    return [results[number] for number in range(len(matrices))]


@overload
def polar(M: Tensor, *, iterations: int = 2, lower: float = 1e-2) -> Tensor: ...
@overload
def polar(M: Sequence[Tensor], *, iterations: int = 2, lower: float = 1e-2) -> list[Tensor]: ...
@takes_arrays
def polar(M: Tensor | Sequence[Tensor], *, iterations: int = 2, lower: float = 1e-2) -> Tensor | list[Tensor]:
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
            multiplied in their dtype (singular values then come out in [0.98, 1.02]). Or a list of such tensors, of
            any shapes: those of equal shape are computed together.
        iterations: 1 or more.
        lower: the smallest singular value over the largest that is to go to 1; from 0 (not itself) to 1.

    Returns:
        (…,n,m), of M's dtype, or float32 for 16-bit M. 0 for M = 0. A list for a list.

    Raises:
        LinAlgError: M holds NaN or Inf. Looking waits for a GPU; ``polar_ex`` does not look. Inside torch.func.vmap the
            factor is NaN instead.
        ValueError, TypeError: a shape, option or dtype is not one of those above.
        NotImplementedError: a derivative is asked for.

    Examples:
        >>> import torch
        >>> from onestep.linalg import polar
        >>> U, V = polar([torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.ones(1, 4)])
        >>> U.round(decimals=2).tolist(), V.tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5, 0.5, 0.5]])
    """
    if isinstance(M, (list, tuple)):
        results = _of_list(M, iterations, lower)
        for device in {info.device for _, info in results}:
            ops.raise_if_failed(torch.cat([info.reshape(-1) for _, info in results if info.device == device]))
        return [factor for factor, _ in results]
    check_dense("M", M)
    assert isinstance(M, Tensor)
    result = PolarResult(*ops.polar(M, iterations, lower))
    # vmap lets nobody look at a value.
    if not transforms_active():
        ops.raise_if_failed(result.info)
    return result.factor
