"""`python -m onestep predict`: predictions of a saved model for every row of a CSV file."""

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from .columns import Category, Column, Number, encode
from .errors import CliError, count, listed, note, say
from .model import Model, check_writable, load_model, replacing
from .report import ClassScore, Score
from .source import Source
from .table import Table, read_table


def _check(table: Table, model: Model) -> None:
    """Raises unless the table has every column the model needs, with numbers in the units that it was fitted on."""
    names = [column.name for column in model.columns]
    for name in names:
        table.require(name, "the model was fitted on it")
    extra = [name for name in table.names if name not in names and name != model.target]
    if extra:
        note(f"not used by the model: {listed(extra)}")
    for column in model.columns:
        if not isinstance(column, Number):
            continue
        if table.is_text(column.name):
            table.numbers(column.name)
        unit = table.unit(column.name)
        if unit is not None and unit != column.unit:
            found, fitted = unit or "nothing", column.unit or "nothing"
            raise CliError(
                f"{table.source}: column {column.name!r} has {found} beside its numbers, but {fitted} in the file that "
                "the model was fitted on; write it as there"
            )


def _tell_unknown(table: Table, model: Model, whole: np.ndarray) -> None:
    """Notes the rows that get no prediction: those that are not whole, or have a value that is missing or unknown."""
    if table.broken:
        example = next(iter(table.broken.values()))
        note(f"{table.source}: {count(len(table.broken), 'row')} without a prediction: {example}")
    for column in model.columns:
        unknown = np.isnan(column.encode(table)).any(1) & whole
        missing = unknown & table.frame[column.name].isna().to_numpy()
        for rows, why in ((missing, ""), (unknown & ~missing, _why_unknown(column))):
            if not rows.any():
                continue
            first = int(rows.argmax())
            value = repr(str(table.frame[column.name].iloc[first])) if why else "no value"
            hint = why or "; a model fitted with --impute median fills it"
            note(
                f"{table.source}: {count(int(rows.sum()), 'row')} without a prediction: column {column.name!r} has "
                f"{value} on line {table.line(first)}{hint}"
            )


def _why_unknown(column: Column) -> str:
    if isinstance(column, Category):
        levels = listed([column.baseline, *column.levels])
        return f", which was not there when the model was fitted; it knows {levels}"
    if isinstance(column, Number):
        return ", which is no finite number"
    return f", which is not {column.format or 'YYYY-MM-DD'}"


def _tell_score(table: Table, model: Model, features: np.ndarray, known: np.ndarray) -> None:
    """The score of the rows that have a prediction and a target."""
    rows, score = np.flatnonzero(known), ""
    if model.classes:
        values = table.frame[model.target]
        codes = pd.Index(model.classes).get_indexer(values)
        rows = rows[codes[rows] >= 0]
        if len(rows):
            score = ClassScore.of(codes[rows], model.probabilities(features[rows])).describe()
    else:
        try:
            truth = table.numbers(model.target)
        except CliError as error:
            note(f"not scored: {error}")
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
    table = read_table(Source(args.file), args.sep, conventions, text, fits=False, target=model.target)
    _check(table, model)
    features = encode(model.columns, table)
    whole = ~np.isin(np.arange(len(features)), list(table.broken))
    known = ~np.isnan(features).any(1) & whole
    _tell_unknown(table, model, whole)

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(_predictions(model, features, known))
    if args.output:
        with replacing(args.output) as file:
            file.write(buffer.getvalue().encode())
    else:
        sys.stdout.write(buffer.getvalue())
    if model.target in table.names:
        _tell_score(table, model, features, known)
