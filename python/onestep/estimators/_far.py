"""The objective on float32 rows whose products keep too few digits: centred, in float64, a chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep.estimators._chunked import CentredPoint
from onestep.estimators._problem import Point, Problem, without_common
from onestep.linalg import gram
from onestep.linalg.narrow import row_chunks
from onestep.solvers.coordinates import Coordinates

# Means beyond so many standard deviations: float32 moves a slope by 1e-4 of them.
_FAR = 256.0


@dataclass(frozen=True)
class FarProblem(Problem):
    """`Problem` whose rows lose their means a chunk at a time, in float64."""

    @staticmethod
    def of(problem: Problem) -> Problem:
        """The same problem, or ``problem`` itself where float32 is good enough, or nothing may be taken off."""
        coordinates = problem.coordinates
        far = (coordinates.shift.abs() > _FAR * coordinates.scale).numpy().any()
        if problem.dtype != torch.float32 or not coordinates.intercept or not far:
            return problem
        return FarProblem.in_float64(problem)

    @staticmethod
    def in_float64(problem: Problem) -> Problem:
        """The same problem; without an intercept nothing is taken off."""
        weight = None if problem.weight is None else problem.weight.double()
        y = problem.y.double() if problem.y.is_floating_point() else problem.y
        return FarProblem(problem.X, y, problem.family, weight, problem.penalty, problem.coordinates)

    @property
    def precision(self) -> torch.dtype:
        """Of the centred rows."""
        return torch.float64

    @cached_property
    def model_coordinates(self) -> Coordinates:
        """Of the centred rows: the scales alone."""
        return replace(self.coordinates, shift=torch.zeros_like(self.coordinates.shift))

    def at(self, V: Tensor) -> Point:
        W, d = self.model_coordinates.weights(V, torch.float64), self.X.shape[1]
        shift, intercept = self.coordinates.shift, self.coordinates.intercept
        model = CentredPoint(self.X, self.y, W, self.family, self.weight, shift, intercept=intercept)
        penalty = self.penalties(V) * V
        loss = model.loss.item() / self.total + 0.5 * (penalty * V).sum().item()
        mean = model.grad / self.total
        shape = (-1, *(1,) * (V.dim() - 1))
        slopes = mean.clone()
        slopes[:d] += self.coordinates.shift.reshape(shape) * mean[-1] + self.penalty * W[:d]
        slope = (slopes.abs() - self.rounding.reshape(shape)).max().item()
        gradient = without_common(self.model_coordinates.pull_back(mean) + penalty)
        return Point(V, loss, gradient, slope, model, self)

    def gram(self, curvature: Tensor) -> Tensor:
        """The Hessian of the summed loss of one output, (p, p) float64, from each row's w ℓ″."""
        total = torch.zeros(1, 1, dtype=torch.float64)
        for rows in row_chunks(*self.X.shape):
            z = (self.X[rows].double() - self.coordinates.shift) / self.coordinates.scale
            if self.coordinates.intercept:
                z = torch.cat((z, z.new_ones(len(z), 1)), 1)
            if self.weight is not None:
                # Rows of no weight may hold anything.
                z[self.weight[rows] == 0] = 0.0
            total = total + gram(z, weight=curvature[rows].double())[0]
        return total

    def movement(self, direction: Tensor) -> float:
        """How far a step moves the outputs of any row with weight."""
        shift = self.coordinates.shift
        chunks = ((rows, self.X[rows].double() - shift) for rows in row_chunks(*self.X.shape))
        return self.most_moved(chunks, self.model_coordinates.weights(direction, torch.float64))
