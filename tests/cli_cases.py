"""Tables and saved weights for tests of the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("rich")
safe_open = pytest.importorskip("safetensors").safe_open
linear_model = pytest.importorskip("sklearn.linear_model")
train_test_split = pytest.importorskip("sklearn.model_selection").train_test_split


ROOT = Path(__file__).resolve().parent.parent
HOUSES = ROOT / "examples" / "data" / "houses.csv"


def weights(path: Path) -> dict[str, float]:
    with safe_open(path, framework="numpy") as file:
        names = json.loads(file.metadata()["features"])
        return dict(zip(names, file.get_tensor("weight")[0], strict=True)) | {"": float(file.get_tensor("bias")[0])}


def small(rows: int = 40, seed: int = 0) -> str:
    """A table without noise: y = 3a - 2b + 5 + 10 where kind is v."""
    rng = np.random.default_rng(seed)
    lines = ["a,b,kind,y"]
    for _ in range(rows):
        a, b, kind = int(rng.integers(100)), int(rng.integers(100)), "uuv"[rng.integers(3)]
        lines.append(f"{a},{b / 4},{kind},{3 * a - 2 * b / 4 + 5 + 10 * (kind == 'v')}")
    return "\n".join(lines) + "\n"


def with_line(text: str, line: int, replacement: str) -> str:
    """The text with one line (counted from 1) replaced."""
    lines = text.splitlines()
    lines[line - 1] = replacement
    return "\n".join(lines) + "\n"


def r2(out: str, name: str) -> list[float]:
    """R² of the network and of the linear model."""
    start = out.splitlines().index(next(line for line in out.splitlines() if line.startswith(name)))
    return [float(re.search(r"R² (-?[\d.]+)", line)[1]) for line in out.splitlines()[start : start + 2]]


def besides_task(err: str) -> str:
    """What was said but for the note that the target is fitted as a number, which stands where --task does not."""
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if not re.match("note: the target .* is fitted as a number, because", line))
