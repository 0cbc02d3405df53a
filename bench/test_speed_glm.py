"""Hessian-vector products of generalised linear models against torch's ways to them."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from onestep.curvature import glm


class Shape(NamedTuple):
    """n rows, d features, k classes (1: logistic); the goal that the project sets itself."""

    n: int
    d: int
    k: int
    goal: float
    rounds: int

    @property
    def case(self) -> str:
        sizes = f"{self.n:,} × {self.d}"
        return f"logistic {sizes}" if self.k == 1 else f"softmax {sizes} × {self.k}"

    @property
    def family(self) -> str:
        return "logistic" if self.k == 1 else "softmax"

    @property
    def cost(self) -> dict[str, int]:
        """Two products, and X and the curvature read once."""
        return {"flops": 4 * self.n * self.d * self.k, "bytes": 4 * self.n * (self.d + self.k)}


SHAPES = [
    Shape(1_000_000, 32, 1, 8.0, 9),
    Shape(20_000, 784, 10, 4.0, 9),
    Shape(8192, 768, 1000, 2.3, 5),
]


def problem(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, targets, W and V."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(shape.n, shape.d, generator=generator)
    labels = torch.randint(0, max(2, shape.k), (shape.n,), generator=generator)
    size = (shape.d,) if shape.k == 1 else (shape.d, shape.k)
    W, V = (torch.randn(2, *size, generator=generator) / shape.d**0.5).unbind()
    return X, labels.float() if shape.k == 1 else labels, W, V


def torch_ways(X: Tensor, y: Tensor, W: Tensor, V: Tensor, family: str, kept: bool) -> dict[str, Callable[[], Tensor]]:
    """Forward mode over reverse mode, and double backward; ``kept``: through a graph that is made once, outside."""
    loss_of = binary_cross_entropy_with_logits if family == "logistic" else cross_entropy
    leaf = W.clone().requires_grad_()

    def loss(W: Tensor) -> Tensor:
        return loss_of(X @ W, y, reduction="sum")

    def gradient() -> Tensor:
        return torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0]

    if kept:
        slope = gradient()
        return {"double backward, graph kept": lambda: torch.autograd.grad(slope, leaf, V, retain_graph=True)[0]}
    return {
        "double backward": lambda: torch.autograd.grad(gradient(), leaf, V)[0],
        "jvp(grad)": lambda: torch.func.jvp(torch.func.grad(loss), (W,), (V,))[1],
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.case)
@pytest.mark.benchmark(group="GLM HVP")
def test_product(compare: Callable[..., float], shape: Shape, kept: bool) -> None:
    """Against the faster of torch's two ways, and against a graph that is kept as the point is."""
    X, y, W, V = problem(shape)
    point = glm(X, y, W, shape.family)
    ways = torch_ways(X, y, W, V, shape.family, kept)
    name, peer = min(ways.items(), key=lambda way: min(timeit.repeat(way[1], number=1, repeat=3)))
    exact = glm(X.double(), y, W.double(), shape.family).hvp(V.double())
    compare(
        lambda: point.hvp(V),
        peer,
        rounds=shape.rounds,
        case=f"{shape.case}; peer: {name}",
        goal=None if kept else shape.goal,
        error=relative_error(point.hvp(V), exact),
        peer_error=relative_error(peer(), exact),
        **shape.cost,
    )


@pytest.mark.benchmark(group="GLM HVP")
def test_product_by_hand(compare: Callable[..., float]) -> None:
    """Against the two products that one writes by hand for a logistic model, its curvature known."""
    shape = Shape(1_000_000, 256, 1, 2.5, 9)
    X, y, W, V = problem(shape)
    point = glm(X, y, W, shape.family)
    p = (X @ W).sigmoid()
    curvature = p * (1 - p)
    compare(
        lambda: point.hvp(V),
        lambda: X.T @ (curvature * (X @ V)),
        rounds=shape.rounds,
        case=f"{shape.case}; peer: X.T @ (s * (X @ v))",
        goal=shape.goal,
        **shape.cost,
    )
