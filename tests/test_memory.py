"""Kernels that get no work memory say so, and leave nothing behind: the next call has the bits of the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from onestep import _native

ops = torch.ops.onestep


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    _native.refuse_workspace(0)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = _random(300, 40), _random(300, 3, seed=1)
A = X.mT @ X
Q = _random(1, 2, 40, 8, seed=2)
TARGET = torch.arange(300) % 50

CALLS: dict[str, Callable[[], Any]] = {
    "gram": lambda: ops.gram(X, Y),
    "moments": lambda: ops.moments(X, Y),
    "solve_normal": lambda: ops.solve_normal(X, Y, None, None, 0.1, 2),
    "cholesky": lambda: ops.cholesky(A),
    "solve_spd": lambda: ops.solve_spd(A, A[:, :3].contiguous()),
    "glm_point": lambda: ops.glm_point(X, Y.abs(), _random(40, 3), None, 3, False),
    "linear_cross_entropy": lambda: ops.linear_cross_entropy(
        torch.ones(300), X, _random(50, 40), None, TARGET, -100, 0.0, [True, True, False]
    ),
    "mlp_gradient": lambda: ops.mlp_gradient(X, Y, _random(40 * 3 + 3), [40, 3], [0], [True], True),
    "sparse_multiply": lambda: ops.sparse_multiply(
        torch.arange(0, 121, 3), torch.arange(120) % 40, torch.ones(120), _random(40, 5)
    ),
    "attention": lambda: ops.attention(Q, Q, Q, None, 0.3, True),
    "attention_backward": lambda: ops.attention_backward(
        Q, None, Q, Q, Q, None, *ops.attention(Q, Q, Q, None, 0.3, True), 0.3, True, False
    ),
}


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("name", CALLS)
def test_refused_memory_is_an_error_and_nothing_else(name: str) -> None:
    call = CALLS[name]
    expected = _tensors(call())
    refusals = 0
    for n in range(1, 20):
        _native.release_workspaces()
        _native.refuse_workspace(n)
        try:
            result = _tensors(call())
        except MemoryError:
            refusals += 1
            continue
        finally:
            _native.refuse_workspace(0)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
        break
    else:
        pytest.fail("20 blocks of memory for one call")
    # Every one of these kernels works on memory of its own.
    assert refusals == n - 1 > 0
