"""Schemas of the ops on ragged problems: their operands' checks and their results' shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.ops._library import define
from onestep.ops.operands import check_dims, check_floating, check_like, check_size, empty_factor

# solution, L, info
Solved = tuple[Tensor, Tensor, Tensor]


def _check_integers(name: str, tensor: Tensor, X: Tensor, meaning: str) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected torch.int64")
    if tensor.device != X.device:
        raise ValueError(f"{name} is on device {tensor.device}; expected {X.device}, like the other operands")
    if tensor.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {meaning}")


def _check_operands(
    X: Tensor,
    Y: Tensor,
    offsets: Tensor,
    indices: Tensor | None,
    weight: Tensor | None,
    base: Tensor | None,
    ridge: Tensor | None,
) -> int:
    """Checks X (r,d), Y (m,k), offsets (B + 1,), indices (m,), weight (m,), base (d,d), ridge (B,d); returns B."""
    check_floating("X", X)
    for name, matrix, meaning in (("X", X, "(rows, d)"), ("Y", Y, "(m, k)")):
        check_dims(name, matrix, 2, meaning)
        if matrix.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}; expected {meaning}")
    check_like("Y", Y, X)
    _check_integers("offsets", offsets, X, "(B + 1,)")
    if offsets.shape[0] < 1:
        raise ValueError("offsets is empty; expected (B + 1,): where each problem begins, and where the last one ends")
    entries, d, problems = Y.shape[0], X.shape[1], offsets.shape[0] - 1
    if indices is not None:
        _check_integers("indices", indices, X, f"({entries},): the row of X of each row of Y")
        check_size("indices", indices, -1, entries, f"({entries},): the row of X of each row of Y")
    else:
        check_size("X", X, -2, entries, f"({entries}, d): as many rows as Y, or pass indices")
    for name, tensor, shape in (
        ("weight", weight, (entries,)),
        ("base", base, (d, d)),
        ("ridge", ridge, (problems, d)),
    ):
        if tensor is not None:
            check_like(name, tensor, X)
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    return problems


def segments_results(
    X: Tensor,
    Y: Tensor,
    offsets: Tensor,
    indices: Tensor | None = None,
    weight: Tensor | None = None,
    base: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Checks the operands; returns solution (B,d,k) and info (B,), empty."""
    problems = _check_operands(X, Y, offsets, indices, weight, base, ridge)
    return X.new_empty(problems, X.shape[1], Y.shape[1]), X.new_empty(problems, dtype=torch.int32)


solve_normal_segments = define(
    "solve_normal_segments(Tensor X, Tensor Y, Tensor offsets, Tensor? indices=None, Tensor? weight=None, "
    "Tensor? base=None, Tensor? ridge=None, float uniform_ridge=0.0, bool check=False) -> (Tensor, Tensor)",
    fake=segments_results,
)


def segments_ex_results(
    X: Tensor,
    Y: Tensor,
    offsets: Tensor,
    indices: Tensor | None = None,
    weight: Tensor | None = None,
    base: Tensor | None = None,
    ridge: Tensor | None = None,
    uniform_ridge: float = 0.0,
    check: bool = False,
) -> Solved:
    """Checks the operands; returns solution (B,d,k), L (B,d,d) and info (B,), empty."""
    solution, info = segments_results(X, Y, offsets, indices, weight, base, ridge)
    return solution, empty_factor(X, (info.shape[0],), X.shape[1]), info


solve_normal_segments_ex = define(
    "solve_normal_segments_ex(Tensor X, Tensor Y, Tensor offsets, Tensor? indices=None, Tensor? weight=None, "
    "Tensor? base=None, Tensor? ridge=None, float uniform_ridge=0.0, bool check=False) -> (Tensor, Tensor, Tensor)",
    fake=segments_ex_results,
)


def apply_results(
    B: Tensor,
    X: Tensor,
    offsets: Tensor,
    indices: Tensor | None,
    weight: Tensor | None,
    base: Tensor | None,
    ridge: Tensor | None,
    L: Tensor,
) -> Tensor:
    """Checks the operands; returns A⁻¹B, in the shape of B (B,d,k), empty."""
    check_floating("X", X)
    for name, tensor in (("B", B), ("L", L)):
        check_like(name, tensor, X)
        check_dims(name, tensor, 3, "(B, d, ·)")
        check_size(name, tensor, -2, X.shape[1], f"(B, {X.shape[1]}, ·)")
    return B.new_empty(B.shape)


apply_segments_inverse = define(
    "apply_segments_inverse(Tensor B, Tensor X, Tensor offsets, Tensor? indices, Tensor? weight, Tensor? base, "
    "Tensor? ridge, Tensor L) -> Tensor",
    fake=apply_results,
)
