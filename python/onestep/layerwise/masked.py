"""Normal equations of outputs that have features of their own, as the rows of a pruned weight have."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep import linalg

# Elements of the matrices that are solved with at a time.
_MOST_ELEMENTS = 1 << 24


def solve_masked(system: Tensor, right: Tensor, zeros: Tensor) -> tuple[Tensor, int]:
    """Of each row of a weight the elements that are not to stay 0, by the equations of their features alone.

    Args:
        system: (d,d), positive definite.
        right: (d,k), the right-hand sides.
        zeros: (k,d), bool, elements that stay 0.

    Returns:
        (k,d), and the status: 0, or the largest of equations that have no solution.
    """
    # Each output's equations are those of the others' rows and columns removed.
    parts = []
    places = torch.arange(len(zeros), device=zeros.device)
    for rows in places.split(max(1, _MOST_ELEMENTS // max(1, system.numel()))):
        kept = (~zeros[rows]).to(system.dtype)
        own = system * kept[:, :, None] * kept[:, None, :] + torch.diag_embed(1 - kept)
        solved, info = linalg.solve_spd_ex(own, right.mT[rows] * kept)
        if bool(info.any()):
            return right.mT, int(info.max())
        parts.append(solved * kept)
    return torch.cat(parts), 0
