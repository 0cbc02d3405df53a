"""The centred, weighted problem, made in float64 a block at a time: X itself is never copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep._serial_torch import serial_for
from onestep.estimators._arrays import check_finite
from onestep.linalg.constant_columns import constant_columns
from onestep.linalg.narrow import moments_of, working_dtype
from onestep.linalg.spd import LEAST_RCOND

EPS = torch.finfo(torch.float64).eps

# Down to this reciprocal condition Cholesky on float64 sums is accurate enough.
MIN_RCOND = LEAST_RCOND

# The same for a Gram summed in fp32: it is off by about three ulps, of which this rcond makes 1e-5 of the solution.
_FLOAT_GRAM_FLOOR = 3 * torch.finfo(torch.float32).eps / 1e-5

# Elements of a float64 block: 4 MiB stays near the cache and keeps the memory that a fit adds small.
_BLOCK = 1 << 19


def blocks(count: int, width: int, least: int = 64) -> Iterator[slice]:
    """Slices that cut `count` rows of `width` elements into blocks, each of `least` rows or more (but the last)."""
    step = max(least, _BLOCK // max(width, 1))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


class Centred(NamedTuple):
    """X (n, d), Y (n, k), weight (n,) or None, and what is taken off each column; means are float64.

    `constant` (d,) marks the columns that do not vary but for rounding; they read as zero, since what is left of
    such a column after centring is noise that a fit without ridge would blow up.
    """

    X: Tensor
    Y: Tensor
    weight: Tensor | None
    x_mean: Tensor
    y_mean: Tensor
    constant: Tensor

    def _scaled(self, block: Tensor, rows: slice) -> Tensor:
        return block if self.weight is None else block.mul_(self.weight[rows, None].double().sqrt())

    def x(self, rows: slice = slice(None), columns: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """√w (X - x_mean) over some rows and columns, float64, in `out` if given."""
        stored = self.X[rows, columns]
        # torch does not subtract from booleans.
        stored = stored.to(torch.uint8) if stored.dtype == torch.bool else stored
        with serial_for(stored.numel()):
            block = torch.sub(stored, self.x_mean[columns], out=out)
        constant = self.constant[columns]
        return self._scaled(block.masked_fill_(constant, 0.0) if bool(constant.any()) else block, rows)

    def x_by_blocks(self, width: int | None = None, least: int = 64) -> Iterator[tuple[slice, Tensor]]:
        """All rows of `x` in blocks (see `blocks`) of one memory: new pages cost more than the subtraction."""
        n, d = self.X.shape
        room = torch.empty(0)
        for rows in blocks(n, d if width is None else width, least):
            if rows.start == 0:  # the largest
                room = torch.empty(rows.stop, d, dtype=torch.float64)
            yield rows, self.x(rows, out=room[: rows.stop - rows.start])

    def unrounded(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows, and √w (X - x_mean) over them without the rounding of x_mean, which passes for a rank."""
        n, d = self.X.shape
        share = self._scaled(torch.ones(n, 1, dtype=torch.float64), slice(None))
        rest = torch.zeros(1, d, dtype=torch.float64)
        # Nothing is taken off where there is no intercept.
        if bool(self.x_mean.any()):
            for rows, x in self.x_by_blocks():
                rest.addmm_(share[rows].mT, x)
            rest /= share.square().sum()
        for rows in blocks(n, d, least=2 * d):
            yield rows, self.x(rows).addmm_(share[rows], rest, alpha=-1)

    def y(self, rows: slice = slice(None), targets: slice = slice(None)) -> Tensor:
        """√w (Y - y_mean) over some rows and targets, float64."""
        return self._scaled(self.Y[rows, targets] - self.y_mean[targets], rows)


class Primal:
    """The centred problem with its Gram matrix and cross product: one pass over X.

    Raises ValueError if X is not finite: its Gram tells, so no pass is spent on looking.
    """

    def __init__(self, X: Tensor, Y: Tensor, weight: Tensor | None, *, center: bool) -> None:
        moments = moments_of(X, Y, weight, center=center)
        if not (bool(moments.gram.isfinite().all()) and bool(moments.cross.isfinite().all())):
            raise_not_finite(X)
        constant = constant_columns(moments.gram.diagonal(), moments.x_mean, moments.weight_sum, working_dtype(X))
        self.centred = Centred(X, Y, weight, moments.x_mean, moments.y_mean, constant)
        self._gram = moments.gram.masked_fill(constant[:, None] | constant, 0.0)
        self._cross = moments.cross.masked_fill(constant[:, None], 0.0)

    def candidates(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Gram (d, d) and cross product (d, k), each time more accurate, and the rcond down to which they will do."""
        X = self.centred.X
        if working_dtype(X) == torch.float32:
            # The kernel sums fp32 rows in fp32 over slabs of 4096, and the slabs, whose errors average out, in fp64.
            yield self._gram, self._cross, _FLOAT_GRAM_FLOOR / (1.0 + X.shape[0] / 4096) ** 0.5
            yield *self._in_double, MIN_RCOND
        else:
            yield self._gram, self._cross, MIN_RCOND

    @cached_property
    def _in_double(self) -> tuple[Tensor, Tensor]:
        gram, cross = torch.zeros_like(self._gram), torch.zeros_like(self._cross)
        for rows, x in self.centred.x_by_blocks():
            gram.addmm_(x.mT, x)
            cross.addmm_(x.mT, self.centred.y(rows))
        return gram, cross


def wide(X: Tensor, Y: Tensor, weight: Tensor | None, *, center: bool) -> Centred:
    """The centred problem without a d x d Gram, for n < d. Raises ValueError if X is not finite."""
    d = X.shape[1]
    x_mean = torch.zeros(d, dtype=torch.float64)
    y_mean = torch.zeros(Y.shape[1], dtype=torch.float64)
    spread = torch.empty(d, dtype=torch.float64)
    share = torch.ones(X.shape[0], dtype=torch.float64) if weight is None else weight.double()
    total = share.sum()
    if center:
        y_mean = (share / total) @ Y.double()
    for columns in blocks(d, X.shape[0]):
        block = X[:, columns].double()
        if center:
            x_mean[columns] = (share / total) @ block
            # The mean of what is left puts right the rounding of the first, which a large offset makes large.
            x_mean[columns] += (share / total) @ (block - x_mean[columns])
        spread[columns] = share @ (block - x_mean[columns]).square_()
    if not bool(spread.isfinite().all()):
        raise_not_finite(X)
    return Centred(X, Y, weight, x_mean, y_mean, constant_columns(spread, x_mean, total, working_dtype(X)))


def raise_not_finite(X: Tensor) -> None:
    """Say what is wrong where products with X are not finite: NaN or infinity in it, or values too large."""
    check_finite(X)
    raise ValueError("X, y or sample_weight holds values so large that their products overflow: rescale them")
