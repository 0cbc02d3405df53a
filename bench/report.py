"""Runs the benchmarks, prints one table, and stores it with a plot under bench/results/<machine>/.

python bench/report.py [pytest options]     # all benchmarks, about half an hour
python bench/report.py --plot FOLDER        # draws the plot of stored results again
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from ratio_plot import plot_ratios
from rich.console import Console
from rich.table import Table

import onestep

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def best_seconds(work: Any, repeats: int = 10) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def physical_limits() -> dict[str, float]:
    """GEMM peak (torch, fp32, 2048³) and read bandwidth (torch sum over 256 MiB), best of ten."""
    A = torch.randn(2048, 2048)
    long = torch.randn(64 << 20)
    return {
        "gemm_gflops": 2 * 2048**3 / best_seconds(lambda: A @ A) / 1e9,
        "read_gbps": 4 * long.numel() / best_seconds(long.sum) / 1e9,
    }


def machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cpu_target": onestep.info()["cpu_target"],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "onestep": onestep.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }


def folder_of(where: dict[str, Any]) -> Path:
    """Where this machine's results are kept: the CPU's name and the target, as words with dashes."""
    name = "".join(letter if letter.isalnum() else " " for letter in f"{where['cpu']} {where['cpu_target']}".lower())
    return RESULTS / "-".join(name.split())


def row(benchmark: dict[str, Any], limits: dict[str, float]) -> list[str]:
    info = benchmark["extra_info"]
    if "added_mib" in info:
        return [
            benchmark["group"],
            info["case"],
            f"{info['peer_added_mib']:.1f} MiB",
            f"{info['added_mib']:.1f} MiB",
            "",
            f"< {info['goal_mib']:.0f} MiB",
            "",
            "",
            "",
        ]
    # What cannot be repeated in rounds brings its own seconds.
    seconds = info.get("own_seconds", benchmark["stats"]["median"])
    gflops = info.get("flops", 0) / seconds / 1e9
    gbps = info.get("bytes", 0) / seconds / 1e9
    return [
        benchmark["group"],
        info["case"],
        f"{info['peer_seconds'] * 1e3:.2f} ms",
        f"{seconds * 1e3:.2f} ms",
        f"{info['ratio']:.2f}",
        f"≥ {info['goal']}" if info.get("goal") else "",
        f"{gflops:.0f} ({gflops / limits['gemm_gflops']:.0%})" if gflops else "",
        f"{gbps:.1f} ({gbps / limits['read_gbps']:.0%})" if gbps else "",
        f"{info['error']:.1e} / {info['peer_error']:.1e}" if "error" in info else "",
    ]


HEADER = ["group", "case", "peer", "onestep", "ratio", "goal", "GFLOP/s (of GEMM)", "GB/s (of read)", "error / peer's"]


def run(path: Path, options: list[str]) -> tuple[list[dict[str, Any]], bool]:
    """The results of one file of benchmarks, and whether all of them passed."""
    raw = RESULTS / "pytest-benchmark.json"
    raw.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(path), "-q", "--benchmark-enable", f"--benchmark-json={raw}"]
    status = subprocess.run([*command, "--benchmark-columns=median,rounds", *options], check=False).returncode
    text = raw.read_text() if raw.exists() else ""
    raw.unlink(missing_ok=True)
    found: list[dict[str, Any]] = json.loads(text)["benchmarks"] if text else []
    # A benchmark that failed has no figures.
    found = [benchmark for benchmark in found if "case" in benchmark["extra_info"]]
    return found, status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def store(benchmarks: list[dict[str, Any]], limits: dict[str, float], where: dict[str, Any]) -> list[list[str]]:
    """Writes table and plot, and returns the table's rows."""
    folder = folder_of(where)
    folder.mkdir(exist_ok=True)
    rows = [row(benchmark, limits) for benchmark in benchmarks]
    facts = ", ".join(f"{name} {value}" for name, value in where.items())
    limit_line = f"GEMM peak {limits['gemm_gflops']:.0f} GFLOP/s, read bandwidth {limits['read_gbps']:.1f} GB/s"
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *rows)]
    (folder / "table.md").write_text("\n".join([*lines, "", facts, "", limit_line, ""]))
    kept = [{"group": b["group"], "median_seconds": b["stats"]["median"], **b["extra_info"]} for b in benchmarks]
    (folder / "table.json").write_text(
        json.dumps({"machine": where, "limits": limits, "results": kept}, indent=2) + "\n"
    )
    plot_ratios(kept, limits, facts, folder / "ratios.png")
    print(f"{facts}\n{limit_line}\nstored under {folder}", flush=True)
    return rows


def main() -> int:
    """File by file, so that one which crashes, or Ctrl-C, does not take the results of those before with it."""
    if sys.argv[1:2] == ["--plot"]:
        folder = Path(sys.argv[2])
        stored = json.loads((folder / "table.json").read_text())
        facts = ", ".join(f"{name} {value}" for name, value in stored["machine"].items())
        plot_ratios(stored["results"], stored["limits"], facts, folder / "ratios.png")
        return 0
    RESULTS.mkdir(exist_ok=True)
    torch.set_num_threads(2)
    limits, where = physical_limits(), machine()
    benchmarks: list[dict[str, Any]] = []
    failed: list[str] = []
    rows: list[list[str]] = []
    for path in sorted(HERE.glob("test_speed_*.py")):
        found, passed = run(path, sys.argv[1:])
        benchmarks += found
        if not passed:
            failed.append(path.name)
        if found:
            rows = store(benchmarks, limits, where)

    table = Table(title="peer and onestep in turn, ratio of medians")
    for name in HEADER:
        table.add_column(name)
    for cells in rows:
        table.add_row(*cells)
    Console(width=190).print(table)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
