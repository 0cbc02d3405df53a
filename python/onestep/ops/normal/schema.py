"""Schemas of the normal-equations ops: their operands' checks, their results' shapes, their vmap rules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from onestep.ops._library import define
from onestep.ops.normal.options import (
    SCHEMA_OF_SOLVE_NORMAL,
    SCHEMA_OF_SOLVE_NORMAL_EX,
    Options,
    of_solve_normal,
)
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

Batch = tuple[int, ...]
Moments = tuple[Tensor, Tensor, Tensor, Tensor]
# solution, L, info, rcond, jitter
Solved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# The same for a device's solve to fill; None: not wanted.
Results = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]

# What the rows of X may be beside the types of most kernels.
HALF = (torch.bfloat16, torch.float16)

# ``info`` of a problem whose weight or ridge (the ops' third and fourth arguments, counted as LAPACK does) has a
# negative value, on devices where values are not checked before the kernel runs.
NEGATIVE_WEIGHT, NEGATIVE_RIDGE = -3, -4


def check_rows(X: Tensor, Y: Tensor, weight: Tensor | None) -> list[Batch]:
    """Checks X (…,n,d), Y (…,n,k), weight (…,n); returns their batch shapes.

    X may be bfloat16 or float16, which kernels widen as they read it: Y, weight and the results are float32 then.
    """
    x_shape, y_shape, dtype = X.shape, Y.shape, X.dtype
    # The good case is one expression, since this is a large part of what a small problem takes.
    if not (
        dtype in FLOATING
        and Y.dtype == dtype
        and Y.device == X.device
        and len(x_shape) >= 2
        and len(y_shape) >= 2
        and x_shape[-2] == y_shape[-2]
    ):
        if dtype in HALF:
            check_floating("Y", Y)
            if Y.dtype != torch.float32:
                raise TypeError(f"Y has dtype {Y.dtype}; expected torch.float32, beside X of {dtype}")
            if Y.device != X.device:
                raise ValueError(f"Y is on device {Y.device}; expected {X.device}, like the other operands")
        else:
            check_floating("X", X)
            check_like("Y", Y, X)
        check_dims("X", X, 2, "(..., n, d)")
        check_dims("Y", Y, 2, "(..., n, k)")
        check_size("Y", Y, -2, x_shape[-2], f"(..., {x_shape[-2]}, k): as many rows as X")
    batches: list[Batch] = [
        () if len(x_shape) == 2 else x_shape[:-2],
        () if len(y_shape) == 2 else y_shape[:-2],
    ]
    if weight is not None:
        n = x_shape[-2]
        check_like("weight", weight, Y)
        check_dims("weight", weight, 1, "(..., n)")
        check_size("weight", weight, -1, n, f"(..., {n}): one weight per row of X")
        batches.append(weight.shape[:-1])
    return batches


# ---------------------------------------------------------------------------------------------------------------- gram


def gram_results(X: Tensor, Y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Checks the operands; returns XᵀDX (…,d,d) and XᵀDY (…,d,k), empty."""
    batch = broadcast_batch("X, Y, weight", *check_rows(X, Y, weight))
    d, k = X.shape[-1], Y.shape[-1]
    return Y.new_empty(*batch, d, d), Y.new_empty(*batch, d, k)


gram = define(
    "gram(Tensor X, Tensor Y, Tensor? weight=None) -> (Tensor, Tensor)",
    fake=gram_results,
    own_dims=(2, 2, 1),
)

# ------------------------------------------------------------------------------------------------------------- moments


def moments_results(X: Tensor, Y: Tensor, weight: Tensor | None = None, center: bool = False) -> Moments:
    """Checks the operands; returns gram (d,d), cross (d,k), means (d + k,) and the weights' sum (), empty."""
    if any(check_rows(X, Y, weight)):
        raise ValueError(f"moments takes one table: X {tuple(X.shape)} and Y {tuple(Y.shape)} have batch dimensions")
    d, k = X.shape[-1], Y.shape[-1]

    def empty(*shape: int) -> Tensor:
        return X.new_empty(shape, dtype=torch.float64)

    return empty(d, d), empty(d, k), empty(d + k), empty()


moments = define(
    "moments(Tensor X, Tensor Y, Tensor? weight=None, bool center=False) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=moments_results,
)

# -------------------------------------------------------------------------------------------------------- solve_normal


def _solve_batch(X: Tensor, Y: Tensor, weight: Tensor | None, ridge: Tensor | None, dual: bool) -> Batch:
    """Checks the operands of both solve ops; returns the batch shape."""
    batches = check_rows(X, Y, weight)
    if ridge is not None:
        d = X.shape[-1]
        check_like("ridge", ridge, Y)
        check_dims("ridge", ridge, 1, "(..., d)")
        check_size("ridge", ridge, -1, d, f"(..., {d}): one penalty per feature")
        batches.append(tuple(ridge.shape[:-1]))
    elif dual:
        raise ValueError("dual=True needs ridge > 0; got ridge=None")
    return broadcast_batch("X, Y, weight, ridge", *batches)


def check_uniform_ridge(uniform_ridge: float) -> None:
    """Raises ValueError unless the plain ridge is in range."""
    if not 0 <= uniform_ridge < math.inf:
        raise ValueError(f"ridge={uniform_ridge}; expected a finite number >= 0")


def solve_results(
    X: Tensor, Y: Tensor, weight: Tensor | None, ridge: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Checks the operands; returns solution (…,d,k) and info (…), empty."""
    batch = _solve_batch(X, Y, weight, ridge, options.dual)
    # Sizes as arguments of their own take half a microsecond less than a tuple.
    return Y.new_empty(*batch, X.shape[-1], Y.shape[-1]), empty_info(Y, batch)


def _fake_solve(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    *plain: Any,
) -> tuple[Tensor, Tensor]:
    return solve_results(X, Y, weight, ridge, of_solve_normal(*plain))


solve_normal = define(
    "solve_normal(Tensor X, Tensor Y, Tensor? weight=None, Tensor? ridge=None, float uniform_ridge=0.0, "
    f"{SCHEMA_OF_SOLVE_NORMAL}) -> (Tensor, Tensor)",
    fake=_fake_solve,
    own_dims=(2, 2, 1, 1),
)


def solve_ex_results(X: Tensor, Y: Tensor, weight: Tensor | None, ridge: Tensor | None, options: Options) -> Solved:
    """Checks the operands; returns solution (…,d,k), L, info (…), rcond (…), or (…,0) if unwanted, and jitter (…)."""
    batch = _solve_batch(X, Y, weight, ridge, options.dual)
    order = X.shape[-2] if options.dual else X.shape[-1]
    return (
        Y.new_empty(*batch, X.shape[-1], Y.shape[-1]),
        empty_factor(Y, batch, order),
        empty_info(Y, batch),
        Y.new_empty(batch if options.rcond else (*batch, 0)),
        Y.new_empty(batch),
    )


def _fake_solve_ex(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    *plain: Any,
) -> Solved:
    return solve_ex_results(X, Y, weight, ridge, Options(*plain))


solve_normal_ex = define(
    "solve_normal_ex(Tensor X, Tensor Y, Tensor? weight=None, Tensor? ridge=None, float uniform_ridge=0.0, "
    f"{SCHEMA_OF_SOLVE_NORMAL_EX}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_solve_ex,
    own_dims=(2, 2, 1, 1),
)


def raise_if_failed(info: Tensor, d: int) -> None:
    """Raises LinAlgError if any problem failed, naming how many, the first few, and what to do. Waits for a GPU."""
    if not any_failed(info):
        return
    for code, name in ((NEGATIVE_WEIGHT, "weight"), (NEGATIVE_RIDGE, "ridge")):
        if (info == code).any():
            raise ValueError(f"{name} has negative values; expected values >= 0")
    raise LinAlgError(
        f"{describe_failures(info, 'problems')}. info = i up to {d}: the leading minor of order i of X'DX + ridge is "
        "not positive definite, because columns are linearly dependent (rows, where n < d and ridge > 0), or X or "
        "weight holds NaN or Inf; "
        f"info = {d + 1}: Y holds NaN or Inf, or the solution overflowed. Add ridge > 0, remove dependent "
        "columns, clean the data, or call the _ex variant, which reports info and keeps the good solutions."
    )


# ------------------------------------------------------------------------------------------------------ for derivatives


def _check_matrix(name: str, tensor: Tensor, X: Tensor, rows: int, columns: int) -> None:
    """Checks the dtype, the device and the last two sizes of an operand beside X."""
    check_like(name, tensor, X)
    if tensor.dim() < 2 or tensor.shape[-2:] != (rows, columns):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (..., {rows}, {columns})")


def _check_implied(X: Tensor, weight: Tensor | None, ridge: Tensor | None, L: Tensor) -> None:
    """Checks what X, weight and ridge have led to: the factor L of A, (…,d,d), or of the dual matrix, (…,n,n)."""
    n, d = X.shape[-2:]
    if weight is not None:
        check_like("weight", weight, X)
        check_size("weight", weight, -1, n, f"(..., {n}): one weight per row of X")
    if ridge is not None:
        check_like("ridge", ridge, X)
        check_size("ridge", ridge, -1, d, f"(..., {d}): one penalty per feature")
    order = L.shape[-1] if L.dim() >= 2 else -1
    if order != d and not (order == n and ridge is not None):
        raise ValueError(
            f"L has shape {tuple(L.shape)}; expected (..., {d}, {d}), or with ridge the dual factor (..., {n}, {n})"
        )
    _check_matrix("L", L, X, order, order)


def backward_results(
    grad: Tensor,
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    solution: Tensor,
    L: Tensor,
    info: Tensor,
) -> Gradients:
    """Checks the operands; returns the gradients of X (…,n,d), Y (…,n,k), weight (…,n) and ridge (…,d), empty."""
    batches = check_rows(X, Y, weight)
    n, d, k = X.shape[-2], X.shape[-1], Y.shape[-1]
    for name, tensor in (("grad", grad), ("solution", solution)):
        _check_matrix(name, tensor, X, d, k)
        batches.append(tuple(tensor.shape[:-2]))
    _check_implied(X, weight, ridge, L)
    if info.dtype != torch.int32:
        raise TypeError(f"info has dtype {info.dtype}; expected torch.int32")
    batch = broadcast_batch("X, Y, weight, grad, solution, L, info", *batches, tuple(L.shape[:-2]), tuple(info.shape))
    return (
        X.new_empty((*batch, n, d)),
        X.new_empty((*batch, n, k)),
        X.new_empty((*batch, n)),
        X.new_empty((*batch, d)),
    )


solve_normal_backward = define(
    "solve_normal_backward(Tensor grad, Tensor X, Tensor Y, Tensor? weight, Tensor? ridge, Tensor solution, Tensor L, "
    "Tensor info) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=backward_results,
    own_dims=(2, 2, 2, 1, 1, 2, 2, 0),
    first_has_batch=True,
)


def apply_results(B: Tensor, X: Tensor, weight: Tensor | None, ridge: Tensor | None, L: Tensor) -> Tensor:
    """Checks the operands; returns A⁻¹B, in the shape of B with L's batch, empty."""
    check_floating("X", X)
    check_dims("X", X, 2, "(..., n, d)")
    check_dims("B", B, 2, "(..., d, k)")
    _check_matrix("B", B, X, X.shape[-1], B.shape[-1])
    _check_implied(X, weight, ridge, L)
    batch = broadcast_batch("B, L", tuple(B.shape[:-2]), tuple(L.shape[:-2]))
    return B.new_empty((*batch, *B.shape[-2:]))


apply_normal_inverse = define(
    "apply_normal_inverse(Tensor B, Tensor X, Tensor? weight, Tensor? ridge, Tensor L) -> Tensor",
    fake=apply_results,
    own_dims=(2, 2, 1, 1, 2),
    first_has_batch=True,
)
