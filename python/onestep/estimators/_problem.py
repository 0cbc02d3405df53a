"""The objective of a generalised linear model, in coordinates in which the columns of X are alike.

Newton's method does not depend on the coordinates, but its arithmetic does: a shift of the Hessian's diagonal that
is small beside the column of incomes is large beside the column of years, and two columns far from zero are nearly
parallel. Therefore the solver works with V, the weights of the columns z_j = (x_j - shift_j) / scale_j. X itself is
read as it is: W = V / scale, and the intercept takes what the shift adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from onestep.curvature import GLMPoint, glm
from onestep.linalg import moments

# Rows from which shift and scale are taken. They only have to come near: the minimum does not depend on them.
_SCALE_ROWS = 16384
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
            mean[columns], deviation[columns] = _columns(X[:, torch.from_numpy(columns)], weight, 1, intercept)
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

    def gram(self, X: Tensor, weight: Tensor) -> Tensor:
        """ZᵀDZ (p, p) float64, with a column of ones at the end of Z where there is an intercept."""
        sums = moments(X, X[:, :0], weight=weight, center=self.intercept)
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


def _columns(X: Tensor, weight: Tensor | None, step: int, centred: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the columns of every step-th row with weight, or zero and the root mean square."""
    rows = X.numpy()[::step]
    share = np.ones(len(rows)) if weight is None else weight.numpy()[::step].astype(np.float64)
    if not share.any():
        share = np.ones(len(rows))
    share = share / share.sum()
    mean, square = np.zeros(X.shape[1]), np.zeros(X.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        used = rows[share > 0]
        largest = abs(used).max(0).astype(np.float64)
        largest[~(largest > 0)] = 1.0
        if centred:
            for part in _blocks(*rows.shape):
                mean += share[part] @ _known(rows[part], share[part])
        for part in _blocks(*rows.shape):
            square += share[part] @ np.square((_known(rows[part], share[part]) - mean) / largest)
        return mean, np.sqrt(square) * largest


def _known(rows: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Rows in float64; those without weight, which may hold anything, as zeros."""
    converted = rows.astype(np.float64)
    converted[share == 0] = 0.0
    return converted


@dataclass(frozen=True)
class Point:
    """f, its gradient and its Hessian-vector products at V.

    ``slope`` is the largest element of the gradient in W, less what rounding may have made of it.
    """

    V: Tensor
    loss: float
    grad: Tensor
    slope: float
    model: GLMPoint
    problem: Problem

    def product(self, direction: Tensor) -> Tensor:
        problem = self.problem
        summed = self.model.hvp(problem.coordinates.weights(direction, problem.X.dtype))
        return problem.coordinates.pull_back(summed) / problem.total + problem.penalties(direction) * direction

    @property
    def scale(self) -> float:
        """What a decrease of the loss is small against: the loss itself, or for counts their mean; 1 at most."""
        return min(1.0, self.problem.target_mean.item() if self.problem.family == "poisson" else self.loss)


@dataclass(frozen=True)
class Problem:
    """f(W) = Σ wᵢ ℓ(xᵢW, yᵢ) / Σ wᵢ + ½ penalty ‖W‖², without the intercept's row; weights of mean 1 or None."""

    X: Tensor
    y: Tensor
    family: str
    weight: Tensor | None
    penalty: float
    coordinates: Coordinates

    @cached_property
    def total(self) -> float:
        return total_weight(self.X, self.weight)

    @cached_property
    def rounding(self) -> Tensor:
        """How far rounding X's products to its type may move each slope (p,)."""
        size = self.coordinates.shift.abs() + self.coordinates.scale
        size = torch.cat((size, size.new_ones(1))) if self.coordinates.intercept else size
        residual = max(1.0, self.target_mean.item()) if self.family == "poisson" else 1.0
        return 4 * torch.finfo(self.X.dtype).eps * residual * size

    @cached_property
    def decrement_rounding(self) -> float:
        """The squared Newton decrement that such slopes may make where there is nothing left to gain."""
        return 0.5 * (self.rounding[: self.X.shape[1]] / self.coordinates.scale).square().sum().item()

    @cached_property
    def target_mean(self) -> Tensor:
        """The weighted mean of y (1,), or the weighted share of each class (k,) that occurs; float64."""
        share = None if self.weight is None else self.weight.numpy()
        if self.family == "softmax":
            return torch.from_numpy(np.bincount(self.y.numpy(), share) / self.total)
        return torch.tensor([np.average(self.y.numpy().astype(np.float64), weights=share)])

    def penalties(self, like: Tensor) -> Tensor:
        """The second derivative of the penalty's part, in the shape of a column of V."""
        penalties = self.penalty / self.coordinates.scale.square()
        if self.coordinates.intercept:
            penalties = torch.cat((penalties, penalties.new_zeros(1)))
        return penalties.reshape(-1, *(1,) * (like.dim() - 1))

    def at(self, V: Tensor) -> Point:
        intercept = self.coordinates.intercept
        W = self.coordinates.weights(V, self.X.dtype)
        model = glm(self.X, self.y, W, self.family, weight=self.weight, intercept=intercept)
        penalty = self.penalties(V) * V
        loss = model.loss.item() / self.total + 0.5 * (penalty * V).sum().item()
        mean = model.grad.double() / self.total
        slopes = mean.clone()
        slopes[: self.X.shape[1]] += self.penalty * W[: self.X.shape[1]]
        slope = (slopes.abs() - self.rounding.reshape(-1, *(1,) * (V.dim() - 1))).max().item()
        return Point(V, loss, self.coordinates.pull_back(mean) + penalty, slope, model, self)

    def null(self, shape: tuple[int, ...]) -> tuple[Tensor, float]:
        """The best V of given shape with an intercept alone, and its loss, which takes no pass over X."""
        V = torch.zeros(shape, dtype=torch.float64)
        classes = shape[-1] if self.family == "softmax" else 1
        mean = torch.cat((self.target_mean, torch.zeros(classes - len(self.target_mean), dtype=torch.float64)))
        # Half a row more than there is, so that the logarithm is finite.
        tiny = 0.5 / self.X.shape[0]
        scores = torch.zeros_like(mean)
        if self.coordinates.intercept:
            scores = mean.clamp_min(tiny).log()
            if self.family == "logistic":
                scores = scores - (1 - mean).clamp_min(tiny).log()
            V[-1] = scores if V.dim() == 2 else scores[0]
        if self.family == "softmax":
            start = scores.logsumexp(0)
        else:
            start = (scores.exp() if self.family == "poisson" else torch.nn.functional.softplus(scores)).sum()
        return V, (start - mean @ scores).item()

    def sampled(self, rows: int) -> Problem:
        """Every k-th row, or the problem itself where that would spare little."""
        step = self.X.shape[0] // rows
        if step < 3:
            return self
        weight = None if self.weight is None else self.weight[::step]
        sample = replace(self, X=self.X[::step], y=self.y[::step], weight=weight)
        return sample if sample.total > 0 else self

    def movement(self, direction: Tensor) -> float:
        """How far a step moves the outputs of any row with weight."""
        W = self.coordinates.weights(direction, self.X.dtype)
        moved = self.X @ W[:-1] + W[-1] if self.coordinates.intercept else self.X @ W
        if moved.dim() == 2:
            moved = moved - moved.mean(1, keepdim=True)
        if self.weight is not None:
            moved = moved[self.weight > 0]
        return moved.abs().max().item()


def total_weight(X: Tensor, weight: Tensor | None) -> float:
    """Σ wᵢ over the rows of X in float64; None stands for ones. numpy sums in one order for any number of threads."""
    return float(X.shape[0] if weight is None else weight.numpy().sum(dtype=np.float64))
