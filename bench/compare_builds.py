"""Two builds of onestep side by side: `python bench/compare_builds.py OLD NEW [--out FILE] [--only REGEX]`.

OLD and NEW are folders that hold a package `onestep` (a checkout's `python/`). Each build runs in a worker process of
its own; the two take turns (A B A B ...), and only one works at a time. There are two ratios of NEW's time by OLD's: of
the fastest turns, and of the turns at the lower quartile, which a busy machine disturbs least. Exits with 1 if a kernel
is slower by more than `--limit` in both, or if the last results of the two differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Calls of one turn take about this long: short, so that most turns are not disturbed.
TURN_SECONDS = 0.005
# How far the norms of two builds' results may be from each other: sums of bfloat16 may be cut in other places.
SAME = 1e-3


def cases() -> dict[str, Callable[[], Any]]:
    """Typical shapes of the CPU kernels of all families but compensated, as calls without arguments."""
    import torch

    ops = torch.ops.onestep
    generator = torch.Generator().manual_seed(0)

    def r(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    found: dict[str, Callable[[], Any]] = {}

    def solves(b: int, n: int, d: int, k: int, dtype: Any = torch.float32, refine: int = 0) -> None:
        X, Y = r(b, n, d, dtype=dtype), r(b, n, k, dtype=dtype)
        name = f"{b} x ({n}, {d}, {k}) {str(dtype)[6:]}"
        if refine:
            found[f"solve_normal refine={refine} {name}"] = lambda: ops.solve_normal(X, Y, None, None, 0.1, refine)
            return
        found[f"gram {name}"] = lambda: ops.gram(X, Y)
        found[f"solve_normal {name}"] = lambda: ops.solve_normal(X, Y, None, None, 0.1)
        solution, L, info, *_ = ops.solve_normal_ex(X, Y, None, None, 0.1)
        grad = torch.ones_like(solution)
        found[f"solve_normal_backward {name}"] = lambda: ops.solve_normal_backward(
            grad, X, Y, None, None, solution, L, info
        )

    solves(4000, 40, 8, 1)
    solves(1000, 100, 30, 2)
    solves(64, 300, 64, 4, torch.float64)
    solves(1, 4000, 300, 10)
    solves(1, 20_000, 48, 8, refine=1)
    table = r(200_000, 24)
    found["moments (200000, 16, 8) float32"] = lambda: ops.moments(table[:, :16], table[:, 16:], None, True)
    momenta = r(24, 144, 576)  # of an older build, too, whose numbers behind it would be others
    if hasattr(ops, "polar"):
        found["polar 24 x (144, 576) float32"] = lambda: ops.polar(momenta, 2, 1e-2)
    for b, d in ((500, 24), (32, 128), (1, 768)):
        A = r(b, d, d)
        A = A @ A.mT / d + torch.eye(d)
        B = r(b, d, 4)
        L = ops.cholesky(A)[0]
        found[f"cholesky {b} x ({d}, {d})"] = lambda A=A: ops.cholesky(A)
        found[f"cholesky_solve {b} x ({d}, 4)"] = lambda B=B, L=L: ops.cholesky_solve(B, L)
        found[f"solve_spd {b} x ({d}, 4)"] = lambda A=A, B=B: ops.solve_spd(A, B)

    def models(n: int, d: int, k: int, m: int, family: int, dtype: Any = torch.float32) -> None:
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        X, W, V = r(n, d, dtype=dtype), 0.1 * r(d, k, dtype=wide), r(m, d, k, dtype=wide)
        y = (torch.arange(n) % k)[:, None] if family == 2 else (r(n, k) > 0).to(wide)
        curvature = ops.glm_point(X, y, W, None, family, False)[2]
        name = f"family {family} ({n}, {d}, {k}) {str(dtype)[6:]}"
        found[f"glm_point {name}"] = lambda: ops.glm_point(X, y, W, None, family, False)
        found[f"glm_product m={m} {name}"] = lambda: ops.glm_product(V, X, W, None, curvature, family, False)

    models(200_000, 32, 1, 1, 1)
    models(20_000, 256, 1, 1, 1)
    models(20_000, 64, 10, 1, 2)
    models(4000, 256, 500, 1, 2)
    models(20_000, 64, 1, 16, 1, torch.float64)
    models(20_000, 64, 1, 1, 3, torch.bfloat16)

    X, y = r(20_000, 16), r(20_000, 1)
    p, v = 0.3 * r(16 * 8 + 8 + 8 + 1), r(16 * 8 + 8 + 8 + 1)
    net = ([16, 8, 1], [1, 0], [True, True])
    found["mlp_gradient 20000 x (16, 8, 1)"] = lambda: ops.mlp_gradient(X, y, p, *net, True)
    found["mlp_product 20000 x (16, 8, 1)"] = lambda: ops.mlp_product(X, p, v, *net)
    found["mlp_jacobian 20000 x (16, 8, 1)"] = lambda: ops.mlp_jacobian(X, p, *net, 1.0)

    def heads(n: int, d: int, classes: int, dtype: Any) -> None:
        H, W, b = r(n, d, dtype=dtype), 0.1 * r(classes, d, dtype=dtype), r(classes, dtype=dtype)
        t, c = torch.arange(n) * 7 % classes, torch.ones(n)
        options = (-100, 0.0)
        name = f"({n}, {d}, {classes}) {str(dtype)[6:]}"
        found[f"linear_cross_entropy {name}"] = lambda: ops.linear_cross_entropy(c, H, W, b, t, *options, [True] * 3)
        found[f"linear_cross_entropy_tangent {name}"] = lambda: ops.linear_cross_entropy_tangent(
            c, None, H, W, b, t, H, W, b, *options, False, [True] * 3
        )

    heads(256, 256, 8000, torch.float32)
    heads(256, 256, 8000, torch.bfloat16)

    def attention(heads: int, length: int, d: int, dtype: Any, causal: bool, masked: bool = False) -> None:
        q, k, v, dq, dk, dv = (r(1, heads, length, d, dtype=dtype) for _ in range(6))
        mask = r(length, length, dtype=dtype)[None, None] if masked else None
        out, lse = ops.attention(q, k, v, mask, 0.1, causal)
        g, dg = r(*out.shape, dtype=out.dtype), r(*out.shape, dtype=out.dtype)
        move = (dq, dk, dv, None, 0.1, causal)
        dout, dlse = ops.attention_jvp(q, k, v, mask, out, lse, *move)
        both = (g, None, q, k, v, mask, out, lse, dg, None, dq, dk, dv, None, dout, dlse, 0.1, causal, masked)
        how = "causal" if causal else "mask" if masked else "all"
        name = f"{heads} x ({length}, {d}) {how} {str(dtype)[6:]}"
        found[f"attention {name}"] = lambda: ops.attention(q, k, v, mask, 0.1, causal)
        found[f"attention_jvp {name}"] = lambda: ops.attention_jvp(q, k, v, mask, out, lse, *move)
        found[f"attention_and_jvp {name}"] = lambda: ops.attention_and_jvp(q, k, v, mask, *move)
        found[f"attention_backward {name}"] = lambda: ops.attention_backward(
            g, None, q, k, v, mask, out, lse, 0.1, causal, masked
        )
        found[f"attention_backward_jvp {name}"] = lambda: ops.attention_backward_jvp(*both)
        found[f"attention_backward_and_jvp {name}"] = lambda: ops.attention_backward_and_jvp(*both)

    attention(4, 256, 64, torch.float32, True)
    attention(4, 256, 64, torch.float32, False, masked=True)
    attention(4, 256, 64, torch.bfloat16, False)
    attention(2, 200, 32, torch.float64, True)
    return found


def norms(results: Any) -> list[float]:
    """Of the tensors of floating-point numbers among a call's results."""
    every = results if isinstance(results, (tuple, list)) else [results]
    return [float(x.double().norm()) for x in every if x.is_floating_point()]


def work(only: str) -> None:
    """A worker: for each line `name calls` on stdin, the seconds that so many calls take, and the last one's norms."""
    import onestep

    every = {name: call for name, call in cases().items() if re.search(only, name)}
    print(json.dumps({"file": onestep.__file__, "info": onestep.info(), "names": list(every)}), flush=True)
    for line in sys.stdin:
        name, calls = json.loads(line)
        call = every[name]
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, norms(result)]), flush=True)


class Build:
    """A worker process that has one of the builds."""

    def __init__(self, folder: Path, only: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder.resolve()), "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, __file__, "--worker", "--only", only]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = json.loads(self._line())
        found = Path(self.facts["file"]).resolve().parents[1]
        assert found == folder.resolve(), f"{found} was imported; expected {folder}"

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker has died")
        return line

    def seconds(self, name: str, calls: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, calls]) + "\n")
        self.process.stdin.flush()
        seconds, self.norms = json.loads(self._line())
        return float(seconds)


class Comparison(NamedTuple):
    """Milliseconds of a call in both builds, in the fastest turn, and the ratios."""

    old: float
    new: float
    fastest: float
    quartile: float
    same: bool


def compare(old: Build, new: Build, name: str, rounds: int) -> Comparison:
    for build in (old, new):
        build.seconds(name, 2)
    calls = max(1, round(TURN_SECONDS / max(min(old.seconds(name, 1) for _ in range(3)), 1e-6)))
    times: dict[Build, list[float]] = {old: [], new: []}
    for number in range(rounds):
        for build in (old, new) if number % 2 == 0 else (new, old):
            times[build].append(1e3 * build.seconds(name, calls) / calls)
    best = [min(times[build]) for build in (old, new)]
    quartile = [sorted(times[build])[rounds // 4] for build in (old, new)]
    same = all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(old.norms, new.norms, strict=False))
    return Comparison(*best, best[1] / best[0], quartile[1] / quartile[0], same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--only", default="", help="a regular expression: kernels by name")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--limit", type=float, default=1.03, help="the ratio above which a kernel counts as slower")
    parser.add_argument("--out", type=Path, help="a file that the rows of the table are appended to")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.only)
        return 0
    if len(given.builds) != 2:
        parser.error("expected two folders, OLD and NEW")
    old, new = (Build(folder, given.only) for folder in given.builds)
    print(f"{old.facts['info']['cpu_target']}; A: {old.facts['file']}; B: {new.facts['file']}")
    slower, differing = [], []
    for name in (name for name in new.facts["names"] if name in old.facts["names"]):
        found = compare(old, new, name, given.rounds)
        row = f"| {name} | {found.old:.3f} | {found.new:.3f} | {found.fastest:.3f} | {found.quartile:.3f} |"
        print(row, flush=True)
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(row + "\n")
        if min(found.fastest, found.quartile) > given.limit:
            slower.append(name)
        if not found.same:
            differing.append(name)
    print(f"slower by more than the limit: {', '.join(slower) or 'none'}")
    print(f"other results: {', '.join(differing) or 'none'}")
    return 1 if slower or differing else 0


if __name__ == "__main__":
    sys.exit(main())
