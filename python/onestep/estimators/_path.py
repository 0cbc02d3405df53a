"""One set of rows, prepared once for fits of any number of penalties."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep.estimators._far import FarProblem
from onestep.estimators._newton import Minimum, minimise, newton_pays
from onestep.estimators._problem import Problem, total_weight
from onestep.estimators._small import MOST_ELEMENTS, SmallProblem
from onestep.linalg.narrow import working_dtype
from onestep.solvers.coordinates import Coordinates
from onestep.solvers.multinomial import DenseRows, Gram, Solution, solve_multinomial


class Path:
    """Rows X (n, d), y and weight of a generalised linear model of given family, and solutions for penalties.

    y is (n,) floats, or for "softmax" class numbers below ``outputs``.
    """

    def __init__(
        self, X: Tensor, y: Tensor, family: str, weight: Tensor | None, *, outputs: int, intercept: bool
    ) -> None:
        if weight is not None:
            # Of mean 1, so that their products are in range whatever their scale.
            weight = (weight.double() / (total_weight(X, weight) / len(X))).to(working_dtype(X))
        self.X, self._y, self._family, self._weight, self._outputs = X, y, family, weight, outputs
        self.coordinates = Coordinates.of(X, weight, intercept=intercept)
        columns = X.shape[1] + intercept
        self.shape = (columns, outputs) if family == "softmax" else (columns,)

    @cached_property
    def _rows(self) -> DenseRows:
        return DenseRows(self.X, self._y, self._weight, self.coordinates, self._outputs)

    @cached_property
    def _gram(self) -> Gram:
        return Gram.of(self._rows)

    @cached_property
    def _loses_digits(self) -> bool:
        """Whether X is so far from zero, for its spread, that float32 costs the scores of several classes digits.

        Of few elements: the others are read as they are.
        """
        if self._family != "softmax" or self.X.numel() > MOST_ELEMENTS or working_dtype(self.X) != torch.float32:
            return False
        # Without an intercept nothing is taken off, and whether columns are far from zero is not known.
        return self._rows.far or not self.coordinates.intercept

    @cached_property
    def _exact(self) -> tuple[Tensor, Tensor | None]:
        """X and weight for Newton's method, in float64 where float32 loses digits."""
        if not self._loses_digits:
            return self.X, self._weight
        return self.X.double(), None if self._weight is None else self._weight.double()

    @cached_property
    def _in_float64(self) -> Path | None:
        """The same on a float64 copy of float32 rows of several classes, of few elements; None for others."""
        if self._family != "softmax" or self.X.numel() > MOST_ELEMENTS or working_dtype(self.X) != torch.float32:
            return None
        weight = None if self._weight is None else self._weight.double()
        intercept = self.coordinates.intercept
        return Path(self.X.double(), self._y, self._family, weight, outputs=self._outputs, intercept=intercept)

    def solve(self, penalty: float, start: Tensor | None, *, tol: float, max_iter: int) -> Minimum | Solution:
        """The minimum of the mean loss + ½ penalty ‖W‖², from coefficients W of this shape or the best constant."""
        found = self._solve(penalty, start, tol=tol, max_iter=max_iter)
        left = max_iter - found.iterations
        if found.converged or found.runaway or left <= 0 or self._in_float64 is None:
            return found
        # float32 has no step left that lowers the loss: from here on by float64.
        first, W = found.iterations, self.weights(found)
        found = self._in_float64.solve(penalty, W, tol=tol, max_iter=left)
        V = self.coordinates.invert(self._in_float64.weights(found))
        if isinstance(found, Minimum):
            return replace(found, point=replace(found.point, V=V), iterations=first + found.iterations)
        return replace(found, V=V, iterations=first + found.iterations)

    def _solve(self, penalty: float, start: Tensor | None, *, tol: float, max_iter: int) -> Minimum | Solution:
        V = None if start is None else self.coordinates.invert(start)
        if self._family == "softmax" and not newton_pays(len(self.X), self.shape):
            solution = solve_multinomial(self._rows, penalty, V, tol=tol, max_iter=max_iter, gram=self._gram)
            return replace(solution, converged=solution.converged and self._is_known(solution, self._rows.dtype))
        X, weight = self._exact
        problem = SmallProblem.of(Problem(X, self._y, self._family, weight, penalty, self.coordinates))
        problem = problem if isinstance(problem, SmallProblem) else FarProblem.of(problem)
        found = minimise(problem, self.shape, V, tol=tol, max_iter=max_iter)
        return replace(found, converged=found.converged and self._is_known(found, problem.precision))

    def _is_known(self, found: Minimum | Solution, dtype: torch.dtype) -> bool:
        """Whether what is left to gain shows: float32 rounds each row's loss to ε, and a mean under that is noise.

        A Poisson loss may be negative.
        """
        return dtype != torch.float32 or self._family == "poisson" or not found.loss <= torch.finfo(dtype).eps

    def weights(self, found: Minimum | Solution) -> Tensor:
        """W of a solution, with the intercepts' row last; float64."""
        return self.coordinates.weights(found.V, torch.float64)
