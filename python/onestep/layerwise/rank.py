"""How many of a layer's inputs are independent."""

from __future__ import annotations

import torch
from torch import Tensor


def numerical_rank(gram: Tensor, rows: int) -> int:
    """The rank of a Gram matrix of ``rows`` rows, as far as its dtype can tell.

    Features that are 0 in all rows are left out, and the others scaled to a diagonal of 1. Counted are the eigenvalues
    above ε times the number of these features, ε of the matrix's dtype; rounding alone makes smaller ones. There are no
    more than there are rows. On the CPU the eigenvalues are not computed: by Sylvester's law of inertia as many are
    above τ as LDLᵀ of (matrix − τ·1) has positive pivots, n³/3 operations, which is Cholesky's where all are.

    Args:
        gram: (d,d), Σxxᵀ, finite.
        rows: how many rows it is the sum of.

    Returns:
        The rank, 0 where there are no rows.
    """
    live = gram.diagonal() > 0
    if not bool(live.all()):
        gram = gram[live][:, live]
    n = len(gram)
    most = min(n, rows)
    if most == 0:
        return 0
    root = gram.diagonal().sqrt()
    shifted = gram / root / root[:, None]
    shifted.diagonal().sub_(n * torch.finfo(gram.dtype).eps)
    if most == n and int(torch.linalg.cholesky_ex(shifted)[1]) == 0:
        return n
    if shifted.is_cuda:
        # What torch's LDLᵀ marks blocks by depends on the library there.
        return min(int((torch.linalg.eigvalsh(shifted) > 0).sum()), most)
    factors, pivots, _ = torch.linalg.ldl_factor_ex(shifted)
    # A negative number marks the two rows of a block of 2 × 2, which has one positive eigenvalue and one negative.
    single = pivots > 0
    return min(int((factors.diagonal()[single] > 0).sum()) + int((~single).sum()) // 2, most)
