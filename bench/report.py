"""Runs the benchmarks, prints one table, and stores it with a picture under bench/results/<machine>/.

python bench/report.py [pytest options]     # all benchmarks, about half an hour
python bench/report.py --write FOLDER       # writes table and picture of stored results again

A run is kept in table.json. What was measured apart, since it takes longer or came later, is in other JSON files of the
folder, each with a note on how; table and picture have both.
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


def row(result: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """A line of the table; without limits no shares of them."""
    if "added_mib" in result:
        return [
            result["group"],
            result["case"],
            f"{result['peer_added_mib']:.1f} MiB",
            f"{result['added_mib']:.1f} MiB",
            "",
            f"< {result['goal_mib']:.0f} MiB",
            "",
            "",
            "",
        ]
    # What cannot be repeated in rounds brings its own seconds.
    seconds = result.get("own_seconds", result["median_seconds"])
    gflops = result.get("flops", 0) / seconds / 1e9 if limits else 0
    gbps = result.get("bytes", 0) / seconds / 1e9 if limits else 0
    return [
        result["group"],
        result["case"],
        f"{result['peer_seconds'] * 1e3:.2f} ms",
        f"{seconds * 1e3:.2f} ms",
        f"{result['ratio']:.2f}",
        f"≥ {result['goal']}" if result.get("goal") else "",
        f"{gflops:.0f} ({gflops / limits['gemm_gflops']:.0%})" if gflops else "",
        f"{gbps:.1f} ({gbps / limits['read_gbps']:.0%})" if gbps else "",
        f"{result['error']:.1e} / {result['peer_error']:.1e}" if "error" in result else "",
    ]


# A peak that is measured is no bound: other shapes, and kernels of ours, may be faster than torch's product of 2048³.
SHARES = (
    "Shares are of these rates of torch's product of 2048 × 2048 matrices and of torch's sum of 256 MiB: yardsticks, "
    "no limits. Above 100 % our kernels do what a result needs faster than torch does the operations of that product."
)
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


def table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *rows))


def write(folder: Path) -> list[list[str]]:
    """Writes table and picture of what a folder holds, and returns the table's rows."""
    whole = json.loads((folder / "table.json").read_text())
    limits, results = whole["limits"], whole["results"]
    rows = [row(result, limits) for result in results]
    facts = ", ".join(f"{name} {value}" for name, value in whole["machine"].items())
    limit_line = f"GEMM peak {limits['gemm_gflops']:.0f} GFLOP/s, read bandwidth {limits['read_gbps']:.1f} GB/s"
    parts = [table(rows), facts, f"{limit_line}. {SHARES}"]
    known = {(result["group"], result["case"]) for result in results}
    for path in sorted(folder.glob("*.json")):
        apart = json.loads(path.read_text())
        if path.name != "table.json" and "results" in apart:
            # Of a later day, on which the machine's limits may have been others: no shares of those above.
            later = [{key: value for key, value in result.items() if key not in ("flops", "bytes")}
                     for result in apart["results"] if (result["group"], result["case"]) not in known]  # fmt: skip
            parts += [f"## Measured apart: {path.stem}", apart["note"], table([row(result, {}) for result in later])]
            results = results + later
    (folder / "table.md").write_text("\n\n".join(parts) + "\n")
    plot_ratios(results, limits, facts, folder / "ratios.png")
    return rows


def store(benchmarks: list[dict[str, Any]], limits: dict[str, float], where: dict[str, Any]) -> list[list[str]]:
    """Keeps a run; writes table and picture, and returns the table's rows."""
    folder = folder_of(where)
    folder.mkdir(exist_ok=True)
    kept = [{"group": b["group"], "median_seconds": b["stats"]["median"], **b["extra_info"]} for b in benchmarks]
    (folder / "table.json").write_text(
        json.dumps({"machine": where, "limits": limits, "results": kept}, indent=2) + "\n"
    )
    rows = write(folder)
    print(f"stored under {folder}", flush=True)
    return rows


def main() -> int:
    """File by file, so that one which crashes, or Ctrl-C, does not take the results of those before with it."""
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]))
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

    shown = Table(title="peer and onestep in turn, ratio of medians")
    for name in HEADER:
        shown.add_column(name)
    for cells in rows:
        shown.add_row(*cells)
    Console(width=190).print(shown)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
