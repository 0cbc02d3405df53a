"""The objective of one output on so few numbers that a step's time would be that of calls, not of arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from onestep._cached import cached_property
from onestep.estimators._arrays import Array
from onestep.estimators._problem import Point, Problem
from onestep.linalg import gram
from onestep.linalg.narrow import widened
from onestep.ops.glm import FAMILIES, glm_product
from onestep.ops.glm.schema import CURVATURE_SLACK
from onestep.solvers.coordinates import Coordinates

# The rows are copied, centred and scaled, up to so many elements: a megabyte.
MOST_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class _Rows:
    """The rows (n, p) and w ℓ″ of each (n,): what `Point` asks of a model."""

    rows: Tensor
    curvature: Array
    family: str

    def diagonal_curvature(self) -> Tensor:
        return torch.from_numpy(self.curvature)[:, None]

    def hvp(self, V: Tensor) -> Tensor:
        """XᵀC(XV), V (p,)."""
        kept = torch.from_numpy(np.append(self.curvature, np.zeros(CURVATURE_SLACK)))
        V = V[None, :, None]
        product: Tensor = glm_product(V, self.rows, V[0], None, kept, FAMILIES[self.family], False)
        return product[0, :, 0]


@dataclass(frozen=True)
class SmallProblem(Problem):
    """`Problem` for a logistic or Poisson loss, on a float64 copy of the centred and scaled rows.

    Losses and gradients are numpy's sums and einsum, which no number of threads changes.
    """

    @staticmethod
    def of(problem: Problem) -> Problem:
        """The same problem without the rows of no weight, or ``problem`` itself where it is large."""
        n, d = problem.X.shape
        if problem.family not in ("logistic", "poisson") or n * (d + 1) > MOST_ELEMENTS:
            return problem
        X, y, weight = problem.X, problem.y, problem.weight
        if weight is not None and not weight.numpy().all():
            kept = weight > 0
            X, y, weight = X[kept], y[kept], weight[kept]
        small = SmallProblem(X, y, problem.family, weight, problem.penalty, problem.coordinates)
        return small if np.isfinite(small._rows).all() else problem

    @property
    def precision(self) -> torch.dtype:
        """The rows are in float64 whatever X is in."""
        return torch.float64

    @cached_property
    def model_coordinates(self) -> Coordinates:
        """The rows are in V's coordinates, the intercept's column among them."""
        p = self._rows.shape[1]
        return Coordinates(torch.zeros(p, dtype=torch.float64), torch.ones(p, dtype=torch.float64), False)

    @cached_property
    def _rows(self) -> Array:
        shift, scale = self.coordinates.shift.numpy(), self.coordinates.scale.numpy()
        n, d = self.X.shape
        rows = np.ones((n, d + self.coordinates.intercept))
        np.subtract(widened(self.X).numpy(), shift, out=rows[:, :d])
        rows[:, :d] /= scale
        return rows

    @cached_property
    def _shared(self) -> tuple[Array, Array | None, Array, Any]:
        """y, weight, the penalties of V, all float64, and rows as a tensor."""
        weight = None if self.weight is None else self.weight.numpy().astype(np.float64)
        penalties = self.penalties(torch.empty(self._rows.shape[1])).numpy()
        return self.y.numpy().astype(np.float64), weight, penalties, torch.from_numpy(self._rows)

    def at(self, V: Tensor) -> Point:
        y, weight, penalties, rows = self._shared
        v, d = V.numpy(), self.X.shape[1]
        with np.errstate(over="ignore", invalid="ignore"):
            scores = np.einsum("ij,j->i", self._rows, v)
            if self.family == "logistic":
                mean = expit(scores)
                losses, curvature = np.logaddexp(0.0, scores) - y * scores, mean * (1.0 - mean)
            else:
                mean = curvature = np.exp(scores)
                losses = mean - y * scores
            residual = mean - y
            if weight is not None:
                losses, curvature, residual = weight * losses, weight * curvature, weight * residual
            pull = penalties * v
            gradient = np.einsum("ij,i->j", self._rows, residual) / self.total + pull
            loss = float(losses.sum() / self.total + 0.5 * (pull * v).sum())
            slopes = gradient[:d] * self.coordinates.scale.numpy()
            if self.coordinates.intercept:
                slopes = np.append(slopes + self.coordinates.shift.numpy() * gradient[-1], gradient[-1])
            slope = float((abs(slopes) - self.rounding.numpy()).max())
        model: Any = _Rows(rows, curvature, self.family)
        return Point(V, loss if math.isfinite(loss) else math.inf, torch.from_numpy(gradient), slope, model, self)

    def gram(self, curvature: Tensor) -> Tensor:
        return gram(self._shared[3], weight=curvature)[0]
