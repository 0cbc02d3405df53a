"""What the GPU benchmarks share: interleaved timings by CUDA events, the device's ceilings, a table and a JSON file.

Protocol: warm up, then rounds of A B A B …, each call between two events; medians. Then the results of the last round
are held to float64 or to the peer's. A case whose results are wrong is named, has no row in the file, and the run ends
with an error once the other cases are done. Ceilings are measured in the same run: a large device-to-device copy (bytes
read plus bytes written) and a large bf16 matrix product on random data.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROUNDS = 9


class WrongResult(AssertionError):
    """What was timed did not give what it should."""


def timed(call: Callable[[], Any], before: Callable[[], Any] | None = None) -> tuple[float, Any]:
    """Milliseconds of one call on the device, and its result. The time includes what the CPU takes to queue the call,
    unless the device has work to do meanwhile: ``before`` queues it.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if before is not None:
        before()
    begin.record()
    result = call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), result


def interleaved(
    calls: dict[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, float]:
    """Medians in milliseconds of several calls that take turns.

    Then ``check`` is called with what the last round's calls returned, by name, and raises where a result is wrong.
    Only the last round keeps its results, so that the others have as much memory as without a check.
    """
    for call in calls.values():
        call()
        call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    for remaining in reversed(range(rounds)):
        for name, call in calls.items():
            milliseconds, result = timed(call)
            times[name].append(milliseconds)
            if check is not None and not remaining:
                results[name] = result
            del result
    if check is not None:
        check(results)
    return {name: statistics.median(values) for name, values in times.items()}


def queued(calls: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """The same medians of the device's time alone: each call is queued behind a fill of 1 GiB, which empties the L2
    cache and takes longer than the CPU needs to queue the call.
    """
    fill = torch.empty(1 << 28, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            milliseconds, result = timed(call, lambda: fill.zero_())
            times[name].append(milliseconds)
            del result
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


# ------------------------------------------------------------------------------------------------------------- results


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in double."""
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm()).item()


def largest_error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest of the relative errors of several tensors; NaN where one of them is."""
    errors = [relative_error(one, other.reshape(one.shape)) for one, other in zip(got, expected, strict=True)]
    return max(errors, key=lambda error: error if error == error else float("inf"))


def require(what: str, error: float, peers: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
    """Raises where an error is more than twice the peer's own, beside rounding in ``dtype``, or is NaN."""
    limit = 2 * peers + (1e-13 if dtype == torch.float64 else 1e-6)
    if not error <= limit:
        raise WrongResult(f"{what} is wrong: the error is {error:.1e} of the norm; expected at most {limit:.1e}")


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
        self.wrong: list[str] = []
        self._write()  # rows of an earlier run are none of this one
        copy, gemm = self.facts["copy_bytes_per_second"] / 1e12, self.facts["bf16_flops"] / 1e12
        print(f"{name} on {self.facts['device']}: copy {copy:.2f} TB/s, bf16 GEMM {gemm:.0f} TFLOP/s")

    def run(self, benchmark: Callable[..., None], *arguments: Any) -> None:
        """One benchmark, which writes its row itself, after its check. Where the check fails the next one goes on."""
        try:
            benchmark(self, *arguments)
        except WrongResult as error:
            self.wrong.append(f"{benchmark.__name__}{arguments}: {error}")
            print(f"  WRONG: {self.wrong[-1]}", flush=True)
        torch.cuda.empty_cache()

    def end(self) -> None:
        """Ends the program with an error if a result was wrong."""
        if self.wrong:
            sys.exit(f"{self.name}: wrong results of {len(self.wrong)} cases:\n" + "\n".join(self.wrong))

    def row(self, case: str, **values: Any) -> None:
        self.rows.append({"case": case, **values})
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        print(f"  {case}: {shown}", flush=True)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1))

    def bandwidth_share(self, bytes_moved: int, time: float) -> float:
        return bytes_moved / (time * 1e-3) / self.facts["copy_bytes_per_second"]

    def gemm_share(self, operations: float, time: float) -> float:
        return operations / (time * 1e-3) / self.facts["bf16_flops"]
