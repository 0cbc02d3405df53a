"""The picture of `make bench`: a small plot of ratios to the peer for each group of benchmarks, on one log axis."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

FASTER, SLOWER, GOAL = "#2f6f9f", "#b5542f", "#222222"
# Ratios beyond these ends are drawn at the end, with their figure.
LOWEST, HIGHEST = 1 / 16, 64
ROW_INCHES, COLUMN_INCHES, LABEL_CHARACTERS = 0.27, 5.4, 46


def _short(text: str) -> str:
    return "\n".join(textwrap.wrap(text, LABEL_CHARACTERS, max_lines=2, placeholder=" …"))


def _draw(axes: Any, group: str, rows: list[dict[str, Any]]) -> None:
    positions = np.arange(len(rows))[::-1]
    ratios = np.array([row["ratio"] for row in rows])
    colours = [FASTER if ratio >= 1 else SLOWER for ratio in ratios]
    ends = np.clip(ratios, LOWEST, HIGHEST)
    axes.hlines(positions, 1, ends, color=colours, linewidth=5)
    for row, position, end in zip(rows, positions, ends, strict=True):
        ahead = row["ratio"] >= 1
        axes.text(end * (1.08 if ahead else 1 / 1.08), position, f"{row['ratio']:.2g}", va="center", fontsize=8,
                  ha="left" if ahead else "right")  # fmt: skip
        if row.get("goal"):
            axes.plot([row["goal"]] * 2, [position - 0.36, position + 0.36], color=GOAL, linewidth=1.4)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlim(LOWEST / 1.6, HIGHEST * 1.7)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_yticks(positions, [_short(row["case"]) for row in rows], fontsize=7.5)
    axes.set_xticks([1 / 8, 1 / 2, 1, 2, 4, 8, 16, 32], ["⅛", "½", "1", "2", "4", "8", "16", "32"], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(group, loc="left", fontsize=10, fontweight="bold")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def plot_ratios(results: list[dict[str, Any]], facts: str, path: Path) -> None:
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
        lengths[shorter] += len(groups[group]) + 2.4
    figure = plt.figure(figsize=(2 * COLUMN_INCHES, ROW_INCHES * max(lengths) + 1.0), layout="constrained")
    for sub, names in zip(figure.subfigures(1, 2), columns, strict=True):
        if names:
            plots = sub.subplots(len(names), 1, squeeze=False, height_ratios=[len(groups[n]) + 1.2 for n in names])
            for axes, name in zip(plots[:, 0], names, strict=True):
                _draw(axes, name, groups[name])
    figure.suptitle("times as fast as the peer (log scale; |: goal)\n" + facts, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
