"""The benchmark's problems and the torch composite that they are measured against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 0.1


class Shape(NamedTuple):
    """A batch of B problems: n rows, d features, k targets; the goals that the project sets itself."""

    B: int
    n: int
    d: int
    k: int
    forward_goal: float | None
    backward_goal: float | None

    @property
    def label(self) -> str:
        return f"{self.B:,} × ({self.n}, {self.d}, {self.k})"

    @property
    def flops(self) -> int:
        """What the forward pass needs at least: half of XᵀX, XᵀY, the factor, two triangular solves."""
        n, d, k = self.n, self.d, self.k
        return self.B * (n * d * (d + 1) + 2 * n * d * k + d**3 // 3 + 2 * d * d * k)

    @property
    def bytes_read(self) -> int:
        return 4 * self.B * self.n * (self.d + self.k)


SHAPES = [
    Shape(20000, 16, 8, 1, 6.0, 4.0),
    Shape(20000, 32, 16, 1, 6.0, 4.0),
    Shape(8192, 64, 32, 1, 6.0, 4.0),
    Shape(4096, 128, 64, 8, 4.0, 2.5),
    Shape(512, 256, 128, 8, 3.0, 2.5),
    Shape(128, 1024, 256, 16, 1.3, None),
    Shape(16, 2048, 512, 16, 1.2, None),
]


def rows(shape: Shape, *, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(shape.B, shape.n, shape.d, generator=generator)
    Y = torch.randn(shape.B, shape.n, shape.k, generator=generator)
    return X.requires_grad_(requires_grad), Y.requires_grad_(requires_grad)


def composite(X: Tensor, Y: Tensor, ridge: Tensor) -> Tensor:
    """What a torch user writes today; ``ridge`` is λI."""
    return torch.cholesky_solve(X.mT @ Y, torch.linalg.cholesky_ex(X.mT @ X + ridge)[0])
