"""One set of rows, prepared once for fits of any number of penalties."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep.estimators._far import FarProblem
from onestep.estimators._newton import Minimum, minimise, newton_pays
from onestep.estimators._problem import Problem, total_weight
from onestep.estimators._small import MOST_ELEMENTS, SmallProblem
from onestep.linalg.narrow import FLOAT_NOISE, working_dtype
from onestep.solvers.coordinates import Coordinates
from onestep.solvers.multinomial import OVERSHOOT, DenseRows, Gram, Solution, solve_multinomial

_Found = TypeVar("_Found", Minimum, Solution)


class Path:
    """Rows X (n, d), y and weight of a generalised linear model of given family, and solutions for penalties.

    y is (n,) floats, or for "softmax" class numbers below ``outputs``. ``double``: float32 rows are computed in
    float64, a chunk at a time.
    """

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        family: str,
        weight: Tensor | None,
        *,
        outputs: int,
        intercept: bool,
        double: bool = False,
    ) -> None:
        if weight is not None:
            # Of mean 1, so that their products are in range whatever their scale.
            weight = (weight.double() / (total_weight(X, weight) / len(X))).to(working_dtype(X))
        self.X, self._y, self._family, self._weight, self._outputs = X, y, family, weight, outputs
        self._double = double
        self.coordinates = Coordinates.of(X, weight, intercept=intercept)
        columns = X.shape[1] + intercept
        self.shape = (columns, outputs) if family == "softmax" else (columns,)

    @cached_property
    def _rows(self) -> DenseRows:
        return DenseRows(self.X, self._y, self._weight, self.coordinates, self._outputs, double=self._double)

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
        """The same of float32 rows in float64: of a copy of few elements, of many a chunk at a time; else None."""
        if working_dtype(self.X) != torch.float32 or self._double:
            return None
        few = self.X.numel() <= MOST_ELEMENTS
        weight = None if self._weight is None else self._weight.double() if few else self._weight
        X, y = (self.X.double(), self._y) if few else (self.X, self._y)
        y = y.to(X.dtype) if y.is_floating_point() else y
        return Path(
            X,
            y,
            self._family,
            weight,
            outputs=self._outputs,
            intercept=self.coordinates.intercept,
            double=not few,
        )

    def solve(
        self, penalty: float, start: Tensor | Minimum | Solution | None, *, tol: float, max_iter: int
    ) -> Minimum | Solution:
        """The minimum of the mean loss + ½ penalty ‖W‖², from coefficients W of this shape or the best constant.

        Or from the solution of this path for another penalty: it then ends where slopes are as small as tol says, and
        no further.
        """
        found = self._solve(penalty, start, tol=tol, max_iter=max_iter)
        left = max_iter - found.iterations
        if not found.halted or found.runaway or left <= 0 or self._in_float64 is None:
            return found
        # float32 has no step left that lowers the loss: from here on by float64.
        first, W = found.iterations, self.weights(found)
        found = self._in_float64.solve(penalty, W, tol=tol, max_iter=left)
        V = self.coordinates.invert(self._in_float64.weights(found))
        if isinstance(found, Minimum):
            return replace(found, point=replace(found.point, V=V), iterations=first + found.iterations)
        return replace(found, V=V, iterations=first + found.iterations, found=None)

    def _solve(
        self, penalty: float, start: Tensor | Minimum | Solution | None, *, tol: float, max_iter: int
    ) -> Minimum | Solution:
        V: Tensor | None = None
        if start is not None:
            V = self.coordinates.invert(start) if isinstance(start, Tensor) else start.V
        if self._family == "softmax" and not newton_pays(len(self.X), self.shape):
            solution = solve_multinomial(
                self._rows,
                penalty,
                start if isinstance(start, Solution) else V,
                tol=tol,
                max_iter=max_iter,
                gram=self._gram,
                overshoot=1.0 if isinstance(start, Solution) else OVERSHOOT,
            )
            return self._known(solution, self._rows.dtype)
        X, weight = self._exact
        problem = SmallProblem.of(Problem(X, self._y, self._family, weight, penalty, self.coordinates))
        if not isinstance(problem, SmallProblem):
            problem = FarProblem.in_float64(problem) if self._double else FarProblem.of(problem)
        minimum = minimise(problem, self.shape, V, tol=tol, max_iter=max_iter)
        return self._known(minimum, problem.precision)

    def _known(self, found: _Found, dtype: torch.dtype) -> _Found:
        """As it is, but not converged where the loss is less than float32 makes of it; Poisson's may be negative."""
        if dtype != torch.float32 or self._family == "poisson" or not found.loss <= FLOAT_NOISE:
            return found
        return replace(found, converged=False, halted=True)

    def weights(self, found: Minimum | Solution) -> Tensor:
        """W of a solution, with the intercepts' row last; float64."""
        return self.coordinates.weights(found.V, torch.float64)
