"""One table of the JSON files that the GPU benchmarks wrote.

python bench/gpu/table.py bench/results/nvidia-h200
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# What is shown of a row, and under which heading. A ratio above 1 says that onestep is faster.
SHOWN = {
    "ms": "ms",
    "onestep_ms": "ms",
    "ggn_ms": "GGN product, ms",
    "hvp_ms": "HVP, ms",
    "jvp_ms": "JVP, ms",
    "ratio": "ratio to torch",
    "ggn_ratio": "GGN ratio to torch",
    "hvp_ratio": "HVP ratio to torch",
    "jvp_to_forward": "JVP / flash forward",
    "hvp_to_forward_backward": "HVP / flash forward + backward",
    "faster": "ratio to the math backend",
    "hvp_to_gradient": "HVP / gradient",
    "memory_to_gradient": "HVP / gradient, memory",
    "share_of_copy": "share of copy bandwidth",
    "goal": "goal",
}


def text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(folder: Path) -> str:
    lines, device = [], {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        device = {key: value for key, value in content.items() if key != "rows"}
        for row in content["rows"]:
            parts = [f"{name} {text(row[key])}" for key, name in SHOWN.items() if row.get(key)]
            if parts:
                lines.append(f"| {path.stem} | {row['case']} | {', '.join(parts)} |")
    copy, gemm = device["copy_bytes_per_second"] / 1e12, device["bf16_flops"] / 1e12
    head = f"{device['device']}, torch {device['torch']}; copy {copy:.2f} TB/s, bf16 GEMM {gemm:.0f} TFLOP/s\n"
    return "\n".join([head, "| family | case | measured |", "| --- | --- | --- |", *lines, ""])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "table.md").write_text(table(target))
    print((target / "table.md").read_text())
