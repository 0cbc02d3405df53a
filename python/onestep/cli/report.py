"""What `fit` and `predict` show: weights in their own units, and scores."""

import math
import sys
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .columns import Number
from .model import LinearModel

# Beyond a terminal (a pipe, a file, a test) nothing is to be folded or cut off.
PIPE_WIDTH = 1000


def number(value: float, sign: str = "") -> str:
    """Six significant digits, thousands apart."""
    if value == 0 or not math.isfinite(value):
        return f"{value:{sign}g}"
    magnitude = math.floor(math.log10(abs(value)))
    if not -5 <= magnitude <= 14:
        return f"{value:{sign}.5e}"
    return f"{value:{sign},.{max(0, 5 - magnitude)}f}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


@dataclass(frozen=True)
class Score:
    """R² (NaN where all targets are equal) and root mean squared error of predictions."""

    r2: float
    rmse: float

    @classmethod
    def of(cls, truth: np.ndarray, predicted: np.ndarray) -> "Score":
        """The score of predictions against the truth."""
        squares = float(((truth - predicted) ** 2).sum())
        total = float(((truth - truth.mean()) ** 2).sum())
        return cls(1 - squares / total if total > 0 else math.nan, math.sqrt(squares / len(truth)))

    def describe(self, unit: str) -> str:
        """`R² 0.9120, RMSE 38,204.1 price`."""
        r2 = "undefined (all targets are equal)" if math.isnan(self.r2) else f"{self.r2:.4f}"
        return f"R² {r2}, RMSE {number(self.rmse)} {unit}"


def console() -> Console:
    """A console on stdout that leaves plain text alone."""
    return Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def weight_table(model: LinearModel) -> Table:
    """One row for each weight, with its unit, and one for the intercept."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("feature", overflow="fold")
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("unit", style="dim", overflow="fold")
    weights = iter(model.weight)
    for column in model.columns:
        for feature in column.features:
            if isinstance(column, Number):
                unit = f"{model.target} per {column.name}"
            else:
                unit = f"{model.target}, against {column.name} = {column.baseline}"
            table.add_row(Text(feature), number(float(next(weights)), "+"), Text(unit))
    table.add_section()
    zero = f"{model.target}, where every number is 0"
    if not all(isinstance(column, Number) for column in model.columns):
        zero += " and every category at its baseline"
    table.add_row(Text("intercept"), number(model.bias, "+"), Text(zero))
    return table
