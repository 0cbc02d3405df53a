"""Batched Cholesky factors and solves of symmetric positive definite systems (LAPACK xPOTRF, xPOTRS, xPOSV)."""

from __future__ import annotations

from torch import Tensor

from onestep.linalg._arguments import as_columns, floating
from onestep.linalg.dlpack import takes_arrays
from onestep.ops import cholesky as family


def _matrix(name: str, A: Tensor) -> Tensor:
    A = floating(name, A)
    if A.dim() < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"{name} has shape {tuple(A.shape)}; expected square matrices (..., d, d)")
    return A


@takes_arrays
def cholesky(A: Tensor) -> Tensor:
    """Factors A = LLᵀ, L lower triangular (LAPACK xPOTRF).

    Args:
        A: (…,d,d) symmetric positive definite, float32 or float64 (16-bit: computed in float32), of which the lower
            triangle is read; its gradient is symmetric.

    Returns:
        (…,d,d) in A's dtype (float32 for 16 bits), zeros above the diagonal. Differentiable to every order.

    Raises:
        torch.linalg.LinAlgError: a matrix is not positive definite, or holds NaN or Inf.
        ValueError, TypeError: A is no floating-point tensor of square matrices.

    Examples:
        >>> import torch
        >>> from onestep.linalg import cholesky
        >>> cholesky(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))
        tensor([[2., 0.],
                [1., 2.]])
    """
    factor: Tensor = family.cholesky(_matrix("A", A), True)[0]
    return factor


@takes_arrays
def cholesky_ex(A: Tensor) -> tuple[Tensor, Tensor]:
    """``cholesky`` that reports instead of raising.

    Args:
        A: (…,d,d), as in ``cholesky``.

    Returns:
        L (…,d,d) in A's dtype (float32 for 16 bits), NaN for a matrix that failed, with zero gradients; and info (…)
        int32, which is 0, or the 1-based order of the leading minor that is not positive definite.

    Raises:
        ValueError, TypeError: A is no floating-point tensor of square matrices.

    Examples:
        >>> import torch
        >>> from onestep.linalg import cholesky_ex
        >>> L, info = cholesky_ex(torch.stack([torch.eye(2), -torch.eye(2)]))
        >>> info
        tensor([0, 1], dtype=torch.int32)
    """
    factor, info = family.cholesky(_matrix("A", A))
    return factor, info


@takes_arrays
def cholesky_solve(B: Tensor, L: Tensor) -> Tensor:
    """Solves LLᵀX = B (LAPACK xPOTRS).

    Args:
        B: (…,d,k) or (…,d) right-hand sides, float32 or float64.
        L: (…,d,d) lower triangular factor, same dtype; above the diagonal nothing is read.

    Returns:
        X, shaped like B with the batch broadcast. Differentiable to every order.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.

    Examples:
        >>> import torch
        >>> from onestep.linalg import cholesky_solve
        >>> cholesky_solve(torch.tensor([4.0, 5.0]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([1., 5.])
    """
    L = _matrix("L", L)
    columns, is_vector = as_columns("B", floating("B", B, L), L, L.shape[-1])
    solution: Tensor = family.cholesky_solve(columns, L)
    return solution.squeeze(-1) if is_vector else solution


@takes_arrays
def solve_spd(A: Tensor, B: Tensor) -> Tensor:
    """Solves AX = B for symmetric positive definite A, by one fused Cholesky factorisation and solve.

    (LAPACK xPOSV.)

    Args:
        A: (…,d,d), float32 or float64 (16-bit: computed in float32), of which the lower triangle is read; its gradient
            is symmetric.
        B: (…,d,k) or (…,d), same dtype.

    Returns:
        X, shaped like B with the batch broadcast. Differentiable to every order.

    Raises:
        torch.linalg.LinAlgError: a matrix is not positive definite, or an operand holds NaN or Inf.
        ValueError, TypeError: shapes or dtypes do not fit.

    Examples:
        >>> import torch
        >>> from onestep.linalg import solve_spd
        >>> solve_spd(torch.tensor([[4.0, 0.0], [0.0, 16.0]]), torch.tensor([4.0, 32.0]))
        tensor([1., 2.])
    """
    return _solve_spd(A, B, check=True)[0]


@takes_arrays
def solve_spd_ex(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """``solve_spd`` that reports instead of raising.

    Args:
        A: (…,d,d), as in ``solve_spd``.
        B: (…,d,k) or (…,d), same dtype.

    Returns:
        X, NaN where it failed, with zero gradients; and info (…) int32, as in ``solve_normal_ex``.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.

    Examples:
        >>> import torch
        >>> from onestep.linalg import solve_spd_ex
        >>> X, info = solve_spd_ex(torch.stack([torch.eye(2), torch.zeros(2, 2)]), torch.ones(2, 2))
        >>> info.tolist(), X.tolist()
        ([0, 1], [[1.0, 1.0], [nan, nan]])
    """
    return _solve_spd(A, B, check=False)


def _solve_spd(A: Tensor, B: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    A = _matrix("A", A)
    columns, is_vector = as_columns("B", floating("B", B, A), A, A.shape[-1])
    solution, _, info = family.solve_spd(A, columns, check)
    return solution.squeeze(-1) if is_vector else solution, info
