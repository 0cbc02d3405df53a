"""What the GPU benchmarks share: interleaved timings by CUDA events, the device's ceilings, a table and a JSON file.

Protocol: warm up, then rounds of A B A B …, each call between two events; medians. Ceilings are measured in the same
run: a large device-to-device copy (bytes read plus bytes written) and a large bf16 matrix product on random data.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROUNDS = 9


def milliseconds(call: Callable[[], Any]) -> float:
    """The time of one call on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Medians in milliseconds of several calls that take turns."""
    for call in calls.values():
        call()
        call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read plus written."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    time = interleaved({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.nbytes / (time * 1e-3)


def gemm_peak() -> float:
    """Operations per second of a large bf16 matrix product."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    time = interleaved({"gemm": lambda: torch.mm(a, b, out=out)})["gemm"]
    return 2 * size**3 / (time * 1e-3)


def added_bytes(call: Callable[[], Any]) -> int:
    """The most memory that a call holds at once, its results included, beyond what was allocated before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def top_kernels(call: Callable[[], Any], count: int = 12) -> dict[str, float]:
    """Milliseconds of a call by kernel, the longest first, as torch's profiler has them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:count]
    return {f"{event.key[:60]} x{event.count}": event.device_time_total / 1e3 for event in events}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in double."""
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm()).item()


class Report:
    """Rows of one benchmark, printed as they come and written to a JSON file."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.path = name, folder / f"{name}.json"
        self.facts: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_bytes_per_second": copy_bandwidth(),
            "bf16_flops": gemm_peak(),
        }
        self.rows: list[dict[str, Any]] = []
        copy, gemm = self.facts["copy_bytes_per_second"] / 1e12, self.facts["bf16_flops"] / 1e12
        print(f"{name} on {self.facts['device']}: copy {copy:.2f} TB/s, bf16 GEMM {gemm:.0f} TFLOP/s")

    def row(self, case: str, **values: Any) -> None:
        self.rows.append({"case": case, **values})
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        print(f"  {case}: {shown}", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1))

    def bandwidth_share(self, bytes_moved: int, time: float) -> float:
        return bytes_moved / (time * 1e-3) / self.facts["copy_bytes_per_second"]

    def gemm_share(self, operations: float, time: float) -> float:
        return operations / (time * 1e-3) / self.facts["bf16_flops"]
