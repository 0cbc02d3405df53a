"""Least squares and Poisson losses on a scipy.sparse X, which never becomes dense: columns are centred implicitly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, issparse
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from onestep.curvature.conjugate_gradient import conjugate_gradient
from onestep.estimators._arrays import Array
from onestep.estimators._centred import MIN_RCOND
from onestep.estimators._problem import Point, Problem
from onestep.estimators._solve import Solution, solve_spd
from onestep.solvers.multinomial.sparse import centred_gram, column_squares
from onestep.solvers.sparse_products import SparseProducts

# Elements, zeros included, up to which a matrix is solved as a dense one: half a megabyte.
SMALL_SPARSE = 1 << 16
# Features whose Gram matrix is formed and factored.
_LARGEST_GRAM = 2048
# Relative residual of conjugate gradients.
_TOLERANCE = 1e-10
_LEAST_ITERATIONS = 1000


def is_large_sparse(X: Any) -> bool:
    """Whether X is a scipy.sparse matrix that should not become dense."""
    return bool(issparse(X)) and math.prod(X.shape) > SMALL_SPARSE


def dense_if_small(X: Any, given: Any) -> Any:
    """A small sparse matrix as an array, or as a tensor where ``given`` was one; anything else as it is."""
    if not issparse(X):
        return X
    return torch.from_numpy(X.toarray()) if isinstance(given, Tensor) else X.toarray()


@dataclass(frozen=True)
class SparseLeastSquares:
    """X (n, d) CSR and weight (n,) of rows of sparse or dense targets; see `solve`."""

    X: Any
    weight: Array | None
    center: bool

    def solve(self, Y: Any, offset: float, alpha: Tensor) -> Solution:
        """argmin of Σ w ‖y + offset - xW - b‖² + Σⱼ alphaⱼ ‖Wⱼ‖², Y (n, k) dense or scipy.sparse.

        (X̃ᵀDX̃ + alpha I) W = X̃ᵀDỸ by Cholesky where d is small, else by conjugate gradients for all targets at once,
        preconditioned by the diagonal; without a penalty as they are, and so with the solution of minimum norm
        (Hestenes and Stiefel 1952). X̃ᵀDX̃V is Xᵀ(D(XV)) - Σw x̄ x̄ᵀV.
        """
        n, d = self.X.shape
        weight = np.ones(n) if self.weight is None else self.weight.astype(np.float64)
        total = weight.sum()
        X = csr_array((self.X.data.astype(np.float64, copy=False), self.X.indices, self.X.indptr), shape=self.X.shape)
        x_mean = (X.T @ weight) / total if self.center else np.zeros(d)
        y_mean = np.asarray(Y.T @ weight).ravel() / total + offset if self.center else np.zeros(Y.shape[1])
        weighted = X.multiply(weight[:, None]).tocsr() if self.weight is not None else X
        cross = weighted.T @ Y
        cross = np.asarray(cross.toarray() if issparse(cross) else cross, dtype=np.float64)
        # Σ w x̃ (y + offset - ȳ) is Σ w x (y + offset - ȳ), as what is centred adds up to zero.
        cross += np.outer(weighted.T @ np.ones(n), offset - y_mean)
        by_rows, by_columns = SparseProducts(X), SparseProducts(weighted)
        coef, paths = np.zeros_like(cross), []
        gram = self._gram(X, weighted, x_mean, total) if d <= _LARGEST_GRAM else None
        for penalty in sorted(set(alpha.tolist())):
            columns = (alpha == penalty).numpy()
            W = None
            if gram is not None:
                shifted = gram + torch.full((d,), penalty, dtype=torch.float64).diag()
                W = solve_spd(shifted, torch.from_numpy(cross[:, columns]), MIN_RCOND)
            if W is not None:
                coef[:, columns] = W.numpy()
                paths.append("cholesky")
                continue

            def product(V: Array, penalty: float = penalty) -> Array:
                # A sum instead of a product by BLAS: the same for any number of threads.
                shared = total * np.outer(x_mean, (x_mean[:, None] * V).sum(0))
                image: Array = by_columns.transposed_multiply(by_rows.multiply(V)) - shared + penalty * V
                return image

            squares = column_squares(X, weight) - total * x_mean**2
            inverse = 1.0 / (np.maximum(squares, 0.0) + penalty) if penalty > 0 else np.ones(d)
            coef[:, columns] = _conjugate_gradients(product, cross[:, columns], inverse)
            paths.append("conjugate_gradients")
        W = torch.from_numpy(coef)
        intercept = torch.from_numpy(y_mean) - torch.from_numpy(x_mean) @ W
        return Solution(W, intercept, "+".join(dict.fromkeys(paths)))

    @staticmethod
    def _gram(X: Any, weighted: Any, x_mean: Array, total: float) -> Tensor:
        return torch.from_numpy((weighted.T @ X).toarray() - total * np.outer(x_mean, x_mean))


def _conjugate_gradients(apply: Callable[[Array], Array], B: Array, inverse: Array) -> Array:
    """AV = B for each column of B (d, k), A symmetric and not negative, preconditioned by a diagonal (d,)."""
    diagonal = torch.from_numpy(inverse)[:, None]
    solved = conjugate_gradient(
        lambda V: torch.from_numpy(apply(V.numpy())),
        torch.from_numpy(B),
        precondition=lambda R: R * diagonal,
        tolerance=_TOLERANCE,
        max_iterations=max(_LEAST_ITERATIONS, 2 * B.shape[0]),
        least_progress=0.0,
    )
    if not solved.converged.all():
        left = (solved.residual.norm(dim=0) / np.maximum(np.linalg.norm(B, axis=0), np.finfo(float).tiny)).max().item()
        warnings.warn(
            f"conjugate gradients stopped after {solved.iterations} iterations with a relative residual of {left:.1e}; "
            "a larger alpha converges sooner",
            ConvergenceWarning,
            stacklevel=5,
        )
    return np.asarray(solved.x)


@dataclass(frozen=True)
class _SparsePoisson:
    """What `Point` asks of a model."""

    rows: Any
    curvature: Array
    intercept: bool

    def hvp(self, W: Tensor) -> Tensor:
        return _transposed(self.rows, self.curvature * _scores(self.rows, W.numpy(), self.intercept), self.intercept)

    def diagonal_curvature(self) -> Tensor:
        return torch.from_numpy(self.curvature)[:, None]


# By SciPy, which sums float32 rows in float64. With one column, products are bound by reading the rows.
def _scores(rows: Any, W: Array, intercept: bool) -> Array:
    return np.asarray(rows @ W[:-1] + W[-1] if intercept else rows @ W, dtype=np.float64)


def _transposed(rows: Any, residual: Array, intercept: bool) -> Tensor:
    product = rows.T @ residual
    return torch.from_numpy(np.append(product, residual.sum()) if intercept else product)


@dataclass(frozen=True)
class SparsePoisson(Problem):
    """`Problem` for a Poisson loss on rows (n, d) in CSR form; X only has their shape and type. Sums are float64."""

    rows: Any

    def at(self, V: Tensor) -> Point:
        intercept, y = self.coordinates.intercept, self.y.numpy().astype(np.float64)
        W = self.coordinates.weights(V, torch.float64)
        weight = 1.0 if self.weight is None else self.weight.numpy().astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            scores = _scores(self.rows, W.numpy(), intercept)
            mean = np.exp(scores)
            loss = float((weight * (mean - y * scores)).sum() / self.total)
            slopes = _transposed(self.rows, weight * (mean - y), intercept) / self.total
        penalty = self.penalties(V) * V
        gradient = self.coordinates.pull_back(slopes) + penalty
        slopes[: self.X.shape[1]] += self.penalty * W[: self.X.shape[1]]
        slope = (slopes.abs() - self.rounding).max().item()
        model: Any = _SparsePoisson(self.rows, weight * mean, intercept)
        return Point(V, loss + 0.5 * (penalty * V).sum().item(), gradient, slope, model, self)

    def gram(self, curvature: Tensor) -> Tensor:
        weight = curvature.numpy()
        return centred_gram(self.rows, weight, self.coordinates) * float(weight.sum())

    def squares(self, curvature: Tensor) -> Tensor:
        weight = curvature[:, 0].numpy()
        shift, scale, total = self.coordinates.shift.numpy(), self.coordinates.scale.numpy(), weight.sum()
        sums = self.rows.T @ weight
        squares = column_squares(self.rows, weight) - 2 * shift * sums + shift**2 * total
        squares = np.maximum(squares, 0.0) / scale**2
        return torch.from_numpy(np.append(squares, total) if self.coordinates.intercept else squares)[:, None]

    def sampled(self, rows: int) -> Problem:
        step = self.X.shape[0] // rows
        if step < 3:
            return self
        weight = None if self.weight is None else self.weight[::step]
        sample = replace(self, X=self.X[::step], y=self.y[::step], weight=weight, rows=self.rows[::step])
        return sample if sample.total > 0 else self

    def movement(self, direction: Tensor) -> float:
        W = self.coordinates.weights(direction, torch.float64)
        moved = abs(_scores(self.rows, W.numpy(), self.coordinates.intercept))
        return float(moved.max() if self.weight is None else moved[self.weight.numpy() > 0].max())
