"""CPU kernels of the Cholesky ops: allocate the results and call csrc/normal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import register
from onestep.ops.cholesky import schema
from onestep.ops.operands import kernel_batch, operand

Entries = dict[torch.dtype, Callable[..., None]]

_CHOLESKY: Entries = {torch.float32: _native.cholesky_f32, torch.float64: _native.cholesky_f64}
_CHOLESKY_SOLVE: Entries = {torch.float32: _native.cholesky_solve_f32, torch.float64: _native.cholesky_solve_f64}
_SOLVE_SPD: Entries = {torch.float32: _native.solve_spd_f32, torch.float64: _native.solve_spd_f64}


@register(schema.cholesky, device="cpu")
def _cholesky(A: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
    L, info = schema.cholesky_results(A)
    batch = info.shape
    _CHOLESKY[A.dtype](
        a=operand(A, batch, 2),
        batch=kernel_batch(batch),
        d=A.shape[-1],
        factor=L.data_ptr(),
        info=info.data_ptr(),
    )
    if check:
        schema.raise_if_failed(info, A.shape[-1])
    return L, info


@register(schema.cholesky_solve, device="cpu")
def _cholesky_solve(B: Tensor, L: Tensor) -> Tensor:
    out = schema.cholesky_solve_results(B, L)
    batch = tuple(out.shape[:-2])
    _CHOLESKY_SOLVE[L.dtype](
        factor=operand(L.mT, batch, 2),
        b=operand(B, batch, 2),
        batch=kernel_batch(batch),
        d=L.shape[-1],
        k=B.shape[-1],
        solution=out.data_ptr(),
    )
    return out


@register(schema.solve_spd, device="cpu")
def _solve_spd(A: Tensor, B: Tensor, check: bool = False) -> schema.Solved:
    out = schema.solve_spd_results(A, B)
    batch = tuple(out[2].shape)
    _SOLVE_SPD[A.dtype](
        a=operand(A, batch, 2),
        b=operand(B, batch, 2),
        batch=kernel_batch(batch),
        d=A.shape[-1],
        k=B.shape[-1],
        solution=out[0].data_ptr(),
        factor=out[1].data_ptr(),
        info=out[2].data_ptr(),
    )
    if check:
        schema.raise_if_failed(out[2], A.shape[-1])
    return out


@register(schema.apply_spd_inverse, device="cpu")
def _apply_spd_inverse(B: Tensor, A: Tensor, L: Tensor) -> Tensor:
    return _cholesky_solve(B, L)
