"""Derivatives of the Cholesky ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onestep.ops._derivatives import OpFunction, register_derivatives
from onestep.ops.cholesky.schema import apply_spd_inverse, cholesky, cholesky_solve, solve_spd


def _symmetrized(A: Tensor) -> Tensor:
    return (A + A.mT) / 2


def _clean_factor(info: Tensor, L: Tensor) -> Tensor:
    """Factors of failed problems replaced by the identity, so that their derivatives are finite and can be zeroed."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return torch.where((info != 0)[..., None, None], eye, L)


def _zero_failed(info: Tensor, tensor: Tensor) -> Tensor:
    return torch.where((info != 0)[..., None, None], 0, tensor)


def _lower_half(A: Tensor) -> Tensor:
    """Φ(A): the lower triangle with the diagonal halved."""
    return A.tril() - torch.diag_embed(A.diagonal(dim1=-2, dim2=-1)) / 2


class _Cholesky(OpFunction):
    """∂A = sym(L⁻ᵀ Φ(Lᵀ L̄) L⁻¹), L̇ = L Φ(L⁻¹ Ȧ L⁻ᵀ) (Murray, "Differentiation of the Cholesky decomposition", 2016)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        L, info = output
        ctx.mark_non_differentiable(info)
        ctx.save_for_backward(L, info)
        ctx.save_for_forward(L, info)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, None]:
        L, info = ctx.saved_tensors
        if grad is None:
            return None, None
        L = _clean_factor(info, L)
        middle = _lower_half(L.mT @ _zero_failed(info, grad.tril()))
        left = torch.linalg.solve_triangular(L.mT, middle, upper=True)
        return _symmetrized(torch.linalg.solve_triangular(L, left, upper=False, left=False)), None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor, *unused: Any) -> tuple[Tensor, None]:
        L, info = ctx.saved_tensors
        L = _clean_factor(info, L)
        left = torch.linalg.solve_triangular(L, _symmetrized(dA), upper=False)
        middle = torch.linalg.solve_triangular(L.mT, left, upper=True, left=False)
        return _zero_failed(info, L @ _lower_half(middle)), None


register_derivatives(cholesky, _Cholesky)


class _CholeskySolve(OpFunction):
    """V = (LLᵀ)⁻¹B: with S = (LLᵀ)⁻¹Ū, ∂B = S and ∂L = −tril((SVᵀ + VSᵀ)L)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        B, L = inputs
        ctx.save_for_backward(L, output)
        ctx.save_for_forward(L, output)
        ctx.shape_b = B.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, Any]:
        L, V = ctx.saved_tensors
        S = cholesky_solve.dispatched(grad, L)
        grad_l = None
        if ctx.needs_input_grad[1]:
            grad_l = -((S @ V.mT + V @ S.mT) @ L.tril()).tril().sum_to_size(L.shape)
        return S.sum_to_size(ctx.shape_b), grad_l

    @staticmethod
    def jvp(ctx: Any, dB: Any, dL: Any) -> Tensor:
        L, V = ctx.saved_tensors
        right = torch.zeros_like(V) if dB is None else dB
        if dL is not None:
            lower, tangent = L.tril(), dL.tril()
            right = right - tangent @ (lower.mT @ V) - lower @ (tangent.mT @ V)
        solution: Tensor = cholesky_solve.dispatched(right, L)
        return solution


register_derivatives(cholesky_solve, _CholeskySolve)


class _SolveSpd(OpFunction):
    """V = A⁻¹B, and the factor: with S = A⁻¹Ū, ∂B = S and ∂A = −sym(SVᵀ)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        A, B = inputs[:2]
        solution, L, info = output
        ctx.mark_non_differentiable(L, info)
        ctx.save_for_backward(A, solution, L, info)
        ctx.save_for_forward(A, solution, L, info)
        ctx.set_materialize_grads(False)
        ctx.shape_b = B.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, Any, None]:
        A, V, L, info = ctx.saved_tensors
        if grad is None:
            return None, None, None
        L, V = _clean_factor(info, L), _zero_failed(info, V)
        S = apply_spd_inverse.dispatched(_zero_failed(info, grad), _zero_failed(info, A), L)
        return -_symmetrized(S @ V.mT).sum_to_size(A.shape), S.sum_to_size(ctx.shape_b), None

    @staticmethod
    def jvp(ctx: Any, dA: Any, dB: Any, *unused: Any) -> tuple[Any, ...]:
        A, V, L, info = ctx.saved_tensors
        L, V = _clean_factor(info, L), _zero_failed(info, V)
        right = torch.zeros_like(V) if dB is None else dB
        if dA is not None:
            right = right - _symmetrized(dA) @ V
        right = _zero_failed(info, right)
        return apply_spd_inverse.dispatched(right, _zero_failed(info, A), L), None, None


register_derivatives(solve_spd, _SolveSpd)


class _ApplySpdInverse(OpFunction):
    """V = A⁻¹B as a function of B and A; the factor L is A's cached function, not an argument."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        B, A, L = inputs
        ctx.save_for_backward(A, L, output)
        ctx.save_for_forward(A, L, output)
        ctx.shape_b = B.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, Any, None]:
        A, L, V = ctx.saved_tensors
        S = apply_spd_inverse.dispatched(grad, A, L)
        return S.sum_to_size(ctx.shape_b), -_symmetrized(S @ V.mT).sum_to_size(A.shape), None

    @staticmethod
    def jvp(ctx: Any, dB: Any, dA: Any, dL: Any) -> Tensor:
        A, L, V = ctx.saved_tensors
        right = torch.zeros_like(V) if dB is None else dB
        if dA is not None:
            right = right - _symmetrized(dA) @ V
        solution: Tensor = apply_spd_inverse.dispatched(right, A, L)
        return solution


register_derivatives(apply_spd_inverse, _ApplySpdInverse)
