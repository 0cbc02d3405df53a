"""Parameters on which the outputs do not depend, where rounding makes their derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.evaluation.errors import NonFiniteError
from onestep.evaluation.parameters import ParameterVector
from onestep.optim.objective import CurvatureRoot, Objective

# Rounding leaves some ε of terms that cancel, which may be larger than the largest derivative there is.
_SUSPECT = 1e3
# How far parameters are moved to have all that is computed rounded anew, in ε of themselves, how often, and by what
# part of itself a derivative must differ then to be rounding. One that has digits differs by some ε.
_MOVED, _TRIALS, _DIFFERENT = 16, 3, 0.1


def made_of_rounding(objective: Objective, parameters: ParameterVector, sizes: Tensor | None = None) -> Tensor | None:
    """Which parameters (p,) change the outputs by rounding alone; None where that is none, or not known.

    A key's bias adds the same to all scores of a query, which softmax ignores. Its derivatives are zero, computed as
    1e-17. No size tells them from those of a feature in another unit, but they are random: they change by their own size
    if all parameters are moved by some ε of themselves, where true ones change by some ε (Vignes, Mathematics and
    Computers in Simulation 35, 1993). Only derivatives that are very small beside the largest are looked at, for which
    the model is differentiated four times.

    Args:
        objective: its outputs are asked, over the rows of its curvature.
        parameters: at the point in question, where they are again afterwards.
        sizes: of each parameter's derivatives (p,); None for those of a random sum of the outputs.
    """
    eps = torch.finfo(parameters.dtype).eps
    first = None
    if sizes is None:
        sizes = first = objective.output_gradient(parameters)
        if sizes is None:
            return None
    sizes = sizes.abs()
    suspects = (sizes > 0) & (sizes <= _SUSPECT * eps * sizes.max())
    if not bool(suspects.any()):
        return None
    first = objective.output_gradient(parameters) if first is None else first
    if first is None:
        return None
    start, generator = parameters.read(), torch.Generator().manual_seed(0)
    least = most = first
    try:
        for _ in range(_TRIALS):
            noise = torch.rand(len(start), generator=generator, dtype=torch.float64).to(start) * 2 - 1
            parameters.write(start + _MOVED * eps * noise * start)
            again = objective.output_gradient(parameters)
            if again is None:
                return None
            least, most = torch.minimum(least, again), torch.maximum(most, again)
    except (NonFiniteError, ValueError, ArithmeticError):
        # A model that checks its parameters may refuse these.
        return None
    finally:
        parameters.write(start)
    found = suspects & (most - least > _DIFFERENT * torch.maximum(most.abs(), least.abs()))
    return found if bool(found.any()) else None


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
