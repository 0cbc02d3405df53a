"""NormalEquations on a stream of rows, in time against the Gram kernel alone and in added memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onestep.linalg import LinearSolution, NormalEquations, gram

N, D, CHUNK = 10_000_000, 128, 100_000

# Chunks that are made; the stream repeats them. Together they are far larger than a cache.
DISTINCT = 4


def chunks(n: int, d: int) -> list[tuple[Tensor, Tensor]]:
    """A stream of n rows, X (CHUNK,d) and Y (CHUNK,1) each, in the memory of a few of them."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(d, 1, generator=generator)
    made = []
    for _ in range(DISTINCT):
        X = torch.randn(CHUNK, d, generator=generator)
        made.append((X, X @ W + torch.randn(CHUNK, 1, generator=generator)))
    return [made[index % DISTINCT] for index in range(n // CHUNK)]


def accumulate(stream: list[tuple[Tensor, Tensor]]) -> NormalEquations:
    equations = NormalEquations(D, 1, dtype=torch.float32)
    for X, Y in stream:
        equations.update(X, Y)
    return equations


def solution_in(dtype: torch.dtype, stream: list[tuple[Tensor, Tensor]]) -> Tensor:
    """W from Gram matrices of `dtype`, each distinct chunk's as often as it comes."""
    products, cross = torch.zeros(D, D, dtype=dtype), torch.zeros(D, 1, dtype=dtype)
    for index, (X, Y) in enumerate(stream[:DISTINCT]):
        X, Y = X.to(dtype), Y.to(dtype)
        times = len(range(index, len(stream), DISTINCT))
        products += times * (X.mT @ X)
        cross += times * (X.mT @ Y)
    return torch.linalg.solve(products, cross)


@pytest.mark.benchmark(group="NormalEquations")
def test_streaming(compare: Callable[..., float]) -> None:
    stream = chunks(N, D)
    exact = solution_in(torch.float64, stream)

    def relative_error(W: Tensor) -> float:
        return float((W.double() - exact).norm() / exact.norm())

    error = relative_error(accumulate(stream).solve().W)

    def is_exact(found: LinearSolution, _: None) -> None:
        assert relative_error(found.W) < 1e-6

    def gram_alone() -> None:
        for X, Y in stream:
            gram(X, Y)

    compare(
        lambda: accumulate(stream).solve(),
        gram_alone,
        rounds=7,
        check=is_exact,
        case="10,000,000 × 128 fp32 in chunks of 100,000; peer: gram alone",
        goal=round(1 / 1.3, 2),
        flops=N * D * (D + 3),
        bytes=4 * N * (D + 1),
        error=error,
        peer_error=relative_error(solution_in(torch.float32, stream)),
    )


@pytest.mark.benchmark(group="NormalEquations memory")
def test_streaming_memory(benchmark: Any) -> None:
    """Peak RSS added by ten million rows and, for comparison, by one million, each in a fresh process."""
    script = Path(__file__).parent / "stream_memory.py"
    added = {n: int(subprocess.check_output([sys.executable, script, str(n), str(D)], text=True)) for n in (N // 10, N)}
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        case="10,000,000 × 128 fp32 in chunks of 100,000; peer: 1,000,000",
        added_mib=added[N] / 2**20,
        peer_added_mib=added[N // 10] / 2**20,
        goal_mib=64,
    )
