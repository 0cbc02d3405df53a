"""CPU kernels of the ops on one layer: allocate the results and call csrc/compensated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onestep import _native
from onestep._fork import safe_after_fork
from onestep.ops._library import register
from onestep.ops.compensated import schema
from onestep.ops.compensated.singular import scaled_into_range, with_dependent
from onestep.ops.operands import kernel_batch, operand

Entries = dict[torch.dtype, Callable[..., None]]

_INVERSE: Entries = {torch.float32: _native.inverse_cholesky_f32, torch.float64: _native.inverse_cholesky_f64}
_SWEEP: Entries = {torch.float32: _native.compensated_sweep_f32, torch.float64: _native.compensated_sweep_f64}


@register(schema.inverse_cholesky, device="cpu")
def _inverse_cholesky(A: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    return _factor(A, damping, unit=False)


@register(schema.unit_cholesky, device="cpu")
def _unit_cholesky(A: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    return _factor(A, damping, unit=True)


@safe_after_fork
def _factor(A: Tensor, damping: Tensor, *, unit: bool) -> tuple[Tensor, Tensor]:
    factor, info = schema.factor_results(A, damping)
    batch = tuple(info.shape)
    if factor.numel() == 0:
        return factor, info.zero_()
    A, power = scaled_into_range(A, damping)
    _INVERSE[A.dtype](
        a=operand(A, batch, 2),
        damping=operand(damping, batch, 0),
        batch=kernel_batch(batch),
        n=A.shape[-1],
        unit=unit,
        factor=factor.data_ptr(),
        info=info.data_ptr(),
    )
    with_dependent(A, damping, factor, info, unit=unit)
    if power is not None and unit:
        factor.diagonal(dim1=-2, dim2=-1).mul_(power.squeeze(-1))
    elif power is not None:
        factor.div_(power)
    return factor, info


@register(schema.compensated_sweep, device="cpu")
def _compensated_sweep(
    W: Tensor,
    factor: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group: Tensor | None = None,
    bits: int = 0,
    symmetric: bool = False,
    group_size: int = 1,
    sparsity: float = 0.0,
    keep: int = 0,
    of: int = 0,
    unit: bool = False,
) -> schema.Swept:
    out = schema.compensated_sweep_results(
        W, factor, scale, zero, group, bits, symmetric, group_size, sparsity, keep, of, unit
    )
    swept, codes, scales, zeros, error = out
    weight = W.contiguous()
    columns = schema.given_grids(out, scale, zero, group)
    if columns is not None:
        schema.check_groups(columns, scales.shape[1])
    upper = factor.contiguous()
    _SWEEP[W.dtype](
        w=weight.data_ptr(),
        swept=swept.data_ptr(),
        factor=upper.data_ptr(),
        unit=unit,
        rows=W.shape[0],
        columns=W.shape[1],
        bits=bits,
        symmetric=symmetric,
        group_size=group_size,
        group=0 if columns is None else columns.data_ptr(),
        groups=scales.shape[1],
        scale=scales.data_ptr(),
        zero=zeros.data_ptr(),
        codes=codes.data_ptr(),
        sparsity=sparsity,
        keep=keep,
        of=of,
        error=error.data_ptr(),
    )
    return out
