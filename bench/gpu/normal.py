"""Normal equations and Cholesky factors on a GPU, against the same in torch's own ops (cuBLAS, cuSOLVER, MAGMA).

    python bench/gpu/normal.py [--out FOLDER] [--quick]

Goals (ratios of medians): solve_normal of 100,000 problems, n = 2d, one right-hand side: d 8, 16, 32: 10; d 64: 5;
d 128: 3. cholesky of 64 × 128² and 64 × 512²: 2 times torch.linalg.cholesky_ex.

A row has both times: of a call that finds the device idle, with what the CPU takes to queue it (`onestep_ms`,
`torch_ms`, and their `ratio`, which the goals are for), and of the device alone (`queued_…`).

After timing, solutions are compared with float64 and factors with the matrix: within twice the error of torch's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measure import Report, interleaved, queued, relative_error, require
from torch import Tensor

import onestep  # noqa: F401  (torch.ops.onestep)


def composite(X: Tensor, Y: Tensor) -> Tensor:
    """What one writes in torch: XᵀX, its Cholesky factor, two triangular solves."""
    L, _ = torch.linalg.cholesky_ex(X.mT @ X)
    return torch.cholesky_solve(X.mT @ Y, L)


def solution_error(X: Tensor, Y: Tensor, W: Tensor, elements: int = 1 << 26) -> float:
    """The mean over all problems of the relative error against float64, by LU, some problems at a time.

    A mean of the problems' own errors, not of one norm: a problem with a large solution would hide all others in that.
    """
    at_once = max(1, elements // X[0].numel())
    total = 0.0
    for x, y, w in zip(*(t.split(at_once) for t in (X, Y, W)), strict=True):
        x, y = x.double(), y.double()
        exact = torch.linalg.solve(x.mT @ x, x.mT @ y)
        total += ((w.double() - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))).sum().item()
    return total / len(X)


def factor_error(A: Tensor, L: Tensor) -> float:
    """‖LLᵀ − A‖ / ‖A‖ in float64, of the lower triangle of L alone."""
    L = L.double().tril()
    return relative_error(L @ L.mT, A)


def device_times(calls: dict[str, Any]) -> dict[str, float]:
    """Of the device alone, and their ratio."""
    times = queued(calls, 7)
    return {
        "queued_ms": times["onestep"],
        "queued_torch_ms": times["torch"],
        "queued_ratio": times["torch"] / times["onestep"],
    }


def solve(report: Report, problems: int, d: int, dtype: torch.dtype, goal: float) -> None:
    n = 2 * d
    X = torch.randn(problems, n, d, device="cuda", dtype=dtype)
    Y = torch.randn(problems, n, 1, device="cuda", dtype=dtype)
    # The op itself: the public function checks `info`, which waits for the device.
    ours = lambda: torch.ops.onestep.solve_normal(X, Y)[0]  # noqa: E731
    errors: dict[str, float] = {}

    def check(results: dict[str, Any]) -> None:
        errors.update({name: solution_error(X, Y, W) for name, W in results.items()})
        require("solve_normal", errors["onestep"], errors["torch"], dtype)

    calls: dict[str, Any] = {"torch": lambda: composite(X, Y), "onestep": ours}
    times = interleaved(calls, 7, check)
    moved = (X.numel() + Y.numel() + problems * d) * X.itemsize
    report.row(
        f"solve_normal {problems} x ({n} x {d}) {str(dtype)[6:]}",
        onestep_ms=times["onestep"],
        torch_ms=times["torch"],
        ratio=times["torch"] / times["onestep"],
        goal=goal,
        **device_times(calls),
        copy_share=report.bandwidth_share(moved, times["onestep"]),
        tflops=problems * (n * d * (d + 3) + d**3 / 3) / times["onestep"] / 1e9,
        error=errors["onestep"],
        torch_error=errors["torch"],
    )


def spd(batch: int, d: int, dtype: torch.dtype) -> Tensor:
    X = torch.randn(batch, d, d, device="cuda", dtype=dtype)
    return X @ X.mT / d + torch.eye(d, device="cuda", dtype=dtype)


def factor(report: Report, batch: int, d: int, dtype: torch.dtype, goal: float) -> None:
    A = spd(batch, d, dtype)
    ours = lambda: torch.ops.onestep.cholesky(A)[0]  # noqa: E731
    errors: dict[str, float] = {}

    def check(results: dict[str, Any]) -> None:
        errors.update({name: factor_error(A, L) for name, L in results.items()})
        require("cholesky", errors["onestep"], errors["torch"], dtype)

    calls: dict[str, Any] = {"torch": lambda: torch.linalg.cholesky_ex(A)[0], "onestep": ours}
    times = interleaved(calls, 7, check)
    report.row(
        f"cholesky {batch} x {d}² {str(dtype)[6:]}",
        onestep_ms=times["onestep"],
        torch_ms=times["torch"],
        ratio=times["torch"] / times["onestep"],
        goal=goal,
        **device_times(calls),
        tflops=batch * d**3 / 3 / times["onestep"] / 1e9,
        error=errors["onestep"],
        torch_error=errors["torch"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument("--quick", action="store_true", help="a tenth of the problems")
    options = parser.parse_args()
    torch.manual_seed(0)
    report = Report("normal", options.out)
    scale = 10 if options.quick else 1
    with torch.no_grad():
        for d, goal in ((8, 10.0), (16, 10.0), (24, 0.0), (32, 10.0), (64, 5.0), (96, 0.0), (128, 3.0)):
            report.run(solve, 100_000 // scale, d, torch.float32, goal)
        for d in (8, 32, 64, 128):
            report.run(solve, 20_000 // scale, d, torch.float64, 0.0)
        for batch, d, goal in (
            (4096, 32, 0.0), (1024, 64, 0.0), (64, 128, 2.0), (64, 168, 0.0), (64, 256, 0.0), (2000, 256, 0.0),
            (64, 512, 2.0), (16, 1024, 0.0), (2, 2048, 0.0), (1, 1024, 0.0), (1, 4096, 0.0),
        ):  # fmt: skip
            report.run(factor, batch, d, torch.float32, goal)
        for batch, d in ((64, 128), (64, 512)):
            report.run(factor, batch, d, torch.float64, 0.0)
    report.end()


if __name__ == "__main__":
    main()
