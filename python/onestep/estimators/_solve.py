"""Ridge solutions: Cholesky where it is accurate, orthogonal factors where it is not. All of it in float64."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from scipy.linalg import LinAlgWarning
from scipy.linalg.lapack import dpocon
from torch import Tensor

from onestep.estimators._centred import EPS, MIN_RCOND, Centred, Primal, blocks, wide
from onestep.linalg import spd
from onestep.linalg.narrow import working_dtype


class Solution(NamedTuple):
    """W (d, k) and intercept (k,), float64, and the name of the path that found them.

    Attributes:
        centred: the problem, where the rows were at hand.
        sums: X̃ᵀX̃ and X̃ᵀỸ, where Cholesky factors of them solved for all targets.
    """

    coef: Tensor
    intercept: Tensor
    path: str
    centred: Centred | None = None
    sums: tuple[Tensor, Tensor] | None = None


def solve_ridge(X: Tensor, Y: Tensor, weight: Tensor | None, alpha: Tensor, *, fit_intercept: bool) -> Solution:
    """argmin over W and b of ‖√w (Y - XW - b)‖² + Σⱼ alphaⱼ ‖Wⱼ‖²; X (n, d), Y (n, k), alpha (k,) >= 0 float64.

    Targets that share a penalty share a factorisation. With n < d and alpha > 0 the n x n dual is solved (Saunders,
    Gammerman and Vovk 1998). What Cholesky cannot solve accurately goes to a QR of the rows, which is formed once.
    """
    n, d = X.shape
    paths: list[str] = []
    coef = torch.empty(d, Y.shape[1], dtype=torch.float64)
    primal = None if n < d else Primal(X, Y, weight, center=fit_intercept)
    centred = wide(X, Y, weight, center=fit_intercept) if primal is None else primal.centred
    K = kernel(centred) if primal is None and bool((alpha > 0).any()) else None
    factor: tuple[Tensor, Tensor] | None = None
    sums: tuple[Tensor, Tensor] | None = None
    for penalty in sorted(set(alpha.tolist())):
        targets = (alpha == penalty).nonzero()[:, 0]
        if primal is not None:
            path = "cholesky"
            W, sums = _primal(primal, targets, penalty)
        else:
            path, W = "dual_cholesky", _dual(centred, K, targets, penalty)
        if W is None:
            factor = factor or triangular(centred)
            W, rank = _least_squares(factor[0], factor[1][:, targets], penalty, n, working_dtype(X))
            path = "least_squares" if rank == d else "minimum_norm"
            if rank < d:
                _warn_rank(rank, d, penalty, fit_intercept)
        coef[:, targets] = W
        paths.append(path)
    intercept = centred.y_mean - centred.x_mean @ coef
    path = "+".join(dict.fromkeys(paths))
    return Solution(coef, intercept, path, centred, sums if path == "cholesky" else None)


def solve_spd(A: Tensor, B: Tensor, min_rcond: float) -> Tensor | None:
    """A⁻¹B by Cholesky, or None where A's reciprocal condition, after scaling, is under `min_rcond`.

    A is scaled to a unit diagonal first (see ``onestep.linalg.spd``). The condition is LAPACK's estimate (dpocon).
    """
    factor = spd.factor(A)
    if not factor.succeeded:
        return None
    # Row-major L is column-major Lᵀ, the upper factor that dpocon reads in place.
    rcond, _ = dpocon(factor.L.contiguous().mT.numpy(), factor.scaled.abs().sum(dim=0).max().item(), uplo="U")
    return factor.solve(B) if rcond >= min_rcond else None


def _primal(primal: Primal, targets: Tensor, alpha: float) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """(X̃ᵀX̃ + alpha I)W = X̃ᵀỸ, and the sums that had the digits for it; None where ill-conditioned."""
    for gram, cross, floor in primal.candidates():
        ridge = torch.full((len(gram),), alpha, dtype=gram.dtype).diag()
        W = solve_spd(gram + ridge, cross[:, targets], floor)
        if W is not None:
            return W, (gram, cross)
    return None, None


def kernel(centred: Centred) -> Tensor:
    """√w (X - x_mean)(X - x_mean)ᵀ √w (n, n), summed over blocks of columns."""
    n, d = centred.X.shape
    K = torch.zeros(n, n, dtype=torch.float64)
    for columns in blocks(d, n):
        block = centred.x(columns=columns)
        K.addmm_(block, block.mT)
    return K


def from_dual(centred: Centred, C: Tensor) -> Tensor:
    """(X - x_mean)ᵀ √w C: the coefficients (d, …) of dual variables (n, …)."""
    n, d = centred.X.shape
    return torch.cat([centred.x(columns=columns).mT @ C for columns in blocks(d, n)])


def _dual(centred: Centred, K: Tensor | None, targets: Tensor, alpha: float) -> Tensor | None:
    """(K + alpha I)C = Ỹ, W = X̃ᵀC with K = X̃X̃ᵀ; None without a ridge or where ill-conditioned."""
    if K is None or alpha == 0:
        return None
    ridge = torch.full((len(K),), alpha, dtype=K.dtype).diag()
    C = solve_spd(K + ridge, centred.y()[:, targets], MIN_RCOND)
    return None if C is None else from_dual(centred, C)


def triangular(centred: Centred) -> tuple[Tensor, Tensor]:
    """R (at most max(2d, block) x d) and QᵀỸ with X̃ = QR, block by block of rows (TSQR; Demmel et al. 2012).

    The condition is X's, not its square. When the rows fit one block R is X̃ itself, and Q the identity.
    """
    n = len(centred.X)
    R = Z = torch.empty(0)
    for rows, x in centred.unrounded():
        y = centred.y(rows)
        if rows.start == 0:
            R, Z = x, y
        else:
            R, Z = torch.cat([R, x]), torch.cat([Z, y])
        if n > rows.stop or rows.start > 0:
            Q, R = torch.linalg.qr(R)
            Z = Q.mT @ Z
    return R, Z


def _least_squares(R: Tensor, Z: Tensor, alpha: float, n: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """argmin ‖Z - RW‖² + alpha‖W‖², of least norm among equals, and the numerical rank.

    Rank is judged on columns scaled to length one, so units do not decide it: singular values under n·ε(fp64) or,
    without a ridge, under what rounding X to its own type does to d columns are zero.
    """
    d = R.shape[1]
    tolerance = max(n, d) * EPS
    if alpha > 0:
        R = torch.cat([R, alpha**0.5 * torch.eye(d, dtype=R.dtype)])
        Z = torch.cat([Z, Z.new_zeros(d, Z.shape[1])])
    else:
        tolerance = max(tolerance, min(n, d) * torch.finfo(dtype).eps)
    scale = R.norm(dim=0)
    scale = torch.where(scale > 0, scale, 1.0)
    U, S, Vh = torch.linalg.svd(R / scale, full_matrices=False)
    rank = int((tolerance * S[0] < S).sum())
    V = Vh[:rank].mT
    W = (V @ ((U[:, :rank].mT @ Z) / S[:rank, None])) / scale[:, None]
    if rank < d:
        # Least norm in the caller's units, not the scaled ones: project on the row space.
        Q, _ = torch.linalg.qr(V * scale[:, None])
        W = Q @ (Q.mT @ W)
    return W, rank


def _warn_rank(rank: int, d: int, alpha: float, centred: bool) -> None:
    what = "the centred X" if centred else "X"
    warnings.warn(
        f"{what} has rank {rank} of {d} features and alpha is {alpha:g}: the solution is not unique, "
        "and the one of minimum norm is returned; set a larger alpha for a unique one",
        LinAlgWarning,
        stacklevel=6,
    )
