"""The loss near the present parameters, and the steps that it proposes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Proposal:
    """A step (p,), the reduction that the undamped quadratic model promises for it, and the products it took.

    ``concave``: whether it goes along a direction in which the model falls without end.
    ``shorter``: the step without that direction, for where the loss does not follow the model so far.
    """

    step: Tensor
    predicted: float
    products: int = 0
    concave: bool = False
    shorter: Proposal | None = None


class QuadraticModel:
    """The loss near the present parameters: loss + gᵀs + ½ sᵀBs."""

    without_influence = 0
    # Parameters (p,) with neither a slope nor curvature, once a decrement was found.
    flat: Tensor | None = None
    # A lower bound of the decrement, where one is known.
    promise = -math.inf

    # Whether rounding cannot have hidden a direction along which the loss falls from the decrement that was found.
    certain = True
    # The undamped minimiser (p,), where the decrement took it.
    newton: Tensor | None = None

    def decrement(self, enough: float, *, final: bool) -> float:
        """The reduction by the undamped minimiser; infinity if it is not known, or not known to be at most enough.

        ``final``: whether no step lowered the loss, so that no later step may be asked.
        """
        return math.inf

    def resolution(self, point: Tensor) -> float:
        """By how much rounding the parameters, whose values are ``point``, may change the loss; 0 if not known."""
        return 0.0

    def propose(self, damping: float) -> Proposal | None:
        """The damped minimiser; None if it cannot be had with so little damping."""
        raise NotImplementedError
