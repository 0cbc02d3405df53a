"""A table and a picture of the JSON files that the GPU benchmarks wrote.

python bench/gpu/table.py bench/results/nvidia-h200
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from ratio_plot import plot_ratios

MATH, GRADIENT = "attention, HVP against torch's math backend", "GPT-2, HVP against a gradient"
NEWTON_SCHULZ = "polar, against five Newton-Schulz iterations in torch"


class Product(NamedTuple):
    """What one benchmark has measured for each case, and the names of its figures in the file."""

    group: str  # what is measured, and the peer
    ratio: str  # how many times as fast as the peer; after "1/", how many times the peer's seconds it takes
    ms: str
    share: str = ""  # of the GPU's limit
    limit: str = ""


PRODUCTS = {
    "attention": [
        Product("attention, JVP against flash forward", "1/jvp_to_forward", "jvp_ms"),
        Product("attention, HVP against flash forward + backward", "1/hvp_to_forward_backward", "hvp_ms"),
        Product(MATH, "faster", "onestep_ms"),
        Product(GRADIENT, "1/hvp_to_gradient", "hvp_ms"),
    ],
    "glm": [Product("GLM, HVP against the same in torch", "ratio", "ms", "share_of_copy", "copying")],
    "lmhead": [
        Product("LM head, GGN product against torch", "ggn_ratio", "ggn_ms", "ggn_share_of_gemm", "GEMM"),
        Product("LM head, HVP against torch", "hvp_ratio", "hvp_ms", "hvp_share_of_gemm", "GEMM"),
        Product("LM head, gradient against torch", "ratio", "ms", "share_of_gemm", "GEMM"),
    ],
    "normal": [Product("normal equations and Cholesky, against torch", "ratio", "onestep_ms", "copy_share", "copying")],
    "polar": [Product(NEWTON_SCHULZ, "ratio", "ms", "share_of_gemm", "GEMM")],
}
# Ratios that were set before the measurement; those of normal equations are in their file.
LONG = "B 1 H 16 T 8192 D 128 bfloat16 causal"
GOALS = {
    ("attention, JVP against flash forward", LONG): 1 / 4,
    ("attention, HVP against flash forward + backward", LONG): 1 / 4,
    (MATH, "HVP beside math, H 16 T 4096 D 128"): 5.0,
    (GRADIENT, "GPT-2 124 M, B 8 T 1024, bf16"): 1 / 4,
    ("LM head, GGN product against torch", "products 16384 x 2048 x 50304 bfloat16"): 1.0,
    ("LM head, HVP against torch", "products 16384 x 2048 x 50304 bfloat16"): 1.0,
    (NEWTON_SCHULZ, "48 x (1024 x 4096) bfloat16"): 1.0,
}


def measured(family: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """A case's figures, one for each product."""
    case = row["case"].replace("torch.", "")
    found = []
    for product in PRODUCTS.get(family, []):
        key = product.ratio.removeprefix("1/")
        if product.ms not in row or (key not in row and product.share not in row):
            continue
        share = row.get(product.share)
        figures = {"group": product.group, "case": case, "median_seconds": row[product.ms] / 1e3}
        figures["share"] = f"{share:.0%} of {product.limit}" if share else ""
        if key in row:
            figures["ratio"] = 1 / row[key] if key != product.ratio else row[key]
        goal = row.get("goal") or GOALS.get((product.group, case))
        found.append(figures | ({"goal": goal} if goal else {}))
    return found


def in_words(case: str) -> str:
    """A case as tables and pictures name it: "products 2048 x 768 x 50257 float16" → "2,048 × 768 × 50,257, fp16"."""
    case = case.removeprefix("products ").removeprefix("gradient ").replace(" x ", " × ")
    for dtype, short in (("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"), ("float64", "fp64")):
        case = case.replace(f" {dtype}", f", {short}")
    case = re.sub(r" (causal|full)$", r", \1", case)
    case = re.sub(r"\b([A-Z] \d+) (?=[A-Z] \d)", r"\1, ", case)
    case = re.sub(r"^(solve_normal|cholesky|logistic|softmax) ", r"\1, ", case)
    return re.sub(r"\d{4,}", lambda number: f"{int(number[0]):,}", case)


def main(folder: Path) -> None:
    rows: list[dict[str, Any]] = []
    device: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        device = {key: value for key, value in content.items() if key != "rows"}
        rows += [figures for row in content["rows"] for figures in measured(path.stem, row)]
    rows.sort(key=lambda row: row["group"])  # stable: cases stay in their order
    for row in rows:
        row["case"] = in_words(row["case"])
    copy, gemm = device["copy_bytes_per_second"] / 1e12, device["bf16_flops"] / 1e12
    facts = f"{device['device']}, torch {device['torch']}; copy {copy:.2f} TB/s, bf16 GEMM {gemm:.0f} TFLOP/s"
    header = ["what, against which peer", "case", "ms", "times as fast", "goal", "share of the GPU's limit"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        ratio, goal = (f"{row[key]:.3g}" if key in row else "" for key in ("ratio", "goal"))
        lines.append([row["group"], row["case"], f"{row['median_seconds'] * 1e3:.3g}", ratio, goal, row["share"]])
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    (folder / "table.md").write_text(f"{facts}\n\n{text}\n")
    plot_ratios(rows, {}, facts, folder / "ratios.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
