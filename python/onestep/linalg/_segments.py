"""Ragged least-squares problems that gather their rows and share a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onestep.linalg._arguments import floating, number, ridge_per_feature
from onestep.linalg.dlpack import takes_arrays
from onestep.ops import segments


class SolveSegmentsResult(NamedTuple):
    """What ``solve_normal_segments_ex`` returns.

    Attributes:
        solution: (B,d,k) or (B,d) in X's dtype. NaN for a problem that failed; its gradients are zero.
        info: (B,) int32, as ``SolveNormalResult.info``.

    Examples:
        >>> import torch
        >>> from onestep.linalg import solve_normal_segments_ex
        >>> X, Y = torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([1.0, 3.0, 8.0])
        >>> result = solve_normal_segments_ex(X, Y, torch.tensor([0, 2, 3]))  # rows 0 and 1, and row 2
        >>> [round(w, 4) for w in result.solution.flatten().tolist()], result.info
        ([2.0, 4.0], tensor([0, 0], dtype=torch.int32))
    """

    solution: Tensor
    info: Tensor


@takes_arrays
def solve_normal_segments(
    X: Tensor,
    Y: Tensor,
    offsets: Tensor,
    *,
    indices: Tensor | None = None,
    weight: Tensor | None = None,
    base: Tensor | None = None,
    ridge: float | Tensor = 0.0,
) -> Tensor:
    """Solves B least-squares problems of different sizes, which gather their rows from one table, in one call.

    Problem b has the entries e = offsets[b], ..., offsets[b + 1] - 1, each with the row x_e = X[indices[e]]:
    W_b = (base + Σ w_e x_e x_eᵀ + diag(ridge))⁻¹ Σ w_e x_e y_eᵀ. That is a half-step of alternating least squares, with
    ``base`` = XᵀX for implicit feedback (Hu, Koren and Volinsky, ICDM 2008), and any regression per group or user.

    A problem with fewer rows than features is solved in its dual form (I + SSᵀ)a = t, n × n, on rows whitened by the
    Cholesky factor of base + ridge, where all problems share that matrix, it is well conditioned, and no derivative is
    wanted; the result is the same to rounding. The work is shared among threads by its amount, and the result does not
    depend on their number.

    Args:
        X: (r,d) rows of features, float32 or float64, any strides.
        Y: (m,k) or (m,) targets of the entries.
        offsets: (B + 1,) int64 or int32, from 0 to m, never falling. A problem may have no entries.
        indices: (m,) int64 or int32, the row of X of each entry; None: entry e has row e, and r = m.
        weight: (m,) weights of the entries, >= 0.
        base: (d,d) symmetric matrix that is added for each problem. Of any other matrix the symmetric part counts.
        ridge: penalty >= 0: a number or scalar tensor, one per problem (B,) or (B,1), or one per feature, (d,) or
            (B,d).

    Returns:
        (B,d,k), or (B,d) if Y is (m,). Differentiable in X, Y, weight, base and ridge to every order; derivatives take
        memory for m × d × k numbers.

    Raises:
        torch.linalg.LinAlgError: a problem is singular or holds NaN or Inf; ``solve_normal_segments_ex`` reports it
            instead.
        ValueError, TypeError: an argument has the wrong shape, dtype, device, order or sign.

    Examples:
        >>> import torch
        >>> from onestep.linalg import solve_normal_segments
        >>> X = torch.tensor([[1.0], [2.0], [3.0]])
        >>> y = torch.tensor([2.0, 4.0, 9.0])
        >>> solve_normal_segments(X, y, torch.tensor([0, 2, 3]))  # rows 0 and 1, and row 2
        tensor([[2.],
                [3.]])
    """
    return _solve(X, Y, offsets, indices, weight, base, ridge, True).solution


@takes_arrays
def solve_normal_segments_ex(
    X: Tensor,
    Y: Tensor,
    offsets: Tensor,
    *,
    indices: Tensor | None = None,
    weight: Tensor | None = None,
    base: Tensor | None = None,
    ridge: float | Tensor = 0.0,
) -> SolveSegmentsResult:
    """``solve_normal_segments`` that never raises for a bad problem, but reports each problem's status.

    A problem that fails has NaN for a solution and zero gradients. All others are bitwise what they would be without
    it.

    Args:
        X, Y, offsets, indices, weight, base, ridge: as in ``solve_normal_segments``.

    Returns:
        ``SolveSegmentsResult(solution, info)``, of which the solution alone is differentiable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device, order or sign.

    Examples:
        >>> import torch
        >>> from onestep.linalg import solve_normal_segments_ex
        >>> X, y = torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([2.0, 4.0, 1.0])
        >>> solve_normal_segments_ex(X, y, torch.tensor([0, 2, 3])).info  # the second problem's row is zero
        tensor([0, 1], dtype=torch.int32)
    """
    return _solve(X, Y, offsets, indices, weight, base, ridge, False)


def _solve(
    X: Tensor,
    Y: Tensor,
    offsets: Tensor,
    indices: Tensor | None,
    weight: Tensor | None,
    base: Tensor | None,
    ridge: float | Tensor,
    check: bool,
) -> SolveSegmentsResult:
    X = floating("X", X)
    Y = floating("Y", Y, X)
    if X.dim() != 2 or X.shape[1] == 0:
        raise ValueError(f"X has shape {tuple(X.shape)}; expected (rows, d), with at least one feature")
    is_vector = Y.dim() == 1
    offsets = _integers("offsets", offsets)
    indices = None if indices is None else _integers("indices", indices)
    weight = None if weight is None else floating("weight", weight, X)
    base = None if base is None else floating("base", base, X)
    penalties: Tensor | None = None
    uniform = 0.0
    if isinstance(ridge, Tensor):
        problems = max(offsets.shape[0] - 1, 0) if offsets.dim() == 1 else 0
        penalties = ridge_per_feature(ridge, X, torch.Size((problems,))).expand(problems, X.shape[1])
    else:
        most = torch.finfo(X.dtype).max
        uniform = number("ridge", ridge, 0.0, most, "a tensor or a number from 0, finite in X's dtype")
    solution, info = segments.solve_normal_segments(
        X, Y.unsqueeze(-1) if is_vector else Y, offsets, indices, weight, base, penalties, uniform, check
    )
    return SolveSegmentsResult(solution.squeeze(-1) if is_vector else solution, info)


def _integers(name: str, value: object) -> Tensor:
    """The tensor as int64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; expected torch.Tensor")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} has dtype {value.dtype}; expected torch.int64 or torch.int32")
    return value.to(torch.int64)
