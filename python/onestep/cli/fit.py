"""`python -m onestep fit`: from a CSV file to a fitted, reported and saved model."""

import argparse
import time
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import train_test_split

from .columns import Column, encode, learn_columns
from .errors import CliError, count, listed, note
from .model import LinearModel, Model, NetworkModel, check_writable, save_model
from .report import Score, console, duration, weight_table
from .solve import Solve, fit_linear, fit_network
from .table import Table, read_table


def _read(args: argparse.Namespace) -> tuple[Table, list[str]]:
    """The table and the names of the columns to fit on."""
    table = read_table(args.file, args.sep, text=[name for name in args.categorical if name != args.target])
    table.require(args.target, "the target")
    for option in ("ignore", "categorical"):
        for name in getattr(args, option):
            table.require(name, f"in --{option}")
            if name == args.target:
                raise CliError(f"the target {name!r} cannot also be in --{option}")
    names = [name for name in table.names if name != args.target and name not in args.ignore]
    if not names:
        raise CliError(f"{args.file}: there is no column to fit on besides the target {args.target!r}")
    return table, names


def _settle_missing(table: Table, names: list[str], target: str, impute: bool) -> None:
    """Raises for missing values, or, with `impute`, drops the rows without a target."""
    missing = table.frame[[*names, target]].isna().sum()
    missing = missing[missing > 0]
    if not impute and len(missing):
        columns = listed([f"{name} ({n:,})" for name, n in missing.items()])
        raise CliError(
            f"{table.path} has missing values in {columns}; pass --impute median, or leave columns out with --ignore"
        )
    if target in missing:
        note(f"{count(int(missing[target]), 'row')} without {target} dropped")
        table.frame = table.frame[table.frame[target].notna()]


def _split(table: Table, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and the held-out rows, as scikit-learn's train_test_split chooses them."""
    rows = np.arange(len(table.frame))
    held_out = int(np.ceil(test_size * len(rows)))
    if len(rows) - held_out < 2 or held_out == 1:
        purpose = "fit on" if test_size == 0 else f"hold out {test_size:g} of them and fit on the rest"
        raise CliError(f"{table.path}: {count(len(rows), 'row')} with a target: too few to {purpose}")
    if test_size == 0:
        return rows, rows[:0]
    train, test = train_test_split(rows, test_size=test_size, random_state=seed)
    return train, test


def _tell_filled(table: Table, model: Model) -> None:
    for column in model.columns:
        missing = int(table.frame[column.name].isna().sum())
        if missing:
            fill = f"the median {column.fill:,.6g}" if isinstance(column.fill, float) else repr(column.fill)
            note(f"{count(missing, 'missing value')} of {column.name} filled with {fill}")


def _tell_few_rows(model: NetworkModel, rows: int) -> None:
    if rows < model.parameters:
        note(
            f"{count(rows, 'training row')} cannot settle the {count(model.parameters, 'parameter')} of the network: "
            "a smaller --hidden, a larger --alpha or --model linear may predict better"
        )


def _tell_solve(solve: Solve, rows: int, features: int) -> None:
    if solve.path == "minimum_norm":
        why = (
            f"{count(rows, 'training row')} cannot determine {count(features, 'weight')} and an intercept"
            if rows <= features
            else "some columns depend linearly on others"
        )
        note(f"{why}: the weights are not unique, and the smallest of them are shown")


@dataclass(frozen=True)
class _Data:
    """A file ready to be fitted: features and target of all its rows, and which are trained on and held out."""

    table: Table
    columns: list[Column]
    features: np.ndarray
    y: np.ndarray
    train: np.ndarray
    test: np.ndarray

    def scores(self, model: Model, rows: np.ndarray) -> str:
        """R² and RMSE over some of the rows."""
        return Score.of(self.y[rows], model.predict(self.features[rows])).describe(model.target)


def _load(args: argparse.Namespace) -> _Data:
    table, names = _read(args)
    # The target's own errors come before those of the columns.
    hint = "correct it, or choose another target"
    table.numbers(args.target, hint)
    _settle_missing(table, names, args.target, args.impute is not None)
    y = table.numbers(args.target, hint)
    train, test = _split(table, args.test_size, args.seed)
    columns = learn_columns(table, names, train, impute=args.impute is not None)
    features = encode(columns, table)
    unknown = np.isnan(features[test]).any(1)
    if unknown.any():
        note(f"{count(int(unknown.sum()), 'held-out row')} with a category that no training row has: not scored")
        test = test[~unknown]
    return _Data(table, columns, features, y, train, test)


def _fit(args: argparse.Namespace, data: _Data) -> tuple[Model, LinearModel, Solve]:
    """The model that was asked for, the linear one (the same, or the one to compare with), and how the first went."""
    fitted = args.target, data.columns, data.features[data.train], data.y[data.train]
    if args.model == "linear":
        linear, solve = fit_linear(*fitted, args.alpha, args.dtype)
        return linear, linear, solve
    linear, _ = fit_linear(*fitted, 0.0, args.dtype)
    network, solve = fit_network(
        *fitted, args.alpha, args.dtype, hidden=args.hidden, max_steps=args.max_steps, seed=args.seed
    )
    return network, linear, solve


def run(args: argparse.Namespace) -> None:
    """Reads, fits, reports and saves."""
    begin = time.perf_counter()
    if args.save:
        check_writable(args.save)
    data = _load(args)
    read = time.perf_counter() - begin
    model, linear, solve = _fit(args, data)
    if args.save:
        save_model(model, args.save)

    rows, features = len(data.train), len(model.features)
    if args.impute:
        _tell_filled(data.table, model)
    out = console()
    held = f"{len(data.test):,} held out" if len(data.test) else "none held out"
    heading = f"{args.file}: {count(len(data.table.frame), 'row')}, {rows:,} to fit on, {held}"
    how = ""
    if isinstance(model, NetworkModel):
        _tell_few_rows(model, rows)
        out.print(heading)
        widths = "-".join(str(width) for width in (features, *args.hidden, 1))
        out.print(f"network:   {widths} with relu, {count(model.parameters, 'parameter')}, alpha {args.alpha:g}")
        out.print(f"method:    {solve.path}, {count(solve.steps, 'step')}: {solve.reason}")
    else:
        _tell_solve(solve, rows, features)
        out.print(heading)
        out.print(weight_table(linear))
        how = f"; {solve.path}"
    for name, part in (("held out:", data.test), ("training:", data.train)):
        if len(part):
            out.print(f"{name}  {data.scores(model, part)}")
            if model is not linear:
                out.print(f"           {data.scores(linear, part)} with --model linear")
    shape = f"{rows:,} rows, {count(features, 'feature')}{how}"
    out.print(f"time:      {duration(solve.seconds)} to solve ({shape}), {duration(read)} to read")
    if args.save:
        out.print(f"saved to {args.save}")
