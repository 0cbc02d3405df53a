"""From the columns of a table to the matrix of features that a model is fitted on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .errors import CliError, count, note
from .table import Table

MANY_LEVELS = 50
MOST_LEVELS = 1000


@dataclass(frozen=True)
class Number:
    """A column of numbers: one feature. `fill` stands in for missing values; without it there may be none."""

    name: str
    fill: float | None

    @property
    def features(self) -> list[str]:
        """The names of the features it makes."""
        return [self.name]

    def encode(self, table: Table) -> np.ndarray:
        """The features of each row, NaN where a value is missing and nothing may fill it."""
        values = table.numbers(self.name)
        return (values if self.fill is None else np.where(np.isnan(values), self.fill, values))[:, None]


@dataclass(frozen=True)
class Category:
    """A column of categories: one 0/1 feature for each level but the baseline."""

    name: str
    baseline: str
    levels: tuple[str, ...]
    fill: str | None

    @property
    def features(self) -> list[str]:
        """The names of the features it makes."""
        return [f"{self.name} = {level}" for level in self.levels]

    def codes(self, table: Table) -> np.ndarray:
        """0 for the baseline, 1... for the other levels, -1 for a level that is none of them, or missing."""
        values = table.frame[self.name]
        values = values if self.fill is None else values.fillna(self.fill)
        return np.asarray(pd.Index([self.baseline, *self.levels]).get_indexer(values))

    def encode(self, table: Table) -> np.ndarray:
        """The features of each row, NaN where the level is unknown, or missing and nothing may fill it."""
        codes = self.codes(table)
        hot: np.ndarray = (codes[:, None] == np.arange(1, len(self.levels) + 1)).astype(np.float64)
        hot[codes < 0] = np.nan
        return hot


Column = Number | Category


def encode(columns: Sequence[Column], table: Table) -> np.ndarray:
    """The matrix of features, rows by features; a row with NaN has a level that no column knows."""
    return np.hstack([column.encode(table) for column in columns])


def _level_order(level: str) -> tuple[float, str]:
    try:
        return float(level), level
    except ValueError:
        return math.inf, level


def _category(name: str, table: Table, values: Any, impute: bool) -> Category | None:
    counts = values.value_counts()
    if len(counts) > MANY_LEVELS and (2 * len(counts) > len(values) or len(counts) > MOST_LEVELS):
        row = values.first_valid_index()
        raise CliError(
            f"{table.path}: column {name!r} is text with {len(counts):,} different values in "
            f"{count(len(values), 'training row')} ({values[row]!r} on line {table.line(row)}): too many for "
            f"categories; leave it out with --ignore {name!r}"
        )
    if len(counts) < 2:
        return None
    # Ties go to the first by name, so that the baseline does not depend on the order of the rows.
    most = counts.max()
    levels = sorted(map(str, counts.index), key=_level_order)
    baseline = next(level for level in levels if counts[level] == most)
    others = tuple(level for level in levels if level != baseline)
    return Category(name, baseline, others, baseline if impute else None)


def _number(name: str, values: np.ndarray, impute: bool) -> Number | None:
    if np.nanmin(values) == np.nanmax(values):
        return None
    return Number(name, float(np.nanmedian(values)) if impute else None)


def learn_columns(table: Table, names: Sequence[str], train: np.ndarray, *, impute: bool) -> list[Column]:
    """Decides from the training rows what each named column is. One that is constant there is left out, with a note."""
    columns: list[Column] = []
    for name in names:
        values = table.frame[name].iloc[train]
        column: Column | None
        if values.isna().all():
            raise CliError(
                f"{table.path}: column {name!r} has no value in the training rows; leave it out with --ignore {name!r}"
            )
        if table.is_text(name):
            column = _category(name, table, values, impute)
        else:
            hint = f"correct it, leave the column out with --ignore {name!r}, or pass --categorical {name!r}"
            column = _number(name, table.numbers(name, hint)[train], impute)
        if column is None:
            note(f"column {name!r} is constant in the training rows and is left out")
        else:
            columns.append(column)
    if not columns:
        raise CliError(f"{table.path}: no column is left to fit on")
    return columns
