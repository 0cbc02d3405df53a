"""From the columns of a table to the matrix of features that a model is fitted on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from . import dates
from .errors import CliError, count, note
from .table import Table
from .texts import check_text, tell_dates_in_numbers, tell_leading_zeros, tell_numbers_in_texts, tell_points, tell_unit

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
        values = table.as_fitted(self.name, self.unit)
        values = np.where(np.isinf(values), np.nan, values)
        if self.fill is not None:
            values = np.where(table.frame[self.name].isna(), self.fill, values)
        return values[:, None]


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

    @property
    def written_fill(self) -> str | None:
        """What stands in for missing dates, as the file writes dates: 08/29 has no year."""
        return self.fill if self.fill is None or self.format is None else pd.Timestamp(self.fill).strftime(self.format)

    def encode(self, table: Table) -> np.ndarray:
        """The features of each row, NaN where there is no date, or none is given and nothing may fill it."""
        texts = table.frame[self.name]
        days, said = dates.parse(texts, self.format), dates.said(texts, self.format)
        missing = texts.isna().to_numpy() & (self.fill is not None)
        days = days.mask(missing, pd.Timestamp(self.fill))
        parts = [_date_part(days, part).to_numpy(dtype=np.float64) for part in self.parts]
        return np.column_stack(
            [np.where(said[name] | missing, part, np.nan) for name, part in zip(self.parts, parts, strict=True)]
        )


def _date_part(days: Any, part: str) -> Any:
    return getattr(days.dt, dates.PARTS[part])


def _date(name: str, table: Table, train: np.ndarray, written: str | None, impute: bool) -> Date | None:
    values = table.frame[name]
    days = dates.parse(values, written)
    wrong = (days.isna() & values.notna()).to_numpy()
    if wrong.any():
        first = int(wrong.argmax())
        raise CliError(
            f"{table.source}: column {name!r} should hold dates, but line {table.line(values.index[first])} has "
            f"{values.iloc[first]!r}, which is not {written or 'YYYY-MM-DD'}; correct it, or say how dates are written "
            f"with --date-format, such as {dates.likely_format(values.iloc[first])!r}"
        )
    said = _parts_said(name, table, written)
    days = days.iloc[train]
    parts = tuple(part for part in said if _date_part(days, part).nunique() > 1)
    fill = str(days.quantile(0.5, interpolation="lower").isoformat()) if impute else None
    return Date(name, parts, written, fill) if parts else None


def _parts_said(name: str, table: Table, written: str | None) -> list[str]:
    """The parts that all dates of a column say; raises where some say more than others, and tells if it is not all."""
    values = table.frame[name].dropna()
    said = dates.said(values, written)
    for part, says in said.items():
        if says.any() and not says.all():
            first, second = (values.index[int(rows.argmax())] for rows in (says, ~says))
            raise CliError(
                f"{table.source}: column {name!r} has dates with and without a {part}, such as {values[first]!r} "
                f"on line {table.line(first)} and {values[second]!r} on line {table.line(second)}; write all in one way"
            )
    parts = [part for part, says in said.items() if says.all()]
    missing = [part for part in said if part not in parts]
    if not parts:
        raise CliError(f"--date-format {written!r} says no year, month or day: it must have one, such as %Y, %m or %d")
    if missing:
        note(
            f"column {name!r}: dates such as {values.iloc[0]} say no {' and no '.join(missing)}; "
            f"{' and '.join(parts)} {'is' if len(parts) == 1 else 'are'} used"
        )
    return parts


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
    tell_unit(table, name)
    tell_dates_in_numbers(table, name, values)
    tell_points(table, name, values)
    if table.frame[name].dtype.kind == "f":
        tell_leading_zeros(table, name)
    if np.nanmin(values) == np.nanmax(values):
        return None
    return Number(name, float(np.nanmedian(values)) if impute else None, table.unit(name) or "")


def learn_columns(
    table: Table,
    names: Sequence[str],
    train: np.ndarray,
    *,
    impute: bool,
    date_columns: Sequence[str] = (),
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
        if name in date_columns:
            column = _date(name, table, train, date_format, impute)
        elif table.is_text(name):
            check_text(table, name)
            column = _category(name, table, values, impute)
            if column is not None:
                tell_numbers_in_texts(table, name)
        else:
            column = _number(table, name, train, impute)
        if column is None:
            note(f"column {name!r} is constant in the training rows and is left out")
        else:
            columns.append(column)
    if not columns:
        raise CliError(f"{table.source}: no column is left to fit on")
    return columns
