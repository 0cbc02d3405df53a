"""A table and a picture of the JSON files that the GPU benchmarks wrote.

python bench/gpu/table.py bench/results/nvidia-h200
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from ratio_plot import plot_ratios

MATH, GRADIENT = "attention, HVP against torch's math backend", "GPT-2, HVP against a gradient"
LAYERS = "layers of language models, against chains and loops in torch"
NEWTON_SCHULZ = "polar, against five Newton-Schulz iterations in torch"


class Product(NamedTuple):
    """What one benchmark has measured for each case, and the names of its figures in the file."""

    group: str  # what is measured, and the peer
    ratio: str  # how many times as fast as the peer; after "1/", how many times the peer's seconds it takes
    ms: str
    share: str = ""  # of the GPU's limit
    limit: str = ""
    # Memory that is added, in MiB, or in bytes where the name says so: of the peer, of onestep.
    memory: tuple[str, str] = ("", "")


PRODUCTS = {
    "attention": [
        Product("attention, JVP against flash forward", "1/jvp_to_forward", "jvp_ms"),
        Product(
            "attention, HVP against flash forward + backward",
            "1/hvp_to_forward_backward",
            "hvp_ms",
            memory=("gradient_added_mib", "hvp_added_mib"),
        ),
        Product(MATH, "faster", "onestep_ms", memory=("math_added_mib", "onestep_added_mib")),
        Product(GRADIENT, "1/hvp_to_gradient", "hvp_ms", memory=("gradient_sdpa_added_mib", "hvp_added_mib")),
    ],
    "glm": [Product("GLM, HVP against the same in torch", "ratio", "ms", "share_of_copy", "copying")],
    "lmhead": [
        Product(
            "LM head, GGN product against torch",
            "ggn_ratio",
            "ggn_ms",
            "ggn_share_of_gemm",
            "GEMM",
            memory=("ggn_composition_added_bytes", "ggn_added_bytes"),
        ),
        Product(
            "LM head, HVP against torch",
            "hvp_ratio",
            "hvp_ms",
            "hvp_share_of_gemm",
            "GEMM",
            memory=("hvp_composition_added_bytes", "hvp_added_bytes"),
        ),
        Product(
            "LM head, gradient against torch",
            "ratio",
            "ms",
            "share_of_gemm",
            "GEMM",
            memory=("torch_added_bytes", "added_bytes"),
        ),
    ],
    "compensated": [Product(LAYERS, "ratio", "onestep_ms", memory=("", "added_bytes"))],
    "normal": [Product("normal equations and Cholesky, against torch", "ratio", "onestep_ms", "copy_share", "copying")],
    "polar": [Product(NEWTON_SCHULZ, "ratio", "ms", "share_of_gemm", "GEMM", memory=("", "added_bytes"))],
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
            # The ratio is that of the medians, so this is the peer's median, which some files do not hold by itself.
            figures["peer_seconds"] = figures["ratio"] * figures["median_seconds"]
        for name, key in zip(("peer_mib", "mib"), product.memory, strict=True):
            if key in row:
                figures[name] = row[key] / 2**20 if key.endswith("bytes") else row[key]
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
    case = re.sub(r"^(solve_normal|cholesky|inverse_cholesky|quantize|prune|logistic|softmax) ", r"\1, ", case)
    return re.sub(r"\d{4,}", lambda number: f"{int(number[0]):,}", case)


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown. A case without a peer has neither the peer's time nor a ratio."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "what, against which peer": lambda row: row["group"],
        "case": lambda row: row["case"],
        "peer, ms": lambda row: f"{row['peer_seconds'] * 1e3:.3g}" if "peer_seconds" in row else "",
        "onestep, ms": lambda row: f"{row['median_seconds'] * 1e3:.3g}",
        "times as fast": lambda row: f"{row['ratio']:.3g}" if "ratio" in row else "",
        "goal": lambda row: f"{row['goal']:.3g}" if "goal" in row else "",
        "share of the GPU's limit": lambda row: row["share"],
        "peer adds, MiB": lambda row: f"{row['peer_mib']:,.0f}" if "peer_mib" in row else "",
        "onestep adds, MiB": lambda row: f"{row['mib']:,.0f}" if "mib" in row else "",
    }
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def rows_of(contents: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of all files, which are given by their family, with cases in words; each group's stay in order."""
    rows = [
        figures for family, content in contents.items() for row in content["rows"] for figures in measured(family, row)
    ]
    for row in rows:
        row["case"] = in_words(row["case"])
    return sorted(rows, key=lambda row: row["group"])


def read(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def main(folder: Path) -> None:
    contents = read(folder)
    rows, device = rows_of(contents), list(contents.values())[-1]
    copy, gemm = device["copy_bytes_per_second"] / 1e12, device["bf16_flops"] / 1e12
    facts = f"{device['device']}, torch {device['torch']}; copy {copy:.2f} TB/s, bf16 GEMM {gemm:.0f} TFLOP/s"
    (folder / "table.md").write_text(f"{facts}\n\n{as_table(rows)}\n")
    plot_ratios(rows, {}, facts, folder / "ratios.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
