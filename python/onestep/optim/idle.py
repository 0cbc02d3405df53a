"""Parameters on which the outputs do not depend, where rounding makes their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from onestep._processes import place
from onestep.evaluation.errors import NonFiniteError
from onestep.evaluation.parameters import ParameterVector
from onestep.optim.objective import CurvatureRoot, Objective

# Derivatives that are rounding are some ε of terms that cancel, which may be larger than the largest derivative there
# is: smaller ones than this many ε of that are tested. Those that were found to be rounding stay out up to the root of
# ε of it, as where scores have grown.
_SUSPECT = 1e3
# How far parameters are moved to have all that is computed rounded anew, in ε of themselves, and by what part of itself
# a derivative then differs if it is rounding. One that has digits differs by some ε.
_MOVED, _DIFFERENT = 16, 0.1
# Where one row saturates, rounding is the same four times of five.
_TRIALS = 20
# What is known of a parameter.
_REAL, _ROUNDING = 1.0, -1.0


def made_of_rounding(
    objective: Objective, parameters: ParameterVector, sizes: Tensor, known: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which parameters (p,) change the outputs by rounding alone, None for none, and what is known for later steps.

    A key's bias adds the same to all scores of a query, which softmax ignores. Its derivatives are zero, computed as
    1e-17. No size tells them from those of a feature in another unit, but they are random: they change by their own
    size if all parameters are moved by some ε of themselves, where true ones change by some ε (as rounding is estimated
    by Vignes, Mathematics and Computers in Simulation 35, 1993). Only derivatives that are very small beside the
    largest are tested, and each once, by up to twenty gradients.

    Args:
        objective: its outputs are asked, over the rows of its curvature.
        parameters: at the point in question, where they are again afterwards.
        sizes: of each parameter's derivatives (p,).
        known: what the last call gave (p,), None at first.
    """
    eps, largest = torch.finfo(parameters.dtype).eps, sizes.max().item()
    small = (sizes > 0) & (sizes <= _SUSPECT * eps * largest)
    if not math.isfinite(largest) or (known is None and not bool(small.any())):
        return None, known
    known = torch.zeros_like(sizes, dtype=parameters.dtype) if known is None else known
    idle = still_idle(known, sizes, largest)
    suspects = small & (known == 0)
    if bool(suspects.any()):
        random, seen = _changes(objective, parameters, suspects)
        idle = idle | random
        known = torch.where(suspects & seen, torch.where(random, _ROUNDING, _REAL), known)
    return (idle if bool(idle.any()) else None), known


def still_idle(known: Tensor, sizes: Tensor, largest: float) -> Tensor:
    """Which parameters (p,) were found to be idle, and have derivatives of these sizes (p,), beside the largest."""
    idle: Tensor = (known == _ROUNDING) & (sizes <= torch.finfo(known.dtype).eps ** 0.5 * largest)
    return idle


def without_sizes(
    objective: Objective, parameters: ParameterVector, gradient: Tensor, known: Tensor | None
) -> Tensor | None:
    """What is known of the parameters (p,), as ``made_of_rounding`` has it, where the gradient (p,) is all there is.

    That of a random sum of the outputs tells the sizes, at the first step alone, and whenever the loss depends on a
    parameter on which it has not depended before.
    """
    if known is not None and not bool(((known == 0) & (gradient != 0)).any()):
        return known
    sizes = objective.output_gradient(parameters)
    if sizes is None or not bool(sizes.isfinite().all()):
        return None
    sizes = sizes.abs()
    known = torch.zeros_like(sizes) if known is None else known
    small = (sizes > 0) & (sizes <= _SUSPECT * torch.finfo(parameters.dtype).eps * sizes.max())
    suspects, random = small & (known == 0), torch.zeros_like(small)
    if bool(suspects.any()):
        random, _ = _changes(objective, parameters, suspects)
    return torch.where((known != 0) | (sizes == 0), known, torch.where(random, _ROUNDING, _REAL))


def _changes(objective: Objective, parameters: ParameterVector, suspects: Tensor) -> tuple[Tensor, Tensor]:
    """Which suspects (p,) have derivatives that are random, or zero in all rows, and which have any."""
    nothing, eps = torch.zeros_like(suspects), torch.finfo(parameters.dtype).eps
    least = most = objective.output_gradient(parameters)
    if least is None or most is None:
        return nothing, nothing
    start, generator = parameters.read(), torch.Generator().manual_seed(0)
    random = nothing
    # A model that checks its parameters may refuse these. Of several processes one alone may, for which others wait.
    refusals = (NonFiniteError, ValueError, ArithmeticError) if place()[1] == 1 else (NonFiniteError,)
    try:
        for _ in range(_TRIALS):
            noise = torch.rand(len(start), generator=generator, dtype=torch.float64).to(start) * 2 - 1
            parameters.write(start + _MOVED * eps * noise * start)
            again = objective.output_gradient(parameters)
            if again is None or not bool(again.isfinite().all()):
                return nothing, nothing
            least, most = torch.minimum(least, again), torch.maximum(most, again)
            size = torch.maximum(most.abs(), least.abs())
            random = suspects & (most - least >= _DIFFERENT * size)
            if torch.equal(random, suspects):
                break
    except refusals:
        return nothing, nothing
    finally:
        parameters.write(start)
    return random, size > 0


def projected(product: Callable[[Tensor], Tensor], idle: Tensor | None) -> Callable[[Tensor], Tensor]:
    """v ↦ Av with zeros in the rows and columns of A of parameters that are idle (p,)."""
    if idle is None:
        return product
    return lambda v: product(v.masked_fill(idle, 0.0)).masked_fill(idle, 0.0)


def without(A: Tensor, idle: Tensor) -> Tensor:
    """A (p,p) with zeros in the rows and columns of parameters that are idle (p,)."""
    return A.masked_fill(idle[:, None] | idle, 0.0)


class RootWithout(CurvatureRoot):
    """A root with zeros in the columns of parameters that are idle (p,)."""

    def __init__(self, root: CurvatureRoot, idle: Tensor) -> None:
        self.root, self.idle = root, idle

    @property
    def diagonal(self) -> Tensor:
        return self.root.diagonal.masked_fill(self.idle, 0.0)

    def multiply(self, v: Tensor) -> Tensor:
        return self.root.multiply(v.masked_fill(self.idle, 0.0)).masked_fill_(self.idle, 0.0)

    def matrix(self) -> Tensor:
        return without(self.root.matrix(), self.idle)
