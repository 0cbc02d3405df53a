"""Schemas of the Cholesky ops: their operands' checks, their results' shapes, their vmap rules."""

from __future__ import annotations

from torch import Tensor

from onestep.ops._library import define
from onestep.ops.operands import (
    FLOATING,
    LinAlgError,
    any_failed,
    broadcast_batch,
    check_dims,
    check_floating,
    check_like,
    check_size,
    describe_failures,
    empty_factor,
    empty_info,
)

# solution, L, info
Solved = tuple[Tensor, Tensor, Tensor]


def _check_square(name: str, A: Tensor) -> None:
    shape = A.shape
    # The good case is one expression; so it is below.
    if A.dtype in FLOATING and len(shape) >= 2 and shape[-2] == shape[-1]:
        return
    check_floating(name, A)
    check_dims(name, A, 2, "(..., d, d)")
    check_size(name, A, -2, A.shape[-1], "square matrices (..., d, d)")


def _check_right(B: Tensor, matrix: Tensor) -> None:
    shape, d = B.shape, matrix.shape[-1]
    if B.dtype == matrix.dtype and B.device == matrix.device and len(shape) >= 2 and shape[-2] == d:
        return
    check_like("B", B, matrix)
    check_dims("B", B, 2, "(..., d, k)")
    check_size("B", B, -2, d, f"(..., {d}, k): as many rows as the matrix")


def raise_if_failed(info: Tensor, d: int) -> None:
    """Raises LinAlgError if any matrix failed, naming how many, the first few, and what to do. Waits for a GPU."""
    if not any_failed(info):
        return
    raise LinAlgError(
        f"{describe_failures(info, 'matrices')}. info = i up to {d}: the leading minor of order i is not positive "
        f"definite or holds NaN or Inf; info = {d + 1}: the right-hand side holds NaN or Inf, or the solution "
        "overflowed. Add a multiple of the identity, or call the _ex variant, which reports info."
    )


def cholesky_results(A: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
    """Checks A; returns L (…,d,d), column-major, and info (…), empty."""
    _check_square("A", A)
    batch = A.shape[:-2]
    return empty_factor(A, batch, A.shape[-1]), empty_info(A, batch)


cholesky = define(
    "cholesky(Tensor A, bool check=False) -> (Tensor, Tensor)",
    fake=cholesky_results,
    own_dims=(2,),
)


def cholesky_solve_results(B: Tensor, L: Tensor) -> Tensor:
    """Checks the operands; returns the solution (…,d,k), empty."""
    _check_square("L", L)
    _check_right(B, L)
    batch = broadcast_batch("B, L", tuple(B.shape[:-2]), tuple(L.shape[:-2]))
    return B.new_empty(*batch, *B.shape[-2:])


cholesky_solve = define(
    "cholesky_solve(Tensor B, Tensor L) -> Tensor",
    fake=cholesky_solve_results,
    own_dims=(2, 2),
)


def solve_spd_results(A: Tensor, B: Tensor, check: bool = False) -> Solved:
    """Checks the operands; returns solution (…,d,k), L (…,d,d), column-major, and info (…), empty."""
    _check_square("A", A)
    d = A.shape[-1]
    _check_right(B, A)
    batch = broadcast_batch("A, B", tuple(A.shape[:-2]), tuple(B.shape[:-2]))
    return (
        A.new_empty(*batch, d, B.shape[-1]),
        empty_factor(A, batch, d),
        empty_info(A, batch),
    )


solve_spd = define(
    "solve_spd(Tensor A, Tensor B, bool check=False) -> (Tensor, Tensor, Tensor)",
    fake=solve_spd_results,
    own_dims=(2, 2),
)


def _apply_results(B: Tensor, A: Tensor, L: Tensor) -> Tensor:
    return cholesky_solve_results(B, L)


apply_spd_inverse = define(
    "apply_spd_inverse(Tensor B, Tensor A, Tensor L) -> Tensor",
    fake=_apply_results,
    own_dims=(2, 2, 2),
    first_has_batch=True,
)
