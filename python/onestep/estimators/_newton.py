"""Newton's method for penalised generalised linear models, on as many rows as each part of a step needs.

Loss, gradient and Hessian-vector products are of all rows, a pass over X each. The Hessian that is factored is that of
a sample of the rows, and preconditions conjugate gradients on the full one (Erdogdu and Montanari, "Convergence rates
of sub-sampled Newton methods", 2015; Xu et al., "Newton-type methods under inexact Hessian information", 2020). With
few rows it is the Hessian itself, and a step is a Cholesky solve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onestep.curvature.conjugate_gradient import conjugate_gradient
from onestep.estimators._problem import Point, Problem, without_common
from onestep.linalg import cholesky_solve
from onestep.linalg.spd import factor_with_shift

# Samples of the rows, the larger of these and of so many rows per parameter: the minimum of each is the start on the
# next larger one, and its Hessian, whose error is about √(parameters / rows), the preconditioner there.
_SAMPLES = (32768, 8192)
_ROWS_PER_PARAMETER = 16
# The largest is of an eighth of many rows, as far as its Gram matrix takes less time than a pass over all of them.
_SAMPLE_SHARE = 8
_SAMPLE_WIDTH = 64
# The full problem starts at the sample's minimum, which is a statistical distance off: its squared decrement there is
# about parameters / rows. More digits than a tenth of that would be wasted.
_SAMPLE_DECREMENT = 0.1
_SAMPLE_STEPS = 15

# The Hessian of several classes, a Gram matrix per pair of them, is assembled and factored up to this size.
_LARGEST_HESSIAN = 1024
# What onestep.solvers.multinomial takes instead: iterations, of so many operations each beside the passes; and steps.
# Each of Newton's Gram matrices costs some operations beside its own. With 1,000 rows of 16 features Newton takes three
# quarters of the time for 3 classes, three times as much for 10 and nine times as much for 20. It ends with more digits
# and is taken up to 13.
_FIRST_ORDER_STEPS = 100.0
_FIRST_ORDER_OPERATIONS = 2e7
_NEWTON_STEPS = 8.0
_GRAM_OPERATIONS = 2.5e6
# The Hessian of one output, a single Gram matrix, is factored up to this size; beyond, there is its diagonal.
_LARGEST_GRAM = 1024

# Relative residual of a step; the second where that brings the slopes to the goal.
_CG_TOLERANCE = 0.03
_LAST_CG_TOLERANCE = 0.3
_CG_ITERATIONS = 200
# So many iterations say that the factor is of a Hessian too far away.
_STALE_ITERATIONS = 8

# Steps by the sample's factor alone go on while each lowers the squared decrement by this factor, and until one must be
# halved more often than so: a column that is constant in the sample has no curvature there.
_CONTRACTION = 0.1
_DIRECT_HALVINGS = 2

_SUFFICIENT_DECREASE = 1e-4
_HALVINGS = 29
# A run ends after so many steps in a row that neither lowered the loss by more than so many ε of it nor halved the
# decrement: they move by rounding alone.
_IDLE_STEPS = 3
_ROUNDINGS = 4

# scikit-learn's solvers mostly end well below tol: one step more than it asks for, which squares what is left.
_OVERSHOOT = 0.1
# Slopes say little where the columns of X differ in scale or the loss is nearly zero. A step must also promise to lower
# the loss by less than so many times tol of itself, half the squared Newton decrement (Boyd and Vandenberghe, Convex
# Optimization, 2004, 9.5).
_DECREMENT = 1e-6
# Where the loss falls to zero, as along the intercept of a class without weight, it ends at so many times tol.
_LEAST_SCALE = 0.01
# The decrement by an earlier step's factor, between which and this one the Hessian may have changed.
_DECREMENT_MARGIN = 4.0

# A Newton step that still moves the outputs of some row so far though the slopes are small: the minimum is at infinity.
_RUNAWAY_STEP = 0.1


def newton_pays(n: int, shape: tuple[int, ...]) -> bool:
    """Whether Newton's method with the whole Hessian of all classes is predicted to take less time than first order."""
    size, classes = math.prod(shape), shape[-1]
    grams = _GRAM_OPERATIONS * classes * (classes + 1) / 2
    newton = _NEWTON_STEPS * (n * size**2 / 2 + size**3 / 3 + grams)
    return size <= _LARGEST_HESSIAN and newton <= _FIRST_ORDER_STEPS * (4.0 * n * size + _FIRST_ORDER_OPERATIONS)


@dataclass(frozen=True)
class Minimum:
    """Where Newton's method ended.

    Attributes:
        runaway: there is no minimum, the loss falls for ever along a direction.
        halted: rounding left no further step before the tests were met; ``converged`` is by wider ones then.
    """

    point: Point
    iterations: int
    converged: bool
    runaway: bool = False
    halted: bool = False

    @property
    def V(self) -> Tensor:
        return self.point.V

    @property
    def loss(self) -> float:
        return self.point.loss

    @property
    def slope(self) -> float:
        return self.point.slope


def minimise(problem: Problem, shape: tuple[int, ...], warm: Tensor | None, *, tol: float, max_iter: int) -> Minimum:
    """Minimises until slopes and Newton decrement are small, from ``warm`` or the best constant; V has given shape.

    Where there are rows enough, the minimum of a sample of them is the start, if it is better.
    """
    levels = [problem]
    share = len(problem.X) // (_SAMPLE_SHARE * max(1, math.prod(shape) // _SAMPLE_WIDTH))
    for rows in (max(share, _SAMPLES[0]), *_SAMPLES):
        sample = levels[-1].sampled(max(rows, _ROWS_PER_PARAMETER * math.prod(shape)))
        if sample is not levels[-1]:
            levels.append(sample)
    sample = levels[min(1, len(levels) - 1)]
    start, null_loss = (warm, math.inf) if warm is not None else problem.null(shape)
    start = without_common(start)
    if sample is problem or max_iter == 0:
        return _checked(_newton(problem, sample, problem.at(start), tol, max_iter))
    V, near = start, None
    for smaller, level in itertools.pairwise((levels[-1], *reversed(levels[1:]))):
        least = _SAMPLE_DECREMENT * math.prod(shape) / len(level.X)
        near = _newton(level, smaller, level.at(V), tol, _SAMPLE_STEPS, near=near, least=least).point
        V = near.V
    point = problem.at(V)
    better = point.loss < (null_loss if warm is None else problem.at(start).loss)
    if not better:
        point, near = problem.at(start), None
    return _checked(_newton(problem, sample, point, tol, max_iter, near=near))


def _checked(found: Minimum) -> Minimum:
    """Without a penalty, whether the minimum is one: see ``runaway_step``."""
    unpenalised = found.converged and not found.runaway and found.point.problem.penalty == 0
    return replace(found, runaway=True) if unpenalised and runaway_step(found.point) else found


def _newton(
    problem: Problem,
    sample: Problem,
    point: Point,
    tol: float,
    max_iter: int,
    *,
    near: Point | None = None,
    least: float = 0.0,
) -> Minimum:
    """Newton steps from ``point``; ``near``: the sample there; ``least``: a squared decrement that is small enough."""
    precondition, stale, direct = None, False, sample is not problem
    goal = _OVERSHOOT * tol
    step, decrement = 0, math.inf
    progress = _Progress(torch.finfo(problem.precision).eps)
    while True:
        if not math.isfinite(point.loss):
            return Minimum(point, step, False)
        if problem.is_noise(point.loss):
            break
        level = point.slope <= goal
        target = 2 * _DECREMENT * tol * max(point.scale, _LEAST_SCALE * tol) + problem.decrement_rounding
        if level and precondition is not None and precondition.faithful:
            decrement = (
                _DECREMENT_MARGIN * torch.dot(point.grad.flatten(), precondition.solve(point.grad.flatten())).item()
            )
            if decrement <= target:
                return Minimum(point, step, True)
        if step == max_iter:
            break
        fresh = precondition is None or stale
        if precondition is None or stale:
            precondition = _preconditioner(point if sample is problem else near or sample.at(point.V))
            near, stale = None, False
        tolerance = max(_CG_TOLERANCE, 0.5 * goal / point.slope) if point.slope > goal else _CG_TOLERANCE
        direct = direct and precondition.exact
        if direct:
            # The inverse of a sample's Hessian is off by little: a step by it alone takes a pass, a product another.
            direction, iterations = precondition.solve(-point.grad.flatten()).view_as(point.V), 0
        else:
            direction, iterations = newton_direction(point, precondition, min(_LAST_CG_TOLERANCE, tolerance))
        last, decrement = decrement, -torch.dot(point.grad.flatten(), direction.flatten()).item()
        contracts = decrement <= _CONTRACTION * last
        if least and decrement <= least:
            return Minimum(point, step, True)
        # A sample says less of the decrement than the full Hessian: what it may say is asked above, with a margin.
        if level and not direct:
            if decrement <= target:
                return Minimum(point, step, True)
            # All slopes of rare counts are small, and those in W of columns of small values, wherever they are taken.
            small = point.grad.abs().max().item() <= goal * (point.scale if problem.family == "poisson" else 1.0)
            if problem.penalty == 0 and small and problem.movement(direction) > _RUNAWAY_STEP:
                return Minimum(point, step, True, runaway=True)
        if not direct and progress.has_ended(point.loss, decrement):
            break
        found = _line_search(problem, point, direction, _DIRECT_HALVINGS if direct else _HALVINGS)
        if found is None and direct:
            direct, decrement = False, last
            continue
        if found is None and fresh:
            break
        direct = direct and contracts
        stale = found is None or sample is problem or iterations > _STALE_ITERATIONS
        point = found or point
        step += found is not None
    # The best that the precision of X allows, or that max_iter does.
    close = point.slope <= tol and decrement <= 2 * tol * max(point.scale, _LEAST_SCALE * tol)
    return Minimum(point, step, close, halted=step < max_iter and problem.precision == torch.float32)


class _Progress:
    """Whether steps still lower the loss by more than rounding, or shrink the decrement.

    Steps that rounding alone decides would be accepted for ever.
    """

    def __init__(self, eps: float) -> None:
        self._eps, self._loss, self._decrement, self._idle = eps, math.inf, math.inf, 0

    def has_ended(self, loss: float, decrement: float) -> bool:
        lower = loss < self._loss - _ROUNDINGS * self._eps * abs(loss)
        nearer = decrement < 0.5 * self._decrement
        self._idle = 0 if lower or nearer else self._idle + 1
        self._loss, self._decrement = min(self._loss, loss), min(self._decrement, decrement)
        return self._idle >= _IDLE_STEPS


def _line_search(problem: Problem, point: Point, direction: Tensor, halvings: int) -> Point | None:
    """The first of the full step, its half, ... that lowers the loss enough (Armijo 1966); None if none does."""
    slope = torch.dot(point.grad.flatten(), direction.flatten()).item()
    rounding = 4 * torch.finfo(problem.precision).eps * abs(point.loss)
    length = 1.0
    for _ in range(halvings + 1):
        trial = problem.at(point.V + length * direction)
        if trial.loss <= point.loss + _SUFFICIENT_DECREASE * length * slope + rounding:
            return trial
        length /= 2
    return None


@dataclass(frozen=True)
class _Preconditioner:
    """An approximate inverse of the Hessian on flat float64 vectors.

    ``exact``: it is the whole Hessian of its rows; ``faithful``: at least it has all of the couplings.
    """

    solve: Callable[[Tensor], Tensor]
    exact: bool
    faithful: bool
    problem: Problem


def newton_direction(point: Point, precondition: _Preconditioner, tolerance: float) -> tuple[Tensor, int]:
    """-H⁻¹g, and the conjugate-gradient iterations it took (0 by a Cholesky solve)."""
    b = -point.grad.flatten()
    if precondition.exact and precondition.problem is point.problem:
        return precondition.solve(b).view_as(point.V), 0
    solved = conjugate_gradient(
        lambda v: point.product(v.view_as(point.V)).flatten(),
        b,
        precondition=precondition.solve,
        tolerance=tolerance,
        max_iterations=_CG_ITERATIONS,
    )
    return solved.x.view_as(point.V), solved.iterations


def _preconditioner(point: Point) -> _Preconditioner:
    problem, V = point.problem, point.V
    columns = V[:, None] if V.dim() == 1 else V
    penalties = problem.penalties(columns).expand_as(columns)
    if columns.shape[1] > 1:
        L, scale = _factor(_hessian(point, columns) / problem.total, penalties.flatten(), problem.precision)

        def solve(v: Tensor) -> Tensor:
            solution = scale * cholesky_solve((v * scale)[:, None], L)[:, 0]
            return without_common(solution.view_as(columns)).flatten()

        return _Preconditioner(solve, True, True, problem)
    curvature = point.model.diagonal_curvature()
    if V.numel() <= _LARGEST_GRAM:
        L, scale = _factor(problem.gram(curvature[:, 0]) / problem.total, penalties.flatten(), problem.precision)
        return _Preconditioner(lambda v: scale * cholesky_solve((v * scale)[:, None], L)[:, 0], True, True, problem)
    diagonal = (problem.squares(curvature) / problem.total + penalties).flatten()
    # A feature that is zero in the sample: whatever scale the others have.
    diagonal = diagonal.clamp_min(diagonal.mean().item() * 1e-6 + torch.finfo(torch.float64).tiny)
    return _Preconditioner(lambda v: v / diagonal, False, False, problem)


def _hessian(point: Point, columns: Tensor) -> Tensor:
    """The Hessian of the summed loss (p k, p k), in the order of V's elements."""
    problem, (p, k) = point.problem, columns.shape
    H = torch.empty(p, k, p, k, dtype=torch.float64)
    diagonal, P = point.model.diagonal_curvature(), point.model.output_curvature()
    for c in range(k):
        H[:, c, :, c] = problem.gram(diagonal[:, c])
        for b in range(c + 1, k):
            weight = P[:, c] * P[:, b] if problem.weight is None else P[:, c] * P[:, b] * problem.weight
            H[:, c, :, b] = H[:, b, :, c] = -problem.gram(weight)
    return H.view(p * k, p * k)


def _factor(H: Tensor, penalties: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cholesky factors L of S(H + diag(penalties))S, S = diag(scale) making its diagonal 1, and scale.

    The diagonal is raised as far as the rounding of H (made in `precision`), or directions in which nothing bends
    (dependent features, the common shift of softmax), demand.
    """
    diagonal = H.diagonal() + penalties
    # An output that no row bends any more: in units of the others.
    least = max(diagonal.max().item() * 1e-16, torch.finfo(torch.float64).tiny)
    scale = diagonal.clamp_min(least).rsqrt()
    scaled = H * scale[:, None] * scale
    scaled.diagonal().add_(penalties * scale.square())
    return factor_with_shift(scaled, 0.01 * max(torch.finfo(precision).eps, 1e-12))[0], scale


def runaway_step(point: Point) -> bool:
    """Whether one more Newton step would still move the outputs of some row by much.

    Near a minimum that is little. Where a plane separates the classes, or the counts of a category are all zero, there
    is no minimum: the loss falls like e⁻ᵗ, and every step is one of about 1, however small the slopes have become.
    """
    step, _ = newton_direction(point, _preconditioner(point), _CG_TOLERANCE)
    return point.problem.movement(step) > _RUNAWAY_STEP
