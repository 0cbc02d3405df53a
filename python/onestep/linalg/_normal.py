"""Least squares by the normal equations."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from onestep._fork import safe_after_fork
from onestep.linalg._arguments import (
    as_columns,
    features,
    floating,
    number,
    result_dtype,
    ridge_per_feature,
    steps,
    values_are_known,
)
from onestep.linalg.dlpack import takes_arrays
from onestep.ops import normal
from onestep.ops.normal.formulas import more_jitter
from onestep.ops.normal.options import Options, to_solve_normal
from onestep.ops.operands import broadcast_batch

# X, Y, weight, ridge, uniform_ridge
_Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]

# Kept, since torch takes as long to make one as a check takes.
_FINFO = {dtype: torch.finfo(dtype) for dtype in (torch.float32, torch.float64)}

# Up to this many features the kernel solves a problem per vector lane, which no dual form beats.
_PACKED_FEATURES = 32


class SolveNormalResult(NamedTuple):
    """What ``solve_normal_ex`` returns; batch shape … throughout.

    Attributes:
        solution: (…,d,k) or (…,d) in X's dtype (float32 for 16 bits). NaN for a problem that failed; its gradients are
            zero.
        info: (…) int32, as LAPACK's xPOTRF: 0, or the 1-based order of the leading minor of A that is not positive
            definite (or holds NaN or Inf); or d + 1 where A is fine and Y or the solution is not finite. For n < d with
            a ridge A is the n × n matrix of the dual form, whose orders count rows of X.
        rcond: (…) in the solution's dtype, an estimate of 1 / (‖A‖₁‖A⁻¹‖₁) (LAPACK xPOCON); 0 for a problem that
            failed. cond(A) = cond(X)² where there is no ridge. For n < d with a ridge it is that of the n × n dual
            system.
        jitter: (…) in the solution's dtype, what was added to the diagonal of A; 0 where nothing was.

    Examples:
        >>> import torch
        >>> from onestep.linalg import solve_normal_ex
        >>> X = torch.tensor([[[1.0], [1.0]], [[0.0], [0.0]]])  # the second of two problems has no solution
        >>> solve_normal_ex(X, torch.ones(2, 2, 1)).info
        tensor([0, 1], dtype=torch.int32)
    """

    solution: Tensor
    info: Tensor
    rcond: Tensor
    jitter: Tensor


class Moments(NamedTuple):
    """What ``moments`` returns, all float64.

    Attributes:
        gram: (d,d) Σ w (x − x̄)(x − x̄)ᵀ, or XᵀDX if not centred.
        cross: (d,k) Σ w (x − x̄)(y − ȳ)ᵀ, or XᵀDY.
        x_mean: (d,) weighted means; zeros if not centred.
        y_mean: (k,) likewise.
        weight_sum: () Σ w, or n.

    Examples:
        >>> import torch
        >>> from onestep.linalg import moments
        >>> found = moments(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]]), center=True)
        >>> found.gram.item(), found.cross.item(), found.x_mean.item()
        (2.0, 4.0, 1.0)
    """

    gram: Tensor
    cross: Tensor
    x_mean: Tensor
    y_mean: Tensor
    weight_sum: Tensor


def _problem(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: float | Tensor,
    refine: int,
    jitter: float | None = None,
    check: bool = False,
) -> tuple[_Operands, Options, bool]:
    """The arguments of the public functions as the ops take them, and whether Y came as vectors.

    Plain arguments are brought to the types of ``Options``. Every public function calls this, so a check of one stands
    here.
    """
    refine = steps("refine", refine)
    added = 0.0
    if jitter is not None:
        added = number("jitter", jitter, sys.float_info.min, 1.0, "None or a fraction of the mean diagonal in (0, 1]")
    X = features(X)
    Y = floating("Y", Y, X)
    shape = X.shape
    if len(shape) < 2:
        raise ValueError(f"X has shape {tuple(shape)}; expected (..., n, d)")
    n, d = shape[-2:]
    if d == 0:
        raise ValueError(f"X has shape {tuple(shape)}; expected at least one feature (d >= 1)")
    Y, is_vector = as_columns("Y", Y, X, n)
    if weight is not None:
        weight = floating("weight", weight, X)
    may_be_dual = n < d and d > _PACKED_FEATURES
    limits = _FINFO[result_dtype(X)]
    if not isinstance(ridge, Tensor):
        uniform_ridge = number("ridge", ridge, 0.0, limits.max, "a tensor or a number from 0, finite in X's dtype")
        dual = may_be_dual and uniform_ridge >= limits.tiny
        penalties = None
        if dual:
            penalties, uniform_ridge = Y.new_full((1,), uniform_ridge).expand(d), 0.0
    else:
        shapes = [tuple(X.shape[:-2]), tuple(Y.shape[:-2])] + ([] if weight is None else [tuple(weight.shape[:-1])])
        penalties = ridge_per_feature(ridge, X, torch.Size(broadcast_batch("X, Y, weight", *shapes)))
        dual = may_be_dual and values_are_known(penalties) and bool((penalties >= limits.tiny).all())
        uniform_ridge = 0.0
    return (X, Y, weight, penalties, uniform_ridge), Options(refine, added, dual, True, check), is_vector


@takes_arrays
def solve_normal(
    X: Tensor, Y: Tensor, *, weight: Tensor | None = None, ridge: float | Tensor = 0.0, refine: int = 0
) -> Tensor:
    """Solves W = (XᵀDX + diag(ridge))⁻¹ XᵀDY for a batch of least-squares problems, D = diag(weight).

    One fused pass per problem: Gram matrix, Cholesky factor, solves (LAPACK xSYRK, xPOTRF, xPOTRS). With n < d and
    ridge > 0 the n × n dual form is taken where it is cheaper, with the same result.

    The normal equations square the condition number: cond(XᵀX) = cond(X)². ``refine`` repairs most of it: each step
    costs one more pass over X and solves for a correction with the residual Y − XW recomputed from X in float64
    (corrected semi-normal equations: Björck, Linear Algebra Appl. 88/89, 1987); two steps come near the accuracy of a
    QR factorisation while cond(X)² stays below 1/ε.

    Args:
        X: (…,n,d) rows of features, float32 or float64, any strides; bfloat16 and float16 are widened as they are read,
            without a copy, and summed in float32.
        Y: (…,n,k) or (…,n) targets, of X's dtype, or float32 beside a 16-bit X.
        weight: (…,n) weights of the rows, >= 0, likewise.
        ridge: penalty >= 0: a number or scalar tensor, one per problem (the batch shape, or (…,1)), or one per
            feature (…,d). A tensor may require grad.
        refine: refinement steps.

    Returns:
        (…,d,k), or (…,d) if Y is (…,n), in X's dtype (float32 for 16 bits). Differentiable in X, Y, weight and ridge by
        backward, forward mode, vmap and every composition of them; refinement and the choice of form do not change
        the derivatives.

    Raises:
        torch.linalg.LinAlgError: a problem is singular or holds NaN or Inf; ``solve_normal_ex`` reports it instead.
        ValueError, TypeError: an argument has the wrong shape, dtype, device or sign.

    Examples:
        >>> import torch
        >>> from onestep.linalg import solve_normal
        >>> X = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
        >>> Y = torch.tensor([[1.0, 2.0, 3.0], [4.0, 2.0, 0.0]])  # two problems of 3 rows and 2 features
        >>> solve_normal(X, Y).round(decimals=4)
        tensor([[1., 2.],
                [2., 1.]])
    """
    operands, options, is_vector = _problem(X, Y, weight, ridge, refine, check=True)
    solution: Tensor = normal.solve_normal(*operands, *to_solve_normal(options))[0]
    return solution.squeeze(-1) if is_vector else solution


@takes_arrays
def solve_normal_ex(
    X: Tensor,
    Y: Tensor,
    *,
    weight: Tensor | None = None,
    ridge: float | Tensor = 0.0,
    refine: int = 0,
    jitter: float | None = None,
) -> SolveNormalResult:
    """``solve_normal`` that never raises for a bad problem, but reports each problem's status and condition.

    A problem that fails (singular to working precision, NaN, Inf) has NaN for a solution and zero gradients. All
    other problems are bitwise what they would be without it. A pivot counts as zero below 8 ε times its diagonal
    element of A, where only rounding noise is left of it.

    Args:
        X, Y, weight, ridge, refine: as ``solve_normal``.
        jitter: if given, a failed problem is tried again with ``jitter * mean(diag A)`` added to the diagonal, tenfold
            more each time until it succeeds or the mean itself has been added. In (0, 1], 1e-6 is usual for float32,
            1e-12 for float64. Derivatives treat what was added as a constant.

    Returns:
        ``SolveNormalResult(solution, info, rcond, jitter)``, of which the solution alone is differentiable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or sign.

    Examples:
        >>> import torch
        >>> from onestep.linalg import solve_normal_ex
        >>> X = torch.stack([torch.eye(2), torch.ones(2, 2)])  # the columns of the second are equal
        >>> solution, info, rcond, jitter = solve_normal_ex(X, torch.ones(2, 2))
        >>> info.tolist(), solution.tolist()
        ([0, 2], [[1.0, 1.0], [nan, nan]])
    """
    operands, options, is_vector = _problem(X, Y, weight, ridge, refine, jitter)
    if options.dual and options.jitter > 0:
        solution, info, rcond, added = _dual_with_jitter(operands, options)
    else:
        solution, _, info, rcond, added = normal.solve_normal_ex(*operands, *options)
    return SolveNormalResult(solution.squeeze(-1) if is_vector else solution, info, rcond, added)


@safe_after_fork
def _dual_with_jitter(operands: _Operands, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel's jitter for the dual form, where adding to the diagonal of A is adding to the ridge."""
    X, Y, weight, penalty, _ = operands
    assert penalty is not None
    in_dual = options._replace(jitter=0.0)
    weighted = X.detach().square() if weight is None else weight.detach().unsqueeze(-1) * X.detach().square()
    mean_diagonal = (weighted.sum(-2) + penalty.detach()).mean(-1)
    added = torch.zeros((), dtype=X.dtype, device=X.device)
    attempt = 0
    while True:
        ridge = penalty + added.unsqueeze(-1)
        solution, _, info, rcond, _ = normal.solve_normal_ex(X, Y, weight, ridge, 0.0, *in_dual)
        retry, more = more_jitter(info, X.shape[-1], mean_diagonal, added, options.jitter, attempt)
        if not values_are_known(info) or not retry.any():
            failed = (info > 0) & (info <= X.shape[-1])
            return solution, info, rcond, torch.where(failed, 0, added).expand(info.shape).contiguous()
        added = more
        attempt += 1


@takes_arrays
def gram(X: Tensor, Y: Tensor | None = None, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes XᵀDX and XᵀDY in one pass over the rows, D = diag(weight) (BLAS xSYRK, xGEMM).

    Args:
        X: (…,n,d) float32 or float64, any strides; bfloat16 or float16, which are widened as they are read (bfloat16
            without Y and weight is multiplied by AMX tiles where the CPU has them, and summed in float32).
        Y: (…,n,k) or (…,n), of X's dtype, or float32 beside a 16-bit X; None for no targets, k = 0.
        weight: (…,n), >= 0, likewise.

    Returns:
        (…,d,d), exactly symmetric, and (…,d,k), or (…,d) if Y is (…,n). Differentiable to every order.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or sign.

    Examples:
        >>> import torch
        >>> from onestep.linalg import gram
        >>> gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2))
        (tensor([[10., 14.],
                 [14., 20.]]), tensor([4., 6.]))
    """
    X = features(X)
    if X.dim() < 2:
        raise ValueError(f"X has shape {tuple(X.shape)}; expected (..., n, d)")
    if Y is None:
        columns, is_vector = X.detach()[..., :0].to(result_dtype(X)), False
    else:
        columns, is_vector = as_columns("Y", floating("Y", Y, X), X, X.shape[-2])
    if weight is not None:
        weight = floating("weight", weight, X)
    products, cross = normal.gram(X, columns, weight)
    return products, cross.squeeze(-1) if is_vector else cross


@takes_arrays
def moments(X: Tensor, Y: Tensor, *, weight: Tensor | None = None, center: bool = False) -> Moments:
    """Second moments of one table, and its means, in one pass over X and without a copy of it, in float64.

    Rows are centred on provisional means while they are loaded (Chan, Golub and LeVeque, The American Statistician 37,
    1983), so that columns whose mean is large against their spread lose no digits. Not differentiable.

    Args:
        X: (n,d) float32 or float64, any strides; bfloat16 or float16, which are widened as they are read.
        Y: (n,k), same dtype.
        weight: (n,), >= 0, same dtype.
        center: whether to subtract the weighted means.

    Returns:
        ``Moments``: XᵀDX and XᵀDY, centred if asked for, and the means.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or sign.

    Examples:
        >>> import torch
        >>> from onestep.linalg import moments
        >>> found = moments(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [6.0]]), center=True)
        >>> found.gram.item(), found.cross.item(), found.x_mean.item()
        (2.0, 4.0, 2.0)
    """
    X = features(X)
    if weight is not None:
        weight = floating("weight", weight, X)
    products, cross, mean, weight_sum = normal.moments(X, floating("Y", Y, X), weight, center)
    d = X.shape[-1]
    return Moments(products, cross, mean[:d], mean[d:], weight_sum)
