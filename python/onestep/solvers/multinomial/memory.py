"""What L-BFGS knows of the Hessian: pairs of steps and changes of the gradient over one factor of a Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onestep.linalg import cholesky_solve
from onestep.linalg.spd import factor_with_shift
from onestep.solvers.multinomial.rows import Evaluation, Rows

# Pairs that L-BFGS keeps.
_PAIRS = 10
# The factor of the Gram matrix may cost so many passes, and its rows are so many per feature at least.
_FACTOR_PASSES = 8.0
_GRAM_ROWS_PER_FEATURE = 4
_LARGEST_FACTOR = 8192
# Where all probabilities are 0 or 1 there is no spread to divide by.
_LEAST_SPREAD = 1e-8
# Of the mean diagonal element: the least that one counts as where the Gram matrix is factored.
_LEAST_DIAGONAL = 1e-12
# What is added to a diagonal of ones: it is a preconditioner, and needs few digits.
_LEAST_SHIFT = 1e-8
# An intercept has no penalty and is divided by its own class's spread, at least so much of their mean.
_LEAST_SHARE = 1e-2
# The factors are made anew where the spread has changed by this factor.
_SPREAD_CHANGE = 2.0
# Classes whose share (1 - share) differs by less than this factor have a Cholesky factor in common. All of these may
# cost so many passes.
_LEVEL = 4.0
_LEVELS_PASSES = 4.0


@dataclass
class Point:
    """Loss, gradient (p, k) in V, largest slope in W and mean p(1 - p) of each class at V, penalty included.

    ``found`` is what the pass gave, without the penalty. ``centres`` (d, k), where `Memory.wants_centres`: the columns'
    means over rows weighted by each class's probability.
    """

    V: Tensor
    loss: float
    gradient: Tensor
    slope: float
    spreads: Tensor
    centres: Tensor | None
    found: Evaluation


@dataclass(frozen=True)
class Gram:
    """ZᵀZ/n, where it and its factor cost less than they save, and its diagonal; the same for all penalties."""

    matrix: Tensor | None
    diagonal: Tensor

    @staticmethod
    def of(rows: Rows) -> Gram:
        """Of all rows, or of a sample if need be."""
        step = _gram_step(rows, _FACTOR_PASSES)
        if step is None:
            return Gram(None, rows.squares())
        matrix = rows.gram(step)
        return Gram(matrix, matrix.diagonal())


def _gram_step(rows: Rows, passes: float) -> int | None:
    """Of every how many rows the Gram matrix and its factor cost no more than so many passes; None if too few."""
    n, d, k = rows.count, len(rows.coordinates.scale), rows.classes
    fitting = int((passes * 4.0 * rows.operations * k - d**3 / 3.0) / d**2)
    if d > _LARGEST_FACTOR or fitting < min(n, _GRAM_ROWS_PER_FEATURE * d):
        return None
    return max(1, n // fitting)


def _levels(rows: Rows, bends: Tensor) -> Tensor:
    """Each class's level (k,) int64: its factor is for ``_LEVEL`` to this power times the mean spread, as ``bends`` go.

    All are zero where as many factors as levels would cost too much.
    """
    bends = bends.clamp_min(0.5 / rows.count)
    levels = ((bends / bends.mean()).log() / math.log(_LEVEL)).round().long()
    count, d = len(levels.unique()), len(rows.coordinates.scale)
    dear = count * d**2 > _LARGEST_FACTOR**2 or count * d**3 / 3.0 > _LEVELS_PASSES * 4.0 * rows.operations * len(bends)
    return torch.zeros_like(levels) if dear else levels


class Memory:
    """Pairs of steps and changes of the gradient, over the inverse of spread · ZᵀZ/n + penalties.

    The spread is the mean over classes of the mean p(1 - p), times what `_levels` says of classes of unlike shares.
    With an intercept the shares tell, as the mean probabilities soon are the shares. Without one the columns may not be
    able to follow the shares: there is one level, until the Gram matrix is taken anew and the spreads themselves tell.
    """

    def __init__(self, rows: Rows, penalties: Tensor, gram: Gram) -> None:
        coordinates = rows.coordinates
        self._intercept = coordinates.intercept
        # The penalty ½ penalty ‖W‖² has this Hessian in V; where the intercept b = v - Σ shift/scale·V has one, too,
        # also a rank-one part, of which the couplings of v are left out.
        scale = coordinates.scale
        self._penalties = penalties / (torch.cat((scale, scale.new_ones(1))) if self._intercept else scale).square()
        offset = coordinates.shift / scale
        self._offset = torch.cat((offset, offset.new_zeros(1))) if self._intercept else offset
        self._offset = self._offset * float(penalties[-1]) ** 0.5
        self._pairs: list[tuple[Tensor, Tensor, float]] = []
        self._gram, self._squares = gram.matrix, gram.diagonal
        self._spread = 0.0
        self._shared = rows.shares * (1 - rows.shares)
        self._levels = torch.zeros(rows.classes, dtype=torch.int64)
        if self._intercept and gram.matrix is not None:
            self._levels = _levels(rows, self._shared)
        # Of the features' rows of each level's classes.
        self._solves: list[tuple[Tensor | slice, Callable[[Tensor], Tensor]]] = []
        self._bends = torch.ones(rows.classes, dtype=torch.float64)
        self._centres: Tensor | None = None
        # The same with rows weighted by p(1 - p), of where the Gram matrix was last taken anew; None before.
        self._curved_centres: Tensor | None = None

    @property
    def wants_centres(self) -> bool:
        """Whether directions are made with the centres of the point.

        A diagonal says too little of the rows of a class: with their mean or spread it is no nearer (0323).
        """
        return self._intercept and self._gram is not None and self._curved_centres is None

    def add(self, step: Tensor, change: Tensor) -> None:
        curvature = dot(step, change)
        if curvature > 1e-14 * math.sqrt(dot(step, step) * dot(change, change)):
            self._pairs = [*self._pairs[1 - _PAIRS :], (step, change, 1.0 / curvature)]

    def forget(self) -> bool:
        """Drops the pairs; False if there were none."""
        had = bool(self._pairs)
        self._pairs = []
        return had

    def reweigh(self, rows: Rows, point: Point, passes: int) -> None:
        """Takes Gram matrix and centres anew if it costs less than so many passes, by the rows' curvature here."""
        step = _gram_step(rows, passes)
        if step is not None:
            self._gram, self._curved_centres = rows.curved(point.V, step)
            self._levels = _levels(rows, self._shared if self._intercept else point.spreads)
            self._factor(max(float(point.spreads.numpy().mean()), _LEAST_SPREAD))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "pairs": self._pairs,
            "spread": self._spread,
            "gram": self._gram,
            "curved_centres": self._curved_centres,
            "levels": self._levels,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``."""
        self._pairs, self._gram = state["pairs"], state["gram"]
        # Checkpoints had neither before 2026-11-28.
        self._curved_centres = state.get("curved_centres")
        self._levels = state.get("levels", self._levels)
        if state["spread"]:
            self._factor(state["spread"])

    def decrement(self, point: Point) -> float:
        return -dot(point.gradient, self.direction(point))

    def direction(self, point: Point) -> Tensor:
        """-H⁻¹g by the two-loop recursion."""
        self._prepare(point)
        q = point.gradient.clone()
        scaled: list[float] = []
        for step, change, inverse in reversed(self._pairs):
            a = inverse * dot(step, q)
            scaled.append(a)
            q.add_(change, alpha=-a)
        q = self._apply(q)
        if self._pairs:
            _, change, inverse = self._pairs[-1]
            scale = inverse * dot(change, self._apply(change))
            # Squares of gradients that are next to nothing underflow.
            if scale > 0:
                q *= 1.0 / scale
        for (step, change, inverse), a in zip(self._pairs, reversed(scaled), strict=True):
            q.add_(step, alpha=a - inverse * dot(change, q))
        return q.neg_()

    def _prepare(self, point: Point) -> None:
        spreads = point.spreads
        spread = max(float(spreads.numpy().mean()), _LEAST_SPREAD)
        self._centres = point.centres if self.wants_centres else self._curved_centres
        if self._intercept:
            # The intercept's row of ZᵀZ/n is that of the identity, as columns are centred.
            self._bends = spreads.clamp_min(_LEAST_SHARE * spread) + self._penalties[-1]
        if not self._spread / _SPREAD_CHANGE < spread < self._spread * _SPREAD_CHANGE:
            self._factor(spread)

    def _factor(self, spread: float) -> None:
        self._spread = spread
        found: list[int] = self._levels.unique().tolist()
        self._solves = []
        for level in found:
            classes = slice(None) if len(found) == 1 else (self._levels == level).nonzero()[:, 0]
            self._solves.append((classes, self._solve_of(spread * _LEVEL**level)))

    def _solve_of(self, spread: float) -> Callable[[Tensor], Tensor]:
        """R → (spread · ZᵀZ/n + penalties)⁻¹ R."""
        if self._gram is None:
            diagonal = spread * self._squares + self._penalties + self._offset.square()
            # A feature that is zero in all rows: whatever scale the others have.
            diagonal = diagonal.clamp_min(1e-6 * diagonal.mean().item() + torch.finfo(torch.float64).tiny)[:, None]
            return lambda R: R / diagonal
        A = spread * self._gram + torch.diag(self._penalties) + torch.outer(self._offset, self._offset)
        if self._intercept:
            # `_apply` has an inverse of its own for the intercept: with the couplings that columns have which weights
            # centre elsewhere, the two together would not be positive definite.
            A[-1, :-1] = A[:-1, -1] = 0.0
        diagonal = A.diagonal()
        # A feature that is zero in the rows which bend: its gradient need not be.
        least = _LEAST_DIAGONAL * diagonal.mean().item() + torch.finfo(torch.float64).tiny
        scale = diagonal.clamp_min(least).rsqrt()[:, None]
        A = A * scale * scale.mT
        L, _ = factor_with_shift(A, _LEAST_SHIFT)
        return lambda R: scale * cholesky_solve(scale * R, L)

    def _features(self, R: Tensor) -> Tensor:
        result = torch.empty_like(R)
        for classes, solve in self._solves:
            result[:, classes] = solve(R[:, classes])
        return result

    def _apply(self, R: Tensor) -> Tensor:
        if self._centres is None:
            result = self._features(R)
            if self._intercept:
                result[-1] = R[-1] / self._bends
            # Levels would give the classes a shift in common, which lowers no loss.
            return result - result.mean(1, keepdim=True)
        # A class's block of the Hessian, in which rows weigh p(1 - p), has about the covariance of all rows, but a mean
        # of its own. Columns that lose that mean are not coupled with the intercept.
        R = R.clone()
        R[:-1] -= self._centres * R[-1]
        result = self._features(R)
        result[-1] = R[-1] / self._bends - (self._centres * result[:-1]).sum(0)
        # A shift common to all classes changes no score: only a penalty sees it, as next to nothing.
        return result - result.mean(1, keepdim=True)


def dot(A: Tensor, B: Tensor) -> float:
    """⟨A, B⟩ in one read and on one thread (numpy's einsum, not BLAS): the same for any number of threads."""
    return float(np.einsum("i,i->", A.numpy().ravel(), B.numpy().ravel()))
