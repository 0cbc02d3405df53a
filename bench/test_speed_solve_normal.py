"""solve_normal against the torch composite: forward, forward + backward, one small problem."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import RIDGE, SHAPES, Shape, composite, rows

from onestep.linalg import solve_normal

by_label = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)


@by_label
@pytest.mark.benchmark(group="forward")
def test_forward(compare: Callable[..., float], shape: Shape) -> None:
    X, Y = rows(shape)
    ridge = RIDGE * torch.eye(shape.d)
    exact = composite(X.double(), Y.double(), ridge.double())
    ours, theirs = solve_normal(X, Y, ridge=RIDGE), composite(X, Y, ridge)
    compare(
        lambda: solve_normal(X, Y, ridge=RIDGE),
        lambda: composite(X, Y, ridge),
        case=shape.label,
        goal=shape.forward_goal,
        flops=shape.flops,
        bytes=shape.bytes_read,
        error=float((ours - exact).norm() / exact.norm()),
        peer_error=float((theirs - exact).norm() / exact.norm()),
    )


@by_label
@pytest.mark.benchmark(group="forward + backward")
def test_backward(compare: Callable[..., float], shape: Shape) -> None:
    X, Y = rows(shape, requires_grad=True)
    ridge = RIDGE * torch.eye(shape.d)
    cotangent = torch.randn(shape.B, shape.d, shape.k)

    def gradients(solve: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(solve(), (X, Y), cotangent)

    compare(
        lambda: gradients(lambda: solve_normal(X, Y, ridge=RIDGE)),
        lambda: gradients(lambda: composite(X, Y, ridge)),
        case=shape.label,
        goal=shape.backward_goal,
    )


@pytest.mark.benchmark(group="one small problem")
def test_single(compare: Callable[..., float]) -> None:
    X, Y, ridge = torch.randn(16, 8), torch.randn(16, 1), RIDGE * torch.eye(8)

    def repeat(solve: Callable[[], torch.Tensor]) -> torch.Tensor:
        for _ in range(999):
            solve()
        return solve()

    compare(
        lambda: repeat(lambda: solve_normal(X, Y, ridge=RIDGE)),
        lambda: repeat(lambda: composite(X, Y, ridge)),
        case="1,000 calls of (16, 8, 1)",
        goal=1.0,
    )
