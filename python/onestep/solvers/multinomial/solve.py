"""Minimises mean multinomial loss + ½ Σ penalty_j ‖V_j‖², by preconditioned L-BFGS.

A pass over the rows (loss and gradient: two matrix products) is all that an iteration costs. L-BFGS (Liu and Nocedal,
Mathematical Programming 45, 1989) starts each iteration from the inverse of spread · ZᵀZ/n + penalty, spread being the
mean of p(1 - p), by one Cholesky factorisation for all classes whose shares are alike. With an intercept the columns
lose a mean for each class there, of rows weighted by its probability, which the gradient gives for nothing; where the
Gram matrix is taken anew, rows weigh p(1 - p). That takes up to half of the passes away
(docs/decisions/0323-intercepts-and-unlike-classes.md). What makes features badly conditioned is in there, and what is
left to learn in a few pairs is how the probabilities vary. A factor for each class, with its own mean of p(1 - p) as it
goes, is the better start and the worse end; Newton's method with conjugate gradients takes 1.3 to 3 times the passes,
as each step forgets what the last one learnt (docs/decisions/0018-multinomial-solver.md).

Early iterations run on samples of the rows, whose pairs stay, and in float32 where X is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep.linalg.narrow import FLOAT_NOISE
from onestep.solvers.multinomial.memory import Gram, Memory, Point, dot
from onestep.solvers.multinomial.rows import Evaluation, Rows, best_constant, constant_loss
from onestep.solvers.multinomial.search import Sample, line_search

# Samples: each has a quarter of the rows of the next, down to so many per class and per parameter, and ends where half
# the squared Newton decrement is below so much of the loss. With 0.6 rows per parameter they cost more than they save.
_SAMPLE_STEP = 4
_SAMPLE_ROWS_PER_CLASS = 32
_SAMPLE_ROWS_PER_PARAMETER = 2
_SAMPLE_DECREMENT = 1e-2
_SAMPLE_STEPS = 50
# float32 is left where the decrement is so small against the loss, at the latest.
_FLOAT_DECREMENT = 1e-10

# After so many iterations, and after twice as many each time, the Gram matrix is taken anew with the curvature of each
# row as its weight: near a minimum rows that are told for sure bend nothing. 60 instead of 150 passes to 1e-6 for 400
# features of 1,797 digits, where none is formed before; no fewer where all rows bend alike.
_REWEIGH = 20

# Where half the squared Newton decrement is more than so much of the loss, a sample is asked how far to go. Nearer to
# the minimum a step of length 1 is as good.
_SEARCHED_DECREMENT = 1e-3

# A class's mean probability counts as this part of an even share, 1/k, at least.
_LEAST_SHARE = 1e-2

# scikit-learn's solvers mostly end well below tol.
OVERSHOOT = 0.1
# Half the squared Newton decrement must be below so many times tol of the loss, or of tol where the loss goes to zero.
_DECREMENT = 0.03
_LEAST_SCALE = 0.01
# Slopes of columns far from zero stay large at the minimum. A run may end as well where half the squared decrement is
# at most so many times tol of the loss.
_NEXT_TO_NOTHING = 1e-6
# Where a plane separates the classes nothing bends, and L-BFGS knows little of the decrement. But the loss then falls
# along V itself: weights that are larger by a tenth must not lower it by more than a tenth of this. At a minimum they
# do not.
_MOST_FALL = 0.1
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
        halted: rounding left no further step before the tests were met; ``converged`` is by wider ones then.
        found: what a pass in the type of the rows gave at V, without the penalty; None if there was none.
    """

    V: Tensor
    loss: float
    slope: float
    iterations: int
    passes: float
    converged: bool
    runaway: bool
    halted: bool = False
    found: Evaluation | None = None


class _Objective:
    """The rows with the penalty (p, 1) of each row of W, counting passes in units of all rows."""

    def __init__(self, rows: Rows, penalty: Tensor, all_rows: int, memory: Memory) -> None:
        self.rows, self.penalty, self.precise = rows, penalty, not rows.mixed
        self.passes, self._share = 0.0, rows.count / all_rows
        self._memory, self._has_constant = memory, False
        self._slope_rounding = rows.coordinates.rounding(rows.dtype)[:, None]
        # Columns far from zero cost the scores digits.
        far = 0.0 if rows.centres else (rows.coordinates.shift.abs() / rows.coordinates.scale).max().item()
        self._far = 1.0 + far

    def at(self, V: Tensor) -> Point:
        self.passes += self._share
        return self._point(V, self.rows.evaluate(V, precise=self.precise))

    def known(self, V: Tensor, found: Evaluation) -> Point:
        """Where a precise pass has been, with whatever penalty."""
        self.precise = True
        return self._point(V, found)

    def at_constant(self) -> Point:
        """At the best constant scores."""
        self.passes += self._share
        self._has_constant = True
        return self._point(best_constant(self.rows), self.rows.at_constant)

    def _point(self, V: Tensor, found: Evaluation) -> Point:
        coordinates = self.rows.coordinates
        W = coordinates.weights(V, torch.float64)
        pull = self.penalty * W
        loss = found.loss + 0.5 * dot(pull, W)
        slope = ((found.slopes + pull).abs() - self._slope_rounding).max().item()
        gradient = found.gradient + coordinates.pull_back(pull)
        centres = self._centres(found) if self._memory.wants_centres else None
        return Point(V, loss, gradient, slope, found.spreads, centres, found)

    def _centres(self, found: Evaluation) -> Tensor:
        """The mean of the columns over rows weighted by each class's probability (d, k).

        Zᵀ(P - Y)/n is the gradient, at constant scores -ZᵀY/n, as columns are centred.
        """
        rows = self.rows
        if not self._has_constant:
            # A pass of its own, unless another penalty has made it for these rows.
            self.passes, self._has_constant = self.passes + self._share, True
        shares = (found.gradient[-1] + rows.shares).clamp_min(_LEAST_SHARE / rows.classes)
        return (found.gradient[:-1] - rows.at_constant.gradient[:-1]) / shares

    def length(self, point: Point, direction: Tensor, slope: float) -> float:
        """The length of a step that a sample of the rows advises."""
        if self._sample is None:
            return 1.0
        self.passes += self._sample.share * self._share
        return self._sample.length(self, point.V, direction, slope)

    @cached_property
    def _sample(self) -> Sample | None:
        return Sample.of(self.rows)

    @property
    def unpenalised(self) -> bool:
        return not self.penalty.numpy().any()

    @property
    def rounding(self) -> float:
        """Of the loss, relatively."""
        return 4.0 * torch.finfo(self.rows.dtype if self.precise else torch.float32).eps * self._far


def solve_multinomial(
    rows: Rows,
    penalty: float,
    start: Tensor | Solution | None,
    *,
    tol: float,
    max_iter: int,
    gram: Gram | None = None,
    overshoot: float = OVERSHOOT,
) -> Solution:
    """Minimises Σ wᵢ ℓ(xᵢW, yᵢ) / Σ wᵢ + ½ penalty ‖W‖², the intercept's row being free, over V.

    Args:
        rows: the data.
        penalty: >= 0.
        start: V (p, k) float64, or None for the best constant scores; or the solution for another penalty, where no
            pass is needed to begin with.
        tol: ends where no slope in W exceeds ``overshoot`` times it and the step promises next to nothing.
        max_iter: most iterations over all rows.
        gram: what `Gram.of(rows)` gave, where several penalties share it.
        overshoot: at most 1.

    Returns:
        The solution; its loss is NaN or infinite where X is, or is too large for its type.
    """
    descent = Descent(rows, penalty, tol=tol, gram=gram, overshoot=overshoot)
    descent.begin(start, sampled=max_iter > 0)
    while not (descent.ended or descent.is_noise) and descent.iterations < max_iter:
        descent.step()
    return descent.solution()


class Descent:
    """The minimisation of `solve_multinomial`, an iteration at a time.

    Args:
        rows, penalty, tol, gram, overshoot: as for `solve_multinomial`.
        decrement: ends as well where half the squared Newton decrement, as L-BFGS knows it, is so much of the loss.
        penalise_intercept: whether the penalty is on the intercept, too.

    Attributes:
        iterations: how many were taken.
        ended: whether there is nothing left to do: converged, runaway or stalled.
        converged: see `Solution`.
    """

    def __init__(
        self,
        rows: Rows,
        penalty: float,
        *,
        tol: float,
        decrement: float = 0.0,
        gram: Gram | None = None,
        penalise_intercept: bool = False,
        overshoot: float = OVERSHOOT,
    ) -> None:
        penalties = torch.full_like(rows.coordinates.scale, penalty)
        if rows.coordinates.intercept:
            penalties = torch.cat((penalties, penalties.new_full((1,), penalty if penalise_intercept else 0.0)))
        self._penalty, self._tol, self._decrement, self._goal = penalty, tol, decrement, overshoot * tol
        self._memory = Memory(rows, penalties, gram or Gram.of(rows))
        self._objective = _Objective(rows, penalties[:, None], rows.count, self._memory)
        self._next_gram = _REWEIGH
        self._point: Point | None = None
        self.iterations, self.ended, self.converged = 0, False, False

    @property
    def point(self) -> Point:
        """Where it is."""
        if self._point is None:
            raise RuntimeError("begin() comes first")
        return self._point

    @property
    def passes(self) -> float:
        """Over the rows, those over samples in proportion."""
        return self._objective.passes

    def begin(self, start: Tensor | Solution | None, *, sampled: bool = True) -> None:
        """Starts from V or a solution, or from the minimum of a sample or the best constant scores."""
        V = start.V if isinstance(start, Solution) else start
        if V is None:
            self._point = self._first_guess(sampled)
        elif isinstance(start, Solution) and start.found is not None:
            self._point = self._objective.known(V, start.found)
        else:
            # A shift common to all classes changes no score, and steps do not change it.
            self._point = self._objective.at(V - V.mean(1, keepdim=True))

    def step(self) -> None:
        """One iteration, or the news that there is none left."""
        objective, memory, tol = self._objective, self._memory, self._tol
        while True:
            point = self.point
            if not math.isfinite(point.loss):
                self.ended = True
                return
            direction = memory.direction(point)
            slope = dot(point.gradient, direction)
            scale = min(1.0, point.loss)
            half = -0.5 * slope
            level = point.slope <= self._goal
            # Below zero, which rounding makes of it, it is no decrement: the line search finds nothing, and pairs go.
            done = half >= 0 and (
                half <= self._decrement * scale
                or (
                    (level or half <= _NEXT_TO_NOTHING * tol * scale)
                    and half <= _DECREMENT * tol * max(scale, _LEAST_SCALE * tol)
                    and abs(dot(point.gradient, point.V)) <= _MOST_FALL * point.loss
                )
            )
            noise = point.loss <= FLOAT_NOISE
            if not objective.precise and (done or noise or half <= _FLOAT_DECREMENT * scale):
                self._refine()
                continue
            # Slopes in W of columns of small values are small anywhere.
            even = level and point.gradient.abs().max().item() <= self._goal
            runs_away = even and objective.unpenalised and objective.rows.movement(direction) > _RUNAWAY_STEP
            if done or runs_away:
                self.ended, self.converged = True, done
                return
            length = objective.length(point, direction, slope) if half > _SEARCHED_DECREMENT * scale else 1.0
            found = line_search(objective, point, direction, slope, length)
            if found is not None:
                break
            if memory.forget():
                continue
            if objective.precise:
                self.ended = True
                return
            self._refine()
        memory.add(found.V - point.V, found.gradient - point.gradient)
        self._point = found
        self.iterations += 1
        if self.iterations == self._next_gram:
            self._next_gram *= 2
            memory.reweigh(objective.rows, found, self.iterations)

    @property
    def is_noise(self) -> bool:
        """Whether the loss is less than rounding makes of it."""
        noise = self._objective.rows.dtype == torch.float32 and self.point.loss <= FLOAT_NOISE
        return self._objective.precise and noise

    def _refine(self) -> None:
        """From float32 to the type of the rows."""
        self._objective.precise = True
        self._point = self._objective.at(self.point.V)

    def solution(self) -> Solution:
        """What has been reached."""
        point, tol = self.point, self._tol
        finite = math.isfinite(point.loss)
        halted = finite and ((self.ended and not self.converged) or self.is_noise)
        if not self.converged and finite and point.slope <= tol:
            scale = max(min(1.0, point.loss), _LEAST_SCALE * tol)
            self.converged = self._memory.decrement(point) <= 2 * tol * scale
        small = self._penalty == 0 and finite and max(point.slope, point.gradient.abs().max().item()) <= tol
        runaway = small and self.moves_on()
        known = point.found if self._objective.precise else None
        return Solution(
            point.V, point.loss, point.slope, self.iterations, self.passes, self.converged, runaway, halted, known
        )

    def moves_on(self) -> bool:
        """Whether another step would still move the scores of some row by much, as where there is no minimum."""
        return self._objective.rows.movement(self._memory.direction(self.point)) > _RUNAWAY_STEP

    def decrement(self) -> float:
        """Half the squared Newton decrement, as far as L-BFGS knows it."""
        return 0.5 * self._memory.decrement(self.point)

    def state(self) -> dict[str, Any]:
        """What goes on from here with the same bits, on the same rows."""
        return {
            "V": self.point.V,
            "precise": self._objective.precise,
            "passes": self._objective.passes,
            "iterations": self.iterations,
            "ended": self.ended,
            "converged": self.converged,
            "next_gram": self._next_gram,
            "memory": self._memory.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``."""
        self._objective.precise = state["precise"]
        self._memory.restore(state["memory"])
        self._point = self._objective.at(state["V"])
        self._objective.passes, self._next_gram = state["passes"], state["next_gram"]
        self.iterations, self.ended, self.converged = state["iterations"], state["ended"], state["converged"]

    def _first_guess(self, sampled: bool) -> Point:
        """The minimum of a sample, where it is better than the best constant scores."""
        objective, rows = self._objective, self._objective.rows
        constant = best_constant(rows)
        levels = _samples(rows) if sampled else []
        if not levels:
            return objective.at_constant()
        V = constant
        for level in levels:
            part = _Objective(level, objective.penalty, rows.count, self._memory)
            V = _minimum_of_sample(part, V, self._memory)
            objective.passes += part.passes
        point = objective.at(V)
        if point.loss <= constant_loss(rows):
            return point
        self._memory.forget()
        return objective.at_constant()


def _minimum_of_sample(objective: _Objective, V: Tensor, memory: Memory) -> Tensor:
    point = objective.at(V)
    for _ in range(_SAMPLE_STEPS):
        direction = memory.direction(point)
        slope = dot(point.gradient, direction)
        # False for NaN, which the rows will show.
        if not -0.5 * slope > _SAMPLE_DECREMENT * min(1.0, point.loss):
            break
        found = line_search(objective, point, direction, slope)
        if found is None:
            if memory.forget():
                continue
            break
        memory.add(found.V - point.V, found.gradient - point.gradient)
        point = found
    return point.V


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
