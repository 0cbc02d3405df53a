"""Schemas of the ops on one layer: their operands' checks and their results' shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.ops._library import define
from onestep.ops.operands import broadcast_batch, check_dims, check_floating, check_like, check_size, empty_info

# ``info`` of a matrix that holds NaN or infinity (csrc/compensated/compensated.hpp, kNotFinite).
NOT_FINITE = -1

# Ŵ, codes, scale, zero, error
Swept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def factor_results(A: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Checks the operands; returns the factor (…,n,n) and info (…), empty."""
    check_floating("A", A)
    check_dims("A", A, 2, "(..., n, n)")
    check_size("A", A, -2, A.shape[-1], "square matrices (..., n, n)")
    check_like("damping", damping, A)
    batch = tuple(A.shape[:-2])
    if broadcast_batch("A, damping", batch, tuple(damping.shape)) != batch:
        raise ValueError(f"damping has shape {tuple(damping.shape)}; expected () or the batch shape {batch}")
    return A.new_empty(A.shape), empty_info(A, batch)


inverse_cholesky = define(
    "inverse_cholesky(Tensor A, Tensor damping) -> (Tensor, Tensor)",
    fake=factor_results,
    own_dims=(2, 0),
    first_has_batch=True,
)

# A = R P² Rᵀ: R unit upper triangular, with P on its diagonal.
unit_cholesky = define(
    "unit_cholesky(Tensor A, Tensor damping) -> (Tensor, Tensor)",
    fake=factor_results,
    own_dims=(2, 0),
    first_has_batch=True,
)


def given_grids(out: Swept, scale: Tensor | None, zero: Tensor | None, group: Tensor | None) -> Tensor | None:
    """Copies grids that are given into the results; each column's group (d,), contiguous, or None where none are."""
    if group is None or scale is None or zero is None:
        return None
    _, _, scales, zeros, _ = out
    scales.copy_(scale)
    zeros.copy_(zero)
    return group.contiguous()


def compensated_sweep_results(
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
) -> Swept:
    """Checks the operands; returns Ŵ (n,d), codes (n,d), scale (n,groups), zero (n,groups) and error (n), empty."""
    check_floating("W", W)
    if W.dim() != 2:
        raise ValueError(f"W has shape {tuple(W.shape)}; expected (n, d)")
    n, d = W.shape
    check_like("factor", factor, W)
    if factor.shape != (d, d):
        raise ValueError(f"factor has shape {tuple(factor.shape)}; expected ({d}, {d}): as many columns as W")
    if not 0 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected 1 to 8, or 0 for none")
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity is {sparsity}; expected a number from 0 to 1")
    if of < 0 or not 0 <= keep <= of or (of > 0 and d % of != 0):
        raise ValueError(f"keep={keep} and of={of}; expected 0 <= keep <= of, and of to divide the {d} columns of W")
    if of > 0 and bits > 0 and group is None and group_size % of != 0:
        raise ValueError(f"group_size is {group_size}; expected a multiple of of={of}")
    if unit and (sparsity > 0.0 or of > 0 or (bits > 0 and group is None and group_size < d)):
        raise ValueError("unit was given with pruning or grids of groups; expected U, which shows columns ahead")
    if group is None:
        if group_size < 1:
            raise ValueError(f"group_size is {group_size}; expected 1 or more")
        groups = 0 if bits == 0 else (d + group_size - 1) // group_size
    else:
        if scale is None or zero is None or scale.dim() != 2:
            raise ValueError("group was given without scale (n, groups) and zero (n, groups)")
        if group.shape != (d,) or group.dtype != torch.int64:
            raise ValueError(f"group has shape {tuple(group.shape)} and dtype {group.dtype}; expected ({d},), int64")
        if group.device != W.device:
            raise ValueError(f"group is on device {group.device}; expected {W.device}, like the other operands")
        groups = scale.shape[1]
        for name, grid in (("scale", scale), ("zero", zero)):
            check_like(name, grid, W)
            if grid.shape != (n, groups):
                raise ValueError(f"{name} has shape {tuple(grid.shape)}; expected ({n}, {groups})")
    codes = W.new_empty((n, d if bits > 0 else 0), dtype=torch.uint8)
    error = W.new_empty(n, dtype=torch.float64)
    return W.new_empty((n, d)), codes, W.new_empty((n, groups)), W.new_empty((n, groups)), error


def check_groups(group: Tensor, groups: int) -> None:
    """Raises ValueError if a column's group is none of those that ``scale`` has; reads the values."""
    if group.numel() and not 0 <= int(group.min()) <= int(group.max()) < groups:
        raise ValueError(f"group has values outside 0 to {groups - 1}, the columns of scale")


compensated_sweep = define(
    "compensated_sweep(Tensor W, Tensor factor, Tensor? scale=None, Tensor? zero=None, Tensor? group=None, int bits=0, "
    "bool symmetric=False, int group_size=1, float sparsity=0.0, int keep=0, int of=0, bool unit=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=compensated_sweep_results,
)
