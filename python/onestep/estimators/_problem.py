"""The objective of a generalised linear model, in coordinates in which the columns of X are alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep.curvature import GLMPoint
from onestep.estimators._chunked import ChunkedPoint, point_of
from onestep.linalg.narrow import FLOAT_NOISE, widened_chunks, working_dtype
from onestep.solvers.coordinates import Coordinates


@dataclass(frozen=True)
class Point:
    """f, its gradient and its Hessian-vector products at V.

    ``slope`` is the largest element of the gradient in W, less what rounding may have made of it.
    """

    V: Tensor
    loss: float
    grad: Tensor
    slope: float
    model: GLMPoint | ChunkedPoint
    problem: Problem

    def product(self, direction: Tensor) -> Tensor:
        problem, coordinates = self.problem, self.problem.model_coordinates
        summed = self.model.hvp(coordinates.weights(direction, problem.precision))
        mean = coordinates.pull_back(summed) / problem.total
        return without_common(mean + problem.penalties(direction) * direction)

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

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in beside X."""
        return working_dtype(self.X)

    @property
    def precision(self) -> torch.dtype:
        """What the rows' products and sums are made in."""
        return self.dtype

    @property
    def model_coordinates(self) -> Coordinates:
        """V in terms of the rows that a point's model is of."""
        return self.coordinates

    def is_noise(self, loss: float) -> bool:
        """Whether a loss is less than rounding makes of it. A Poisson loss may be negative."""
        return self.precision == torch.float32 and self.family != "poisson" and loss <= FLOAT_NOISE

    @cached_property
    def total(self) -> float:
        return total_weight(self.X, self.weight)

    @cached_property
    def rounding(self) -> Tensor:
        """How far rounding X's products to ``precision`` may move each slope (p,)."""
        residual = max(1.0, self.target_mean.item()) if self.family == "poisson" else 1.0
        return residual * self.coordinates.rounding(self.precision)

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
        # Twice, since a square may underflow.
        penalties = self.penalty / self.coordinates.scale / self.coordinates.scale
        if self.coordinates.intercept:
            penalties = torch.cat((penalties, penalties.new_zeros(1)))
        return penalties.reshape(-1, *(1,) * (like.dim() - 1))

    def at(self, V: Tensor) -> Point:
        intercept = self.coordinates.intercept
        W = self.coordinates.weights(V, self.dtype)
        model = point_of(self.X, self.y, W, self.family, weight=self.weight, intercept=intercept)
        penalty = self.penalties(V) * V
        loss = model.loss.item() / self.total + 0.5 * (penalty * V).sum().item()
        mean = model.grad.double() / self.total
        slopes = mean.clone()
        slopes[: self.X.shape[1]] += self.penalty * W[: self.X.shape[1]]
        slope = (slopes.abs() - self.rounding.reshape(-1, *(1,) * (V.dim() - 1))).max().item()
        return Point(V, loss, without_common(self.coordinates.pull_back(mean) + penalty), slope, model, self)

    def gram(self, curvature: Tensor) -> Tensor:
        """The Hessian of the summed loss of one output, (p, p) float64, from each row's w ℓ″."""
        return self.coordinates.gram(self.X, curvature)

    def squares(self, curvature: Tensor) -> Tensor:
        """The diagonals of the summed loss's Hessian (p, k), from each row's w ℓ″ (n, k)."""
        return self.coordinates.squares(self.X, curvature)

    def null(self, shape: tuple[int, ...]) -> tuple[Tensor, float]:
        """The best V of given shape with an intercept alone, and its loss, which takes no pass over X."""
        V = torch.zeros(shape, dtype=torch.float64)
        classes = shape[-1] if self.family == "softmax" else 1
        mean = torch.cat((self.target_mean, torch.zeros(classes - len(self.target_mean), dtype=torch.float64)))
        # Half a row more than there is, so that the logarithm is finite; counts have a mean, which may be small.
        tiny = torch.finfo(torch.float64).tiny if self.family == "poisson" else 0.5 / self.X.shape[0]
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
        return self.most_moved(widened_chunks(self.X), self.coordinates.weights(direction, self.dtype))

    def most_moved(self, chunks: Iterable[tuple[slice, Tensor]], W: Tensor) -> float:
        """The largest output of W for rows with weight, less what it adds to all outputs of a row."""
        most = 0.0
        for rows, X in chunks:
            moved = X @ W[:-1] + W[-1] if self.coordinates.intercept else X @ W
            if moved.dim() == 2:
                moved = moved - moved.mean(1, keepdim=True)
            if self.weight is not None:
                moved[self.weight[rows] == 0] = 0.0
            most = max(most, moved.abs().max().item())
        return most


def without_common(V: Tensor) -> Tensor:
    """V (p, k) less what all classes have in common, of which softmax sees nothing; V (p,) as it is.

    It is zero at the minimum, and rounding alone leads that way: for want of curvature, far.
    """
    return V - V.mean(1, keepdim=True) if V.dim() == 2 else V


def total_weight(X: Tensor, weight: Tensor | None) -> float:
    """Σ wᵢ over the rows of X in float64; None stands for ones. numpy sums in one order for any number of threads."""
    return float(X.shape[0] if weight is None else weight.numpy().sum(dtype=np.float64))
