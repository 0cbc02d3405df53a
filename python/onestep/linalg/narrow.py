"""Rows that are stored in another type than they are computed in: they are converted a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from onestep.linalg._accumulate import _merged
from onestep.linalg._arguments import _HALF, _READ
from onestep.linalg._normal import Moments, moments

# Elements that are converted at a time: 8 MiB as float64.
_CHUNK = 1 << 20
# float32 rounds each row's loss to ε of its scores, which are up to 64 where classes are told for sure: a mean loss
# under that is noise.
FLOAT_NOISE = 64 * torch.finfo(torch.float32).eps


def working_dtype(X: Tensor) -> torch.dtype:
    """What is computed in beside X: float32 for 16-bit floats, X's own type for wider ones, float64 for integers."""
    return torch.float32 if X.dtype in _HALF else X.dtype if X.dtype in _READ else torch.float64


def widened(rows: Tensor) -> Tensor:
    """The rows in their working dtype; themselves where they have it."""
    return rows.to(working_dtype(rows))


def rows_of_chunk(d: int) -> int:
    """How many rows of d elements are converted at a time."""
    return max(1, _CHUNK // max(d, 1))


def row_chunks(n: int, d: int) -> Iterator[slice]:
    """Slices that cut n rows of d elements into chunks."""
    step = rows_of_chunk(d)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def widened_chunks(X: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of the rows X (n,d) in their working dtype, each valid until the next: one buffer holds them in turn.

    New memory for each, beside results that are kept, would leave gaps too small for the next.
    """
    n, d = X.shape
    dtype = working_dtype(X)
    buffer = None if X.dtype == dtype else torch.empty(min(n, rows_of_chunk(d)), d, dtype=dtype)
    for rows in row_chunks(n, d):
        yield rows, X[rows] if buffer is None else buffer[: rows.stop - rows.start].copy_(X[rows])


def moments_of(X: Tensor, Y: Tensor, weight: Tensor | None, *, center: bool) -> Moments:
    """``moments`` of rows X (n,d) of floats or integers; 16-bit floats are read in place, integers in chunks.

    Where squares of float32 would overflow or underflow, the rows are read again, in float64.

    Raises:
        ValueError: squares of float64 underflow.
    """
    if X.is_floating_point():
        found = moments(X, Y, weight=weight, center=center)
        if not _is_out_of_range(X, found):
            return found
        if X.dtype == torch.float64:
            raise ValueError("X holds columns of values so small that their squares underflow: rescale them")
        Y, weight = Y.double(), None if weight is None else weight.double()
        chunks = ((rows, X[rows].double()) for rows in row_chunks(*X.shape))
    else:
        chunks = ((rows, chunk) for rows, chunk in widened_chunks(X))
    parts = (
        moments(chunk, Y[rows], weight=None if weight is None else weight[rows], center=center)
        for rows, chunk in chunks
    )
    return reduce(lambda first, second: _merged(first, second, center), parts)


def _is_out_of_range(X: Tensor, found: Moments) -> bool:
    """Whether finite rows have products beyond the range of their working dtype, or varying columns below it."""
    dtype = working_dtype(X)
    if not len(X):
        return False
    diagonal = found.gram.diagonal()
    if not bool(diagonal.isfinite().all() & found.cross.isfinite().all()):
        # Of float64 there is no wider type: who asks for the sums sees that they are not finite.
        return dtype != torch.float64 and bool(X.isfinite().all())
    # A square that keeps its digits.
    least = torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    low = (diagonal <= least * len(X)).nonzero()[:, 0]
    if not len(low):
        return False
    columns = X[:, low]
    spread = columns.amax(0).double() - columns.amin(0).double()
    return bool(((spread > 0) & (spread.square() <= least)).any())
