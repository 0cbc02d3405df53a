"""Coordinates in which the columns of X are alike, though X itself is read as it is.

Newton's method does not depend on the coordinates, but its arithmetic does: a shift of the Hessian's diagonal that
is small beside the column of incomes is large beside the column of years, and two columns far from zero are nearly
parallel. Therefore solvers work with V, the weights of the columns z_j = (x_j - shift_j) / scale_j: W = V / scale, and
the intercept takes what the shift adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onestep.linalg.narrow import moments_of, widened

# Rows from which shift and scale are taken. They only have to come near: the minimum does not depend on them.
_SCALE_ROWS = 4096
# Elements of X that are converted to float64 at a time.
_BLOCK = 1 << 17


@dataclass(frozen=True)
class Coordinates:
    """shift and scale (d,) of each column, float64, scale > 0; the shift is zero where there is no intercept."""

    shift: Tensor
    scale: Tensor
    intercept: bool

    @staticmethod
    def of(X: Tensor, weight: Tensor | None, *, intercept: bool) -> Coordinates:
        """Mean and standard deviation of each column over a sample of the rows, or the root of its mean square."""
        step = max(1, X.shape[0] // _SCALE_ROWS)
        mean, deviation = _columns(X, weight, step, intercept)
        constant = deviation <= 1e-12 * abs(mean)
        if step > 1 and constant.any():
            # These may still vary in the rows that the sample left out: indicators of rare categories do.
            columns = np.flatnonzero(constant)
            mean[columns], deviation[columns] = _columns(X, weight, 1, intercept, torch.from_numpy(columns))
        # A column that does not vary keeps its own size; NaN and infinity are left for the loss to show.
        scale = np.where(deviation > 1e-12 * abs(mean), deviation, abs(mean))
        usable = np.isfinite(mean) & np.isfinite(scale) & (scale > 0)
        shift = np.where(usable & intercept, mean, 0.0)
        return Coordinates(torch.from_numpy(shift), torch.from_numpy(np.where(usable, scale, 1.0)), intercept)

    def weights(self, V: Tensor, dtype: torch.dtype) -> Tensor:
        """W for V (d or d + 1, ...), as the kernels take it; linear in V."""
        scale = self.scale.reshape(-1, *(1,) * (V.dim() - 1))
        if not self.intercept:
            return (V / scale).to(dtype)
        rows = (V[:-1] / scale).to(dtype)
        # What the rounded weights add to every row is taken off, not what the exact ones would.
        last = V[-1] - torch.tensordot(self.shift, rows.double(), dims=1)
        return torch.cat((rows, last.to(dtype)[None]))

    def invert(self, W: Tensor) -> Tensor:
        """V for W."""
        W = W.double()
        scale = self.scale.reshape(-1, *(1,) * (W.dim() - 1))
        if not self.intercept:
            return W * scale
        return torch.cat((W[:-1] * scale, (W[-1] + torch.tensordot(self.shift, W[:-1], dims=1))[None]))

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to V of what has this gradient with respect to W; float64."""
        gradient = gradient.double()
        shape = (-1, *(1,) * (gradient.dim() - 1))
        scale = self.scale.reshape(shape)
        if not self.intercept:
            return gradient / scale
        return torch.cat(((gradient[:-1] - self.shift.reshape(shape) * gradient[-1]) / scale, gradient[-1:]))

    def push_forward(self, gradient: Tensor) -> Tensor:
        """The inverse of ``pull_back``."""
        shape = (-1, *(1,) * (gradient.dim() - 1))
        scale = self.scale.reshape(shape)
        if not self.intercept:
            return gradient * scale
        return torch.cat((gradient[:-1] * scale + self.shift.reshape(shape) * gradient[-1], gradient[-1:]))

    def rounding(self, dtype: torch.dtype) -> Tensor:
        """How far rounding to `dtype` may move the mean over rows of each column times a residual of 1 (p,)."""
        size = self.shift.abs() + self.scale
        size = torch.cat((size, size.new_ones(1))) if self.intercept else size
        return 4 * torch.finfo(dtype).eps * size

    def centres(self, sums: Tensor, masses: Tensor) -> Tensor | None:
        """The weighted means of z (d, k), zero for columns of next to no weight; None without an intercept.

        Args:
            sums: (d, k) float64, sums of x by k columns of weights.
            masses: (k,) float64, the sums of these weights.
        """
        if not self.intercept:
            return None
        least = 1e-8 * masses.mean().item() + torch.finfo(torch.float64).tiny
        means = (sums / masses.clamp_min(least) - self.shift[:, None]) / self.scale[:, None]
        return means.where(masses > least, 0.0)

    def gram(self, X: Tensor, weight: Tensor) -> Tensor:
        """ZᵀDZ (p, p) float64, with a column of ones at the end of Z where there is an intercept."""
        sums = moments_of(X, widened(X[:, :0]), weight, center=self.intercept)
        if not bool(sums.gram.isfinite().all()) and bool(X.isfinite().all() & weight.isfinite().all()):
            raise ValueError("X holds values so large that their products overflow: rescale it")
        gram = sums.gram / self.scale / self.scale[:, None]
        if not self.intercept:
            return gram
        # The Gram matrix is centred on means of its own, which are near the shift: nothing cancels.
        offset = (sums.x_mean - self.shift) / self.scale
        border = (sums.weight_sum * offset)[:, None]
        gram = gram + border * offset
        return torch.cat((torch.cat((gram, border), 1), torch.cat((border.mT, sums.weight_sum.reshape(1, 1)), 1)))

    def squares(self, X: Tensor, weights: Tensor) -> Tensor:
        """The diagonal of ZᵀDZ (p, k) for k columns of weights (n, k); float64."""
        total = torch.zeros(X.shape[1], weights.shape[1], dtype=torch.float64)
        for rows in _blocks(*X.shape):
            total.addmm_(((X[rows] - self.shift) / self.scale).square_().mT, weights[rows].double())
        return torch.cat((total, weights.double().sum(0, keepdim=True))) if self.intercept else total


def _blocks(n: int, d: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(d, 1))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _columns(
    X: Tensor, weight: Tensor | None, step: int, centred: bool, columns: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of columns over every step-th row with weight, or zero and the root mean square."""
    sample = X[::step]
    share = np.ones(len(sample)) if weight is None else weight.numpy()[::step].astype(np.float64)
    if not share.any():
        share = np.ones(len(sample))
    share = share / share.sum()
    d = X.shape[1] if columns is None else len(columns)
    mean, square, largest = np.zeros(d), np.zeros(d), np.zeros(d)

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows in float64, a block at a time; those without weight, which may hold anything, as zeros."""
        for part in _blocks(*X[::step].shape):
            rows = (sample[part] if columns is None else sample[part][:, columns]).to(torch.float64, copy=True).numpy()
            if weight is not None:
                rows[share[part] == 0] = 0.0
            yield share[part], rows

    with np.errstate(over="ignore", invalid="ignore"):
        for part, rows in parts():
            largest = np.maximum(largest, abs(rows).max(0, initial=0.0))
            if centred:
                mean += part @ rows
        largest[~(largest > 0)] = 1.0
        for part, rows in parts():
            square += part @ np.square((rows - mean) / largest)
        return mean, np.sqrt(square) * largest
