"""What `fit` and `predict` show: weights in their own units, and scores."""

import math
import sys
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .columns import Category, Column, Number
from .model import LinearModel

# Beyond a terminal (a pipe, a file, a test) nothing is to be folded or cut off.
PIPE_WIDTH = 1000
# Names in tables are cut to so many characters.
LONGEST_NAME = 80


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


@dataclass(frozen=True)
class ClassScore:
    """Share of rows whose most probable class is right, mean of -log(probability of the true class), and the share of
    the most frequent class, which is what guessing that gives."""

    accuracy: float
    log_loss: float
    majority: float

    @classmethod
    def of(cls, codes: np.ndarray, probabilities: np.ndarray) -> "ClassScore":
        """The score of probabilities (rows, classes) against the numbers of the true classes."""
        rows = np.arange(len(codes))
        likelihood = np.maximum(probabilities[rows, codes], np.finfo(np.float64).tiny)
        return cls(
            float((probabilities.argmax(1) == codes).mean()),
            float(-np.log(likelihood).mean()),
            float(np.bincount(codes).max() / len(codes)),
        )

    def describe(self) -> str:
        """`accuracy 0.9600, log loss 0.1234 (most frequent class alone: 0.5000)`."""
        return (
            f"accuracy {self.accuracy:.4f}, log loss {self.log_loss:.4f} "
            f"(most frequent class alone: {self.majority:.4f})"
        )


def console() -> Console:
    """A console on stdout that leaves plain text alone."""
    return Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _shown(text: str) -> str:
    """A name as a table has it: on one line, and cut where it is as long as a text."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}\u2026"


def _unit(column: Column, gives: str) -> str:
    if isinstance(column, Category):
        return f"{gives}, against {_shown(f'{column.name} = {column.baseline}')}"
    return f"{gives} per {column.name if isinstance(column, Number) else 'unit'}"


def weight_table(model: LinearModel) -> Table:
    """One row for each weight, with its unit, and one for the intercept; one column of weights for each class.

    Two classes have one column, the log-odds of the second; more have one each, their scores before the softmax.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("feature", overflow="fold")
    weight, bias, gives = model.weight, model.bias, model.target
    if len(model.classes) == 2:
        weight, bias, gives = weight[1:] - weight[:1], bias[1:] - bias[:1], f"log-odds of {model.classes[1]}"
    elif model.classes:
        gives = "score of the class"
    for heading in model.classes if len(model.classes) > 2 else ("weight",):
        table.add_column(_shown(heading), justify="right", no_wrap=True)
    table.add_column("unit", style="dim", overflow="fold")
    rows = iter(weight.T)
    for column in model.columns:
        for feature in column.features:
            values = [number(float(value), "+") for value in next(rows)]
            table.add_row(Text(_shown(feature)), *values, Text(_unit(column, gives)))
    table.add_section()
    zero = f"{gives}, where every number is 0"
    if any(isinstance(column, Category) for column in model.columns):
        zero += " and every category at its baseline"
    table.add_row(Text("intercept"), *(number(float(value), "+") for value in bias), Text(zero))
    return table
