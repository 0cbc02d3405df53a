"""The picture of `make bench`: a small plot of ratios to the peer for each group of benchmarks, on one log axis."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory

FASTER, SLOWER, GOAL, LIMIT = "#2a6f97", "#c8553d", "#222222", "#666666"
# What the groups whose names do not say it are compared with.
PEERS = {
    "attention against flash": "attention, against torch's flash attention",
    "attention against math": "attention, against torch's math backend",
    "forward": "solve_normal, B×(n,d,k), against Gram and Cholesky in torch",
    "forward + backward": "solve_normal with its gradient, against the same",
    "one small problem": "solve_normal of one small problem, against the same",
    "attention in fit": "attention in fit, against torch's math backend",
    "fit": "fit, against Adam",
    "whole networks": "whole networks, against Adam and Muon",
    "polar factors": "polar, against five Newton-Schulz iterations in torch",
    "layers of language models": "layers of language models, against torch",
    "GLM HVP": "Hessian products of linear models, against torch",
    "LM head": "LM head, against cross_entropy(linear(…)) in torch",
    "Ridge": "Ridge, against scikit-learn",
    "LogisticRegression": "LogisticRegression, against scikit-learn",
    "Heads": "linear heads and penalties, against the peers named",
    "operators": "products of curvature operators, against curvlinops",
    "ALS iteration": "an iteration of ALS, against the package implicit",
    "Multinomial": "LogisticRegression of many classes, against scikit-learn",
    "NormalEquations": "NormalEquations on a stream, against gram alone",
}
# Ratios beyond these ends are drawn at the end, with their figure.
LOWEST, HIGHEST = 1 / 16, 64
LINE_INCHES, COLUMN_INCHES, HEAD_INCHES, LABEL_CHARACTERS = 0.17, 5.4, 0.75, 46


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, LABEL_CHARACTERS, break_on_hyphens=False))


def _share(row: dict[str, Any], limits: dict[str, float]) -> str:
    """The larger share that a result has of the machine's two limits, or what the result itself says of it."""
    if "share" in row:
        return str(row["share"])
    seconds = row.get("own_seconds", row["median_seconds"]) * 1e9
    shares = {
        "GEMM": row.get("flops", 0) / seconds / limits["gemm_gflops"],
        "reading": row.get("bytes", 0) / seconds / limits["read_gbps"],
    }
    name = max(shares, key=lambda key: shares[key])
    return f"{shares[name]:.0%} of {name}" if shares[name] else ""


def _heights(rows: list[dict[str, Any]]) -> list[float]:
    """In lines: those of the label, and half a one between a row and the next."""
    return [_wrapped(row["case"]).count("\n") + 1.5 for row in rows]


def _draw(axes: Any, group: str, rows: list[dict[str, Any]], limits: dict[str, float]) -> None:
    heights = _heights(rows)
    positions = sum(heights) - np.cumsum(heights) + np.array(heights) / 2
    ratios = np.array([row["ratio"] for row in rows])
    colours = [FASTER if ratio >= 1 else SLOWER for ratio in ratios]
    ends = np.clip(ratios, LOWEST, HIGHEST)
    axes.hlines(positions, 1, ends, color=colours, linewidth=5)
    for row, position, end in zip(rows, positions, ends, strict=True):
        ahead = row["ratio"] >= 1
        goal = row.get("goal")
        # Beyond bar and goal, so that neither crosses the figure.
        edge = end if goal is None else max(end, goal) if ahead else min(end, goal)
        axes.text(edge * (1.12 if ahead else 1 / 1.12), position, f"{row['ratio']:.2g}", va="center", fontsize=8,
                  ha="left" if ahead else "right")  # fmt: skip
        axes.text(HIGHEST * 9, position, _share(row, limits), va="center", ha="right", fontsize=7, color=LIMIT)
        if goal:
            axes.plot([goal] * 2, [position - 0.6, position + 0.6], color=GOAL, linewidth=1.4)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlim(LOWEST / 3, HIGHEST * 10)
    axes.set_ylim(-0.3, sum(heights) + 0.3)
    axes.set_yticks(positions, [_wrapped(row["case"]) for row in rows], fontsize=7.5)
    axes.set_xticks(
        [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32], ["⅛", "¼", "½", "1", "2", "4", "8", "16", "32"], fontsize=8
    )
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(" ", fontsize=10)  # the room of the title, which begins at the column's left edge
    place = blended_transform_factory(axes.figure.transSubfigure, axes.transAxes)
    axes.annotate(PEERS.get(group, group), (0.01, 1), xycoords=place, xytext=(0, 6), textcoords="offset points",
                  fontsize=10, fontweight="bold", in_layout=False, annotation_clip=False)  # fmt: skip
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend() -> list[Line2D]:
    return [
        Line2D([], [], color=FASTER, linewidth=5, label="onestep is faster"),
        Line2D([], [], color=SLOWER, linewidth=5, label="onestep is slower"),
        Line2D([], [], color=GOAL, linewidth=1.4, marker="|", markersize=11, linestyle="", label="goal"),
        Line2D([], [], color=LIMIT, linestyle="", marker="$\\%$", markersize=8,
               label="share of the rate of torch's GEMM, or of reading or copying memory"),
    ]  # fmt: skip


def plot_ratios(results: list[dict[str, Any]], limits: dict[str, float], facts: str, path: Path) -> None:
    """Draws the groups in two columns of about equal length. Memory has no ratio of times and is left to the table."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if "ratio" in result:
            groups.setdefault(result["group"], []).append(result)
    columns: list[list[str]] = [[], []]
    lengths = [0.0, 0.0]
    for group in sorted(groups, key=lambda name: -len(groups[name])):
        shorter = int(lengths[1] < lengths[0])
        columns[shorter].append(group)
        lengths[shorter] += sum(_heights(groups[group])) + 4
    inches = LINE_INCHES * max(lengths) + 0.4
    figure = plt.figure(figsize=(2 * COLUMN_INCHES, inches + HEAD_INCHES), layout="constrained")
    head, body = figure.subfigures(2, 1, height_ratios=[HEAD_INCHES, inches])
    head.text(0.5, 0.98, f"Times as fast as the peer, on a log scale\n{facts}", fontsize=9, ha="center", va="top")
    head.legend(handles=_legend(), loc="lower center", ncols=4, frameon=False, fontsize=8.5)
    for sub, names in zip(body.subfigures(1, 2), columns, strict=True):
        if names:
            plots = sub.subplots(
                len(names), 1, squeeze=False, height_ratios=[sum(_heights(groups[n])) + 0.6 for n in names]
            )
            for axes, name in zip(plots[:, 0], names, strict=True):
                _draw(axes, name, groups[name], limits)
    figure.savefig(path, dpi=120)
    plt.close(figure)
