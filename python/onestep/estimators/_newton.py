"""Newton's method for penalised generalised linear models, on as many rows as each part of a step needs.

Minimises f(W) = Σ wᵢ ℓ(xᵢW, yᵢ) / Σ wᵢ + ½ penalty ‖W‖² (without the intercept's row). Loss, gradient and
Hessian-vector products are of all rows, a pass over X each; the Hessian that is factored is that of enough rows to come
near, and preconditions conjugate gradients on the full one (Erdogdu and Montanari, "Convergence rates of sub-sampled
Newton methods", 2015; Xu et al., "Newton-type methods under inexact Hessian information", 2020). With few rows it is
the Hessian itself, and a step is a Cholesky solve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from onestep.curvature import GLMPoint, glm
from onestep.curvature._conjugate_gradient import conjugate_gradient
from onestep.linalg import cholesky_ex, cholesky_solve

# Samples of the rows, the larger of these and of so many rows per parameter: the minimum of each is the start on the
# next larger one, and its Hessian, whose error is about √(parameters / rows), the preconditioner there.
_SAMPLES = (32768, 8192)
_ROWS_PER_PARAMETER = 16
# The full problem starts at the sample's minimum, which is a statistical distance off: digits would be wasted on it.
_SAMPLE_TOLERANCE = 1e-3
_SAMPLE_STEPS = 15

# The whole Hessian is factored up to the first size, for softmax a Gram matrix per pair of classes; its block for each
# column of W up to the second; beyond, there is its diagonal.
_LARGEST_HESSIAN = 256
_LARGEST_BLOCK = 1024

# Relative residual of a step; the second where that brings the slopes to the goal.
_CG_TOLERANCE = 0.03
_LAST_CG_TOLERANCE = 0.3
_CG_ITERATIONS = 200
# So many iterations say that the factor is of a Hessian too far away.
_STALE_ITERATIONS = 8

_SUFFICIENT_DECREASE = 1e-4
_HALVINGS = 30

# Peers mostly end well below the tolerance: one step more than it asks for, which squares what is left.
_OVERSHOOT = 0.1


def _loss_at_zero(family: str, W: Tensor) -> float:
    """ℓ at η = 0, which takes no pass over the rows."""
    return 1.0 if family == "poisson" else math.log(W.shape[-1] if family == "softmax" else 2)


def total_weight(X: Tensor, weight: Tensor | None) -> float:
    """Σ wᵢ over the rows of X, in float64; None stands for ones."""
    return X.shape[0] if weight is None else weight.sum(dtype=torch.float64).item()


@dataclass(frozen=True)
class Point:
    """f, its gradient and its Hessian-vector product at W."""

    W: Tensor
    loss: float
    grad: Tensor
    model: GLMPoint
    problem: Problem

    def product(self, V: Tensor) -> Tensor:
        return self.problem.penalised(self.model.hvp(V), V)

    @property
    def largest_slope(self) -> float:
        return self.grad.abs().max().item()


@dataclass(frozen=True)
class Problem:
    """The rows, the family and the penalty."""

    X: Tensor
    y: Tensor
    family: str
    weight: Tensor | None
    penalty: float
    intercept: bool

    @cached_property
    def total(self) -> float:
        return total_weight(self.X, self.weight)

    def penalised(self, summed: Tensor, V: Tensor) -> Tensor:
        """A sum over the rows as a mean, plus the penalty's part."""
        result = summed / self.total
        end = -1 if self.intercept else None
        result[:end] += self.penalty * V[:end]
        return result

    def at(self, W: Tensor) -> Point:
        model = glm(self.X, self.y, W, self.family, weight=self.weight, intercept=self.intercept)
        weights = W[:-1] if self.intercept else W
        loss = model.loss.item() / self.total + 0.5 * self.penalty * weights.double().square().sum().item()
        return Point(W, loss, self.penalised(model.grad, W), model, self)

    def sampled(self, rows: int) -> Problem:
        """Every so manieth row, or the problem itself where that would spare little."""
        step = self.X.shape[0] // rows
        if step < 3:
            return self
        sample = replace(
            self, X=self.X[::step], y=self.y[::step], weight=None if self.weight is None else self.weight[::step]
        )
        return sample if sample.total > 0 else self


@dataclass(frozen=True)
class Minimum:
    """Where Newton's method ended."""

    point: Point
    steps: int
    converged: bool


def minimise(problem: Problem, W: Tensor, *, tol: float, max_iter: int, warm: bool) -> Minimum:
    """Minimises from W until no slope exceeds tol.

    Where there are rows enough, the minimum of a sample of them is the start, unless W is better. ``warm``: W is not 0,
    so that its loss has to be computed.
    """
    levels = [problem]
    for rows in _SAMPLES:
        sample = levels[-1].sampled(max(rows, _ROWS_PER_PARAMETER * W.numel()))
        if sample is not levels[-1]:
            levels.append(sample)
    sample = levels[min(1, len(levels) - 1)]
    if sample is problem or max_iter == 0:
        return _newton(problem, sample, problem.at(W), tol, max_iter)
    start, smaller = W, levels[-1]
    for level in reversed(levels[1:]):
        start = _newton(level, smaller, level.at(start), _SAMPLE_TOLERANCE, _SAMPLE_STEPS).point.W
        smaller = level
    near = problem.at(start)
    better = near.loss < (problem.at(W).loss if warm else _loss_at_zero(problem.family, W))
    return _newton(problem, sample, near if better else problem.at(W), tol, max_iter)


def _newton(problem: Problem, sample: Problem, point: Point, tol: float, max_iter: int) -> Minimum:
    precondition, goal = None, _OVERSHOOT * tol
    for step in range(max_iter):
        if not math.isfinite(point.loss) or point.largest_slope <= goal:
            return Minimum(point, step, math.isfinite(point.loss))
        fresh = precondition is None
        if precondition is None:
            precondition = _preconditioner(point if sample is problem else sample.at(point.W))
        tolerance = min(_LAST_CG_TOLERANCE, max(_CG_TOLERANCE, 0.5 * goal / point.largest_slope))
        direction, iterations = newton_direction(point, precondition, tolerance)
        found = _line_search(problem, point, direction)
        if found is None and fresh:
            return Minimum(point, step, point.largest_slope <= tol)
        if found is None or sample is problem or iterations > _STALE_ITERATIONS:
            precondition = None
        point = found or point
    return Minimum(point, max_iter, point.largest_slope <= tol)


def _line_search(problem: Problem, point: Point, direction: Tensor) -> Point | None:
    """The first of the full step, its half, ... that lowers the loss enough (Armijo 1966); None if none does."""
    slope = torch.dot(point.grad.flatten(), direction.flatten()).item()
    rounding = 4 * torch.finfo(point.W.dtype).eps * abs(point.loss)
    length = 1.0
    for _ in range(_HALVINGS):
        trial = problem.at(point.W + length * direction)
        if trial.loss <= point.loss + _SUFFICIENT_DECREASE * length * slope + rounding:
            return trial
        length /= 2
    return None


@dataclass(frozen=True)
class _Preconditioner:
    """An approximate inverse of the Hessian on flat vectors; ``exact`` if it is the whole Hessian of its rows."""

    solve: Callable[[Tensor], Tensor]
    exact: bool
    problem: Problem


def newton_direction(point: Point, precondition: _Preconditioner, tolerance: float) -> tuple[Tensor, int]:
    """-H⁻¹g, and the conjugate-gradient iterations it took (0 by a Cholesky solve)."""
    b = -point.grad.flatten()
    if precondition.exact and precondition.problem is point.problem:
        return precondition.solve(b).view_as(point.W), 0
    solved = conjugate_gradient(
        lambda v: point.product(v.view_as(point.W)).flatten(),
        b,
        precondition=precondition.solve,
        tolerance=tolerance,
        max_iterations=_CG_ITERATIONS,
    )
    return solved.x.view_as(point.W), solved.iterations


def _preconditioner(point: Point) -> _Preconditioner:
    problem, W = point.problem, point.W
    columns = W[:, None] if W.dim() == 1 else W
    penalties = torch.full_like(columns, problem.penalty, dtype=torch.float64)
    if problem.intercept:
        penalties[-1] = 0
    if W.numel() <= _LARGEST_HESSIAN:
        L = _factor(point.model.gram().double() / problem.total, penalties.flatten())
        return _Preconditioner(lambda v: cholesky_solve(v.double()[:, None], L)[:, 0].to(v.dtype), True, problem)
    if columns.shape[0] <= _LARGEST_BLOCK:
        L = _factor(point.model.gram_blocks().double() / problem.total, penalties.mT)

        def solve_blocks(v: Tensor) -> Tensor:
            blocks = v.double().view(columns.shape).mT[..., None]
            return cholesky_solve(blocks, L)[..., 0].mT.reshape(-1).to(v.dtype)

        return _Preconditioner(solve_blocks, False, problem)
    diagonal = point.model.gram_diagonal().flatten() / problem.total + penalties.flatten().to(W.dtype)
    # A feature that is zero in the sample: whatever scale the others have.
    diagonal = diagonal.clamp_min(diagonal.mean().item() * 1e-6 + torch.finfo(W.dtype).tiny)
    return _Preconditioner(lambda v: v / diagonal, False, problem)


def _factor(H: Tensor, penalties: Tensor) -> Tensor:
    """The Cholesky factor of H + diag(penalties), each raised as far as H's rounding, or directions in which nothing
    bends (dependent features, the common shift of softmax), demand."""
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    scale = (diagonal + penalties).mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    raised = 1e-10
    while True:
        L, info = cholesky_ex(H + torch.diag_embed(penalties + raised * scale))
        if not info.any() or raised > 1:
            return L
        raised *= 100


def separating_step(point: Point) -> float:
    """How far one more Newton step would move the outputs of any row.

    Near a minimum that is little. Where a plane separates the classes there is none: the loss falls like e⁻ᵗ along it,
    and every step is one of about 1, however small the slopes have become.
    """
    step, _ = newton_direction(point, _preconditioner(point), _CG_TOLERANCE)
    X = point.problem.X
    moved = X @ step[:-1] + step[-1] if point.problem.intercept else X @ step
    if moved.dim() == 2:
        moved = moved - moved.mean(1, keepdim=True)
    return moved.abs().max().item()
