"""Which matrices that were factored are singular all the same, and matrices near the ends of their dtype's range."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.ops.singular import SINGULAR_EPSILONS

# Elements of the eigenvector to the least eigenvalue from here on, of the largest, are of the dependent features.
_PART_OF_IT = 1e-3


def with_dependent(A: Tensor, damping: Tensor, factor: Tensor, info: Tensor, *, unit: bool) -> None:
    """Marks those singular whose least eigenvalue is at most 8 ε, with the diagonal scaled to 1: info, and NaN.

    A pivot is that eigenvalue over the square of an element of its eigenvector. Where many features depend on each
    other, rounding leaves pivots that are n times as large as itself, which the kernel's rule for pivots lets pass.
    S⁻¹ is asked instead: S is at least as near to singular as two steps of inverse iteration say.

    Args:
        A: (…,n,n), what was factored, without the damping.
        damping: (…).
        factor: (…,n,n), U, or R with P on its diagonal (``unit``); replaced by NaN where it is singular.
        info: (…), of the kernel; written to.
        unit: which factor it is.
    """
    eps = torch.finfo(A.dtype).eps
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    added = damping * diagonal.mean(-1)
    diagonal = diagonal + added[..., None]
    # What damping adds is a floor of the eigenvalues. Rounding moved those of dependent features by up to 3.3 ε.
    unknown = (info == 0) & (added <= SINGULAR_EPSILONS / 2 * eps * diagonal.amax(-1))
    if not bool(unknown.any()):
        return
    if not unit:
        # The sum of S⁻¹'s eigenvalues: first no less than that, which is quicker, then itself.
        most = torch.linalg.vector_norm(factor, dim=(-2, -1)).square() * diagonal.amax(-1)
        unknown &= ~(most * (SINGULAR_EPSILONS * eps) < 1)
        if bool(unknown.any()):
            scaled = factor[unknown] * diagonal[unknown].sqrt()[..., None, :]
            unknown[unknown.clone()] = ~(
                torch.linalg.vector_norm(scaled, dim=(-2, -1)).square() * (SINGULAR_EPSILONS * eps) < 1
            )
    for place in unknown.nonzero():
        at = tuple(place.tolist())
        size, vector = _largest_of_inverse(factor[at], diagonal[at], unit)
        if not 1.0 / float(size) > SINGULAR_EPSILONS * eps:
            info[at] = _order(vector)
            factor[at] = torch.nan


def dependent(A: Tensor, damping: Tensor, factor: Tensor, info: Tensor, *, unit: bool) -> Tensor:
    """What ``with_dependent`` would write into info, 0 where nothing; of all matrices, so that no GPU is waited for.

    Args:
        A, damping, factor, info, unit: as for ``with_dependent``; where info is not 0, any finite factor.
    """
    eps = torch.finfo(A.dtype).eps
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    added = damping * diagonal.mean(-1)
    diagonal = diagonal + added[..., None]
    unknown = (info == 0) & (added <= SINGULAR_EPSILONS / 2 * eps * diagonal.amax(-1))
    size, vector = _largest_of_inverse(factor, diagonal, unit)
    singular = ~(1.0 / size.double() > SINGULAR_EPSILONS * eps)
    return torch.where(unknown & singular, _order(vector), 0).to(info.dtype)


def _order(vector: Tensor) -> Tensor:
    """The order of the trailing minor that has all features of a dependence, of its eigenvector (…,n)."""
    sizes = vector.abs()
    part = sizes >= _PART_OF_IT * sizes.amax(-1, keepdim=True)
    return vector.shape[-1] - part.to(torch.int8).argmax(-1)


def _largest_of_inverse(factor: Tensor, diagonal: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """A bound from below of the largest eigenvalue of S⁻¹ (…), close where it is far above the others.

    Also its eigenvector (…,n). S is the matrix with its diagonal scaled to 1.
    """
    root = diagonal.sqrt()
    if unit:
        pivots = factor.diagonal(dim1=-2, dim2=-1)[..., None]
        least = (pivots[..., 0] / root).argmin(-1, keepdim=True)
        x = torch.zeros_like(root).scatter_(-1, least, 1.0)
    else:
        # S⁻¹ = BᵀB.
        factor = factor * root[..., None, :]
        largest = torch.linalg.vector_norm(factor, dim=-1).argmax(-1)
        x = torch.take_along_dim(factor, largest[..., None, None], -2)[..., 0, :]
        x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    size = torch.ones_like(root[..., :1])
    for _ in range(2):
        if unit:
            y = torch.linalg.solve_triangular(factor, (root * x)[..., None], upper=True, unitriangular=True)
            y = torch.linalg.solve_triangular(factor.mT, y / pivots.square(), upper=False, unitriangular=True)
            y = root * y[..., 0]
        else:
            # Sums by rows and by columns have the same bits for any number of threads.
            y = (factor * (factor * x[..., None, :]).sum(-1, keepdim=True)).sum(-2)
        size = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        x = y / size
    return size[..., 0], x


def scaled_into_range(A: Tensor, damping: Tensor) -> tuple[Tensor, Tensor | None]:
    """A and None; or A over ``power_into_range`` squared, and that, where it is not 1 for all.

    Args:
        A: (…,n,n).
        damping: (…), what is to be added, in means of the diagonal.
    """
    if not bool(_far(A, damping)[0].any()):
        return A, None
    power = power_into_range(A, damping)
    return A / power / power, power


def power_into_range(A: Tensor, damping: Tensor) -> Tensor:
    """2^k, (…,1,1), for matrices near the ends of the dtype's range, which are to be divided by it twice; 1 for others.

    The mean of a diagonal overflows where its elements do not, and small elements have few digits. Large matrices are
    brought no further down than that the damped mean is finite: beside 1e38, an element of 1e-10 is to stay one.

    Args:
        A: (…,n,n).
        damping: (…), what is to be added, in means of the diagonal.
    """
    far, large, top, most = _far(A, damping)
    exponent = torch.frexp(top).exponent
    exponent = torch.where(large, exponent - torch.frexp(most).exponent + 2, exponent)
    exponent = torch.where(far, exponent, 0)
    # As floats: torch's versions differ in what 2 to an integer is.
    half = exponent.div(2, rounding_mode="floor").to(top.dtype)
    return torch.ldexp(torch.ones_like(top), half)[..., None, None]


def _far(A: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which matrices are near an end of the range, and which near the upper one; their largest elements; the most."""
    info = torch.finfo(A.dtype)
    top = A.diagonal(dim1=-2, dim2=-1).amax(-1)
    most = (info.max / 4 / A.shape[-1] / (1 + damping)).clamp(min=1.0)
    large, small = top > most, (top > 0) & (top < info.tiny / info.eps)
    return (large | small) & top.isfinite(), large, top, most
