"""`python -m onestep predict`: predictions of a saved model for every row of a CSV file."""

import argparse
import csv
import io
import sys

import numpy as np

from .columns import Category, encode
from .errors import CliError, count, listed, note, say
from .model import Model, check_writable, load_model, replacing
from .report import Score
from .table import Table, read_table


def _check(table: Table, model: Model) -> None:
    """Raises unless the table has every column the model needs, and no missing value that it cannot fill."""
    names = [column.name for column in model.columns]
    for name in names:
        table.require(name, "the model was fitted on it")
    extra = [name for name in table.names if name not in names and name != model.target]
    if extra:
        note(f"not used by the model: {listed(extra)}")
    missing = {column.name: int(table.frame[column.name].isna().sum()) for column in model.columns}
    unfilled = [f"{c.name} ({missing[c.name]:,})" for c in model.columns if c.fill is None and missing[c.name]]
    if unfilled:
        raise CliError(
            f"{table.path} has missing values in {listed(unfilled)}; a model fitted with --impute median fills them"
        )
    for column in model.columns:
        if isinstance(column, Category) and (unknown := column.codes(table) < 0).any():
            row = int(unknown.argmax())
            raise CliError(
                f"{table.path}: column {column.name!r} has {table.frame[column.name].iloc[row]!r} on line "
                f"{table.line(row)}, which was not there when the model was fitted; "
                f"it knows {listed([column.baseline, *column.levels])}"
            )


def _score(table: Table, target: str, predicted: np.ndarray) -> None:
    try:
        truth = table.numbers(target)
    except CliError as error:
        note(f"not scored: {error}")
        return
    known = ~np.isnan(truth)
    if known.any():
        say("score", f"{Score.of(truth[known], predicted[known]).describe(target)} ({count(int(known.sum()), 'row')})")


def run(args: argparse.Namespace) -> None:
    """Loads the model, reads the table, and writes the predictions."""
    if args.output:
        check_writable(args.output)
    model = load_model(args.model)
    text = [column.name for column in model.columns if isinstance(column, Category)]
    table = read_table(args.file, args.sep, text=text)
    _check(table, model)
    predicted = model.predict(encode(model.columns, table))

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([f"predicted_{model.target}"])
    writer.writerows([value] for value in predicted.tolist())
    if args.output:
        with replacing(args.output) as file:
            file.write(buffer.getvalue().encode())
    else:
        sys.stdout.write(buffer.getvalue())
    if model.target in table.names:
        _score(table, model.target, predicted)
