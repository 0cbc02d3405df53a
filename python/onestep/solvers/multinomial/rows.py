"""What the solver asks of the data: sums over the rows, in one pass over them each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep.curvature.glm import glm
from onestep.linalg.narrow import rows_of_chunk, widened_chunks, working_dtype
from onestep.ops.glm.schema import COMPUTE_DTYPES
from onestep.solvers.coordinates import Coordinates

# Bytes of a chunk's probabilities, which exist for one chunk of rows at a time.
_CHUNK_BYTES = 32 << 20
_LEAST_ROWS = 256
# Rows of a chunk whose probabilities are looked at for their spread.
_SPREAD_ROWS = 512
# Means beyond so many standard deviations are taken off before X is rounded to float32.
_FAR = 16.0
# float32 halves the time of a product, but each pass converts X: it pays from so many classes on.
_FLOAT_CLASSES = 16


class Evaluation(NamedTuple):
    """Sums over the rows at one V.

    Attributes:
        loss: the weighted mean of log Σ eᶻ - z_y.
        gradient: its gradient with respect to V (p, k), float64.
        slopes: its gradient with respect to W, for X's own columns (p, k), float64.
        spreads: the mean over some rows of each class's P(1 - P) (k,): its block of the Hessian is about that · ZᵀZ/n.
    """

    loss: float
    gradient: Tensor
    slopes: Tensor
    spreads: Tensor


class Rows(Protocol):
    """Rows of features with their labels. V is (p, k): d columns and one of ones, if there is an intercept."""

    @property
    def coordinates(self) -> Coordinates:
        """Of the columns."""

    @property
    def count(self) -> int:
        """n."""

    @property
    def classes(self) -> int:
        """k."""

    @property
    def operations(self) -> int:
        """Multiplications that a product with one vector takes: n·d, or the number of stored elements."""

    @property
    def dtype(self) -> torch.dtype:
        """X's."""

    @property
    def weight(self) -> Tensor | None:
        """(n,), >= 0, or None for ones."""

    @property
    def shares(self) -> Tensor:
        """The weighted share of each class (k,), float64."""

    @property
    def at_constant(self) -> Evaluation:
        """One pass at `best_constant`, made once."""

    @property
    def centres(self) -> bool:
        """Whether columns lose their means before their digits are cut off."""

    @property
    def mixed(self) -> bool:
        """Whether a pass that is not precise takes less time."""

    def evaluate(self, V: Tensor, *, precise: bool) -> Evaluation:
        """One pass; in X's own type if ``precise``, else float32 may do."""

    def gram(self, step: int) -> Tensor:
        """The weighted mean of zzᵀ (p, p) over every step-th row, float64."""

    def curved(self, V: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """The same with rows weighted by their mean p(1 - p) at V, too, in units of the mean of those; and centres.

        Centres (d, k), float64, are the means of z by each class's p(1 - p); None without an intercept.
        """

    def squares(self) -> Tensor:
        """The weighted means of z² (p,), float64."""

    def movement(self, direction: Tensor) -> float:
        """How far a step (p, k) moves the scores of any row with weight, less what it moves all of its scores."""

    def scores(self, V: Tensor) -> Tensor:
        """ZV (n, k), in float32 if a pass may be."""

    def sampled(self, step: int) -> Rows | None:
        """Every step-th row, or None where the rows cannot be sampled."""


@dataclass(frozen=True)
class DenseRows:
    """X (n, d) in memory, read in place.

    Attributes:
        X: (n, d) float32 or float64, any strides; 16-bit floats and integers, which are converted in chunks where no
            kernel reads them.
        y: (n,) int64 class numbers, or (n, k) probabilities in X's dtype.
        weight: (n,) in X's dtype, >= 0, or None for ones.
        coordinates: of X's columns.
        classes: k.
        double: whether float32 rows are computed in float64, a chunk at a time.
        as_they_are: whether float32 rows keep the means of columns that are far from zero, as in the scores of a model
            that is given them. Its loss is that of such scores, and weights for which they lose their digits are none.
    """

    X: Tensor
    y: Tensor
    weight: Tensor | None
    coordinates: Coordinates
    classes: int
    double: bool = False
    as_they_are: bool = False

    @property
    def count(self) -> int:
        return len(self.X)

    @property
    def operations(self) -> int:
        return self.X.numel()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else working_dtype(self.X)

    @property
    def centres(self) -> bool:
        return self.far and self.dtype == torch.float32 and not self.as_they_are

    @property
    def mixed(self) -> bool:
        return self.dtype == torch.float64 and self.classes >= _FLOAT_CLASSES

    @property
    def _converted(self) -> bool:
        """Whether the kernels of the model do not read X as it is."""
        return self.double or self.X.dtype not in COMPUTE_DTYPES

    @cached_property
    def far(self) -> bool:
        """Whether a column is so far from zero that float32 would hurt, or its size out of float32's range."""
        shift, scale = self.coordinates.shift, self.coordinates.scale
        odd = (shift.abs() > _FAR * scale) | (scale > 1e6) | (scale < 1e-6)
        return bool(odd.numpy().any())

    @cached_property
    def total(self) -> float:
        return float(self.count if self.weight is None else self.weight.numpy().sum(dtype=np.float64))

    @cached_property
    def shares(self) -> Tensor:
        weight = None if self.weight is None else self.weight.numpy()
        if self.y.dim() == 1:
            return torch.from_numpy(np.bincount(self.y.numpy(), weight, self.classes) / self.total)
        return torch.from_numpy(np.average(self.y.numpy().astype(np.float64), axis=0, weights=weight))

    @cached_property
    def at_constant(self) -> Evaluation:
        return self.evaluate(best_constant(self), precise=False)

    def evaluate(self, V: Tensor, *, precise: bool) -> Evaluation:
        intercept = self.coordinates.intercept
        dtype, centred, W = self._weights(V, precise=precise)
        loss, looked_at, spreads = 0.0, 0, np.zeros(self.classes)
        gradient = torch.zeros_like(V)
        for rows, X in self._read(dtype, centred=centred):
            y, weight = self.y[rows], None if self.weight is None else self.weight[rows]
            y, weight = y.to(dtype) if y.dim() == 2 else y, None if weight is None else weight.to(dtype)
            point = glm(X, y, W, "softmax", weight=weight, intercept=intercept)
            loss += point.loss.item()
            gradient += point.grad
            some = point.output_curvature()[:: max(1, len(X) // _SPREAD_ROWS)].numpy()
            spreads += (some * (1 - some)).sum(0, dtype=np.float64)
            looked_at += len(some)
        gradient /= self.total
        if centred:
            slopes = self.coordinates.push_forward(gradient)
        else:
            slopes, gradient = gradient, self.coordinates.pull_back(gradient)
        return Evaluation(loss / self.total, gradient, slopes, torch.from_numpy(spreads / looked_at))

    def scores(self, V: Tensor) -> Tensor:
        dtype, centred, W = self._weights(V, precise=False)
        found = torch.empty(self.count, self.classes, dtype=dtype)
        for rows, X in self._read(dtype, centred=centred):
            # The kernels of the model read 16-bit floats as they are, torch's product does not.
            torch.mm(X.to(dtype), W[: X.shape[1]], out=found[rows])
        return found.add_(W[-1]) if self.coordinates.intercept else found

    def movement(self, direction: Tensor) -> float:
        W = self.coordinates.weights(direction, self.dtype)
        most = 0.0
        for rows in self._chunks(self.dtype):
            X = self.X[rows].to(self.dtype)
            moved = X @ W[:-1] + W[-1] if self.coordinates.intercept else X @ W
            moved -= moved.mean(1, keepdim=True)
            if self.weight is not None:
                moved[self.weight[rows] == 0] = 0
            most = max(most, moved.abs().max().item())
        return most

    def _weights(self, V: Tensor, *, precise: bool) -> tuple[torch.dtype, bool, Tensor]:
        """What a pass computes in, whether it centres X, and the weights of the X that it reads."""
        dtype = torch.float32 if self.mixed and not precise else self.dtype
        centred = self.centres or (self.far and dtype != self.dtype)
        return dtype, centred, V.float() if centred else self.coordinates.weights(V, dtype)

    def _read(self, dtype: torch.dtype, *, centred: bool) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of X as `glm` reads it, each valid until the next: one buffer holds them in turn."""
        chunks = list(self._chunks(dtype, converted=centred))
        converted = centred or ((self._converted or self.mixed) and self.X.dtype != dtype)
        # New memory for each chunk, beside results that are kept, would leave gaps too small for the next.
        shape = (chunks[0].stop if chunks else 0, self.X.shape[1])
        wide = torch.empty(shape if centred else (0, 0), dtype=torch.float64)
        buffer = torch.empty(shape if converted else (0, 0), dtype=dtype)
        for rows in chunks:
            X = self.X[rows]
            if centred:
                # A column far from zero is centred before digits are cut off: it keeps those by which it varies.
                X = wide[: len(X)].copy_(X).sub_(self.coordinates.shift).div_(self.coordinates.scale)
            yield rows, buffer[: len(X)].copy_(X) if converted else X

    def _chunks(self, dtype: torch.dtype, *, converted: bool = False) -> Iterator[slice]:
        size = torch.finfo(dtype).bits // 8
        width = max(self.classes, self.X.shape[1] if self.mixed else 0)
        step = max(_LEAST_ROWS, _CHUNK_BYTES // (size * width))
        if converted or self.X.dtype != self.dtype:
            step = min(step, max(_LEAST_ROWS, rows_of_chunk(self.X.shape[1])))
        return (slice(start, min(start + step, self.count)) for start in range(0, self.count, step))

    def gram(self, step: int) -> Tensor:
        X, weight = self.X[::step], None if self.weight is None else self.weight[::step]
        dtype = working_dtype(X)
        weight = torch.ones(1, dtype=dtype).expand(len(X)) if weight is None else weight.to(dtype)
        total = float(weight.numpy().sum(dtype=np.float64))
        return self.coordinates.gram(X, weight) / max(total, torch.finfo(torch.float64).tiny)

    def curved(self, V: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        dtype, X = working_dtype(self.X), self.X[::step]
        weight = None if self.weight is None else self.weight[::step].to(dtype)
        W, curvature = self.coordinates.weights(V, dtype), torch.empty(len(X), dtype=dtype)
        sums, masses = torch.zeros(X.shape[1], self.classes, dtype=torch.float64), np.zeros(self.classes)
        for rows, part in widened_chunks(X):
            P = part @ W[: X.shape[1]]
            if self.coordinates.intercept:
                P += W[-1]
            P = torch.softmax(P, 1, out=P)
            bends = P.mul_(1 - P)
            if weight is not None:
                bends *= weight[rows, None]
            curvature[rows] = bends.sum(1)
            if self.coordinates.intercept:
                sums += part.mT @ bends
                masses += bends.numpy().sum(0, dtype=np.float64)
        total = float(curvature.numpy().sum(dtype=np.float64))
        gram = self.coordinates.gram(X, curvature) / max(total, torch.finfo(torch.float64).tiny)
        return gram, self.coordinates.centres(sums, torch.from_numpy(masses))

    def squares(self) -> Tensor:
        weight = torch.ones(1, dtype=self.dtype).expand(self.count) if self.weight is None else self.weight
        return self.coordinates.squares(self.X, weight[:, None])[:, 0] / self.total

    def sampled(self, step: int) -> DenseRows | None:
        weight = None if self.weight is None else self.weight[::step]
        sample = replace(self, X=self.X[::step], y=self.y[::step], weight=weight)
        return sample if sample.total > 0 else None


def best_constant(rows: Rows) -> Tensor:
    """V (p, k) of the best scores that are the same for all rows; zeros without an intercept."""
    V = torch.zeros(len(rows.coordinates.scale) + rows.coordinates.intercept, rows.classes, dtype=torch.float64)
    if rows.coordinates.intercept:
        V[-1] = rows.shares.clamp_min(0.5 / rows.count).log()
        V[-1] -= V[-1].mean()
    return V


def constant_loss(rows: Rows) -> float:
    """The loss at `best_constant`, without a penalty."""
    scores = best_constant(rows)[-1] if rows.coordinates.intercept else rows.shares.new_zeros(rows.classes)
    return float(scores.logsumexp(0) - rows.shares @ scores)
