"""From the columns of a table to the matrix of features that a model is fitted on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from . import numerals
from .errors import CliError, count, note
from .table import Table

# Texts that differ in most rows say which row it is: more levels than this are refused then, or than MANY_LEVELS
# where --categorical asks for them.
SOME_LEVELS = 10
MANY_LEVELS = 50
MOST_LEVELS = 1000


@dataclass(frozen=True)
class Number:
    """A column of numbers: one feature. `fill` stands in for missing values; without it there may be none.

    `unit` is what stands beside them, such as % or $, and is left out; empty for nothing.
    """

    name: str
    fill: float | None
    unit: str = ""

    @property
    def features(self) -> list[str]:
        """The names of the features it makes."""
        return [self.name]

    def encode(self, table: Table) -> np.ndarray:
        """The features of each row, NaN where there is no number, or none is given and nothing may fill it."""
        values = table.readable(self.name)
        values = np.where(np.isinf(values), np.nan, values)
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


# The parts of a date, and what pandas calls them.
DATE_PARTS = {"year": "year", "month": "month", "day": "day", "weekday": "day_of_week"}


def _date_part(dates: Any, part: str) -> Any:
    return getattr(dates.dt, DATE_PARTS[part])


@dataclass(frozen=True)
class Date:
    """A column of dates: one feature for each part that differs in the training rows (weekday: Monday is 0).

    `format` is one of strptime, or None for ISO 8601; `fill` stands in for missing dates.
    """

    name: str
    parts: tuple[str, ...]
    format: str | None
    fill: str | None

    @property
    def features(self) -> list[str]:
        """The names of the features it makes."""
        return [f"{self.name} {part}" for part in self.parts]

    def encode(self, table: Table) -> np.ndarray:
        """The features of each row, NaN where there is no date, or none is given and nothing may fill it."""
        dates = _dates(self.name, table, self.format)
        if self.fill is not None:
            dates = dates.mask(table.frame[self.name].isna(), pd.Timestamp(self.fill))
        return np.column_stack([_date_part(dates, part).to_numpy(dtype=np.float64) for part in self.parts])


def _dates(name: str, table: Table, written: str | None) -> Any:
    """A column as dates, NaT for texts that are none. A time's distance from UTC does not change the day written."""
    texts = table.frame[name].astype("string")
    if written and "%z" in written:
        return pd.to_datetime(texts.map(lambda text: _local_time(text, written), na_action="ignore"), errors="coerce")
    return pd.to_datetime(numerals.local(texts), format=written or "ISO8601", errors="coerce")


def _local_time(text: str, written: str) -> Any:
    try:
        return datetime.strptime(text, written).replace(tzinfo=None)
    except ValueError:
        return None


def _date(name: str, table: Table, train: np.ndarray, written: str | None, impute: bool) -> Date | None:
    dates, values = _dates(name, table, written), table.frame[name]
    wrong = (dates.isna() & values.notna()).to_numpy()
    if wrong.any():
        first = int(wrong.argmax())
        raise CliError(
            f"{table.source}: column {name!r} should hold dates, but line {table.line(values.index[first])} has "
            f"{values.iloc[first]!r}, which is not {written or 'YYYY-MM-DD'}; correct it, or say how dates are written "
            "with --date-format, such as %d/%m/%Y"
        )
    dates = dates.iloc[train]
    parts = tuple(part for part in DATE_PARTS if _date_part(dates, part).nunique() > 1)
    fill = str(dates.quantile(0.5, interpolation="lower").isoformat()) if impute else None
    return Date(name, parts, written, fill) if parts else None


Column = Number | Category | Date


def encode(columns: Sequence[Column], table: Table) -> np.ndarray:
    """The matrix of features, rows by features; a row with NaN has a level that no column knows."""
    return np.hstack([column.encode(table) for column in columns])


def level_order(level: str) -> tuple[float, str]:
    """Numbers by size, then texts by name."""
    try:
        return float(level), level
    except ValueError:
        return math.inf, level


def _category(name: str, table: Table, values: Any, impute: bool) -> Category | None:
    counts = values.value_counts()
    most_rows_differ = 2 * len(counts) > len(values)
    allowed = MANY_LEVELS if name in table.text else SOME_LEVELS
    if (most_rows_differ and len(counts) > allowed) or len(counts) > MOST_LEVELS:
        row = values.first_valid_index()
        wanted = f", or take it for categories all the same with --categorical {name!r}"
        raise CliError(
            f"{table.source}: column {name!r} is text with {len(counts):,} different values in "
            f"{count(len(values), 'training row')} ({values[row]!r} on line {table.line(row)}): too many for "
            f"categories; leave it out with --ignore {name!r}{wanted if len(counts) <= MANY_LEVELS else ''}"
        )
    if len(counts) < 2:
        return None
    # Ties go to the first by name, so that the baseline does not depend on the order of the rows.
    most = counts.max()
    levels = sorted(map(str, counts.index), key=level_order)
    baseline = next(level for level in levels if counts[level] == most)
    others = tuple(level for level in levels if level != baseline)
    return Category(name, baseline, others, baseline if impute else None)


def _number(table: Table, name: str, train: np.ndarray, impute: bool) -> Number | None:
    values = table.numbers(name)[train]
    if np.nanmin(values) == np.nanmax(values):
        return None
    return Number(name, float(np.nanmedian(values)) if impute else None, table.unit(name) or "")


def tell_unit(table: Table, name: str) -> None:
    """Notes that the unit beside a column's numbers is left out."""
    unit = table.unit(name)
    if unit:
        found = numerals.units(table.frame[name], table.conventions)
        example = table.frame[name][found.index[0]]
        read = numerals.to_numbers(pd.Series([example]), table.conventions)[0]
        note(f"column {name!r}: {unit} is left out ({example} is read as {read:g})")


def learn_columns(
    table: Table,
    names: Sequence[str],
    train: np.ndarray,
    *,
    impute: bool,
    dates: Sequence[str] = (),
    date_format: str | None = None,
) -> list[Column]:
    """Decides from the training rows what each named column is. One that is constant there is left out, with a note."""
    columns: list[Column] = []
    for name in names:
        values = table.frame[name].iloc[train]
        column: Column | None
        if values.isna().all():
            raise CliError(
                f"{table.source}: column {name!r} has no value in the training rows; "
                f"leave it out with --ignore {name!r}"
            )
        if name in dates:
            column = _date(name, table, train, date_format, impute)
        elif table.is_text(name):
            table.check_text(name)
            column = _category(name, table, values, impute)
        else:
            column = _number(table, name, train, impute)
            tell_unit(table, name)
        if column is None:
            note(f"column {name!r} is constant in the training rows and is left out")
        else:
            columns.append(column)
    if not columns:
        raise CliError(f"{table.source}: no column is left to fit on")
    return columns
