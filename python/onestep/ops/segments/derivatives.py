"""Derivatives of the ops on ragged problems, in torch's gathers and scatters.

Entry e has the row x_e = X[indices[e]] and belongs to problem b(e), whose matrices it gathers likewise. With
E_e = y_e − x_eᵀW_b and V = A⁻¹Ḡ: ∂x_e = w_e(V_b E_e − W_b(x_eᵀV_b)), added up in the rows of X, ∂y_e = w_e x_eᵀV_b,
∂w_e = (x_eᵀV_b)·E_e, ∂base = −½Σ(V_b W_bᵀ + W_b V_bᵀ), ∂ridge = −rowsum(V∘W).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onestep.ops._derivatives import OpFunction, register_composite_derivative, register_derivatives
from onestep.ops.normal.formulas import column, failed
from onestep.ops.segments.schema import apply_segments_inverse, solve_normal_segments, solve_normal_segments_ex


class _Entries(NamedTuple):
    """What entries gather from and add to."""

    of_row: Tensor | None
    of_problem: Tensor
    problems: int
    rows: int

    def rows_of(self, X: Tensor) -> Tensor:
        """x_e (m,d)."""
        return X if self.of_row is None else X.index_select(0, self.of_row)

    def dot(self, x: Tensor, W: Tensor) -> Tensor:
        """x_eᵀW_b (m,k)."""
        return (x.unsqueeze(-1) * W.index_select(0, self.of_problem)).sum(-2)

    def times(self, t: Tensor, W: Tensor) -> Tensor:
        """W_b t_e (m,d)."""
        return (W.index_select(0, self.of_problem) * t.unsqueeze(-2)).sum(-1)

    def to_rows(self, x: Tensor) -> Tensor:
        """Σ x_e over the entries of each row of X."""
        return x if self.of_row is None else x.new_zeros(self.rows, x.shape[-1]).index_add(0, self.of_row, x)

    def to_problems(self, x: Tensor, t: Tensor) -> Tensor:
        """Σ x_e t_eᵀ over the entries of each problem (B,d,k)."""
        products = x.unsqueeze(-1) * t.unsqueeze(-2)
        return products.new_zeros(self.problems, *products.shape[1:]).index_add(0, self.of_problem, products)


def _entries(X: Tensor, Y_rows: int, offsets: Tensor, indices: Tensor | None) -> _Entries:
    problems = offsets.shape[0] - 1
    of_problem = torch.repeat_interleave(
        torch.arange(problems, device=X.device), offsets[1:] - offsets[:-1], output_size=Y_rows
    )
    return _Entries(indices, of_problem, problems, X.shape[0])


def _symmetric(V: Tensor, W: Tensor) -> Tensor:
    """½Σ(V_b W_bᵀ + W_b V_bᵀ)."""
    product = (V @ W.mT).sum(0)
    return (product + product.mT) / 2


class _SolveSegments(OpFunction):
    """W_b = A_b⁻¹Σ w_e x_e y_eᵀ; every derivative reuses L. Entries of problems that failed count for nothing."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        X, Y, offsets, indices, weight, base, ridge = (*inputs, None, None, None, None)[:7]
        solution, L, info = output
        ctx.mark_non_differentiable(L, info)
        saved = (X, Y, offsets, indices, weight, base, ridge, solution, L, info)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        _, _, offsets, indices, _, base, ridge, _, _, info = saved
        if grad is None:
            return ()
        entries, X, x, y, weight, W, L = _good(*saved)
        V = apply_segments_inverse.dispatched(
            torch.where(failed(info), 0, grad), X, offsets, indices, weight, base, ridge, L
        )
        residual = y - entries.dot(x, W)
        fitted = entries.dot(x, V)
        grad_rows = column(weight, entries.times(residual, V) - entries.times(fitted, W))
        return (
            entries.to_rows(grad_rows),
            column(weight, fitted),
            None,
            None,
            None if weight is None else (fitted * residual).sum(-1),
            None if base is None else -_symmetric(V, W),
            None if ridge is None else -(V * W).sum(-1),
        )

    @staticmethod
    def jvp(ctx: Any, dX: Any, dY: Any, *tangents: Any) -> tuple[Any, ...]:
        _, _, dweight, dbase, dridge = (*tangents, None, None, None, None, None)[:5]
        saved = ctx.saved_tensors
        _, _, offsets, indices, _, base, ridge, _, _, info = saved
        entries, X, x, y, weight, W, L = _good(*saved)
        residual = y - entries.dot(x, W)
        right = torch.zeros_like(W)
        if dX is not None:
            dx = entries.rows_of(dX)
            right = right + entries.to_problems(dx, column(weight, residual))
            right = right - entries.to_problems(x, column(weight, entries.dot(dx, W)))
        if dY is not None:
            right = right + entries.to_problems(x, column(weight, dY))
        if dweight is not None:
            right = right + entries.to_problems(x, column(dweight, residual))
        if dbase is not None:
            right = right - (dbase + dbase.mT) @ W / 2
        if dridge is not None:
            right = right - dridge.unsqueeze(-1) * W
        right = torch.where(failed(info), 0, right)
        tangent = apply_segments_inverse.dispatched(right, X, offsets, indices, weight, base, ridge, L)
        return tangent, None, None


class _Good(NamedTuple):
    entries: _Entries
    X: Tensor
    x: Tensor
    y: Tensor
    weight: Tensor | None
    solution: Tensor
    L: Tensor


def _good(
    X: Tensor,
    Y: Tensor,
    offsets: Tensor,
    indices: Tensor | None,
    weight: Tensor | None,
    base: Tensor | None,
    ridge: Tensor | None,
    solution: Tensor,
    L: Tensor,
    info: Tensor,
) -> _Good:
    """The operands, where problems that failed have x = 0, y = 0, w = 0, W = 0, L = I, whose derivatives are zeros."""
    entries = _entries(X, Y.shape[0], offsets, indices)
    bad = failed(info)
    of_bad = bad[:, :, 0].index_select(0, entries.of_problem)
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    # What is not finite made its problems fail: no other one has it.
    finite = torch.where(X.isfinite(), X, 0)
    return _Good(
        entries,
        finite,
        torch.where(of_bad, 0, entries.rows_of(finite)),
        torch.where(of_bad, 0, Y),
        None if weight is None else torch.where(of_bad[:, 0], 0, weight),
        torch.where(bad, 0, solution),
        torch.where(bad, eye, L),
    )


register_derivatives(solve_normal_segments_ex, _SolveSegments)


def _solve_normal_segments_composite(*args: Any) -> tuple[Tensor, Tensor]:
    """Where a derivative is wanted, the op that keeps the factors."""
    solution, _, info = solve_normal_segments_ex.dispatched(*args)
    return solution, info


register_composite_derivative(solve_normal_segments, _solve_normal_segments_composite)


class _ApplySegmentsInverse(OpFunction):
    """V_b = A_b⁻¹B_b as a function of B and of what A is made of; the factors L are cached, not an argument.

    With S = A⁻¹Ū: ∂B = S, ∂x_e = −w_e(S_b(x_eᵀV_b)ᵀ + V_b(x_eᵀS_b)ᵀ), ∂w_e = −(x_eᵀS_b)·(x_eᵀV_b),
    ∂base = −½Σ(S_b V_bᵀ + V_b S_bᵀ), ∂ridge = −rowsum(S∘V).
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, *operands = inputs
        ctx.save_for_backward(*operands, output)
        ctx.save_for_forward(*operands, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        X, offsets, indices, weight, base, ridge, L, V = ctx.saved_tensors
        S = apply_segments_inverse.dispatched(grad, X, offsets, indices, weight, base, ridge, L)
        entries = _entries(X, _count(X, indices), offsets, indices)
        x = entries.rows_of(X)
        xs, xv = entries.dot(x, S), entries.dot(x, V)
        grad_rows = -column(weight, entries.times(xv, S) + entries.times(xs, V))
        return (
            S,
            entries.to_rows(grad_rows),
            None,
            None,
            None if weight is None else -(xs * xv).sum(-1),
            None if base is None else -_symmetric(S, V),
            None if ridge is None else -(S * V).sum(-1),
            None,
        )

    @staticmethod
    def jvp(ctx: Any, dB: Any, dX: Any, *tangents: Any) -> Tensor:
        _, _, dweight, dbase, dridge, _ = tangents
        X, offsets, indices, weight, base, ridge, L, V = ctx.saved_tensors
        entries = _entries(X, _count(X, indices), offsets, indices)
        x = entries.rows_of(X)
        right = torch.zeros_like(V) if dB is None else dB
        if dX is not None:
            dx = entries.rows_of(dX)
            right = right - entries.to_problems(dx, column(weight, entries.dot(x, V)))
            right = right - entries.to_problems(x, column(weight, entries.dot(dx, V)))
        if dweight is not None:
            right = right - entries.to_problems(x, column(dweight, entries.dot(x, V)))
        if dbase is not None:
            right = right - (dbase + dbase.mT) @ V / 2
        if dridge is not None:
            right = right - dridge.unsqueeze(-1) * V
        tangent: Tensor = apply_segments_inverse.dispatched(right, X, offsets, indices, weight, base, ridge, L)
        return tangent


def _count(X: Tensor, indices: Tensor | None) -> int:
    """The number of entries."""
    return X.shape[0] if indices is None else indices.shape[0]


register_derivatives(apply_segments_inverse, _ApplySegmentsInverse)
