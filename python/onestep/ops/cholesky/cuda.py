"""CUDA kernels of the Cholesky ops: one kernel of csrc/normal/cuda to d = 168 (``most_features``); beyond, in float32,
blocks of 64 columns: one matrix to d = 1024, several to d = 2048; else torch's (cuSOLVER). Nothing waits for the GPU.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from onestep.ops._cuda import entry, native, place
from onestep.ops._library import register
from onestep.ops.cholesky import schema
from onestep.ops.operands import kernel_batch, operand, optional_operand
from onestep.ops.singular import with_singular

# Without it this file is not imported.
assert native is not None

#: The largest d of which a warp holds the matrix.
SMALL_FEATURES: int = native.normal_small_features

# Several matrices of up to so many rows are factored in blocks of columns. On an H200 that takes half of cuSOLVER's
# time for 64 x 512² and 16 x 1,024², three quarters for 2 x 2,048²; for one of 4,096² it takes five times as long.
_MOST_BLOCKED_FEATURES = 2048

# Up to so many rows one matrix is, too: its factor has the same bits alone as among others (decision 331).
_MOST_BLOCKED_ALONE = 1024

# Right-hand sides from which torch's triangular solves, made of matrix products, win over a warp for each.
_MANY_COLUMNS = 64


@functools.cache
def _most_features(dtype: torch.dtype, device: int) -> int:
    return int(entry("normal_most_features", dtype)(device=device))


def most_features(tensor: Tensor) -> int:
    """The largest d that the kernels take: 168, but 144 in float64 where a block has 99 KiB of shared memory."""
    return _most_features(tensor.dtype, tensor.get_device())


@functools.cache
def most_columns(d: int, dtype: torch.dtype) -> int:
    """Right-hand sides that ``system`` takes beside a d × d matrix."""
    return int(entry("normal_most_columns", dtype)(d=d))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def system(
    a: Tensor,
    b: Tensor | None,
    *,
    solution: Tensor | None,
    factor: Tensor | None,
    info: Tensor,
    norm: Tensor | None = None,
    normal_equations: bool = False,
) -> None:
    """Factors a (…,d,d) and solves for b (…,d,k) by one kernel (csrc/normal/cuda), into the results given."""
    batch = info.shape
    entry("normal_system", a.dtype)(
        a=operand(a, batch, 2),
        b=optional_operand(b, batch, 2),
        normal_equations=normal_equations,
        batch=kernel_batch(batch),
        d=a.shape[-1],
        k=0 if b is None else b.shape[-1],
        solution=_address(solution),
        factor=_address(factor),
        info=info.data_ptr(),
        norm=_address(norm),
        **place(a),
    )


def factor_into(A: Tensor, L: Tensor, info: Tensor, *, normal_equations: bool = False) -> None:
    """LLᵀ = A, of which the lower triangle is read; NaN and info > 0 where A is not positive definite."""
    d = A.shape[-1]
    if d <= most_features(A):
        system(A, None, solution=None, factor=L, info=info, normal_equations=normal_equations)
        return
    most_blocked = _MOST_BLOCKED_FEATURES if info.numel() > 1 else _MOST_BLOCKED_ALONE
    if A.dtype == torch.float32 and d <= most_blocked:
        batch = info.shape
        entry("normal_blocked_cholesky", A.dtype)(
            a=operand(A, batch, 2),
            normal_equations=normal_equations,
            batch=kernel_batch(batch),
            d=d,
            factor=L.data_ptr(),
            info=info.data_ptr(),
            **place(A),
        )
        return
    # The lower triangle is read. cuSOLVER stops at a pivot <= 0; after a NaN or Inf the pivots say where it was.
    factor, code = torch.linalg.cholesky_ex(A.expand(L.shape))
    L.copy_(factor)
    pivots = L.diagonal(dim1=-2, dim2=-1)
    first = (~pivots.isfinite()).to(torch.int32).argmax(-1).to(torch.int32) + 1
    info.copy_(torch.where((code == 0) & ~pivots.isfinite().all(-1), first, code))
    if normal_equations:
        info.copy_(with_singular(info, L, A.diagonal(dim1=-2, dim2=-1)))
    L.masked_fill_((info != 0)[..., None, None], torch.nan)


def solve_into(L: Tensor, B: Tensor, solution: Tensor) -> None:
    """(LLᵀ)⁻¹B into a contiguous solution (…,d,k)."""
    d, k = B.shape[-2:]
    batch = tuple(solution.shape[:-2])
    if d > most_features(L) or (d > SMALL_FEATURES and k >= _MANY_COLUMNS):
        # torch's bits depend on how its operands lie: they always lie as our factors and results do.
        L, B = L.mT.contiguous().mT, B.expand(solution.shape).contiguous()
        half = torch.linalg.solve_triangular(L, B, upper=False)
        solution.copy_(torch.linalg.solve_triangular(L.mT, half, upper=True))
        return
    entry("normal_factor_solve", L.dtype)(
        factor=operand(L.mT, batch, 2),
        b=operand(B, batch, 2),
        batch=kernel_batch(batch),
        d=d,
        k=k,
        solution=solution.data_ptr(),
        **place(L),
    )


def solve_system(
    A: Tensor, B: Tensor, solution: Tensor, L: Tensor | None, info: Tensor, *, normal_equations: bool = False
) -> None:
    """Factor and A⁻¹B, with the status of both: info = d + 1 and NaN where the solution is not finite."""
    d, k = B.shape[-2:]
    if d <= most_features(A) and k <= most_columns(d, A.dtype):
        system(A, B, solution=solution if k else None, factor=L, info=info, normal_equations=normal_equations)
        return
    if L is None:
        L = A.new_empty(*info.shape, d, d).mT
    factor_into(A, L, info, normal_equations=normal_equations)
    solve_into(L, B, solution)
    finish(solution, info)


def finish(solution: Tensor, info: Tensor) -> None:
    """Marks problems whose solution is not finite, and fills those that failed with NaN."""
    d = solution.shape[-2]
    finite = solution.isfinite().flatten(-2).all(-1)
    info.copy_(torch.where((info == 0) & ~finite, d + 1, info))
    solution.masked_fill_((info != 0)[..., None, None], torch.nan)


@register(schema.cholesky, device="cuda")
def _cholesky(A: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
    L, info = schema.cholesky_results(A)
    if A.shape[-1] == 0:
        info.zero_()
    elif info.numel():
        factor_into(A, L, info)
    if check:
        schema.raise_if_failed(info, A.shape[-1])
    return L, info


@register(schema.cholesky_solve, device="cuda")
def _cholesky_solve(B: Tensor, L: Tensor) -> Tensor:
    out = schema.cholesky_solve_results(B, L)
    if out.numel():
        solve_into(L, B, out)
    return out


@register(schema.solve_spd, device="cuda")
def _solve_spd(A: Tensor, B: Tensor, check: bool = False) -> schema.Solved:
    out = schema.solve_spd_results(A, B)
    solution, L, info = out
    if A.shape[-1] == 0:
        info.zero_()
    elif info.numel():
        solve_system(A, B, solution, L, info)
    if check:
        schema.raise_if_failed(info, A.shape[-1])
    return out


@register(schema.apply_spd_inverse, device="cuda")
def _apply_spd_inverse(B: Tensor, A: Tensor, L: Tensor) -> Tensor:
    return _cholesky_solve(B, L)
