"""CPU kernel of ``polar``: csrc/polar; for large matrices, products by torch and inverses by csrc/normal.

Both iterations of a float32 matrix are computed on its Gram matrix G, of the order of its short side, so that the long
side is read twice in all. With A = I + cG, B = A⁻¹, α = b/c and β = a − b/c an iteration is X ← (αI + βB)X, and the
Gram matrix of that is a polynomial: c(αI + βB)G(αI + βB) = α²A + (2αβ − α²)I + (β² − 2αβ)B − β²B². What rounding G
costs grows with the square of a: 5e-4 of the smallest singular values at ``lower`` = 1e-2. Other matrices go iteration
by iteration. 16-bit matrices are widened.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onestep import _native
from onestep._fork import one_thread_after_fork
from onestep.ops._library import register
from onestep.ops.cholesky import solve_spd
from onestep.ops.operands import kernel_batch, operand
from onestep.ops.polar import schema

# Up to this a² rounding G leaves 5e-4 of the smallest singular values, a tenth of what two iterations leave of others.
_MOST_GROWTH = 3000.0
# Between these the products of two entries of a matrix neither overflow nor vanish.
_SAFE = 2.0**-20, 2.0**20
# A thread has a matrix of our kernel to itself: larger ones are shared out better by torch's products.
_MOST_ORDER = 256


@register(schema.polar, device="cpu")
@one_thread_after_fork()
def _polar(M: Tensor, iterations: int, lower: float) -> tuple[Tensor, Tensor]:
    U, info = schema.polar_results(M, iterations, lower)
    if U.numel() == 0:
        return U, info.zero_()
    steps = schema.coefficients(iterations, lower)
    n, m = M.shape[-2:]
    M = M.to(U.dtype)
    if U.dtype == torch.float32 and iterations == 2 and steps[0][0] ** 2 <= _MOST_GROWTH:
        if min(n, m) <= _MOST_ORDER:
            batch = tuple(M.shape[:-2])
            _native.polar_f32(
                m=operand(M, batch, 2),
                batch=kernel_batch(batch),
                rows=n,
                columns=m,
                steps=steps,
                factor=U.data_ptr(),
                info=info.data_ptr(),
            )
        else:
            _by_gram(M.reshape(-1, n, m), steps, U.view(-1, n, m), info.view(-1))
    else:
        _by_iterations(M, steps, U, info)
    return U, info


def _by_gram(M: Tensor, steps: list[tuple[float, float, float]], U: Tensor, info: Tensor) -> None:
    """Two iterations of matrices (B,n,m)."""
    largest = torch.linalg.vector_norm(M, math.inf, dim=(-2, -1))
    if not bool(((largest > _SAFE[0]) & (largest < _SAFE[1])).all()):
        M = schema.to_unit_range(M)
    tall = M.shape[-2] > M.shape[-1]
    G = torch.bmm(M.mT, M) if tall else torch.bmm(M, M.mT)
    # ‖XXᵀ‖, which is at least the largest singular value's square, and as a rule half of it.
    norm = torch.linalg.matrix_norm(G, keepdim=True)
    norm = torch.where(norm == 0, 1.0, norm)
    (a, b, c), (a2, b2, c2) = steps
    first, first_inverse = b / c, a - b / c
    second, second_inverse = b2 / c2, a2 - b2 / c2
    A = G.mul_(c / norm)
    A.diagonal(dim1=-2, dim2=-1).add_(1.0)
    B, failed = _inverse(A)
    # I + c₂G₁ from c₂/c times the polynomial.
    t = c2 / c
    linear = t * (first_inverse**2 - 2 * first * first_inverse)
    A = torch.baddbmm(A.mul_(t * first**2).add_(B, alpha=linear), B, B, alpha=-t * first_inverse**2)
    A.diagonal(dim1=-2, dim2=-1).add_(1.0 + t * (2 * first * first_inverse - first**2))
    B2, failed2 = _inverse(A)
    # P = (second·I + second_inverse·B2)(first·I + first_inverse·B).
    P = B2.mul(first * second_inverse).add_(B, alpha=second * first_inverse)
    P = torch.baddbmm(P, B, B2, alpha=first_inverse * second_inverse)
    P.diagonal(dim1=-2, dim2=-1).add_(first * second)
    P *= norm.rsqrt()
    if tall:
        torch.bmm(M, P, out=U)
    else:
        torch.bmm(P, M, out=U)
    bad = (failed != 0) | (failed2 != 0) | ~largest.isfinite()
    info.copy_(bad)
    if bool(bad.any()):
        U[bad] = torch.nan


def _inverse(A: Tensor) -> tuple[Tensor, Tensor]:
    """A⁻¹ of positive definite matrices (B,n,n), and which failed."""
    solution, _, info = solve_spd(A, schema.identity_like(A).expand(A.shape))
    return solution, info


def _by_iterations(M: Tensor, steps: list[tuple[float, float, float]], U: Tensor, info: Tensor) -> None:
    """Any number of iterations, each with a Gram matrix of its own."""
    tall = M.shape[-2] > M.shape[-1]
    X = schema.to_unit_range(M.mT if tall else M)
    info.zero_()
    for step, (a, b, c) in enumerate(steps):
        G = X @ X.mT
        norm = torch.ones_like(G[..., :1, :1])
        if step == 0:
            # As above.
            largest = torch.linalg.matrix_norm(G, keepdim=True)
            norm = torch.where(largest == 0, norm, largest)
        L, failed = torch.linalg.cholesky_ex(schema.identity_like(G) + (c / norm) * G)
        root = norm.sqrt()
        X = (b / c / root) * X + ((a - b / c) / root) * torch.cholesky_solve(X, L)
        # torch's Cholesky says nothing of NaN in some builds: the result does.
        failed = torch.where(X.isfinite().all(-1).all(-1), failed, failed.clamp(min=1))
        info.copy_(torch.where(info == 0, failed, info))
    X = torch.where((info != 0)[..., None, None], torch.nan, X)
    U.copy_(X.mT if tall else X)
