"""The compensated sweep on CUDA: 128 columns a call by csrc/compensated/cuda, what they hand on by torch's products.

Its factors are made of torch's ops and of ops/cholesky/cuda.py. Nothing waits for the GPU. The results repeat bit for
bit on one device; those of the CPU differ by rounding, since products sum in another order, and so do codes at ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.ops._cuda import entry, native, place
from onestep.ops._library import register
from onestep.ops.cholesky.cuda import factor_into
from onestep.ops.compensated import schema
from onestep.ops.compensated.singular import dependent, power_into_range
from onestep.ops.operands import empty_factor, reads_values

# Without it this file is not imported.
assert native is not None

_MOST_COLUMNS: int = native.most_sweep_columns
_block_end = native.sweep_block_end
_count_of = native.sweep_removed


@register(schema.inverse_cholesky, device="cuda")
def _inverse_cholesky(A: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    return _factor(A, damping, unit=False)


@register(schema.unit_cholesky, device="cuda")
def _unit_cholesky(A: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    return _factor(A, damping, unit=True)


def _factor(A: Tensor, damping: Tensor, *, unit: bool) -> tuple[Tensor, Tensor]:
    """U or R as on the CPU, by the Cholesky factor L of A reversed: U is L⁻¹ reversed, R is L reversed over its pivots.

    A composition: L is a kernel's for small and middle matrices and cuSOLVER's for large ones (ops/cholesky/cuda.py),
    L⁻¹ is torch's triangular solve.
    """
    factor, info = schema.factor_results(A, damping)
    n = A.shape[-1]
    if factor.numel() == 0:
        return factor, info.zero_()
    power = power_into_range(A, damping)
    scaled = A / power / power
    # The lower triangle, which is read, is the upper one of A reversed: transposed, since A is symmetric.
    reverse = scaled.flip(-2, -1).mT
    finite = reverse.tril().isfinite().all(-1).all(-1)
    mean = reverse.diagonal(dim1=-2, dim2=-1).mean(-1)
    reverse.diagonal(dim1=-2, dim2=-1).add_((damping * mean)[..., None])
    L = empty_factor(A, tuple(info.shape), n)
    factor_into(reverse, L, info, normal_equations=True)
    info.copy_(torch.where(finite, info, schema.NOT_FINITE))
    # What failed is NaN, from which a solve would make NaN of its own.
    L.copy_(torch.where((info == 0)[..., None, None], L, torch.eye(n, dtype=A.dtype, device=A.device)))
    if unit:
        pivots = L.diagonal(dim1=-2, dim2=-1)
        lower = L / pivots[..., None, :]
        lower.diagonal(dim1=-2, dim2=-1).copy_(pivots)
    else:
        eye = torch.eye(n, dtype=A.dtype, device=A.device)
        lower = torch.linalg.solve_triangular(L, eye.expand(L.shape), upper=False)
    factor.copy_(lower.tril().flip(-2, -1))
    singular = dependent(scaled, damping, factor, info, unit=unit)
    info.copy_(torch.where(singular > 0, singular, info))
    factor.masked_fill_((info != 0)[..., None, None], torch.nan)
    if unit:
        factor.diagonal(dim1=-2, dim2=-1).mul_(power[..., 0])
    else:
        factor.div_(power)
    return factor, info


@register(schema.compensated_sweep, device="cuda")
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
    """Sweeps one block after the other. Columns of a group that ``scale`` has no grid for become NaN on a GPU."""
    out = schema.compensated_sweep_results(
        W, factor, scale, zero, group, bits, symmetric, group_size, sparsity, keep, of, unit
    )
    swept, codes, scales, zeros, error = out
    (rows, d), groups = W.shape, scales.shape[1]
    weight, upper = W.contiguous(), factor.contiguous()
    swept.copy_(weight)
    error.zero_()
    columns = schema.given_grids(out, scale, zero, group)
    if columns is not None and reads_values(columns):
        schema.check_groups(columns, groups)
    if rows == 0:
        return out
    change = W.new_empty(rows, _MOST_COLUMNS)
    start = 0
    while start < d:
        end = _block_end(start=start, columns=d, bits=bits, group_size=group_size, given=columns is not None, of=of)
        removed = _removed(swept, upper, start, end, sparsity, keep, of)
        for first in range(start, end, _MOST_COLUMNS):
            last = min(first + _MOST_COLUMNS, end)
            entry("sweep_block", W.dtype)(
                start=first,
                width=last - first,
                w=weight.data_ptr(),
                swept=swept.data_ptr(),
                factor=upper.data_ptr(),
                unit=unit,
                rows=rows,
                columns=d,
                bits=bits,
                symmetric=symmetric,
                group_size=group_size,
                group=0 if columns is None else columns.data_ptr(),
                groups=groups,
                scale=scales.data_ptr(),
                zero=zeros.data_ptr(),
                codes=codes.data_ptr(),
                removed=0 if removed is None else removed.data_ptr() + first - start,
                removed_row=end - start,
                keep=keep,
                of=of,
                error=error.data_ptr(),
                change=change.data_ptr() if last < d else 0,
                **place(W),
            )
            if last < d:
                swept[:, last:].addmm_(change[:, : last - first], upper[first:last, last:])
        start = end
    return out


def _removed(swept: Tensor, factor: Tensor, start: int, end: int, sparsity: float, keep: int, of: int) -> Tensor | None:
    """(n,width), bool, the elements of a block that are removed; None where the kernel chooses them, or none are.

    The kernel cannot choose where all rows are looked at together, or a run has more columns than a call takes.
    """
    if 0 < of <= _MOST_COLUMNS or (of == 0 and sparsity == 0.0):
        return None
    scores = (swept[:, start:end] / factor.diagonal()[start:end]).square()
    if of:
        # Stable: of equal ones the first go.
        order = scores.reshape(len(scores), -1, of).argsort(dim=-1, stable=True)
        gone = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : of - keep], True)
        return gone.reshape(scores.shape)
    count = _count_of(elements=scores.numel(), sparsity=sparsity)
    if count == 0:
        return None
    return scores <= scores.flatten().sort().values[count - 1]
