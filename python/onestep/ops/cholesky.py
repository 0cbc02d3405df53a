"""Ops on batches of symmetric positive definite matrices: ``cholesky``, ``cholesky_solve``, ``solve_spd``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onestep.ops._library import OpFunction, define, register_derivatives
from onestep.ops._operands import (
    LinAlgError,
    any_failed,
    broadcast_batch,
    check_dims,
    check_floating,
    check_like,
    check_size,
    describe_failures,
    empty_factor,
    kernel,
    kernel_batch,
    operand,
)

Batch = tuple[int, ...]


def _check_square(name: str, A: Tensor) -> None:
    check_floating(name, A)
    check_dims(name, A, 2, "(..., d, d)")
    check_size(name, A, -2, A.shape[-1], "square matrices (..., d, d)")


def _check_right(B: Tensor, matrix: Tensor) -> None:
    d = matrix.shape[-1]
    check_like("B", B, matrix)
    check_dims("B", B, 2, "(..., d, k)")
    check_size("B", B, -2, d, f"(..., {d}, k): as many rows as the matrix")


def _symmetrized(A: Tensor) -> Tensor:
    return (A + A.mT) / 2


def _clean_factor(info: Tensor, L: Tensor) -> Tensor:
    """Factors of failed problems replaced by the identity, so that their derivatives are finite and can be zeroed."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return torch.where((info != 0)[..., None, None], eye, L)


def _zero_failed(info: Tensor, tensor: Tensor) -> Tensor:
    return torch.where((info != 0)[..., None, None], 0, tensor)


# ------------------------------------------------------------------------------------------------------------ cholesky


def raise_if_failed(info: Tensor, d: int) -> None:
    """Raises LinAlgError if any matrix failed, naming how many, the first few, and what to do."""
    if not any_failed(info):
        return
    raise LinAlgError(
        f"{describe_failures(info, 'matrices')}. info = i up to {d}: the leading minor of order i is not positive "
        f"definite or holds NaN or Inf; info = {d + 1}: the right-hand side holds NaN or Inf, or the solution "
        "overflowed. Add a multiple of the identity, or call the _ex variant, which reports info."
    )


def _cholesky_fake(A: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
    _check_square("A", A)
    return empty_factor(A, tuple(A.shape[:-2]), A.shape[-1]), A.new_empty(A.shape[:-2], dtype=torch.int32)


def _cholesky_cpu(A: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
    L, info = _cholesky_fake(A)
    batch = tuple(A.shape[:-2])
    kernel("cholesky", A.dtype)(operand(A, batch, 2), kernel_batch(batch), A.shape[-1], L.data_ptr(), info.data_ptr())
    if check:
        raise_if_failed(info, A.shape[-1])
    return L, info


define(
    "cholesky(Tensor A, bool check=False) -> (Tensor, Tensor)",
    cpu=_cholesky_cpu,
    fake=_cholesky_fake,
    own_dims=(2,),
)


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


register_derivatives("cholesky", _Cholesky)

# ------------------------------------------------------------------------------------------------------ cholesky_solve


def _cholesky_solve_shapes(B: Tensor, L: Tensor) -> tuple[Batch, Tensor]:
    _check_square("L", L)
    _check_right(B, L)
    batch = broadcast_batch(tuple(B.shape[:-2]), tuple(L.shape[:-2]))
    return batch, B.new_empty((*batch, *B.shape[-2:]))


def _cholesky_solve_fake(B: Tensor, L: Tensor) -> Tensor:
    return _cholesky_solve_shapes(B, L)[1]


def _cholesky_solve_cpu(B: Tensor, L: Tensor) -> Tensor:
    batch, out = _cholesky_solve_shapes(B, L)
    kernel("cholesky_solve", L.dtype)(
        operand(L.mT, batch, 2),
        operand(B, batch, 2),
        kernel_batch(batch),
        L.shape[-1],
        B.shape[-1],
        out.data_ptr(),
    )
    return out


define(
    "cholesky_solve(Tensor B, Tensor L) -> Tensor",
    cpu=_cholesky_solve_cpu,
    fake=_cholesky_solve_fake,
    own_dims=(2, 2),
)


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
        S = torch.ops.onestep.cholesky_solve.default(grad, L)
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
        solution: Tensor = torch.ops.onestep.cholesky_solve.default(right, L)
        return solution


register_derivatives("cholesky_solve", _CholeskySolve)

# ----------------------------------------------------------------------------------------------------------- solve_spd

Solved = tuple[Tensor, Tensor, Tensor]


def _solve_spd_shapes(A: Tensor, B: Tensor) -> tuple[Batch, Solved]:
    _check_square("A", A)
    d = A.shape[-1]
    _check_right(B, A)
    batch = broadcast_batch(tuple(A.shape[:-2]), tuple(B.shape[:-2]))
    return batch, (
        A.new_empty((*batch, d, B.shape[-1])),
        empty_factor(A, batch, d),
        A.new_empty(batch, dtype=torch.int32),
    )


def _solve_spd_fake(A: Tensor, B: Tensor, check: bool = False) -> Solved:
    return _solve_spd_shapes(A, B)[1]


def _solve_spd_cpu(A: Tensor, B: Tensor, check: bool = False) -> Solved:
    batch, out = _solve_spd_shapes(A, B)
    kernel("solve_spd", A.dtype)(
        operand(A, batch, 2),
        operand(B, batch, 2),
        kernel_batch(batch),
        A.shape[-1],
        B.shape[-1],
        *(tensor.data_ptr() for tensor in out),
    )
    if check:
        raise_if_failed(out[2], A.shape[-1])
    return out


define(
    "solve_spd(Tensor A, Tensor B, bool check=False) -> (Tensor, Tensor, Tensor)",
    cpu=_solve_spd_cpu,
    fake=_solve_spd_fake,
    own_dims=(2, 2),
)


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
        S = torch.ops.onestep.apply_spd_inverse.default(_zero_failed(info, grad), _zero_failed(info, A), L)
        return -_symmetrized(S @ V.mT).sum_to_size(A.shape), S.sum_to_size(ctx.shape_b), None

    @staticmethod
    def jvp(ctx: Any, dA: Any, dB: Any, *unused: Any) -> tuple[Any, ...]:
        A, V, L, info = ctx.saved_tensors
        L, V = _clean_factor(info, L), _zero_failed(info, V)
        right = torch.zeros_like(V) if dB is None else dB
        if dA is not None:
            right = right - _symmetrized(dA) @ V
        right = _zero_failed(info, right)
        return torch.ops.onestep.apply_spd_inverse.default(right, _zero_failed(info, A), L), None, None


register_derivatives("solve_spd", _SolveSpd)

# --------------------------------------------------------------------------------------------------- apply_spd_inverse


def _apply_fake(B: Tensor, A: Tensor, L: Tensor) -> Tensor:
    return _cholesky_solve_fake(B, L)


def _apply_cpu(B: Tensor, A: Tensor, L: Tensor) -> Tensor:
    return _cholesky_solve_cpu(B, L)


define(
    "apply_spd_inverse(Tensor B, Tensor A, Tensor L) -> Tensor",
    cpu=_apply_cpu,
    fake=_apply_fake,
    own_dims=(2, 2, 2),
)


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
        S = torch.ops.onestep.apply_spd_inverse.default(grad, A, L)
        return S.sum_to_size(ctx.shape_b), -_symmetrized(S @ V.mT).sum_to_size(A.shape), None

    @staticmethod
    def jvp(ctx: Any, dB: Any, dA: Any, dL: Any) -> Tensor:
        A, L, V = ctx.saved_tensors
        right = torch.zeros_like(V) if dB is None else dB
        if dA is not None:
            right = right - _symmetrized(dA) @ V
        solution: Tensor = torch.ops.onestep.apply_spd_inverse.default(right, A, L)
        return solution


register_derivatives("apply_spd_inverse", _ApplySpdInverse)
