"""Ridge from sums over chunks of rows, which cannot be read a second time. All of it in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep._serial_torch import eigh
from onestep.estimators._centred import _FLOAT_GRAM_FLOOR, EPS, MIN_RCOND, blocks, raise_not_finite
from onestep.estimators._solve import Solution, _warn_rank, solve_spd
from onestep.linalg import NormalEquations
from onestep.linalg.constant_columns import without_constants
from onestep.linalg.narrow import widened, working_dtype


def add_chunk(equations: NormalEquations, X: Tensor, Y: Tensor, weight: Tensor | None) -> None:
    """Adds rows X (n, d), Y (n, k), weight (n,) or None; X is not copied, but for blocks of it that need more digits.

    Rows in fp32 are summed in fp32 where that is accurate, as `solve_ridge` judges it, and in fp64 where it is not. If
    each chunk's sums are off by at most δ times the chunk's own Gram matrix, as quadratic forms, their total is off by
    at most δ times the total: chunks that are fine one by one are fine together, whatever the penalty.

    Raises ValueError if X is not finite, or so large that its products are not; nothing is added then.
    """
    try:
        dtype = working_dtype(X)
        narrow = not X.is_floating_point()
        if not narrow:
            chunk = _empty(equations, dtype).update(X, Y, weight)
            narrow = dtype == torch.float32 and not (equations.dtype == dtype and _accurate_in_float(chunk))
        if narrow:
            chunk = _empty(equations, torch.float64)
            for rows in blocks(*X.shape):
                chunk.update(widened(X[rows]), Y[rows], None if weight is None else weight[rows])
    except ValueError:
        # The arguments have been checked, all but the values of X.
        raise_not_finite(X)
    equations.merge(chunk)


def _empty(like: NormalEquations, dtype: torch.dtype) -> NormalEquations:
    return NormalEquations(like.d, like.k, intercept=like.intercept, dtype=dtype)


def _accurate_in_float(chunk: NormalEquations) -> bool:
    gram = without_constants(chunk.sums, chunk.dtype).gram
    # A feature that does not vary in this chunk adds nothing, which is exact; it may vary between chunks.
    varies = gram.diagonal() > 0
    gram = gram[varies][:, varies]
    floor = _FLOAT_GRAM_FLOOR / (1.0 + chunk.count / 4096) ** 0.5
    return len(gram) == 0 or solve_spd(gram, gram[:, :0], floor) is not None


def solve_sums(equations: NormalEquations, alpha: Tensor) -> Solution:
    """argmin over W and b of ‖√w (Y - XW - b)‖² + Σⱼ alphaⱼ ‖Wⱼ‖² over all rows seen; alpha (k,) >= 0 float64.

    By Cholesky ("cholesky"); where that is ill-conditioned, on an orthonormal basis of the row space ("eigh"), which
    without a penalty gives the solution of minimum norm ("minimum_norm").
    """
    sums = without_constants(equations.sums, equations.dtype)
    d = equations.d
    coef = torch.empty_like(sums.cross)
    paths: list[str] = []
    basis: Tensor | None = None
    for penalty in sorted(set(alpha.tolist())):
        targets = (alpha == penalty).nonzero()[:, 0]
        cross = sums.cross[:, targets]
        path, W = "cholesky", solve_spd(sums.gram + penalty * torch.eye(d, dtype=torch.float64), cross, MIN_RCOND)
        if W is None:
            basis = _row_space(equations, sums.gram) if basis is None else basis
            rank = basis.shape[1]
            W = basis @ _solve_psd(basis.mT @ sums.gram @ basis, penalty, basis.mT @ cross)
            path = "minimum_norm" if rank < d and penalty == 0 else "eigh"
            if path == "minimum_norm":
                _warn_rank(rank, d, penalty, equations.intercept)
        coef[:, targets] = W
        paths.append(path)
    intercept = sums.y_mean - sums.x_mean @ coef
    return Solution(coef, intercept, "+".join(dict.fromkeys(paths)))


def _row_space(equations: NormalEquations, gram: Tensor) -> Tensor:
    """An orthonormal basis (d, rank) of the span of the rows, where the minimiser lies whatever the penalty.

    Rank is judged on columns scaled to length one, so units do not decide it: eigenvalues that are rounding of sums of
    so many rows, or (being squares) of rows to their own type, are zero.
    """
    d, n = equations.d, equations.count
    noise = max(8 * EPS * (d + n**0.5), (min(n, d) * torch.finfo(equations.dtype).eps) ** 2)
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 1.0)[:, None]
    values, vectors = eigh(gram * (scale * scale.mT))
    spanned = vectors[:, values > noise * values[-1].clamp_min(0.0)]
    if spanned.shape[1] == d:
        return torch.eye(d, dtype=gram.dtype)
    # The eigenvectors are of SGS; the span of G itself is S⁻¹ times theirs.
    basis: Tensor = torch.linalg.qr(spanned / scale)[0]
    return basis


def _solve_psd(A: Tensor, penalty: float, B: Tensor) -> Tensor:
    """(A + penalty I)⁻¹B by an eigendecomposition, on a unit diagonal, for A that Cholesky might not get through."""
    system = A + penalty * torch.eye(len(A), dtype=A.dtype)
    scale = system.diagonal().clamp_min(torch.finfo(A.dtype).tiny).rsqrt()[:, None]
    values, vectors = eigh(system * (scale * scale.mT))
    solution: Tensor = scale * (vectors @ ((vectors.mT @ (scale * B)) / values.clamp_min(EPS)[:, None]))
    return solution
