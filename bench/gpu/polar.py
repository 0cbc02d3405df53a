"""The polar factor on a GPU against five Newton-Schulz iterations in bf16 (Muon's).

    python bench/gpu/polar.py [--out FOLDER] [--quick]

Goal: 48 × (1024 × 4096) in bf16 no slower. The spread of singular values and the distance to the exact factor are of a
few of the matrices, in float64.

After timing, every factor is held to what Newton-Schulz gives: it may be as far from orthogonal, and its product with
the matrix as far from symmetric, no farther. Replays of a CUDA graph must give the same bits.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from measure import Report, WrongResult, added_bytes, interleaved, require, top_kernels
from torch import Tensor

from onestep.linalg import polar_ex


def newton_schulz(M: Tensor, steps: int = 5) -> Tensor:
    """Muon's quintic iteration (Jordan et al., 2024), in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = M.bfloat16()
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


def matrices(batch: int, n: int, m: int, dtype: torch.dtype, decay: bool) -> Tensor:
    """Random matrices; with ``decay`` their singular values fall from 1 to 1e-2 evenly in their logarithms."""
    generator = torch.Generator("cuda").manual_seed(n + m)
    M = torch.randn(batch, n, m, device="cuda", generator=generator)
    if decay:
        U, _, V = torch.linalg.svd(M[:2], full_matrices=False)
        values = torch.logspace(0, -2, min(n, m), device="cuda")
        M[:2] = (U * values) @ V
    return M.to(dtype)


def quality(U: Tensor, M: Tensor) -> dict[str, float]:
    """Smallest and largest singular value of U, and its distance to the exact factor, of the first two matrices."""
    left, _, right = torch.linalg.svd(M[:2].double(), full_matrices=False)
    exact = left @ right
    values = torch.linalg.svdvals(U[:2].double())
    return {
        "least": values.min().item(),
        "largest": values.max().item(),
        "distance": ((U[:2].double() - exact).norm() / exact.norm()).item(),
    }


def departure(U: Tensor, M: Tensor, at_once: int = 8) -> float:
    """The most, over all matrices, of what is 0 for a polar factor (and for one with some singular vectors negated).

    On the short side: ‖UUᵀ − I‖ / √rows, and ‖S − Sᵀ‖ / ‖S‖ of S = UMᵀ.
    """
    if U.shape[-2] > U.shape[-1]:
        U, M = U.mT, M.mT
    worst = []
    for u, m in zip(U.split(at_once), M.split(at_once), strict=True):
        u, m = u.double(), m.double()
        gram, product = u @ u.mT, u @ m.mT
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        apart = gram.norm(dim=(-2, -1)) / math.sqrt(u.shape[-2])
        skew = (product - product.mT).norm(dim=(-2, -1)) / product.norm(dim=(-2, -1))
        worst.append(torch.maximum(apart, skew).max())
    return torch.stack(worst).max().item()


def check(results: dict[str, Any], M: Tensor) -> None:
    """Holds what was timed to what Newton-Schulz gives: it may be as far from a polar factor as that, no farther."""
    theirs = results["newton_schulz"]
    require("the polar factor", departure(results["polar"], M), departure(theirs, M) / 2)
    exact, peers = (quality(results[name], M)["distance"] for name in ("polar", "newton_schulz"))
    require("the polar factor of the first matrices", exact, peers / 2)


def run(report: Report, batch: int, n: int, m: int, dtype: torch.dtype) -> None:
    M = matrices(batch, n, m, dtype, decay=False)
    calls = {"polar": lambda: polar_ex(M).factor, "newton_schulz": lambda: newton_schulz(M)}
    times = interleaved(calls, check=lambda results: check(results, M))
    graph, static = torch.cuda.CUDAGraph(), M.clone()
    with torch.cuda.graph(graph):
        captured = polar_ex(static)
    graph.replay()
    if not torch.equal(captured.factor, polar_ex(M).factor):
        raise WrongResult("a replay of the CUDA graph gives other bits than the call")
    times |= interleaved({"graph": graph.replay})
    del graph, captured, static
    short, long = min(n, m), max(n, m)
    row = {
        "ms": times["polar"],
        "graph_ms": times["graph"],
        "graph_same_bits": True,
        "ratio": times["newton_schulz"] / times["polar"],
        "share_of_gemm": report.gemm_share(batch * 8.0 * short * short * long, times["polar"]),
        "added_bytes": added_bytes(calls["polar"]),
    }
    for kind, decay in (("random", False), ("decaying", True)):
        few = matrices(2, n, m, dtype, decay)
        row |= {f"{kind}_{key}": value for key, value in quality(polar_ex(few).factor, few).items()}
        row |= {f"{kind}_newton_schulz_{key}": value for key, value in quality(newton_schulz(few), few).items()}
    row |= top_kernels(calls["polar"])
    report.row(f"{batch} x ({n} x {m}) {str(dtype).removeprefix('torch.')}", **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument("--quick", action="store_true", help="the goal's case alone")
    options = parser.parse_args()
    report = Report("polar", options.out)
    with torch.no_grad():
        report.run(run, 48, 1024, 4096, torch.bfloat16)
        if options.quick:
            report.end()
            return
        report.run(run, 12, 1024, 4096, torch.float32)
        report.run(run, 64, 768, 768, torch.bfloat16)
        report.run(run, 256, 256, 1024, torch.bfloat16)
        report.run(run, 1024, 64, 512, torch.bfloat16)
        report.run(run, 1024, 64, 512, torch.float32)
    report.end()


if __name__ == "__main__":
    main()
