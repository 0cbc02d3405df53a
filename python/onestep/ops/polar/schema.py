"""Schema of ``polar``: the operand's checks, the results' shapes, the iteration's coefficients.

QDWH (Nakatsukasa, Bai and Gygi, 2010) with Cholesky: X ← (b/c)X + (a − b/c)(I + cXXᵀ)⁻¹X maps singular values from
[l, 1] into [l′, 1] with l′ = l(a + bl²)/(1 + cl²); a, b and c make l′ as large as a rational function of this form can.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onestep.ops._library import define
from onestep.ops.operands import LinAlgError, any_failed, check_dims, describe_failures, empty_info

# The dtypes that are read, and what is computed in and returned.
COMPUTE_DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def coefficients(iterations: int, lower: float) -> list[tuple[float, float, float]]:
    """a, b and c of each iteration, for singular values from ``lower`` to 1."""
    steps = []
    bound = lower
    for _ in range(iterations):
        square = bound * bound
        gamma = math.cbrt(4.0 * (1.0 - square) / square**2)
        root = math.sqrt(1.0 + gamma)
        a = root + 0.5 * math.sqrt(8.0 - 4.0 * gamma + 8.0 * (2.0 - square) / (square * root))
        b = (a - 1.0) ** 2 / 4.0
        c = a + b - 1.0
        steps.append((a, b, c))
        bound = min(bound * (a + b * square) / (1.0 + c * square), 1.0)
    return steps


def polar_results(M: Tensor, iterations: int, lower: float) -> tuple[Tensor, Tensor]:
    """Checks the operand; returns U (…,n,m) and info (…), empty."""
    if M.dtype not in COMPUTE_DTYPES:
        listed = ", ".join(map(str, COMPUTE_DTYPES))
        raise TypeError(f"M has dtype {M.dtype}; expected one of {listed}")
    check_dims("M", M, 2, "(..., n, m)")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; expected 1 or more")
    if not 0.0 < lower <= 1.0:
        raise ValueError(f"lower is {lower}; expected a number from 0 (not itself) to 1")
    U = torch.empty(M.shape, dtype=COMPUTE_DTYPES[M.dtype], device=M.device)
    return U, empty_info(M, M.shape[:-2])


polar = define(
    "polar(Tensor M, int iterations, float lower) -> (Tensor, Tensor)",
    fake=polar_results,
    own_dims=(2,),
)


def raise_if_failed(info: Tensor) -> None:
    """Raises LinAlgError if a matrix was not finite. Waits for a GPU."""
    if any_failed(info):
        raise LinAlgError(
            f"{describe_failures(info, 'matrices')}. info > 0: the matrix holds NaN or Inf; "
            "polar_ex reports info instead."
        )


def identity_like(matrices: Tensor) -> Tensor:
    """The identity, of the order, dtype and device of square matrices."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


# Powers of two that are normal numbers of a dtype, either way.
_LARGEST_EXPONENT = {torch.float32: 126, torch.float64: 1022, torch.bfloat16: 126, torch.float16: 14}


def to_unit_range(X: Tensor) -> Tensor:
    """Each matrix times the power of two that brings its largest entry near 1; no digit changes.

    So that products of two entries neither overflow nor vanish.
    """
    if X.numel() == 0:
        return X
    largest = torch.linalg.vector_norm(X, math.inf, dim=(-2, -1), keepdim=True, dtype=COMPUTE_DTYPES[X.dtype])
    most = _LARGEST_EXPONENT[X.dtype]
    exponent = torch.frexp(largest).exponent.neg().clamp(-most, most)
    return X * torch.ldexp(torch.ones_like(largest), exponent).to(X.dtype)
