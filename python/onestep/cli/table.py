"""Reads a CSV file into columns of numbers and columns of text, with errors that name the line."""

import difflib
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from . import numerals, units
from .errors import CliError, listed, note
from .records import WrongWidth, check_widths, decoded_lines, read_header, records, unclosed_quote, with_empty_records
from .source import Conventions, Source


def _parse(path: Source, sep: str, **options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            # pandas only warns where it would drop fields.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                path.path,
                sep=sep,
                header=0,
                index_col=False,
                skipinitialspace=True,
                low_memory=False,
                encoding="utf-8-sig",
                compression=None,
                **options,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        if "EOF inside string" in str(error):
            raise unclosed_quote(path, sep) from None
        check_widths(path, sep, len(options["names"]))
        raise CliError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        for _ in decoded_lines(path):
            pass
        raise CliError(f"{path}: {error}") from None


@dataclass
class Table:
    """The columns of a CSV file: numbers as float64, all else as text, missing values as NaN.

    A row keeps its position in the file as its index, so that `line` can find it again after rows were dropped. The
    columns in `text` are text by the caller's wish. `inexact` has, by column, the texts of large numbers that float64
    cannot tell apart, and `misfits` those of numbers that are not written as the conventions say, both with their rows
    as index. `target` is the column that is fitted to, or predicted. `broken` has the rows whose records have too many
    fields or too few, which are read as empty, with what they have; `readable` is the file with these records empty.
    """

    source: Source
    readable: Source
    sep: str
    frame: Any
    text: frozenset[str]
    conventions: Conventions
    inexact: dict[str, Any]
    misfits: dict[str, Any]
    fits: bool
    target: str | None
    broken: dict[int, str]

    @property
    def names(self) -> list[str]:
        """The names of the columns, in the order of the file."""
        return list(self.frame.columns)

    def require(self, name: str, why: str) -> None:
        """Raises unless there is a column of that name."""
        if name not in self.frame.columns:
            close = difflib.get_close_matches(name, self.names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {listed(self.names)}"
            raise CliError(f"{self.source} has no column {name!r} ({why}); {hint}")

    def line(self, row: int) -> int:
        """The line of the file on which a row begins (a quoted field may hold line breaks)."""
        return next(line for position, (line, _) in enumerate(records(self.source, self.sep), -1) if position == row)

    def is_text(self, name: str) -> bool:
        """Whether a column is text. One of which more than half are numbers is a column of numbers with mistakes."""
        if name in self.text:
            return True
        values = self.frame[name]
        if values.dtype.kind == "f":
            return False
        numbers = numerals.to_numbers(values, self.conventions).notna().sum()
        return bool(2 * numbers <= values.notna().sum())

    def texts(self, name: str) -> Any:
        """The fields of a column as they are written in the file; NaN for a field that is empty."""
        names = [field.strip() for field in next(records(self.source, self.sep))[1]]
        key = names.index(name)
        written = {"dtype": str, "keep_default_na": False, "na_values": [""]}
        column = _parse(self.readable, self.sep, names=list(range(len(names))), usecols=[key], **written)[key]
        return column.loc[self.frame.index]

    def _remedy(self, name: str) -> str:
        """What can be done about a column of numbers that cannot be read."""
        if not self.fits:
            return "correct it"
        if name == self.target:
            return "correct it, choose another target, or pass --task classification"
        return f"correct it, leave the column out with --ignore {name!r}, or pass --categorical {name!r}"

    def _hint(self, name: str, text: str) -> str:
        """What can be done about a text that stands for no number."""
        if numerals.is_separated(text):
            return numerals.separator_hint(text)
        if numerals.is_notation(text):
            return numerals.notation_hint(text)
        # A dash, a question mark, a word, or what a spreadsheet writes for an error, such as #DIV/0!.
        digits = any(c.isdigit() for c in text) and not text.startswith("#")
        missing = "" if digits else f"; pass {numerals.missing_option(text)} if it means that there is no value"
        return self._remedy(name) + missing

    def unit(self, name: str) -> str | None:
        """What stands beside the numbers of a column (a currency or percent sign), "" for nothing, None: no number.

        Raises where it does not mean the same beside all, as € and EUR do.
        """
        found = numerals.unit_of_each(self.frame[name], self.conventions)
        values = self.frame[name]
        meant = found.map(units.meaning)
        # The first of each meaning.
        kinds = sorted(found[~meant.duplicated()])
        for kind in kinds:
            row = found[found == kind].index[0]
            if units.differ(units.marks(values[row])):
                raise CliError(
                    f"{self.source}: column {name!r} has {kind} beside one number, {values[row]!r} on line "
                    f"{self.line(row)}; write it with one unit"
                )
        if len(kinds) < 2:
            if kinds or values.dtype.kind != "f":
                return kinds[0] if kinds else None
            return "" if (values.fillna(0) != 0).any() else None
        first, second = (found[found == kind].index[0] for kind in kinds[:2])
        what = f"mixes the units {listed(kinds)}" if kinds[0] else f"has {kinds[1]} beside some numbers and not others"
        raise CliError(
            f"{self.source}: column {name!r} {what}, such as {values[first]!r} on line {self.line(first)} and "
            f"{values[second]!r} on line {self.line(second)}; write it in one of them"
        )

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64 with NaN for missing values; raises on any value that cannot be read as it is written."""
        column = self.frame[name]
        if name in self.misfits:
            row, number = self.misfits[name].index[0], self.misfits[name].iloc[0]
            raise CliError(
                f"{self.source}: column {name!r} has {number!r} on line {self.line(row)}, which does not fit the "
                f"--thousands and --decimal given; {numerals.misfit_hint(number, self.conventions)}"
            )
        if name in self.inexact:
            row, number = self.inexact[name].index[0], self.inexact[name].iloc[0]
            raise CliError(
                f"{self.source}: column {name!r} holds numbers beyond 2^53 ({number} on line {self.line(row)}), "
                f"of which float64 loses digits; {self._remedy(name)}"
            )
        self.unit(name)
        values: np.ndarray = numerals.to_numbers(column, self.conventions).to_numpy(dtype=np.float64)
        wrong = np.isnan(values) & column.notna().to_numpy()
        if wrong.any():
            first = int(wrong.argmax())
            text = str(column.iloc[first])
            more = f", and {int(wrong.sum()) - 1:,} more like it" if wrong.sum() > 1 else ""
            raise CliError(
                f"{self.source}: column {name!r} should hold numbers, but line {self.line(column.index[first])} has "
                f"{text!r}{more}; {self._hint(name, text)}"
            )
        infinite = np.isinf(values)
        if infinite.any():
            row = column.index[int(infinite.argmax())]
            raise CliError(f"{self.source}: column {name!r} holds an infinite value on line {self.line(row)}")
        return values

    def as_fitted(self, name: str, unit: str) -> np.ndarray:
        """A column as a model has it whose numbers have that unit: NaN where there is no such number, but no error."""
        column = self.frame[name]
        values: np.ndarray = numerals.to_numbers(column, self.conventions).to_numpy(dtype=np.float64)
        if column.dtype.kind == "f" and not unit and name not in self.misfits and name not in self.inexact:
            return values
        return np.where(self.flaws(name, unit) == "", values, np.nan)

    def written(self, name: str, row: int) -> str:
        """A value as the file has it, where the number that was made of it may be another."""
        for texts in (self.misfits, self.inexact):
            if name in texts and row in texts[name].index:
                return str(texts[name][row])
        value = self.frame[name][row]
        # 1e400 is read as infinite.
        return str(self.texts(name)[row] if isinstance(value, float) and np.isinf(value) else value)

    def flaws(self, name: str, unit: str) -> np.ndarray:
        """Why the number of each row is none for a model of that unit: unit, misfit or inexact; empty where it is."""
        column = self.frame[name]
        flaws = np.full(len(column), "", dtype=object)
        if column.dtype.kind == "f":
            if unit:
                # Plain numbers; 0 is the same in every unit.
                flaws[column.fillna(0).to_numpy() != 0] = "unit"
        else:
            found = numerals.unit_of_each(column, self.conventions)
            flaws[column.index.isin(found[found.map(units.meaning) != units.meaning(unit)].index)] = "unit"
        for flaw, rows in (("misfit", self.misfits), ("inexact", self.inexact)):
            if name in rows:
                flaws[column.index.isin(rows[name].index)] = flaw
        return flaws


def _keep(found: dict[str, Any], name: str, texts: Any, wrong: Any) -> None:
    """Notes the rows of a column that are wrong, with their texts."""
    # A column without a value has the type of its texts.
    if len(wrong) and wrong.any():
        found[name] = texts[wrong]


def _parse_whole(source: Source, sep: str, **options: Any) -> Any:
    """As _parse, but a record that is too short is an error, too: pandas fills it with missing values."""
    frame = _parse(source, sep, **options)
    if frame[options["names"][-1]].isna().any():
        check_widths(source, sep, len(options["names"]))
    return frame


def _as_written(
    source: Source, sep: str, frame: Any, options: dict[str, Any], separated: bool
) -> tuple[list[int], list[int], Any]:
    """Which columns are no numbers, which are numbers that may differ from those written, and the texts of both."""
    # Only int and float are numbers to us: what pandas made of the rest (booleans, say) is read again as it stands.
    keys = list(frame.columns)
    again = [key for key in keys if frame[key].dtype.kind not in "iuf"]
    numbers = [key for key in keys if key not in again]
    written = [key for key in numbers if separated or frame[key].abs().max() >= numerals.LARGEST_WHOLE]
    if not again + written:
        return again, written, frame[[]]
    # Thousands separators would be taken out of texts, too.
    as_texts = {**options, "thousands": None}
    return again, written, _parse(source, sep, names=keys, usecols=again + written, dtype=str, **as_texts)


def _padded_codes(strings: Any, conventions: Conventions) -> list[str]:
    """The fields that are empty or a missing code but for the blanks around them, as they stand."""
    found = {text for key in strings.columns for text in strings[key].dropna().unique()}
    return sorted(text for text in found if text != text.strip() and text.strip() in conventions.codes)


def read_table(
    source: Source,
    sep: str,
    conventions: Conventions,
    text: Collection[str] = (),
    *,
    fits: bool = True,
    target: str | None = None,
) -> Table:
    """Reads a CSV file; the columns named in `text` are kept as text even where they look like numbers.

    `fits` and `target` say what its errors may advise: the options of fit, those of a target. Where a model is applied
    and not fitted, a record with too many fields or too few is a row without values.
    """
    names = read_header(source, sep)
    options = conventions.options()
    # pandas needs distinct names, so each is its position until the columns without a name are gone.
    keys = list(range(len(names)))
    dtype = {key: str for key in keys if names[key] in text}
    readable, broken = source, dict[int, str]()
    try:
        frame = _parse_whole(source, sep, names=keys, dtype=dtype, **options)
    except WrongWidth:
        if fits:
            raise
        readable, broken = with_empty_records(source, sep, len(names))
        frame = _parse(readable, sep, names=keys, dtype=dtype, **options)
    # Of separators pandas takes out whatever there is.
    separated = conventions.thousands is not None or conventions.decimal != "."
    again, written, strings = _as_written(readable, sep, frame, options, separated)
    padded = _padded_codes(strings[again], conventions)
    if padded:
        # pandas compares fields with the missing codes as they stand, with the blanks around them.
        options["na_values"] += padded
        frame = _parse(readable, sep, names=keys, dtype=dtype, **options)
        again, written, strings = _as_written(readable, sep, frame, options, separated)
    inexact: dict[str, Any] = {}
    misfits: dict[str, Any] = {}
    for key in again:
        frame[key] = strings[key].str.strip()
    for key in again + written:
        texts = strings[key].dropna().str.strip()
        _keep(inexact, names[key], texts, numerals.of_each(numerals.plain(texts, conventions), numerals.is_inexact))
        if separated and names[key] not in text:
            passes = key in written or numerals.to_numbers(texts, conventions).notna()
            _keep(misfits, names[key], texts, passes & numerals.misfits(texts, conventions))
    nameless = [str(key + 1) for key in keys if not names[key]]
    if nameless:
        note(f"{source}: column {listed(nameless)} has no name in the header and is left out")
    frame = frame[[key for key in keys if names[key]]].rename(columns=dict(enumerate(names)))
    floats = {name: np.float64 for name in frame.columns if frame[name].dtype.kind in "iu"}
    return Table(
        source,
        readable,
        sep,
        frame.astype(floats),
        frozenset(text),
        conventions,
        inexact,
        misfits,
        fits,
        target,
        broken,
    )
