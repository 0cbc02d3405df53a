"""CPU kernels of the normal-equations ops: allocate the results and call csrc/normal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import register
from onestep.ops.cholesky.schema import cholesky_solve
from onestep.ops.normal import schema
from onestep.ops.normal.dual import apply_dual
from onestep.ops.normal.formulas import solve_normal_vjp
from onestep.ops.normal.options import Options
from onestep.ops.normal.schema import Results
from onestep.ops.normal.solves import register_solves
from onestep.ops.operands import ELEMENTS, kernel_batch, operand, optional_operand

Entries = dict[torch.dtype, Callable[..., None]]

_GRAM: Entries = {torch.float32: _native.gram_f32, torch.float64: _native.gram_f64}
_MOMENTS: Entries = {torch.float32: _native.moments_f32, torch.float64: _native.moments_f64}
_SOLVE: Entries = {torch.float32: _native.solve_normal_f32, torch.float64: _native.solve_normal_f64}
_BACKWARD: Entries = {
    torch.float32: _native.solve_normal_backward_f32,
    torch.float64: _native.solve_normal_backward_f64,
}


@register(schema.gram, device="cpu")
def _gram(X: Tensor, Y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    gram, cross = schema.gram_results(X, Y, weight)
    batch = tuple(gram.shape[:-2])
    _GRAM[Y.dtype](
        x=operand(X, batch, 2),
        x_element=ELEMENTS[X.dtype],
        y=operand(Y, batch, 2),
        weight=optional_operand(weight, batch, 1),
        batch=kernel_batch(batch),
        n=X.shape[-2],
        d=X.shape[-1],
        k=Y.shape[-1],
        gram=gram.data_ptr(),
        cross=cross.data_ptr(),
    )
    return gram, cross


@register(schema.moments, device="cpu")
def _moments(X: Tensor, Y: Tensor, weight: Tensor | None = None, center: bool = False) -> schema.Moments:
    out = schema.moments_results(X, Y, weight)
    _MOMENTS[Y.dtype](
        x=operand(X, (), 2),
        x_element=ELEMENTS[X.dtype],
        y=operand(Y, (), 2),
        weight=optional_operand(weight, (), 1),
        n=X.shape[-2],
        d=X.shape[-1],
        k=Y.shape[-1],
        center=center,
        gram=out[0].data_ptr(),
        cross=out[1].data_ptr(),
        mean=out[2].data_ptr(),
        weight_sum=out[3].data_ptr(),
    )
    return out


def _solve(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    uniform_ridge: float,
    options: Options,
    out: Results,
) -> None:
    solution, L, info, rcond, jittered = out
    batch = info.shape
    n, d = X.shape[-2:]
    _SOLVE[Y.dtype](
        x=operand(X, batch, 2),
        x_element=ELEMENTS[X.dtype],
        y=operand(Y, batch, 2),
        weight=None if weight is None else operand(weight, batch, 1),
        ridge=None if ridge is None else operand(ridge, batch, 1),
        uniform_ridge=uniform_ridge,
        batch=kernel_batch(batch),
        n=n,
        d=d,
        k=solution.shape[-1],
        refine=options.refine,
        jitter=options.jitter,
        solution=solution.data_ptr(),
        factor=0 if L is None else L.data_ptr(),
        info=info.data_ptr(),
        rcond=0 if rcond is None else rcond.data_ptr(),
        jittered=0 if jittered is None else jittered.data_ptr(),
    )


register_solves("cpu", _solve)


@register(schema.solve_normal_backward, device="cpu")
def _solve_normal_backward(
    grad: Tensor,
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    solution: Tensor,
    L: Tensor,
    info: Tensor,
) -> schema.Gradients:
    out = schema.backward_results(grad, X, Y, weight, ridge, solution, L, info)
    X = X.to(Y.dtype)
    if L.shape[-1] != X.shape[-1]:
        return solve_normal_vjp(grad, X, Y, weight, ridge, solution, L, info)
    batch = tuple(out[0].shape[:-2])
    _BACKWARD[X.dtype](
        grad=operand(grad, batch, 2),
        x=operand(X, batch, 2),
        y=operand(Y, batch, 2),
        weight=optional_operand(weight, batch, 1),
        solution=operand(solution, batch, 2),
        factor=operand(L.mT, batch, 2),
        info=operand(info, batch, 0),
        batch=kernel_batch(batch),
        n=X.shape[-2],
        d=X.shape[-1],
        k=Y.shape[-1],
        grad_x=out[0].data_ptr(),
        grad_y=out[1].data_ptr(),
        grad_weight=out[2].data_ptr(),
        grad_ridge=out[3].data_ptr(),
    )
    return out


@register(schema.apply_normal_inverse, device="cpu")
def _apply_normal_inverse(B: Tensor, X: Tensor, weight: Tensor | None, ridge: Tensor | None, L: Tensor) -> Tensor:
    schema.apply_results(B, X, weight, ridge, L)
    if L.shape[-1] == X.shape[-1]:
        solution: Tensor = cholesky_solve.dispatched(B, L)
        return solution
    assert ridge is not None  # the dual form has penalties
    return apply_dual(B, X, weight, ridge, L).contiguous()
