"""Minimises mean multinomial loss + ½ Σ penalty_j ‖V_j‖², by preconditioned L-BFGS.

A pass over the rows (loss and gradient: two matrix products) is all that an iteration costs. L-BFGS (Liu and Nocedal,
Mathematical Programming 45, 1989) starts each iteration from the inverse of spread · ZᵀZ/n + penalty, one Cholesky
factorisation for all classes, spread being the mean of p(1 - p), for an intercept that of its own class. What makes
features badly conditioned is in there, and what is left to learn in a few pairs is how the probabilities vary. A factor
for each class, with its own mean of p(1 - p), is the better start and the worse end; Newton's method with conjugate
gradients takes 1.3 to 3 times the passes, as each step forgets what the last one learnt
(docs/decisions/0018-multinomial-solver.md).

Early iterations run on samples of the rows, whose pairs stay, and in float32 where X is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onestep.linalg import cholesky_ex, cholesky_solve
from onestep.solvers.multinomial.rows import Evaluation, Rows

# Pairs that L-BFGS keeps.
_PAIRS = 10
# Samples: each has a quarter of the rows of the next, down to so many per class and per parameter, and ends where half
# the squared Newton decrement is below so much of the loss. With 0.6 rows per parameter they cost more than they save.
_SAMPLE_STEP = 4
_SAMPLE_ROWS_PER_CLASS = 32
_SAMPLE_ROWS_PER_PARAMETER = 2
_SAMPLE_DECREMENT = 1e-2
_SAMPLE_STEPS = 50
# float32 is left where the decrement is so small against the loss, at the latest.
_FLOAT_DECREMENT = 1e-10
# The factor of the Gram matrix may cost so many passes, and its rows are so many per feature at least.
_FACTOR_PASSES = 8.0
_GRAM_ROWS_PER_FEATURE = 4
_LARGEST_FACTOR = 8192
# Where all probabilities are 0 or 1 there is no spread to divide by.
_LEAST_SPREAD = 1e-8
# An intercept has no penalty and is divided by its own class's spread, at least so much of their mean.
_LEAST_SHARE = 1e-2
# The factor is made anew where the spread has changed by this factor.
_SPREAD_CHANGE = 2.0

# Wolfe's conditions, and the most evaluations of a line search.
_SUFFICIENT_DECREASE = 1e-4
_CURVATURE = 0.9
_TRIALS = 40

# scikit-learn's solvers mostly end well below tol.
_OVERSHOOT = 0.1
# Half the squared Newton decrement must be below so many times tol of the loss, or of tol where the loss goes to zero.
_DECREMENT = 0.03
_LEAST_SCALE = 0.01
# A step that still moves the scores of some row so far though the slopes are small: the minimum is at infinity.
_RUNAWAY_STEP = 0.1


@dataclass(frozen=True)
class Solution:
    """Where the solver ended.

    Attributes:
        V: (p, k) float64.
        loss: the objective there.
        slope: its largest slope in W.
        iterations: over all rows.
        passes: over the rows, those over samples in proportion.
        converged: whether slopes and Newton decrement are as small as asked for.
        runaway: there is no minimum: without a penalty the loss falls for ever along a direction.
    """

    V: Tensor
    loss: float
    slope: float
    iterations: int
    passes: float
    converged: bool
    runaway: bool


@dataclass
class _Point:
    V: Tensor
    loss: float
    gradient: Tensor
    slope: float
    spreads: Tensor


class _Objective:
    """The rows with the penalty (p, 1), counting passes in units of all rows."""

    def __init__(self, rows: Rows, penalty: Tensor, all_rows: int) -> None:
        self.rows, self.penalty, self.precise = rows, penalty, not rows.mixed
        self.passes, self._share = 0.0, rows.count / all_rows
        self._slope_rounding = rows.coordinates.rounding(rows.dtype)[:, None]
        # Columns far from zero cost the scores digits.
        self._far = 1.0 + (rows.coordinates.shift.abs() / rows.coordinates.scale).max().item()

    def at(self, V: Tensor) -> _Point:
        found: Evaluation = self.rows.evaluate(V, precise=self.precise)
        self.passes += self._share
        pull = self.penalty * V
        slopes = found.slopes + self.rows.coordinates.push_forward(pull)
        loss = found.loss + 0.5 * _dot(pull, V)
        slope = (slopes.abs() - self._slope_rounding).max().item()
        return _Point(V, loss, found.gradient + pull, slope, found.spreads)

    @property
    def unpenalised(self) -> bool:
        return not self.penalty.numpy().any()

    @property
    def rounding(self) -> float:
        """Of the loss, relatively."""
        return 4.0 * torch.finfo(self.rows.dtype if self.precise else torch.float32).eps * self._far


def solve_multinomial(
    rows: Rows, penalty: float, start: Tensor | None, *, tol: float, max_iter: int, gram: Gram | None = None
) -> Solution:
    """Minimises Σ wᵢ ℓ(xᵢW, yᵢ) / Σ wᵢ + ½ penalty ‖W‖², the intercept's row being free, over V.

    Args:
        rows: the data.
        penalty: >= 0.
        start: V (p, k) float64, or None for the best constant scores.
        tol: ends where no slope in W exceeds a tenth of it and the step promises next to nothing.
        max_iter: most iterations over all rows.
        gram: what `Gram.of(rows)` gave, where several penalties share it.

    Returns:
        The solution; its loss is NaN or infinite where X is, or is too large for its type.
    """
    coordinates = rows.coordinates
    penalties = penalty / coordinates.scale.square()
    if coordinates.intercept:
        penalties = torch.cat((penalties, penalties.new_zeros(1)))
    memory = _Memory(rows, penalties, gram or Gram.of(rows))
    objective = _Objective(rows, penalties[:, None], rows.count)
    point = _start(objective, memory, max_iter) if start is None else objective.at(start)
    point, iterations, converged = _lbfgs(objective, point, memory, tol, 0.0, max_iter)
    passes = objective.passes
    small = penalty == 0 and math.isfinite(point.loss) and point.slope <= tol
    runaway = small and rows.movement(memory.direction(point)) > _RUNAWAY_STEP
    return Solution(point.V, point.loss, point.slope, iterations, passes, converged, runaway)


def _start(objective: _Objective, memory: _Memory, max_iter: int) -> _Point:
    """The minimum of a sample, where it is better than the best constant scores."""
    rows = objective.rows
    constant = torch.zeros(len(objective.penalty), rows.classes, dtype=torch.float64)
    shares = rows.shares
    if rows.coordinates.intercept:
        constant[-1] = shares.clamp_min(0.5 / rows.count).log()
    levels = _samples(rows) if max_iter > 0 else []
    if not levels:
        return objective.at(constant)
    V = constant
    for level in levels:
        sampled = _Objective(level, objective.penalty, rows.count)
        V = _lbfgs(sampled, sampled.at(V), memory, 0.0, _SAMPLE_DECREMENT, _SAMPLE_STEPS)[0].V
        objective.passes += sampled.passes
    point = objective.at(V)
    constant_loss = (constant[-1].logsumexp(0) - shares @ constant[-1]).item()
    if point.loss <= constant_loss:
        return point
    memory.forget()
    return objective.at(constant)


def _samples(rows: Rows) -> list[Rows]:
    """Smaller and smaller samples, the smallest first, as long as each class has its share of them."""
    parameters = rows.classes * len(rows.coordinates.scale)
    least = max(_SAMPLE_ROWS_PER_CLASS * rows.classes, _SAMPLE_ROWS_PER_PARAMETER * parameters)
    found: list[Rows] = []
    step = _SAMPLE_STEP
    while rows.count // step >= least:
        sample = rows.sampled(step)
        if sample is None or not _alike(sample, rows):
            break
        found.insert(0, sample)
        step *= _SAMPLE_STEP
    return found


def _alike(sample: Rows, rows: Rows) -> bool:
    """Whether no class is twice as frequent in a sample, or half as frequent, beyond what chance may do."""
    expected, found = rows.shares * sample.count, sample.shares * sample.count
    return bool(((found - expected).abs() <= 0.5 * expected + 4 * (expected + 1).sqrt()).all())


def _lbfgs(
    objective: _Objective, point: _Point, memory: _Memory, tol: float, decrement: float, max_iter: int
) -> tuple[_Point, int, bool]:
    """Ends at a decrement of so much of the loss, or where ``tol`` says so."""
    step = 0
    while math.isfinite(point.loss):
        direction = memory.direction(point)
        slope = _dot(point.gradient, direction)
        scale = min(1.0, point.loss)
        half = -0.5 * slope
        if half <= decrement * scale:
            return point, step, True
        done = point.slope <= _OVERSHOOT * tol and half <= _DECREMENT * tol * max(scale, _LEAST_SCALE * tol)
        if not objective.precise and (done or half <= _FLOAT_DECREMENT * scale):
            objective.precise = True
            point = objective.at(point.V)
            continue
        if done:
            return point, step, True
        level = point.slope <= _OVERSHOOT * tol and objective.unpenalised
        if level and objective.rows.movement(direction) > _RUNAWAY_STEP:
            return point, step, False
        if step == max_iter:
            break
        found = _line_search(objective, point, direction, slope)
        if found is None:
            if memory.forget():
                continue
            if not objective.precise:
                objective.precise = True
                point = objective.at(point.V)
                continue
            break
        memory.add(found.V - point.V, found.gradient - point.gradient)
        point = found
        step += 1
    scale = max(min(1.0, point.loss), _LEAST_SCALE * tol)
    good = math.isfinite(point.loss) and point.slope <= tol
    return point, step, good and memory.decrement(point) <= 2 * tol * scale


def _line_search(objective: _Objective, point: _Point, direction: Tensor, slope: float) -> _Point | None:
    """A step that satisfies Wolfe's conditions, where rounding lets them be seen; None if there is none.

    The loss is convex along the line, so that a secant of its slopes finds the next trial.
    """
    if not slope < 0:
        return None
    low, high, length = 0.0, math.inf, 1.0
    low_slope = slope
    for _ in range(_TRIALS):
        trial = objective.at(point.V + length * direction)
        trial_slope = _dot(trial.gradient, direction) if math.isfinite(trial.loss) else math.inf
        falls = trial.loss <= point.loss + _SUFFICIENT_DECREASE * length * slope
        # Where rounding hides the decrease, slopes show it (Hager and Zhang, SIAM J. Optim. 16, 2005).
        level = trial.loss <= point.loss + objective.rounding * abs(point.loss) and trial_slope <= -0.8 * slope
        if (falls or level) and trial_slope >= _CURVATURE * slope:
            return trial
        bends = trial_slope > low_slope
        secant = low + (length - low) * low_slope / (low_slope - trial_slope) if bends else math.inf
        if falls and trial_slope < 0:
            low, low_slope = length, trial_slope
            length = min(max(secant, 2 * length), 10 * length) if math.isinf(high) else 0.5 * (low + high)
        else:
            high = length
            length = min(max(secant, low + 0.1 * (high - low)), low + 0.7 * (high - low))
    return None


@dataclass(frozen=True)
class Gram:
    """ZᵀZ/n, where it and its factor cost less than they save, and its diagonal; the same for all penalties."""

    matrix: Tensor | None
    diagonal: Tensor

    @staticmethod
    def of(rows: Rows) -> Gram:
        """Of all rows, or of a sample if need be."""
        n, d, k = rows.count, len(rows.coordinates.scale), rows.classes
        budget = _FACTOR_PASSES * 4.0 * rows.operations * k
        fitting = int((budget - d**3 / 3.0) / d**2)
        if d > _LARGEST_FACTOR or fitting < min(n, _GRAM_ROWS_PER_FEATURE * d):
            return Gram(None, rows.squares())
        matrix = rows.gram(max(1, n // fitting))
        return Gram(matrix, matrix.diagonal())


class _Memory:
    """Pairs of steps and changes of the gradient, over the inverse of spread · ZᵀZ/n + penalties."""

    def __init__(self, rows: Rows, penalties: Tensor, gram: Gram) -> None:
        self._penalties = penalties
        self._pairs: list[tuple[Tensor, Tensor, float]] = []
        self._gram, self._squares = gram.matrix, gram.diagonal
        self._spread = 0.0
        self._features: Callable[[Tensor], Tensor] = lambda R: R
        self._intercept, self._bends = rows.coordinates.intercept, torch.ones(rows.classes, dtype=torch.float64)

    def add(self, step: Tensor, change: Tensor) -> None:
        curvature = _dot(step, change)
        if curvature > 1e-14 * math.sqrt(_dot(step, step) * _dot(change, change)):
            self._pairs = [*self._pairs[1 - _PAIRS :], (step, change, 1.0 / curvature)]

    def forget(self) -> bool:
        """Drops the pairs; False if there were none."""
        had = bool(self._pairs)
        self._pairs = []
        return had

    def decrement(self, point: _Point) -> float:
        return -_dot(point.gradient, self.direction(point))

    def direction(self, point: _Point) -> Tensor:
        """-H⁻¹g by the two-loop recursion."""
        self._prepare(point.spreads)
        q = point.gradient.clone()
        scaled: list[float] = []
        for step, change, inverse in reversed(self._pairs):
            a = inverse * _dot(step, q)
            scaled.append(a)
            q.add_(change, alpha=-a)
        q = self._apply(q)
        if self._pairs:
            _, change, inverse = self._pairs[-1]
            q *= 1.0 / (inverse * _dot(change, self._apply(change)))
        for (step, change, inverse), a in zip(self._pairs, reversed(scaled), strict=True):
            q.add_(step, alpha=a - inverse * _dot(change, q))
        return q.neg_()

    def _prepare(self, spreads: Tensor) -> None:
        spread = max(float(spreads.numpy().mean()), _LEAST_SPREAD)
        if self._intercept:
            # The intercept's row of ZᵀZ/n is that of the identity, as columns are centred.
            self._bends = spreads.clamp_min(_LEAST_SHARE * spread)
        if self._spread / _SPREAD_CHANGE < spread < self._spread * _SPREAD_CHANGE:
            return
        self._spread = spread
        if self._gram is None:
            diagonal = spread * self._squares + self._penalties
            # A feature that is zero in all rows: whatever scale the others have.
            diagonal = diagonal.clamp_min(1e-6 * diagonal.mean().item() + torch.finfo(torch.float64).tiny)[:, None]
            self._features = lambda R: R / diagonal
            return
        A = spread * self._gram + torch.diag(self._penalties)
        scale = A.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()[:, None]
        A = A * scale * scale.mT
        raised = 1e-8
        while True:
            L, info = cholesky_ex(A + raised * torch.eye(len(A), dtype=A.dtype))
            if not int(info) or raised > 1:
                break
            raised *= 100
        self._features = lambda R: scale * cholesky_solve(scale * R, L)

    def _apply(self, R: Tensor) -> Tensor:
        result = self._features(R)
        if self._intercept:
            result[-1] = R[-1] / self._bends
        return result


def _dot(A: Tensor, B: Tensor) -> float:
    """⟨A, B⟩, row by row and then in order: the same for any number of threads."""
    return float((A * B).sum(1).numpy().sum())
