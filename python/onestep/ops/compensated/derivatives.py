"""Derivatives of the ops on one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onestep.ops._derivatives import OpFunction, register_derivatives, register_not_differentiable
from onestep.ops.compensated.schema import compensated_sweep, inverse_cholesky, unit_cholesky


def _upper_half(A: Tensor) -> Tensor:
    """Φ(A): the upper triangle with the diagonal halved."""
    return A.triu() - torch.diag_embed(A.diagonal(dim1=-2, dim2=-1)) / 2


def _damped(dA: Tensor, damping: Tensor) -> Tensor:
    """What a symmetric change of A does to A + damping · mean(diag A) · 1; its own adjoint."""
    mean = dA.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(dA.shape[-1], dtype=dA.dtype, device=dA.device)
    return dA + (damping * mean)[..., None, None] * eye


def _clean(info: Tensor, U: Tensor) -> Tensor:
    """U, 0 where it failed, so that the derivatives there are 0."""
    return torch.where((info != 0)[..., None, None], 0, U)


class _InverseCholesky(OpFunction):
    """U̇ = −Φ(U Ȧ Uᵀ) U and ∂A = −sym(Uᵀ Φ(Ū Uᵀ) U), from A = U⁻¹U⁻ᵀ as for Cholesky (Murray 2016).

    The damping counts as a constant.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        U, info = output
        ctx.mark_non_differentiable(info)
        ctx.save_for_backward(U, info, inputs[1])
        ctx.save_for_forward(U, info, inputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, None]:
        U, info, damping = ctx.saved_tensors
        if grad is None:
            return None, None
        U = _clean(info, U)
        inner = -(U.mT @ _upper_half(_clean(info, grad).triu() @ U.mT) @ U)
        return _damped((inner + inner.mT) / 2, damping), None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor | None, *unused: Any) -> tuple[Any, None]:
        U, info, damping = ctx.saved_tensors
        if dA is None:
            return None, None
        U = _clean(info, U)
        change = _damped((dA + dA.mT) / 2, damping)
        return -(_upper_half(U @ change @ U.mT) @ U), None


register_derivatives(inverse_cholesky, _InverseCholesky)
register_not_differentiable(unit_cholesky, "pass A.detach(), or take inverse_cholesky")
register_not_differentiable(compensated_sweep, "rounding has none: pass W.detach() and factor.detach()")
