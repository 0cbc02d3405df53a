"""Ridge on a million rows against scikit-learn's, in time and in added memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge as SklearnRidge

from onestep import Ridge

N, D = 1_000_000, 64


@pytest.mark.benchmark(group="Ridge")
def test_ridge(compare: Callable[..., float]) -> None:
    generator = np.random.default_rng(0)
    X = generator.standard_normal((N, D), dtype=np.float32)
    y = X @ generator.standard_normal(D, dtype=np.float32) + generator.standard_normal(N, dtype=np.float32)
    compare(
        lambda: Ridge(alpha=1.0).fit(X, y),
        lambda: SklearnRidge(alpha=1.0, solver="cholesky").fit(X, y),
        case="fit 1,000,000 × 64 fp32",
        goal=2.0,
        flops=N * D * (D + 3),
        bytes=4 * N * (D + 1),
    )


@pytest.mark.benchmark(group="Ridge memory")
def test_ridge_memory(benchmark: Any) -> None:
    """Peak RSS added by fit, each estimator in a fresh process."""
    script = Path(__file__).parent / "ridge_memory.py"
    added = {
        name: int(subprocess.check_output([sys.executable, script, name, str(N), str(D)], text=True))
        for name in ("onestep", "sklearn")
    }
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        case="fit 1,000,000 × 64 fp32",
        added_mib=added["onestep"] / 2**20,
        peer_added_mib=added["sklearn"] / 2**20,
        goal_mib=64,
    )
