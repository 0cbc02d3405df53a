"""Prints the bytes of peak RSS that fitting a Ridge adds; run in a fresh process. Usage: NAME N D."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from agreement import agree


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    name, n, d = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if name == "onestep":
        from onestep import Ridge

        model = Ridge(alpha=1.0)
    else:
        from sklearn.linear_model import Ridge as SklearnRidge

        model = SklearnRidge(alpha=1.0, solver="cholesky")
    generator = np.random.default_rng(0)
    X = np.empty((n, d), dtype=np.float32)
    generator.standard_normal(out=X, dtype=np.float32)
    y = generator.standard_normal(n, dtype=np.float32)
    model.fit(X[:1000], y[:1000])  # loads what is loaded on first use
    before = status("VmRSS")
    model.fit(X, y)
    print(max(0, status("VmHWM") - before))

    products, cross = np.zeros((d, d)), np.zeros(d)
    centre, level = X.mean(0, dtype=np.float64), y.mean(dtype=np.float64)
    for begin in range(0, n, 100_000):
        rows = X[begin : begin + 100_000] - centre
        products += rows.T @ rows
        cross += rows.T @ (y[begin : begin + 100_000] - level)
    agree(model.coef_, np.linalg.solve(products + np.eye(d), cross))


if __name__ == "__main__":
    main()
