"""The one rule by which a symmetric matrix is singular, wherever it was factored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# A system is singular where a pivot is at most this many ε of its diagonal element: rounding noise. The same number as
# in csrc/base/singular.hpp.
SINGULAR_EPSILONS = 8


def with_singular(info: Tensor, L: Tensor, diagonal: Tensor) -> Tensor:
    """info (…), with the order of the first pivot that is rounding noise, if there is one before the one that failed.

    Args:
        info: 0 where there is a factor, else the order of the pivot that failed.
        L: (…,d,d), what Cholesky has made, up to that pivot.
        diagonal: (…,d) of the matrix that was factored.
    """
    noise = L.diagonal(dim1=-2, dim2=-1).square() <= SINGULAR_EPSILONS * torch.finfo(L.dtype).eps * diagonal
    # One more entry behind the last pivot, so that argmax always finds one.
    first = pad(noise, (0, 1), value=True).to(torch.int32).argmax(-1)
    first = (first + 1).to(info.dtype)
    return torch.where((first <= L.shape[-1]) & ((info == 0) | (first < info)), first, info)
