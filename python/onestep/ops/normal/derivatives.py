"""Derivatives of the normal-equations ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onestep.ops._derivatives import (
    OpFunction,
    register_composite_derivative,
    register_derivatives,
    register_not_differentiable,
)
from onestep.ops.normal.formulas import column, failed, solve_normal_vjp, without_failed
from onestep.ops.normal.options import checked_of_solve_normal
from onestep.ops.normal.schema import (
    apply_normal_inverse,
    gram,
    moments,
    solve_normal,
    solve_normal_backward,
    solve_normal_ex,
)


def _wide(X: Tensor, Y: Tensor, *others: Any) -> tuple[Any, ...]:
    """The operands with X in the type of the results: it may be of 16 bits."""
    return X.to(Y.dtype), Y, *others


class _Gram(OpFunction):
    """G = XᵀDX, R = XᵀDY: ∂X = D(X(Ḡ + Ḡᵀ) + Y R̄ᵀ), ∂Y = D X R̄, ∂weight = rowsum(X∘XḠ + Y∘XR̄)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        X, Y, weight = (*inputs, None)[:3]
        ctx.save_for_backward(X, Y, weight)
        ctx.save_for_forward(X, Y, weight)

    @staticmethod
    def backward(ctx: Any, grad_gram: Tensor, grad_cross: Tensor) -> tuple[Any, ...]:
        X, Y, weight = _wide(*ctx.saved_tensors)
        through_gram = X @ (grad_gram + grad_gram.mT)
        through_cross = X @ grad_cross
        grad_x = column(weight, through_gram + Y @ grad_cross.mT)
        grad_y = column(weight, through_cross)
        grad_weight = None
        if weight is not None:
            per_row = (X * through_gram).sum(-1) / 2 + (Y * through_cross).sum(-1)
            grad_weight = per_row.sum_to_size(weight.shape)
        return grad_x.sum_to_size(X.shape), grad_y.sum_to_size(Y.shape), grad_weight

    @staticmethod
    def jvp(ctx: Any, dX: Tensor | None, dY: Tensor | None, dweight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        X, Y, weight = _wide(*ctx.saved_tensors)
        dX, dY = _zeros_if_none(dX, X).to(Y.dtype), _zeros_if_none(dY, Y)
        half = dX.mT @ column(weight, X)
        cross = dX.mT @ column(weight, Y) + X.mT @ column(weight, dY)
        gram = half + half.mT
        if dweight is not None:
            gram = gram + X.mT @ column(dweight, X)
            cross = cross + X.mT @ column(dweight, Y)
        return gram, cross


def _zeros_if_none(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


register_derivatives(gram, _Gram)

register_not_differentiable(moments, "detach its arguments, or use onestep.linalg.gram")


class _SolveNormalEx(OpFunction):
    """W = A⁻¹XᵀDY, A = XᵀDX + diag(ridge); the formulas stand at ``solve_normal_vjp``. Every derivative reuses L."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        X, Y, weight, ridge = (*inputs, None, None)[:4]
        solution, L, info, rcond, jittered = output
        ctx.mark_non_differentiable(L, info, rcond, jittered)
        ctx.save_for_backward(X, Y, weight, ridge, solution, L, info)
        ctx.save_for_forward(X, Y, weight, ridge, solution, L, info)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        X, Y, weight, ridge, solution, L, info = _wide(*ctx.saved_tensors)
        if grad is None:
            return ()
        grads = solve_normal_backward.dispatched(grad, X, Y, weight, ridge, solution, L, info)
        summed = [
            None if to is None or not needed else gradient.sum_to_size(to.shape)
            for gradient, to, needed in zip(grads, (X, Y, weight, ridge), ctx.needs_input_grad, strict=False)
        ]
        return tuple(summed)

    @staticmethod
    def jvp(ctx: Any, dX: Any, dY: Any, dweight: Any = None, dridge: Any = None, *unused: Any) -> tuple[Any, ...]:
        X, Y, weight, ridge, solution, L, info = _wide(*ctx.saved_tensors)
        X, Y, weight, solution, L = without_failed(info, X, Y, weight, solution, L)
        residual = Y - X @ solution
        right = torch.zeros_like(solution)
        if dX is not None:
            dX = dX.to(Y.dtype)
            right = right + dX.mT @ column(weight, residual) - X.mT @ column(weight, dX @ solution)
        if dY is not None:
            right = right + X.mT @ column(weight, dY)
        if dweight is not None:
            right = right + X.mT @ column(dweight, residual)
        if dridge is not None:
            right = right - dridge.unsqueeze(-1) * solution
        right = torch.where(failed(info), 0, right)
        return apply_normal_inverse.dispatched(right, X, weight, ridge, L), None, None, None, None


register_derivatives(solve_normal_ex, _SolveNormalEx)


def _solve_normal_composite(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    *plain: Any,
) -> tuple[Tensor, Tensor]:
    """Where a derivative is wanted, the op that keeps the factor."""
    solved = solve_normal_ex.dispatched(X, Y, weight, ridge, uniform_ridge, *checked_of_solve_normal(*plain))
    return solved[0], solved[2]


register_composite_derivative(solve_normal, _solve_normal_composite)

register_composite_derivative(solve_normal_backward, solve_normal_vjp)


class _ApplyNormalInverse(OpFunction):
    """V = (XᵀDX + Λ)⁻¹B as a function of B, X, D and Λ; the factor L is their cached function, not an argument.

    With S = A⁻¹Ū: ∂B = S, ∂X = −D((XS)Vᵀ + (XV)Sᵀ), ∂weight = −rowsum(XS∘XV), ∂Λ = −rowsum(S∘V).
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, X, weight, ridge, L = inputs
        ctx.save_for_backward(X, weight, ridge, L, output)
        ctx.save_for_forward(X, weight, ridge, L, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        X, weight, ridge, L, V = ctx.saved_tensors
        S = apply_normal_inverse.dispatched(grad, X, weight, ridge, L)
        XS, XV = X @ S, X @ V
        grad_x = -column(weight, XS @ V.mT + XV @ S.mT)
        grad_weight = None if weight is None else -(XS * XV).sum(-1).sum_to_size(weight.shape)
        grad_ridge = None if ridge is None else -(S * V).sum(-1).sum_to_size(ridge.shape)
        return S, grad_x.sum_to_size(X.shape), grad_weight, grad_ridge, None

    @staticmethod
    def jvp(ctx: Any, dB: Any, dX: Any, dweight: Any, dridge: Any, dL: Any) -> Tensor:
        X, weight, ridge, L, V = ctx.saved_tensors
        right = torch.zeros_like(V) if dB is None else dB
        if dX is not None:
            right = right - dX.mT @ column(weight, X @ V) - X.mT @ column(weight, dX @ V)
        if dweight is not None:
            right = right - X.mT @ column(dweight, X @ V)
        if dridge is not None:
            right = right - dridge.unsqueeze(-1) * V
        tangent: Tensor = apply_normal_inverse.dispatched(right, X, weight, ridge, L)
        return tangent


register_derivatives(apply_normal_inverse, _ApplyNormalInverse)
