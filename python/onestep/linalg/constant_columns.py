"""Features that do not vary: what is left of them after centring is rounding noise."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.linalg._normal import Moments

_EPS = torch.finfo(torch.float64).eps


def constant_columns(spread: Tensor, mean: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """Which features do not vary but for rounding of rows of ``dtype``.

    Args:
        spread: (d,) float64, Σ w (x − x̄)².
        mean: (d,) float64, x̄.
        total: () float64, Σ w.
        dtype: what the rows were stored in.
    """
    # A mean is off by a few ε of float64. Rows less a mean that is off by an ulp of theirs leave ulp² of square, which
    # cancels down to ulp³ in their own arithmetic.
    noise = 64 * (_EPS**2 + torch.finfo(dtype).eps ** 3)
    return spread <= noise * total * mean.square()


def without_constants(sums: Moments, dtype: torch.dtype) -> Moments:
    """Centred sums with zeros for the features that are constant.

    Scaled to a unit diagonal, the noise that is left of such a feature would pass for a feature like any other.
    """
    constant = constant_columns(sums.gram.diagonal(), sums.x_mean, sums.weight_sum, dtype)
    if not constant.any():
        return sums
    gram = sums.gram.masked_fill(constant.unsqueeze(-1) | constant, 0.0)
    return sums._replace(gram=gram, cross=sums.cross.masked_fill(constant.unsqueeze(-1), 0.0))
