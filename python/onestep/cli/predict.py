"""`python -m onestep predict`: predictions of a saved model for every row of a CSV file."""

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from . import dates, numerals
from .columns import Category, Column, Date, Number
from .errors import CliError, count, listed, note, say
from .model import Model, load_model
from .output import check_writable, replacing
from .report import ClassScore, Score
from .source import Source
from .table import Table, read_table


def _check(table: Table, model: Model) -> None:
    """Raises unless the table has every column the model needs."""
    names = [column.name for column in model.columns]
    for name in names:
        table.require(name, "the model was fitted on it")
    extra = [name for name in table.names if name not in names and name != model.target]
    if extra:
        note(f"not used by the model: {listed(extra)}")


def _check_kind(table: Table, column: Column, unknown: np.ndarray, whole: np.ndarray) -> None:
    """Raises for a column of numbers or dates without any: it is of another kind than the model's."""
    values = table.frame[column.name]
    present = values.notna().to_numpy() & whole
    if isinstance(column, Category) or not present.any() or not unknown[present].all():
        return
    row = int(present.argmax())
    if isinstance(column, Number):
        if np.isinf(table.as_fitted(column.name, column.unit)[present]).any():
            return
        if table.flaws(column.name, column.unit)[row] == "unit":
            has = _has_another_unit(table, column.name, column.unit, row)
            raise CliError(f"{table.source}: column {column.name!r}{has}; write it as there")
        table.numbers(column.name)
    raise CliError(
        f"{table.source}: column {column.name!r} should be as in the file that the model was fitted on, but line "
        f"{table.line(row)} has {table.written(column.name, row)!r}{_why_unknown(table, column, row)}; correct it"
    )


def _tell_broken(table: Table) -> None:
    """Notes the rows whose records have too many fields or too few."""
    if table.broken:
        example = next(iter(table.broken.values()))
        note(f"{table.source}: {count(len(table.broken), 'row')} without a prediction: {example}")


def _tell_unknown(table: Table, column: Column, unknown: np.ndarray) -> None:
    """Notes the rows that get no prediction, because a value of a column is missing or is none that the model takes."""
    missing = unknown & table.frame[column.name].isna().to_numpy()
    for rows in (missing, unknown & ~missing):
        if not rows.any():
            continue
        first = int(rows.argmax())
        if rows is missing:
            value, hint = "no value", "; a model fitted with --impute median fills it"
        else:
            value = repr(table.written(column.name, first))
            hint = _why_unknown(table, column, first)
        note(
            f"{table.source}: {count(int(rows.sum()), 'row')} without a prediction: column {column.name!r} has "
            f"{value} on line {table.line(first)}{hint}"
        )


def _has_another_unit(table: Table, name: str, unit: str, row: int) -> str:
    found = numerals.unit(str(table.frame[name].iloc[row]))
    fitted = unit or "nothing"
    return f" has {found or 'nothing'} beside its numbers, but {fitted} in the file that the model was fitted on"


def _why_unknown(table: Table, column: Column, row: int) -> str:
    if isinstance(column, Category):
        levels = listed([column.baseline, *column.levels])
        return f", which was not there when the model was fitted; it knows {levels}"
    if isinstance(column, Date):
        values = table.frame[column.name].iloc[[row]]
        if dates.parse(values, column.format).notna().all():
            said = dates.said(values, column.format)
            return f", which says no {next(part for part in column.parts if not said[part].all())}"
        return f", which is not {column.format or 'YYYY-MM-DD'}"
    flaw = table.flaws(column.name, column.unit)[row]
    if flaw == "unit":
        return f": the column{_has_another_unit(table, column.name, column.unit, row)}"
    if flaw == "misfit":
        conventions = table.conventions
        thousands = f"thousands apart by {conventions.thousands!r} and " if conventions.thousands else ""
        way = f"{thousands}decimals behind {conventions.decimal!r}"
        return f", which is not written as the model reads numbers, with {way}"
    if flaw == "inexact":
        return ", a number beyond 2^53, of which float64 loses digits"
    return ", which is no finite number"


def _codes(table: Table, model: Model) -> np.ndarray:
    """The class of each row's target: its place among the model's, -1 where it is none of them, or missing.

    Classes that were numbers are found as numbers in the table's way of writing: 1,000 and 1.0 are 1000 and 1.
    """
    values, classes = table.frame[model.target], pd.Index(model.classes)
    written = values.notna() & ~numerals.misfits(values, table.conventions)
    written &= values.map(numerals.unit, na_action="ignore") == ""
    numbers = numerals.to_numbers(values.where(written), table.conventions)
    codes = classes.get_indexer(numbers.map(numerals.as_class, na_action="ignore"))
    if model.unit is None:
        named = classes.get_indexer(values)
        codes = np.where(named < 0, codes, named)
    return np.asarray(codes)


def _tell_score(table: Table, model: Model, features: np.ndarray, known: np.ndarray) -> None:
    """The score of the rows that have a prediction and a target."""
    rows, score = np.flatnonzero(known), ""
    if model.classes:
        codes = _codes(table, model)
        other = known & table.frame[model.target].notna().to_numpy() & (codes < 0)
        if other.any():
            row = int(other.argmax())
            note(
                f"{count(int(other.sum()), 'row')} not scored: the target {model.target!r} has "
                f"{table.written(model.target, row)!r} on line {table.line(row)}, which is none of the model's classes "
                f"{listed(list(model.classes))}"
            )
        rows = rows[codes[rows] >= 0]
        if len(rows):
            score = ClassScore.of(codes[rows], model.probabilities(features[rows])).describe()
    else:
        try:
            truth = table.numbers(model.target)
        except CliError as error:
            note(f"not scored: {error}")
            return
        unit = model.unit or ""
        differ = table.flaws(model.target, unit) == "unit"
        if differ.any():
            row = int(differ.argmax())
            has = _has_another_unit(table, model.target, unit, row)
            note(f"not scored: {table.source}: the target {model.target!r}{has}; write it as there")
            return
        rows = rows[~np.isnan(truth[rows])]
        if len(rows):
            score = Score.of(truth[rows], model.predict(features[rows])).describe(model.target)
    if len(rows):
        say("score", f"{score} ({count(len(rows), 'row')})")


def _predictions(model: Model, features: np.ndarray, known: np.ndarray) -> Iterator[list[object]]:
    """The lines of the result: a heading, then one for each row, empty where nothing could be predicted."""
    if model.classes:
        yield [f"predicted_{model.target}", "probability"]
        likely = iter(model.probabilities(features[known]))
        for has in known:
            row = next(likely) if has else None
            yield ["", ""] if row is None else [model.classes[int(row.argmax())], float(row.max())]
        return
    yield [f"predicted_{model.target}"]
    predicted = iter(model.predict(features[known]).tolist())
    for has in known:
        yield [next(predicted) if has else ""]


def run(args: argparse.Namespace) -> None:
    """Loads the model, reads the table, and writes the predictions."""
    if args.output:
        check_writable(args.output)
    model, conventions = load_model(args.model)
    given = {
        "thousands": args.thousands,
        "decimal": args.decimal,
        "missing": None if args.missing is None else tuple(args.missing),
    }
    conventions = replace(conventions, **{name: value for name, value in given.items() if value is not None})
    text = [column.name for column in model.columns if not isinstance(column, Number)]
    text += [model.target] if model.classes else []
    table = read_table(Source(args.file, args.encoding), args.sep, conventions, text, fits=False, target=model.target)
    _check(table, model)
    whole = ~np.isin(np.arange(len(table.frame)), list(table.broken))
    encoded = [column.encode(table) for column in model.columns]
    unknown = [np.isnan(features).any(1) for features in encoded]
    for column, rows in zip(model.columns, unknown, strict=True):
        _check_kind(table, column, rows, whole)
    _tell_broken(table)
    for column, rows in zip(model.columns, unknown, strict=True):
        _tell_unknown(table, column, rows & whole)
    features = np.hstack(encoded)
    known = ~np.isnan(features).any(1) & whole

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(_predictions(model, features, known))
    if args.output:
        with replacing(args.output) as file:
            file.write(buffer.getvalue().encode())
    else:
        sys.stdout.write(buffer.getvalue())
    if model.target in table.names:
        _tell_score(table, model, features, known)
