"""The benchmark protocol: peer and onestep in turn, in one process, ratio of medians, results compared after timing."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import agree

ROUNDS = 7
WARMUP_ROUNDS = 1


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    torch.set_num_threads(int(os.environ.get("ONESTEP_BENCH_THREADS", "2")))
    torch.manual_seed(0)


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., float]:
    """Times ``peer`` and ``ours`` alternately (A B A B …) and records the ratio of their medians.

    Then ``check`` is called with what the last runs of both returned, and raises where ours is wrong.
    """

    def run(
        ours: Callable[[], Any],
        peer: Callable[[], Any],
        *,
        rounds: int = ROUNDS,
        settle: float = 0.0,
        check: Callable[[Any, Any], None] = agree,
        **details: Any,
    ) -> float:
        """``settle``: seconds after each run, for peers with thread pools of their own that spin for a while."""
        peer_seconds: list[float] = []
        theirs: Any = None

        def run_peer() -> None:
            nonlocal theirs
            theirs = None
            time.sleep(settle)
            start = time.perf_counter()
            theirs = peer()
            peer_seconds.append(time.perf_counter() - start)
            time.sleep(settle)

        # pytest-benchmark runs `setup` before each round, outside the timed part.
        result = benchmark.pedantic(ours, setup=run_peer, rounds=rounds, warmup_rounds=WARMUP_ROUNDS)
        check(result, theirs)
        peer_median = statistics.median(peer_seconds[-rounds:])
        ratio = peer_median / benchmark.stats["median"]
        benchmark.extra_info.update(peer_seconds=peer_median, ratio=ratio, **details)
        return ratio

    return run
