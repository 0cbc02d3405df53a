"""Rows for NormalEquations, and their solution in fp64 from all rows at once."""

from __future__ import annotations

from typing import NamedTuple

import cases
import torch
from cases import assert_bitwise
from torch import Tensor

from onestep.linalg import NormalEquations


class Rows(NamedTuple):
    X: Tensor
    Y: Tensor
    weight: Tensor | None

    def part(self, rows: slice) -> Rows:
        return Rows(self.X[rows], self.Y[rows], None if self.weight is None else self.weight[rows])

    def chunks(self, size: int) -> list[Rows]:
        return [self.part(slice(start, start + size)) for start in range(0, len(self.X), size)]


def problem(
    n: int, d: int, k: int, dtype: torch.dtype, *, weighted: bool = False, offset: float = 0.0, name: str = ""
) -> Rows:
    generator = cases.seeded(f"rows {n} {d} {k} {name}")
    X = torch.randn(n, d, dtype=torch.float64, generator=generator)
    W = torch.randn(d, k, dtype=torch.float64, generator=generator)
    Y = X @ W + 0.5 * torch.randn(n, k, dtype=torch.float64, generator=generator) + 2 + offset
    weight = 0.5 + torch.rand(n, dtype=torch.float64, generator=generator) if weighted else None
    X += offset * (1 + torch.arange(d) / d)
    return Rows(X.to(dtype), Y.to(dtype), None if weight is None else weight.to(dtype))


def exact(rows: Rows, ridge: float | Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    """The minimiser over all rows at once, by a QR of the weighted and centred rows in fp64."""
    X, Y = rows.X.double(), rows.Y.double()
    w = torch.ones(len(X), dtype=torch.float64) if rows.weight is None else rows.weight.double()
    x_mean, y_mean = X.new_zeros(X.shape[1]), Y.new_zeros(Y.shape[1])
    if intercept:
        x_mean, y_mean = w @ X / w.sum(), w @ Y / w.sum()
        # The mean of what is left repairs the rounding of the means.
        x_mean, y_mean = x_mean + w @ (X - x_mean) / w.sum(), y_mean + w @ (Y - y_mean) / w.sum()
    penalty = torch.as_tensor(ridge, dtype=torch.float64).expand(X.shape[1]).sqrt().diag()
    root = w.sqrt().unsqueeze(-1)
    Q, R = torch.linalg.qr(torch.cat([root * (X - x_mean), penalty]))
    right = Q.T @ torch.cat([root * (Y - y_mean), penalty.new_zeros(X.shape[1], Y.shape[1])])
    W = torch.linalg.solve_triangular(R, right, upper=True)
    return W, y_mean - x_mean @ W


def accumulate(rows: Rows, size: int, *, intercept: bool = False) -> NormalEquations:
    equations = NormalEquations(rows.X.shape[1], rows.Y.shape[1], intercept=intercept, dtype=rows.X.dtype)
    for chunk in rows.chunks(size):
        equations.update(*chunk)
    return equations


def assert_same(ours: NormalEquations, theirs: NormalEquations) -> None:
    assert ours.count == theirs.count
    for part, expected in zip(ours.sums, theirs.sums, strict=True):
        assert_bitwise(part, expected)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm()) if expected.any() else float(actual.norm())


def tolerance(dtype: torch.dtype) -> float:
    return 2e-6 if dtype == torch.float32 else 1e-13
