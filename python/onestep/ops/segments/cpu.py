"""CPU kernels of the ops on ragged problems: allocate the results and call csrc/normal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import register
from onestep.ops.cholesky.schema import cholesky_solve
from onestep.ops.normal.schema import check_uniform_ridge, raise_if_failed
from onestep.ops.operands import operand, optional_operand
from onestep.ops.segments import schema

Entries = dict[torch.dtype, Callable[..., None]]

_SOLVE: Entries = {torch.float32: _native.solve_segments_f32, torch.float64: _native.solve_segments_f64}


def _check_values(offsets: Tensor, indices: Tensor | None, rows: int, entries: int) -> None:
    """Raises ValueError unless offsets rise from 0 to the number of entries, and indices name rows of X."""
    # By numpy, since torch's own reductions hang in a forked child.
    starts = offsets.detach().numpy()
    if starts[0] != 0 or starts[-1] != entries or (starts[1:] < starts[:-1]).any():
        raise ValueError(
            f"offsets goes from {starts[0]} to {starts[-1]}; expected numbers that never fall, from 0 to {entries}, "
            "the number of rows of Y"
        )
    if indices is not None and entries:
        named = indices.detach().numpy()
        least, most = int(named.min()), int(named.max())
        if least < 0 or most >= rows:
            raise ValueError(f"indices has values from {least} to {most}; expected rows of X, from 0 to {rows - 1}")


def _run(
    X: Tensor,
    Y: Tensor,
    offsets: Tensor,
    indices: Tensor | None,
    weight: Tensor | None,
    base: Tensor | None,
    ridge: Tensor | None,
    uniform_ridge: float,
    check: bool,
    out: tuple[Tensor, Tensor | None, Tensor],
) -> None:
    check_uniform_ridge(uniform_ridge)
    _check_values(offsets, indices, X.shape[0], Y.shape[0])
    offsets = offsets.contiguous()
    indices = None if indices is None else indices.contiguous()
    solution, L, info = out
    _SOLVE[X.dtype](
        x=operand(X, (), 2),
        y=operand(Y, (), 2),
        offsets=offsets.data_ptr(),
        indices=0 if indices is None else indices.data_ptr(),
        weight=optional_operand(weight, (), 1),
        base=optional_operand(base, (), 2),
        ridge=optional_operand(ridge, (), 2),
        uniform_ridge=uniform_ridge,
        segments=info.shape[0],
        entries=Y.shape[0],
        rows=X.shape[0],
        d=X.shape[1],
        k=Y.shape[1],
        solution=solution.data_ptr(),
        factor=0 if L is None else L.data_ptr(),
        info=info.data_ptr(),
    )
    if check:
        raise_if_failed(info, X.shape[1])


@register(schema.solve_normal_segments, device="cpu")
def _solve_normal_segments(
    X: Tensor,
    Y: Tensor,
    offsets: Tensor,
    indices: Tensor | None = None,
    weight: Tensor | None = None,
    base: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    solution, info = schema.segments_results(X, Y, offsets, indices, weight, base, ridge)
    _run(X, Y, offsets, indices, weight, base, ridge, uniform_ridge, check, (solution, None, info))
    return solution, info


@register(schema.solve_normal_segments_ex, device="cpu")
def _solve_normal_segments_ex(
    X: Tensor,
    Y: Tensor,
    offsets: Tensor,
    indices: Tensor | None = None,
    weight: Tensor | None = None,
    base: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    check: bool = False,
) -> schema.Solved:
    out = schema.segments_ex_results(X, Y, offsets, indices, weight, base, ridge)
    _run(X, Y, offsets, indices, weight, base, ridge, uniform_ridge, check, out)
    return out


@register(schema.apply_segments_inverse, device="cpu")
def _apply_segments_inverse(
    B: Tensor,
    X: Tensor,
    offsets: Tensor,
    indices: Tensor | None,
    weight: Tensor | None,
    base: Tensor | None,
    ridge: Tensor | None,
    L: Tensor,
) -> Tensor:
    schema.apply_results(B, X, offsets, indices, weight, base, ridge, L)
    solution: Tensor = cholesky_solve.dispatched(B, L)
    return solution
