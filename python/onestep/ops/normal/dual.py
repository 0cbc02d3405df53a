"""The dual form of the normal equations, n × n instead of d × d, composed of our own ops and torch's, on any device.

W = Λ⁻¹XᵀS (S X Λ⁻¹Xᵀ S + I)⁻¹ S Y, S = sqrt(D), scaled by the largest penalty λ̄.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onestep._fork import safe_after_fork
from onestep.ops.cholesky.schema import cholesky, cholesky_solve
from onestep.ops.normal.formulas import column, failed
from onestep.ops.normal.options import Options
from onestep.ops.normal.schema import Results, gram
from onestep.ops.operands import check_not_negative, reads_values
from onestep.ops.singular import with_singular


def _scales(weight: Tensor | None, ridge: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """sqrt(weight), the largest penalty λ̄ (…,1), and λ̄/λ (…,d)."""
    largest = ridge.amax(-1, keepdim=True)
    return None if weight is None else weight.sqrt(), largest, largest / ridge


@safe_after_fork
def solve_dual(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    options: Options,
    out: Results,
) -> None:
    """Solves in the dual form. The Gram kernel reads X transposed, in place.

    Nothing is added to the diagonal: in the dual form ``jitter`` is the caller's, who adds it to the ridge.
    """
    assert ridge is not None
    # On a GPU a penalty that is not positive makes the system indefinite or NaN, which info reports.
    if reads_values(ridge) and not (ridge > 0).all():
        raise ValueError("dual=True needs ridge > 0 in every feature")
    check_not_negative("weight", weight)
    solution_out, factor_out, info_out, rcond_out, jittered_out = out
    root, largest, inverse_ridge = _scales(weight, ridge)
    inner = gram.dispatched(X.mT, X.mT[..., :0], inverse_ridge)[0]
    if root is not None:
        inner = inner * root.unsqueeze(-1) * root.unsqueeze(-2)
    eye = torch.eye(X.shape[-2], dtype=X.dtype, device=X.device)
    system = inner + largest.unsqueeze(-1) * eye
    L, info = cholesky.dispatched(system)
    info = with_singular(info, L, system.diagonal(dim1=-2, dim2=-1))
    solution = _from_dual(X, root, inverse_ridge, L, column(root, Y))
    for _ in range(options.refine):
        # δ = A⁻¹(XᵀD(Y − XW) − ΛW), with A⁻¹ by Woodbury's identity.
        right = X.mT @ column(weight, Y - X @ solution) - ridge.unsqueeze(-1) * solution
        solution = solution + apply_dual(right, X, weight, ridge, L)
    finite = solution.isfinite().all(-1).all(-1)
    info_out.copy_(torch.where((info == 0) & ~finite, X.shape[-1] + 1, info))
    solution_out.copy_(torch.where(failed(info_out), torch.nan, solution))
    if jittered_out is not None:
        jittered_out.zero_()
    if factor_out is not None:
        factor_out.copy_(L)
    if rcond_out is not None:
        norm = torch.linalg.matrix_norm(system, 1)
        inverse = cholesky_solve.dispatched(eye, L)
        rcond_out.copy_(torch.where(info == 0, 1 / (norm * torch.linalg.matrix_norm(inverse, 1)), 0))


def _from_dual(X: Tensor, root: Tensor | None, inverse_ridge: Tensor, L: Tensor, right: Tensor) -> Tensor:
    """(λ̄Λ⁻¹)XᵀS K⁻¹ right, K = LLᵀ (n × n)."""
    inner = cholesky_solve.dispatched(right, L)
    return inverse_ridge.unsqueeze(-1) * (X.mT @ column(root, inner))


@safe_after_fork
def apply_dual(B: Tensor, X: Tensor, weight: Tensor | None, ridge: Tensor, L: Tensor) -> Tensor:
    """(XᵀDX + Λ)⁻¹B = Λ⁻¹(B − XᵀS K⁻¹ S X (λ̄Λ⁻¹) B) by Woodbury's identity."""
    root, _, inverse_ridge = _scales(weight, ridge)
    scaled = inverse_ridge.unsqueeze(-1) * B
    inner = cholesky_solve.dispatched(column(root, X @ scaled), L)
    return (B - X.mT @ column(root, inner)) / ridge.unsqueeze(-1)
