"""Rows of a scipy.sparse matrix, which never becomes dense: columns are centred and scaled by what the weights do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep.solvers.coordinates import Coordinates
from onestep.solvers.multinomial.rows import Evaluation, best_constant
from onestep.solvers.sparse_products import SparseProducts

# Bytes of the scores of a chunk of rows.
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class SparseRows:
    """X (n, d) in CSR form, of which products are taken chunk by chunk.

    Attributes:
        X: (n, d) scipy.sparse CSR, float32 or float64.
        y: (n,) int64 class numbers.
        weight: (n,) in X's dtype, >= 0, or None for ones.
        coordinates: of X's columns; see `coordinates_of`.
        classes: k.
    """

    X: Any
    y: Tensor
    weight: Tensor | None
    coordinates: Coordinates
    classes: int

    @property
    def count(self) -> int:
        return int(self.X.shape[0])

    @property
    def operations(self) -> int:
        return int(self.X.nnz)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.X.dtype == np.float32 else torch.float64

    @property
    def centres(self) -> bool:
        return False

    @property
    def mixed(self) -> bool:
        return False

    @cached_property
    def _weights(self) -> np.ndarray:
        return np.ones(self.count, self.X.dtype) if self.weight is None else self.weight.numpy()

    @cached_property
    def total(self) -> float:
        return float(self._weights.sum(dtype=np.float64))

    @cached_property
    def shares(self) -> Tensor:
        return torch.from_numpy(np.bincount(self.y.numpy(), self._weights, self.classes) / self.total)

    @cached_property
    def at_constant(self) -> Evaluation:
        return self.evaluate(best_constant(self), precise=False)

    def evaluate(self, V: Tensor, *, precise: bool) -> Evaluation:
        W = self.coordinates.weights(V, self.dtype).numpy()
        features = W[:-1] if self.coordinates.intercept else W
        slopes, bends, loss = np.zeros(W.shape), np.zeros(self.classes), 0.0
        for number, rows in enumerate(self._products.chunks):
            y, weight = self.y.numpy()[rows], self._weights[rows]
            scores = self._products.multiply(features, number)
            if self.coordinates.intercept:
                scores += W[-1]
            scores -= scores.max(1, keepdims=True)
            correct = scores[np.arange(len(y)), y]
            P = np.exp(scores, out=scores)
            sums = P.sum(1, keepdims=True)
            loss += float((weight * (np.log(sums[:, 0]) - correct)).sum(dtype=np.float64))
            P /= sums
            bends += np.einsum("ik,ik->k", P, 1 - P, dtype=np.float64)
            P[np.arange(len(y)), y] -= 1
            P *= weight[:, None]
            slopes[: features.shape[0]] += self._products.transposed_multiply(P, number)
            if self.coordinates.intercept:
                slopes[-1] += P.sum(0, dtype=np.float64)
        gradient = torch.from_numpy(slopes / self.total)
        spreads = torch.from_numpy(bends / self.count)
        return Evaluation(loss / self.total, self.coordinates.pull_back(gradient), gradient, spreads)

    @cached_property
    def _products(self) -> SparseProducts:
        return SparseProducts(self.X, max(256, _CHUNK_BYTES // (self.X.dtype.itemsize * self.classes)))

    def gram(self, step: int) -> Tensor:
        return self._gram(step, self._weights[::step].astype(np.float64))

    def curved(self, V: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        W = self.coordinates.weights(V, self.dtype).numpy()
        d = self.X.shape[1]
        curvature = []
        sums, masses = np.zeros((d, self.classes)), np.zeros(self.classes)
        for number, rows in enumerate(self._products.chunks):
            scores = self._products.multiply(W[:d], number)
            if self.coordinates.intercept:
                scores += W[-1]
            scores -= scores.max(1, keepdims=True)
            P = np.exp(scores, out=scores)
            P /= P.sum(1, keepdims=True)
            bends = P * (1 - P) * self._weights[rows, None]
            curvature.append(bends.sum(1, dtype=np.float64))
            if self.coordinates.intercept:
                sums += self._products.transposed_multiply(bends, number)
                masses += bends.sum(0, dtype=np.float64)
        gram = self._gram(step, np.concatenate(curvature)[::step])
        return gram, self.coordinates.centres(torch.from_numpy(sums), torch.from_numpy(masses))

    def _gram(self, step: int, weight: np.ndarray) -> Tensor:
        return centred_gram(self.X[::step], weight, self.coordinates)

    def squares(self) -> Tensor:
        mean, square = _moments(self.X, self._weights)
        shift, scale = self.coordinates.shift.numpy(), self.coordinates.scale.numpy()
        squares = torch.from_numpy(np.maximum(square - 2 * shift * mean + shift**2, 0) / scale**2)
        return torch.cat((squares, squares.new_ones(1))) if self.coordinates.intercept else squares

    def scores(self, V: Tensor) -> Tensor:
        W = self.coordinates.weights(V, self.dtype).numpy()
        parts = [self._products.multiply(W[: self.X.shape[1]], number) for number in range(len(self._products.chunks))]
        found = torch.from_numpy(np.concatenate(parts))
        return found.add_(torch.from_numpy(W[-1])) if self.coordinates.intercept else found

    def movement(self, direction: Tensor) -> float:
        W = self.coordinates.weights(direction, self.dtype).numpy()
        most = 0.0
        for number, rows in enumerate(self._products.chunks):
            moved = self._products.multiply(W[: self.X.shape[1]], number)
            if self.coordinates.intercept:
                moved += W[-1]
            moved -= moved.mean(1, keepdims=True)
            most = max(most, float(abs(moved[self._weights[rows] > 0]).max(initial=0.0)))
        return most

    def sampled(self, step: int) -> SparseRows | None:
        weight = None if self.weight is None else self.weight[::step]
        sample = replace(self, X=self.X[::step], y=self.y[::step], weight=weight)
        return sample if sample.total > 0 else None


def coordinates_of(X: Any, weight: Tensor | None, *, intercept: bool) -> Coordinates:
    """Means and standard deviations of a sparse matrix's columns."""
    mean, square = _moments(X, np.ones(X.shape[0]) if weight is None else weight.numpy())
    shift = mean if intercept else np.zeros_like(mean)
    scale = np.sqrt(np.maximum(square - shift**2, 0.0))
    # A column that does not vary keeps its own size.
    scale = np.where(scale > 1e-7 * abs(mean), scale, np.where(mean != 0, abs(mean), 1.0))
    return Coordinates(torch.from_numpy(shift), torch.from_numpy(scale), intercept)


def centred_gram(X: Any, weight: np.ndarray, coordinates: Coordinates) -> Tensor:
    """The weighted mean of zzᵀ (p, p) over rows in CSR form, float64."""
    X, weight = X.astype(np.float64), weight.astype(np.float64)
    total = max(float(weight.sum()), np.finfo(np.float64).tiny)
    second = (X.T @ X.multiply(weight[:, None])).toarray() / total
    mean = (X.T @ weight) / total
    shift, scale = coordinates.shift.numpy(), coordinates.scale.numpy()
    centred = second - np.outer(shift, mean) - np.outer(mean, shift) + np.outer(shift, shift)
    gram = torch.from_numpy(centred / scale / scale[:, None])
    if not coordinates.intercept:
        return gram
    border = torch.from_numpy((mean - shift) / scale)[:, None]
    return torch.cat((torch.cat((gram, border), 1), torch.cat((border.mT, torch.ones(1, 1).double()), 1)))


def column_squares(X: Any, weight: np.ndarray) -> np.ndarray:
    """Σ w x² of each column of a matrix in CSR form (d,), float64."""
    squares = X.copy()
    squares.data = np.square(squares.data, dtype=np.float64)
    return np.asarray(squares.T @ weight.astype(np.float64))


def _moments(X: Any, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weighted means of x and x² of each column, float64."""
    share = weight.astype(np.float64) / weight.sum(dtype=np.float64)
    return np.asarray(X.T @ share), column_squares(X, share)
