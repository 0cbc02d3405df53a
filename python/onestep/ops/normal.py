"""Ops of the normal-equations family: ``gram``, ``moments``, ``solve_normal`` and what their derivatives need."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from onestep.ops._library import (
    OpFunction,
    define,
    register_composite_derivative,
    register_derivatives,
    register_not_differentiable,
)
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
    is_floating,
    kernel,
    kernel_batch,
    operand,
)

Batch = tuple[int, ...]


def _check_rows(X: Tensor, Y: Tensor, weight: Tensor | None) -> list[Batch]:
    """Checks X (…,n,d), Y (…,n,k), weight (…,n); returns their batch shapes."""
    x_shape, y_shape = X.shape, Y.shape
    # The good case is one expression, since this is a large part of what a small problem takes.
    if not (
        is_floating(X)
        and Y.dtype == X.dtype
        and Y.is_cpu == X.is_cpu
        and len(x_shape) >= 2
        and len(y_shape) >= 2
        and x_shape[-2] == y_shape[-2]
    ):
        check_floating("X", X)
        check_like("Y", Y, X)
        check_dims("X", X, 2, "(..., n, d)")
        check_dims("Y", Y, 2, "(..., n, k)")
        check_size("Y", Y, -2, x_shape[-2], f"(..., {x_shape[-2]}, k): as many rows as X")
    batches: list[Batch] = [x_shape[:-2], y_shape[:-2]]
    if weight is not None:
        n = x_shape[-2]
        check_like("weight", weight, X)
        check_dims("weight", weight, 1, "(..., n)")
        check_size("weight", weight, -1, n, f"(..., {n}): one weight per row of X")
        batches.append(weight.shape[:-1])
    return batches


def _optional(tensor: Tensor | None, batch: Batch, own: int) -> Any:
    return None if tensor is None else operand(tensor, batch, own)


def _column(weight: Tensor | None, rows: Tensor) -> Tensor:
    """``rows`` (…,n,·) scaled by the weights, if any."""
    return rows if weight is None else rows * weight.unsqueeze(-1)


# ---------------------------------------------------------------------------------------------------------------- gram


def _gram_shapes(X: Tensor, Y: Tensor, weight: Tensor | None) -> tuple[Batch, tuple[Tensor, Tensor]]:
    batch = broadcast_batch(*_check_rows(X, Y, weight))
    d, k = X.shape[-1], Y.shape[-1]
    return batch, (X.new_empty((*batch, d, d)), X.new_empty((*batch, d, k)))


def _gram_fake(X: Tensor, Y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _gram_shapes(X, Y, weight)[1]


def _gram_cpu(X: Tensor, Y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, (gram, cross) = _gram_shapes(X, Y, weight)
    kernel("gram", X.dtype)(
        operand(X, batch, 2),
        operand(Y, batch, 2),
        _optional(weight, batch, 1),
        kernel_batch(batch),
        X.shape[-2],
        X.shape[-1],
        Y.shape[-1],
        gram.data_ptr(),
        cross.data_ptr(),
    )
    return gram, cross


define(
    "gram(Tensor X, Tensor Y, Tensor? weight=None) -> (Tensor, Tensor)",
    cpu=_gram_cpu,
    fake=_gram_fake,
    own_dims=(2, 2, 1),
)


class _Gram(OpFunction):
    """G = XᵀDX, R = XᵀDY: ∂X = D(X(Ḡ + Ḡᵀ) + Y R̄ᵀ), ∂Y = D X R̄, ∂weight = rowsum(X∘XḠ + Y∘XR̄)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        X, Y, weight = (*inputs, None)[:3]
        ctx.save_for_backward(X, Y, weight)
        ctx.save_for_forward(X, Y, weight)

    @staticmethod
    def backward(ctx: Any, grad_gram: Tensor, grad_cross: Tensor) -> tuple[Any, ...]:
        X, Y, weight = ctx.saved_tensors
        through_gram = X @ (grad_gram + grad_gram.mT)
        through_cross = X @ grad_cross
        grad_x = _column(weight, through_gram + Y @ grad_cross.mT)
        grad_y = _column(weight, through_cross)
        grad_weight = None
        if weight is not None:
            per_row = (X * through_gram).sum(-1) / 2 + (Y * through_cross).sum(-1)
            grad_weight = per_row.sum_to_size(weight.shape)
        return grad_x.sum_to_size(X.shape), grad_y.sum_to_size(Y.shape), grad_weight

    @staticmethod
    def jvp(ctx: Any, dX: Tensor | None, dY: Tensor | None, dweight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        X, Y, weight = ctx.saved_tensors
        dX, dY = _zeros_if_none(dX, X), _zeros_if_none(dY, Y)
        half = dX.mT @ _column(weight, X)
        cross = dX.mT @ _column(weight, Y) + X.mT @ _column(weight, dY)
        gram = half + half.mT
        if dweight is not None:
            gram = gram + X.mT @ _column(dweight, X)
            cross = cross + X.mT @ _column(dweight, Y)
        return gram, cross


def _zeros_if_none(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


register_derivatives("gram", _Gram)

# ------------------------------------------------------------------------------------------------------------- moments

Moments = tuple[Tensor, Tensor, Tensor, Tensor]


def _moments_shapes(X: Tensor, Y: Tensor, weight: Tensor | None) -> Moments:
    if any(_check_rows(X, Y, weight)):
        raise ValueError(f"moments takes one table: X {tuple(X.shape)} and Y {tuple(Y.shape)} have batch dimensions")
    d, k = X.shape[-1], Y.shape[-1]

    def empty(*shape: int) -> Tensor:
        return X.new_empty(shape, dtype=torch.float64)

    return empty(d, d), empty(d, k), empty(d + k), empty()


def _moments_fake(X: Tensor, Y: Tensor, weight: Tensor | None = None, center: bool = False) -> Moments:
    return _moments_shapes(X, Y, weight)


def _moments_cpu(X: Tensor, Y: Tensor, weight: Tensor | None = None, center: bool = False) -> Moments:
    out = _moments_shapes(X, Y, weight)
    kernel("moments", X.dtype)(
        operand(X, (), 2),
        operand(Y, (), 2),
        _optional(weight, (), 1),
        X.shape[-2],
        X.shape[-1],
        Y.shape[-1],
        center,
        *(tensor.data_ptr() for tensor in out),
    )
    return out


define(
    "moments(Tensor X, Tensor Y, Tensor? weight=None, bool center=False) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_moments_cpu,
    fake=_moments_fake,
    own_dims=(2, 2, 1),
)
register_not_differentiable("moments", "detach its arguments, or use onestep.linalg.gram")

# -------------------------------------------------------------------------------------------------------- solve_normal

Solved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_solve(X: Tensor, Y: Tensor, weight: Tensor | None, ridge: Tensor | None, dual: bool) -> Batch:
    """Checks the operands of both solve ops; returns the batch shape."""
    batches = _check_rows(X, Y, weight)
    if ridge is not None:
        d = X.shape[-1]
        check_like("ridge", ridge, X)
        check_dims("ridge", ridge, 1, "(..., d)")
        check_size("ridge", ridge, -1, d, f"(..., {d}): one penalty per feature")
        batches.append(tuple(ridge.shape[:-1]))
    elif dual:
        raise ValueError("dual=True needs ridge > 0; got ridge=None")
    return broadcast_batch(*batches)


def _check_numbers(uniform_ridge: float, refine: int, jitter: float) -> None:
    if not (math.isfinite(uniform_ridge) and uniform_ridge >= 0):
        raise ValueError(f"ridge={uniform_ridge}; expected a finite number >= 0")
    if refine < 0:
        raise ValueError(f"refine={refine}; expected a number of steps >= 0")
    if not 0 <= jitter <= 1:
        raise ValueError(f"jitter={jitter}; expected a fraction of the mean diagonal, above 0 and at most 1")


def _run_solve(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    uniform_ridge: float,
    batch: Batch,
    refine: int,
    jitter: float,
    out: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None],
) -> None:
    _check_numbers(uniform_ridge, refine, jitter)
    solution, L, info, rcond, jittered = out
    n, d = X.shape[-2:]
    kernel("solve_normal", X.dtype)(
        operand(X, batch, 2),
        operand(Y, batch, 2),
        None if weight is None else operand(weight, batch, 1),
        None if ridge is None else operand(ridge, batch, 1),
        uniform_ridge,
        kernel_batch(batch),
        n,
        d,
        solution.shape[-1],
        refine,
        jitter,
        solution.data_ptr(),
        0 if L is None else L.data_ptr(),
        info.data_ptr(),
        0 if rcond is None else rcond.data_ptr(),
        0 if jittered is None else jittered.data_ptr(),
    )


def _solve_normal_fake(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    refine: int = 0,
    dual: bool = False,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    batch = _check_solve(X, Y, weight, ridge, dual)
    return X.new_empty((*batch, X.shape[-1], Y.shape[-1])), X.new_empty(batch, dtype=torch.int32)


def _solve_normal_cpu(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    refine: int = 0,
    dual: bool = False,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    solution, info = _solve_normal_fake(X, Y, weight, ridge, dual=dual)
    if dual:
        _solve_dual(X, Y, weight, ridge, refine, (solution, None, info, None))
    else:
        results = (solution, None, info, None, None)
        _run_solve(X, Y, weight, ridge, uniform_ridge, tuple(info.shape), refine, 0.0, results)
    if check:
        raise_if_failed(info, X.shape[-1])
    return solution, info


def raise_if_failed(info: Tensor, d: int) -> None:
    """Raises LinAlgError if any problem failed, naming how many, the first few, and what to do."""
    if not any_failed(info):
        return
    raise LinAlgError(
        f"{describe_failures(info, 'problems')}. info = i up to {d}: the leading minor of order i of X'DX + ridge is "
        "not positive definite, because columns are linearly dependent, or X or weight holds NaN or Inf; "
        f"info = {d + 1}: Y holds NaN or Inf, or the solution overflowed. Add ridge > 0, remove dependent "
        "columns, clean the data, or call the _ex variant, which reports info and keeps the good solutions."
    )


define(
    "solve_normal(Tensor X, Tensor Y, Tensor? weight=None, Tensor? ridge=None, float uniform_ridge=0.0, "
    "int refine=0, bool dual=False, bool check=False) -> (Tensor, Tensor)",
    cpu=_solve_normal_cpu,
    fake=_solve_normal_fake,
    own_dims=(2, 2, 1, 1),
)


def _solve_normal_ex_fake(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    refine: int = 0,
    jitter: float = 0.0,
    dual: bool = False,
    rcond: bool = True,
    check: bool = False,
) -> Solved:
    batch = _check_solve(X, Y, weight, ridge, dual)
    order = X.shape[-2] if dual else X.shape[-1]
    return (
        X.new_empty((*batch, X.shape[-1], Y.shape[-1])),
        empty_factor(X, batch, order),
        X.new_empty(batch, dtype=torch.int32),
        X.new_empty(batch if rcond else (*batch, 0)),
        X.new_empty(batch),
    )


def _solve_normal_ex_cpu(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    refine: int = 0,
    jitter: float = 0.0,
    dual: bool = False,
    rcond: bool = True,
    check: bool = False,
) -> Solved:
    out = _solve_normal_ex_fake(X, Y, weight, ridge, dual=dual, rcond=rcond)
    solution, L, info, condition, jittered = out
    if dual:
        _solve_dual(X, Y, weight, ridge, refine, (solution, L, info, condition if rcond else None))
        jittered.zero_()
    else:
        results = (solution, L, info, condition if rcond else None, jittered)
        _run_solve(X, Y, weight, ridge, uniform_ridge, tuple(info.shape), refine, jitter, results)
    if check:
        raise_if_failed(out[2], X.shape[-1])
    return out


define(
    "solve_normal_ex(Tensor X, Tensor Y, Tensor? weight=None, Tensor? ridge=None, float uniform_ridge=0.0, "
    "int refine=0, float jitter=0.0, bool dual=False, bool rcond=True, bool check=False) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_solve_normal_ex_cpu,
    fake=_solve_normal_ex_fake,
    own_dims=(2, 2, 1, 1),
)


def _dual_scales(weight: Tensor | None, ridge: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """sqrt(weight), the largest penalty λ̄ (…,1), and λ̄/λ (…,d)."""
    largest = ridge.amax(-1, keepdim=True)
    return None if weight is None else weight.sqrt(), largest, largest / ridge


def _solve_dual(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    refine: int,
    out: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
) -> None:
    """The n × n form, W = Λ⁻¹XᵀS (S X Λ⁻¹Xᵀ S + I)⁻¹ S Y, S = sqrt(D), scaled by the largest penalty λ̄.

    The Gram kernel reads X transposed, in place. Writes solution, factor, info and rcond into ``out``.
    """
    assert ridge is not None
    _check_numbers(0.0, refine, 0.0)
    if not (ridge > 0).all():
        raise ValueError("dual=True needs ridge > 0 in every feature")
    if weight is not None and (weight < 0).any():
        raise ValueError("weight has negative values; expected values >= 0")
    solution_out, factor_out, info_out, rcond_out = out
    root, largest, inverse_ridge = _dual_scales(weight, ridge)
    inner = torch.ops.onestep.gram.default(X.mT, X.mT[..., :0], inverse_ridge)[0]
    if root is not None:
        inner = inner * root.unsqueeze(-1) * root.unsqueeze(-2)
    eye = torch.eye(X.shape[-2], dtype=X.dtype, device=X.device)
    system = inner + largest.unsqueeze(-1) * eye
    L, info = torch.ops.onestep.cholesky.default(system)
    solution = _from_dual(X, root, inverse_ridge, L, _column(root, Y))
    for _ in range(refine):
        # δ = A⁻¹(XᵀD(Y − XW) − ΛW), with A⁻¹ by Woodbury's identity.
        right = X.mT @ _column(weight, Y - X @ solution) - ridge.unsqueeze(-1) * solution
        solution = solution + _apply_dual(right, X, weight, ridge, L)
    finite = solution.isfinite().all(-1).all(-1)
    info_out.copy_(torch.where((info == 0) & ~finite, X.shape[-1] + 1, info))
    solution_out.copy_(torch.where(_failed(info_out), torch.nan, solution))
    if factor_out is not None:
        factor_out.copy_(L)
    if rcond_out is not None:
        norm = torch.linalg.matrix_norm(system, 1)
        inverse = torch.ops.onestep.cholesky_solve.default(eye, L)
        rcond_out.copy_(torch.where(info == 0, 1 / (norm * torch.linalg.matrix_norm(inverse, 1)), 0))


def _from_dual(X: Tensor, root: Tensor | None, inverse_ridge: Tensor, L: Tensor, right: Tensor) -> Tensor:
    """(λ̄Λ⁻¹)XᵀS K⁻¹ right, K = LLᵀ (n × n)."""
    inner = torch.ops.onestep.cholesky_solve.default(right, L)
    return inverse_ridge.unsqueeze(-1) * (X.mT @ _column(root, inner))


def _apply_dual(B: Tensor, X: Tensor, weight: Tensor | None, ridge: Tensor, L: Tensor) -> Tensor:
    """(XᵀDX + Λ)⁻¹B = Λ⁻¹(B − XᵀS K⁻¹ S X (λ̄Λ⁻¹) B) by Woodbury's identity."""
    root, _, inverse_ridge = _dual_scales(weight, ridge)
    scaled = inverse_ridge.unsqueeze(-1) * B
    inner = torch.ops.onestep.cholesky_solve.default(_column(root, X @ scaled), L)
    return (B - X.mT @ _column(root, inner)) / ridge.unsqueeze(-1)


class _SolveNormalEx(OpFunction):
    """W = A⁻¹XᵀDY, A = XᵀDX + diag(ridge); the formulas stand at ``_solve_normal_vjp``. Every derivative reuses L."""

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
        X, Y, weight, ridge, solution, L, info = ctx.saved_tensors
        others = (None,) * (len(ctx.needs_input_grad) - 4)
        if grad is None:
            return (None, None, None, None, *others)
        grads = torch.ops.onestep.solve_normal_backward.default(grad, X, Y, weight, ridge, solution, L, info)
        summed = [
            None if to is None or not needed else gradient.sum_to_size(to.shape)
            for gradient, to, needed in zip(grads, (X, Y, weight, ridge), ctx.needs_input_grad, strict=False)
        ]
        return (*summed, *others)

    @staticmethod
    def jvp(ctx: Any, dX: Any, dY: Any, dweight: Any = None, dridge: Any = None, *unused: Any) -> tuple[Any, ...]:
        X, Y, weight, ridge, solution, L, info = ctx.saved_tensors
        X, Y, weight, solution, L = _without_failed(info, X, Y, weight, solution, L)
        residual = Y - X @ solution
        right = torch.zeros_like(solution)
        if dX is not None:
            right = right + dX.mT @ _column(weight, residual) - X.mT @ _column(weight, dX @ solution)
        if dY is not None:
            right = right + X.mT @ _column(weight, dY)
        if dweight is not None:
            right = right + X.mT @ _column(dweight, residual)
        if dridge is not None:
            right = right - dridge.unsqueeze(-1) * solution
        right = torch.where(_failed(info), 0, right)
        return torch.ops.onestep.apply_normal_inverse.default(right, X, weight, ridge, L), None, None, None, None


def _failed(info: Tensor) -> Tensor:
    return (info != 0)[..., None, None]


def _without_failed(
    info: Tensor, X: Tensor, Y: Tensor, weight: Tensor | None, solution: Tensor, L: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Failed problems become X = 0, Y = 0, W = 0, L = I, whose derivatives are zeros; the rest stays as it is."""
    failed = _failed(info)
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    clean_weight = None if weight is None else torch.where(failed[..., 0], 0, weight)
    return (
        torch.where(failed, 0, X),
        torch.where(failed, 0, Y),
        clean_weight,
        torch.where(failed, 0, solution),
        torch.where(failed, eye, L),
    )


register_derivatives("solve_normal_ex", _SolveNormalEx)


def _solve_normal_composite(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    refine: int = 0,
    dual: bool = False,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Where a derivative is wanted, the op that keeps the factor."""
    solved = torch.ops.onestep.solve_normal_ex.default(
        X, Y, weight, ridge, uniform_ridge, refine, 0.0, dual, False, check
    )
    return solved[0], solved[2]


register_composite_derivative("solve_normal", _solve_normal_composite)

# ----------------------------------------------------------------------------------------------- solve_normal_backward

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _backward_shapes(
    grad: Tensor, X: Tensor, Y: Tensor, weight: Tensor | None, solution: Tensor
) -> tuple[Batch, Gradients]:
    batches = [tuple(tensor.shape[:-2]) for tensor in (grad, X, Y, solution)]
    batches += [] if weight is None else [tuple(weight.shape[:-1])]
    batch = broadcast_batch(*batches)
    n, d, k = X.shape[-2], X.shape[-1], Y.shape[-1]
    return batch, (
        X.new_empty((*batch, n, d)),
        X.new_empty((*batch, n, k)),
        X.new_empty((*batch, n)),
        X.new_empty((*batch, d)),
    )


def _backward_fake(
    grad: Tensor,
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    solution: Tensor,
    L: Tensor,
    info: Tensor,
) -> Gradients:
    return _backward_shapes(grad, X, Y, weight, solution)[1]


def _backward_cpu(
    grad: Tensor,
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    solution: Tensor,
    L: Tensor,
    info: Tensor,
) -> Gradients:
    if L.shape[-1] != X.shape[-1]:
        return _solve_normal_vjp(grad, X, Y, weight, ridge, solution, L, info)
    batch, out = _backward_shapes(grad, X, Y, weight, solution)
    kernel("solve_normal_backward", X.dtype)(
        operand(grad, batch, 2),
        operand(X, batch, 2),
        operand(Y, batch, 2),
        _optional(weight, batch, 1),
        operand(solution, batch, 2),
        operand(L.mT, batch, 2),
        operand(info, batch, 0),
        kernel_batch(batch),
        X.shape[-2],
        X.shape[-1],
        Y.shape[-1],
        *(tensor.data_ptr() for tensor in out),
    )
    return out


def _solve_normal_vjp(
    grad: Tensor,
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    solution: Tensor,
    L: Tensor,
    info: Tensor,
) -> Gradients:
    """The backward's formulas in differentiable ops: for double backward, and for the dual form."""
    X, Y, weight, solution, L = _without_failed(info, X, Y, weight, solution, L)
    adjoint = torch.ops.onestep.apply_normal_inverse.default(torch.where(_failed(info), 0, grad), X, weight, ridge, L)
    residual = Y - X @ solution
    fitted = X @ adjoint
    grad_x = _column(weight, residual @ adjoint.mT - fitted @ solution.mT)
    return (
        grad_x,
        _column(weight, fitted),
        (fitted * residual).sum(-1),
        -(adjoint * solution).sum(-1),
    )


define(
    "solve_normal_backward(Tensor grad, Tensor X, Tensor Y, Tensor? weight, Tensor? ridge, Tensor solution, Tensor L, "
    "Tensor info) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
    own_dims=(2, 2, 2, 1, 1, 2, 2, 0),
)
register_composite_derivative("solve_normal_backward", _solve_normal_vjp)

# ------------------------------------------------------------------------------------------------ apply_normal_inverse


def _apply_fake(B: Tensor, X: Tensor, weight: Tensor | None, ridge: Tensor | None, L: Tensor) -> Tensor:
    batch = broadcast_batch(tuple(B.shape[:-2]), tuple(L.shape[:-2]))
    return B.new_empty((*batch, *B.shape[-2:]))


def _apply_cpu(B: Tensor, X: Tensor, weight: Tensor | None, ridge: Tensor | None, L: Tensor) -> Tensor:
    if L.shape[-1] == X.shape[-1]:
        solution: Tensor = torch.ops.onestep.cholesky_solve.default(B, L)
        return solution
    assert ridge is not None
    return _apply_dual(B, X, weight, ridge, L).contiguous()


define(
    "apply_normal_inverse(Tensor B, Tensor X, Tensor? weight, Tensor? ridge, Tensor L) -> Tensor",
    cpu=_apply_cpu,
    fake=_apply_fake,
    own_dims=(2, 2, 1, 1, 2),
)


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
        S = torch.ops.onestep.apply_normal_inverse.default(grad, X, weight, ridge, L)
        XS, XV = X @ S, X @ V
        grad_x = -_column(weight, XS @ V.mT + XV @ S.mT)
        grad_weight = None if weight is None else -(XS * XV).sum(-1).sum_to_size(weight.shape)
        grad_ridge = None if ridge is None else -(S * V).sum(-1).sum_to_size(ridge.shape)
        return S, grad_x.sum_to_size(X.shape), grad_weight, grad_ridge, None

    @staticmethod
    def jvp(ctx: Any, dB: Any, dX: Any, dweight: Any, dridge: Any, dL: Any) -> Tensor:
        X, weight, ridge, L, V = ctx.saved_tensors
        right = torch.zeros_like(V) if dB is None else dB
        if dX is not None:
            right = right - dX.mT @ _column(weight, X @ V) - X.mT @ _column(weight, dX @ V)
        if dweight is not None:
            right = right - X.mT @ _column(dweight, X @ V)
        if dridge is not None:
            right = right - dridge.unsqueeze(-1) * V
        tangent: Tensor = torch.ops.onestep.apply_normal_inverse.default(right, X, weight, ridge, L)
        return tangent


register_derivatives("apply_normal_inverse", _ApplyNormalInverse)
