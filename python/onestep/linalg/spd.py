"""Solving one symmetric positive definite system by Cholesky, and whether the solution can be trusted.

What solves one such system and takes another way where Cholesky fails comes here, so that the same matrix is singular
to all of it. Two kinds of solves have rules of their own. Kernels over batches report each problem by `info`. What may
solve a neighbouring system instead adds to the diagonal until there is a factor, by one of three rules:

- ``jitter`` of `solve_normal_ex`: the user's fraction of the mean diagonal, tenfold until the mean itself is added
  (`ops/normal/formulas.py`, ``more_jitter``), and reported.
- Damping in means of the diagonal, tenfold from the dtype's noise to 1 (`linalg/damping.py`, ``more_damping``), and
  reported: `inverse_cholesky` and `layerwise`.
- A shift for preconditioners and starts, a hundredfold (``factor_with_shift``), of which nobody hears.

The damping of a method's steps is none of these: it is the length of a step, which the method adapts (`optim/`,
`layerwise/outputs.py`), and a step whose matrix has no factor counts as one that failed.

- A is **singular** where a pivot, after scaling to a unit diagonal, is at most ``SINGULAR_EPSILONS`` ε: only rounding
  noise is left of it. ``solve_normal`` judges by the same number, in its kernels and in the dual form.
- A solution is **inaccurate** where A's reciprocal condition is under a floor, ``LEAST_RCOND`` for float64 sums: it has
  fewer than half of its digits then, and the caller takes an orthogonal factorisation or an SVD instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onestep.linalg._cholesky import cholesky_ex, cholesky_solve
from onestep.ops.singular import SINGULAR_EPSILONS as SINGULAR_EPSILONS

# Cholesky on the normal equations has errors of about ε/rcond, and rcond is the square of X's own. Down to this value
# it keeps at least half the digits of float64 (2e-8), and so all of float32. The same holds for eigenvalues, which are
# off by a few ε of the largest.
LEAST_RCOND = 1e-8

# A matrix that cannot be factored gets a shift that is larger by this factor.
_MORE_SHIFT = 100.0
# How many shifts are tried: from rounding noise, 1e-14 of the diagonal, to all of it.
_TRIES = 8


class Factor(NamedTuple):
    """SAS = LLᵀ with S = diag(scale), so that SAS has a unit diagonal.

    That is within a factor d of the best scaling there is (van der Sluis, Numer. Math. 14, 1969): features in different
    units do no harm.

    Attributes:
        scale: (d,1).
        scaled: SAS (d,d).
        L: (d,d).
        zero: the first column whose diagonal element is not positive, or -1; nothing is factored then.
        failed: the first column whose pivot is not positive, or -1.
    """

    scale: Tensor
    scaled: Tensor
    L: Tensor
    zero: int
    failed: int

    @property
    def succeeded(self) -> bool:
        """Whether there is a factor."""
        return self.zero < 0 and self.failed < 0

    def first_singular(self, dtype: torch.dtype) -> int:
        """The first column that depends on those before it, to the precision of the rows' dtype; -1 if none does."""
        if self.failed >= 0:
            return self.failed
        noise = self.L.detach().diagonal().square() <= SINGULAR_EPSILONS * torch.finfo(dtype).eps
        return int(noise.nonzero()[0]) if noise.any() else -1

    def least_pivot(self) -> float:
        """The smallest pivot of SAS, about which part of the digits is left; 0 without a factor."""
        return self.L.diagonal().min().item() ** 2 if self.succeeded else 0.0

    def solve(self, B: Tensor) -> Tensor:
        """A⁻¹B."""
        return self.scale * cholesky_solve(self.scale * B, self.L)


def factor(A: Tensor) -> Factor:
    """Factors A (d,d), of which the lower triangle is read. Differentiable; waits for a GPU."""
    diagonal = A.diagonal()
    positive = diagonal > 0
    if not positive.all():
        return Factor(diagonal, A, A, int((~positive).nonzero()[0]), -1)
    scale = diagonal.rsqrt().unsqueeze(-1)
    scaled = A * (scale * scale.mT)
    L, info = cholesky_ex(scaled)
    return Factor(scale, scaled, L, -1, int(info) - 1)


def factor_with_shift(A: Tensor, shift: float) -> tuple[Tensor, bool]:
    """L of A + sI = LLᵀ for A (...,d,d), and whether there is one; s is the first of ``shift``·100ⁱ that will do.

    For preconditioners and starts, whose solutions need not be those of A itself. All matrices of a batch get the same
    s. Waits for a GPU.
    """
    shift = max(shift, torch.finfo(A.dtype).tiny)
    for _ in range(_TRIES):
        shifted = A.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
        L, info = cholesky_ex(shifted)
        if not bool(info.any()):
            return L, True
        shift *= _MORE_SHIFT
    return L, False


def eigenvalues_are_accurate(values: Tensor, penalty: float | Tensor, floor: float = LEAST_RCOND) -> bool:
    """Whether ascending eigenvalues, each off by a little of the largest, are accurate next to a penalty."""
    return bool(values[0] + penalty >= floor * (values[-1] + penalty))
