"""Formulas of the normal-equations family in differentiable ops, which kernels and derivatives share."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep._fork import safe_after_fork
from onestep.ops.normal.schema import Gradients, apply_normal_inverse


def column(weight: Tensor | None, rows: Tensor) -> Tensor:
    """``rows`` (…,n,·) scaled by the weights, if any."""
    return rows if weight is None else rows * weight.unsqueeze(-1)


def failed(info: Tensor) -> Tensor:
    """Which problems failed, (…,1,1)."""
    return (info != 0)[..., None, None]


def without_failed(
    info: Tensor, X: Tensor, Y: Tensor, weight: Tensor | None, solution: Tensor, L: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Failed problems become X = 0, Y = 0, W = 0, L = I, whose derivatives are zeros; the rest stays as it is."""
    bad = failed(info)
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    clean_weight = None if weight is None else torch.where(bad[..., 0], 0, weight)
    return (
        torch.where(bad, 0, X),
        torch.where(bad, 0, Y),
        clean_weight,
        torch.where(bad, 0, solution),
        torch.where(bad, eye, L),
    )


def more_jitter(
    info: Tensor, d: int, mean: Tensor, added: Tensor, jitter: float, attempt: int
) -> tuple[Tensor, Tensor]:
    """Which problems are tried again with more on their diagonals, and how much: ``jitter`` means, then tenfold.

    The last attempt is the first that adds the mean or more. The CPU's kernel does the same (csrc/normal/cpu).

    Args:
        info: (…), of the last attempt.
        mean: (…), of the diagonals.
        added: (…), in the last attempt.
        attempt: from 0.
    """
    retry = (info > 0) & (info <= d) & mean.isfinite() & (added < mean)
    return retry, torch.where(retry, mean * (jitter * 10.0**attempt), added)


@safe_after_fork
def solve_normal_vjp(
    grad: Tensor,
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    solution: Tensor,
    L: Tensor,
    info: Tensor,
) -> Gradients:
    """The gradients of solve_normal: for double backward, and for the dual form.

    With V = A⁻¹Ḡ and E = Y − XW: ∂X = D(E Vᵀ − X V Wᵀ), ∂Y = D X V, ∂weight = rowsum((XV)∘E), ∂ridge = −rowsum(V∘W).
    """
    X, Y, weight, solution, L = without_failed(info, X, Y, weight, solution, L)
    adjoint = apply_normal_inverse.dispatched(torch.where(failed(info), 0, grad), X, weight, ridge, L)
    residual = Y - X @ solution
    fitted = X @ adjoint
    grad_x = column(weight, residual @ adjoint.mT - fitted @ solution.mT)
    return (
        grad_x,
        column(weight, fitted),
        (fitted * residual).sum(-1),
        -(adjoint * solution).sum(-1),
    )
