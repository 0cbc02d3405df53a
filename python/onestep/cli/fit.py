"""`python -m onestep fit`: from a CSV file to a fitted, reported and saved model."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from . import numerals
from .columns import Date, encode, learn_columns, level_order
from .errors import CliError, Interrupted, count, listed, note
from .model import LinearModel, Model, NetworkModel, save_model
from .output import check_writable
from .report import ClassScore, Score, console, duration, weight_table
from .solve import Solve, Task, fit_linear, fit_network
from .source import Conventions, Source
from .table import Table, read_table
from .texts import check_text, read_as_missing, tell_dates_in_numbers, tell_points, tell_unit

# What alpha is where the command line does not say. The network's suits a standardised target: least squares of a few
# hundred to a few thousand rows would follow their noise. The logistic one is scikit-learn's.
NETWORK_ALPHA, LOGISTIC_ALPHA = 10.0, 1.0
# A text target of more classes than this, most of them seen once, is no class.
MANY_CLASSES = 50


def _read(args: argparse.Namespace) -> tuple[Table, list[str]]:
    """The table and the names of the columns to fit on."""
    conventions = Conventions(
        args.thousands, args.decimal or ".", None if args.missing is None else tuple(args.missing)
    )
    text = [name for name in args.categorical + args.dates if name != args.target]
    if args.task == "classification":
        text.append(args.target)
    table = read_table(Source(args.file, args.encoding), args.sep, conventions, text, target=args.target)
    table.require(args.target, "the target")
    for option in ("ignore", "categorical", "dates"):
        for name in getattr(args, option):
            table.require(name, f"in --{option}")
            if name == args.target:
                raise CliError(f"the target {name!r} cannot also be in --{option}")
    names = [name for name in table.names if name != args.target and name not in args.ignore]
    if not names:
        raise CliError(f"{table.source}: there is no column to fit on besides the target {args.target!r}")
    return table, names


def _settle_task(args: argparse.Namespace, table: Table) -> tuple[bool, str]:
    """Whether the target holds classes, and a note that says why where that was not asked for.

    Texts and numbers of two values are classes. Other numbers are numbers, however few: stars from 1 to 5 have an
    order that classes would lose, and only the user knows whether the codes 0, 1 and 2 have one.
    """
    name, values = args.target, table.frame[args.target].dropna()
    if args.task != "auto":
        return bool(args.task == "classification"), ""
    different = int(values.nunique())
    if table.is_text(name):
        check_text(table, name)
        if different > MANY_CLASSES and 2 * different > len(values):
            return False, ""  # its texts are refused as numbers
        why = "because it is text; one model predicts the probability of each"
        # One class is refused, with what can be done; a target without any is missing.
        return different > 0, f"the target {name!r} has {different} classes: it is classified, {why}"
    if different == 2:
        why = "because it has two different values; pass --task regression to fit it as a number"
        return True, f"the target {name!r} has 2 classes: it is classified, {why}"
    many = count(different, "different value")
    why = f"because it holds numbers, with {many}; pass --task classification if they are classes"
    return False, f"the target {name!r} is fitted as a number, {why}"


def _settle_missing(table: Table, names: list[str], target: str, impute: bool) -> None:
    """Raises for missing values, or, with `impute`, drops the rows without a target."""
    missing = table.frame[[*names, target]].isna().sum()
    missing = missing[missing > 0]
    # Where texts are expected, such as codes of countries, NA may be one of them.
    texts = read_as_missing(table, [name for name in missing.index if table.is_text(name)])
    if not impute and len(missing):
        columns = listed([f"{name} ({n:,})" for name, n in missing.items()])
        raise CliError(
            f"{table.source} has missing values in {columns}; pass --impute median, or leave columns out with --ignore"
            f"{'; ' if texts else ''}{texts}"
        )
    if texts:
        note(texts)
    if target in missing:
        note(f"{count(int(missing[target]), 'row')} without {target} dropped")
        table.frame = table.frame[table.frame[target].notna()]


def _target(table: Table, name: str, classify: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """The target of each row and its classes, if any: a number (NaN: missing), or a class's position (-1: missing)."""
    if not classify:
        return table.numbers(name), ()
    values = table.frame[name]
    if values.dtype.kind == "f" and (name in table.misfits or name in table.inexact):
        # Numbers that are not those that were written are not the classes either.
        table.numbers(name)
    labels = values.map(numerals.as_class, na_action="ignore") if values.dtype.kind == "f" else values
    classes = sorted(map(str, labels.dropna().unique()), key=level_order)
    if len(classes) < 2:
        if values.nunique() > 1:
            raise CliError(
                f"{table.source}: the values of the target {name!r} differ only behind their 15th digit, as numbers "
                f"all are {classes[0]}; pass --task classification to take them as texts, or --task regression"
            )
        has = f"has the one value {listed(classes)}" if classes else "has no value"
        texts = read_as_missing(table, [name])
        raise CliError(f"{table.source}: the target {name!r} {has}: nothing to classify{'; ' if texts else ''}{texts}")
    return np.asarray(pd.Index(classes).get_indexer(labels)), tuple(classes)


def _strata(y: np.ndarray, held_out: int, classes: Sequence[str]) -> np.ndarray | None:
    """The classes, where each can be on both sides of a split."""
    return y if classes and np.bincount(y).min() >= 2 and len(classes) <= min(held_out, len(y) - held_out) else None


def _split(
    table: Table, y: np.ndarray, classes: Sequence[str], test_size: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and the held-out rows, as scikit-learn's train_test_split chooses them."""
    rows = np.arange(len(table.frame))
    held_out = int(np.ceil(test_size * len(rows)))
    if len(rows) - held_out < 2 or held_out == 1:
        purpose = "fit on" if test_size == 0 else f"hold out {test_size:g} of them and fit on the rest"
        raise CliError(f"{table.source}: {count(len(rows), 'row')} with a target: too few to {purpose}")
    if test_size == 0:
        return rows, rows[:0]
    strata = _strata(y, held_out, classes)
    train, test = train_test_split(rows, test_size=test_size, random_state=seed, stratify=strata)
    unseen = [classes[code] for code in sorted(set(y) - set(y[train]))] if classes else []
    if unseen:
        raise CliError(
            f"{table.source}: no training row has the class {listed(unseen)}; hold out fewer rows with --test-size"
        )
    return train, test


def _tell_filled(table: Table, model: Model) -> None:
    for column in model.columns:
        missing = int(table.frame[column.name].isna().sum())
        if missing:
            fill = column.written_fill if isinstance(column, Date) else column.fill
            fill = f"the median {fill:,.6g}" if isinstance(fill, float) else repr(fill)
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
    task: Task
    features: np.ndarray
    y: np.ndarray
    train: np.ndarray
    test: np.ndarray

    def scores(self, model: Model, rows: np.ndarray) -> str:
        """R² and RMSE, or accuracy and log loss, over some of the rows."""
        if model.classes:
            return ClassScore.of(self.y[rows], model.probabilities(self.features[rows])).describe()
        return Score.of(self.y[rows], model.predict(self.features[rows])).describe(model.target)


def _load(args: argparse.Namespace) -> _Data:
    table, names = _read(args)
    classify, why = _settle_task(args, table)
    # The target's own errors come before those of the columns.
    _target(table, args.target, classify)
    if not classify:
        tell_unit(table, args.target)
        numbers = table.numbers(args.target)
        tell_dates_in_numbers(table, args.target, numbers)
        tell_points(table, args.target, numbers)
    _settle_missing(table, names, args.target, args.impute is not None)
    y, classes = _target(table, args.target, classify)
    train, test = _split(table, y, classes, args.test_size, args.seed)
    columns = learn_columns(
        table, names, train, impute=args.impute is not None, date_columns=args.dates, date_format=args.date_format
    )
    if why:
        note(why)
    features = encode(columns, table)
    unknown = np.isnan(features[test]).any(1)
    if unknown.any():
        note(f"{count(int(unknown.sum()), 'held-out row')} with a category that no training row has: not scored")
        test = test[~unknown]
    unit = None if classes and table.frame[args.target].dtype.kind != "f" else table.unit(args.target) or ""
    return _Data(table, Task(args.target, columns, classes, unit), features, y, train, test)


def _fit(args: argparse.Namespace, data: _Data) -> tuple[Model, LinearModel, Solve]:
    """The model that was asked for, the linear one (the same, or the one to compare with), and how the first went."""
    fitted = data.task, data.features[data.train], data.y[data.train]
    if args.model == "linear":
        linear, solve = fit_linear(*fitted, args.alpha, args.dtype)
        return linear, linear, solve
    # Classes that a plane separates have no least log loss without a penalty.
    linear, _ = fit_linear(*fitted, LOGISTIC_ALPHA if data.task.classes else 0.0, args.dtype)
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
    if args.alpha is None:
        args.alpha = NETWORK_ALPHA if args.model == "mlp" else LOGISTIC_ALPHA if data.task.classes else 0.0
    read = time.perf_counter() - begin
    model, linear, solve = _fit(args, data)
    if args.save:
        save_model(model, data.table.conventions, args.save)

    rows, features = len(data.train), len(model.features)
    if args.impute:
        _tell_filled(data.table, model)
    out = console()
    held = f"{len(data.test):,} held out" if len(data.test) else "none held out"
    heading = f"{data.table.source}: {count(len(data.table.frame), 'row')}, {rows:,} to fit on, {held}"
    how = ""
    if isinstance(model, NetworkModel):
        _tell_few_rows(model, rows)
        out.print(heading)
        widths = "-".join(str(width) for width in (features, *args.hidden, model.outputs))
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
    if solve.reason == "interrupted":
        raise Interrupted(f"interrupted after {count(solve.steps, 'step')}: the network as it stood was kept")
