"""How far to go along a direction: a step by Wolfe's conditions, first tried where a sample of the rows has its least.

A trial is a pass over the rows. Where the probabilities still change much, a step of length 1 may lower the loss by a
tenth of what another length does, or be refused; some rows tell the length nearly as well as all, for a small part of a
pass (docs/decisions/0327-line-searches-on-a-sample.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from onestep._serial_torch import serial_torch
from onestep.solvers.multinomial.memory import Point, dot
from onestep.solvers.multinomial.rows import Rows

# Wolfe's conditions, and the most evaluations of a line search.
_SUFFICIENT_DECREASE = 1e-4
_CURVATURE = 0.9
_TRIALS = 40

# A sample has every 16th row. Of few rows it has more, up to every 8th, to have the least number; of many rows or
# classes it has fewer: 512 rows tell a length as well as 2,048.
_STEP, _LEAST_STEP = 16, 8
_LEAST_ROWS, _MOST_ROWS, _MOST_SCORES = 256, 512, 4 << 20
# Its lengths are no further from 1 than this factor, and end where the slope is so small a part of what it was.
_FURTHEST = 10.0
_LEVEL = 0.05
_NEWTON_STEPS = 10


class Objective(Protocol):
    """What is searched."""

    penalty: Tensor
    rows: Rows

    def at(self, V: Tensor) -> Point:
        """Loss and gradient at V, which is a pass."""

    @property
    def rounding(self) -> float:
        """Of the loss, relatively."""


def line_search(
    objective: Objective, point: Point, direction: Tensor, slope: float, length: float = 1.0
) -> Point | None:
    """A step that satisfies Wolfe's conditions, where rounding lets them be seen; None if there is none.

    The loss is convex along the line, so that a secant of its slopes finds the next trial.
    """
    if not slope < 0:
        return None
    low, high = 0.0, math.inf
    low_slope = slope
    for _ in range(_TRIALS):
        trial = objective.at(point.V + length * direction)
        trial_slope = dot(trial.gradient, direction) if math.isfinite(trial.loss) else math.inf
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


class Sample:
    """Some of the rows, on which the length of a step is looked for.

    Attributes:
        share: the part of a pass that a length takes.
    """

    def __init__(self, rows: Rows, share: float) -> None:
        self._rows, self.share = rows, share

    @staticmethod
    def of(rows: Rows) -> Sample | None:
        """None where there are too few rows, or none with weight among them."""
        most = min(_MOST_ROWS, _MOST_SCORES // rows.classes)
        step = max(min(_STEP, rows.count // _LEAST_ROWS), -(-rows.count // max(most, 1)))
        if step < _LEAST_STEP or rows.count // step < _LEAST_ROWS:
            return None
        sample = rows.sampled(step)
        # The scores at a point and along a direction are half a pass each.
        return None if sample is None else Sample(sample, 1.0 / step)

    def length(self, objective: Objective, V: Tensor, direction: Tensor, slope: float) -> float:
        """Where the loss along a direction is least, as far as the sample knows how the slope changes; 1 if unknown."""
        W = self._rows.coordinates.weights(direction, torch.float64)
        bend = (objective.penalty * W).flatten() @ W.flatten()
        change = self._slope_changes(V, direction)
        least, most = 1.0 / _FURTHEST, _FURTHEST
        low, high, length = least, most, 1.0
        for _ in range(_NEWTON_STEPS):
            changed, curvature = change(length)
            here = slope + changed + length * bend.item()
            if not math.isfinite(here):
                return 1.0
            if abs(here) <= _LEVEL * abs(slope):
                break
            low, high = (length, high) if here < 0 else (low, length)
            curvature += bend.item()
            newton = length - here / curvature if curvature > 0 else math.copysign(math.inf, -here)
            length = newton if low < newton < high else math.sqrt(low * high)
            if high <= low * (1 + _LEVEL):
                break
        return length

    def _slope_changes(self, V: Tensor, direction: Tensor) -> Callable[[float], tuple[float, float]]:
        """For a length: how the loss's slope differs from that at 0, and its derivative. Targets fall out of both."""
        rows = self._rows
        # The same bits for any number of threads.
        with serial_torch():
            scores, moves = rows.scores(V), rows.scores(direction)
            moves -= moves.mean(1, keepdim=True)
            share = moves.new_ones(len(moves)) if rows.weight is None else rows.weight.to(moves.dtype)
            share = share / share.sum()
            P = torch.empty_like(scores)

            def means(length: float) -> tuple[Tensor, Tensor]:
                torch.softmax(torch.add(scores, moves, alpha=length, out=P), 1, out=P)
                first = P.mul_(moves).sum(1)
                second = P.mul_(moves).sum(1)
                return share @ first, share @ (second - first.square())

            start = means(0.0)[0]

        def change(length: float) -> tuple[float, float]:
            with serial_torch():
                slope, curvature = means(length)
                return (slope - start).item(), curvature.item()

        return change
