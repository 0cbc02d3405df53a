"""Reads a CSV file into columns of numbers and columns of text, with errors that name the line."""

import codecs
import csv
import difflib
import io
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from . import numerals
from .errors import CliError, count, listed, note
from .source import Conventions, Source


def _lines(path: Source) -> Iterator[str]:
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise CliError(
                    f"{path}: line {number} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8 text"
                ) from None


def _records(path: Source, sep: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file with the line each begins on, without the blank ones that pandas skips too."""
    reader = csv.reader(_lines(path), delimiter=sep, skipinitialspace=True)
    line = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            # The module's own advice on a lone carriage return is about how Python opens files.
            cause = "a carriage return inside the line" if "new-line character" in str(error) else error
            raise CliError(f"{path}: line {reader.line_num}: {cause}") from None
        if fields is None:
            return
        if len(fields) > 1 or (fields and fields[0].strip()):
            yield line, fields
        line = reader.line_num + 1


def _header(source: Source, sep: str) -> list[str]:
    with source.open() as file:
        if b"\0" in file.read(1 << 16):
            raise CliError(f"{source} is not a text file (it holds NUL bytes)")
    records = _records(source, sep)
    _, fields = next(records, (0, []))
    if not fields:
        raise CliError(f"{source} is empty")
    if next(records, None) is None:
        raise CliError(f"{source} has a header but no rows")
    names = [name.strip() for name in fields]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise CliError(f"{source}: the header names a column twice: {listed(twice)}")
    if len(names) == 1 and sep == ",":
        for other, option in ((";", "';'"), ("\t", "tab")):
            if other in names[0]:
                raise CliError(f"{source}: the fields seem to be separated by {option}; pass --sep {option}")
    return names


class _WrongWidth(CliError):
    """A record has more fields than the header, or fewer."""


def _check_shape(path: Source, sep: str, width: int) -> None:
    for line, fields in _records(path, sep):
        if len(fields) != width:
            raise _WrongWidth(f"{path}: {_wrong_width(line, fields, width)}")


def _wrong_width(line: int, fields: list[str], width: int) -> str:
    return f"line {line} has {count(len(fields), 'field')}, but the header has {width}"


def _with_empty_records(path: Source, sep: str, width: int) -> tuple[Source, dict[int, str]]:
    """The table with an empty record for each that has too many fields or too few; these rows, and what they have."""
    begins, wrong, broken = set[int](), set[int](), dict[int, str]()
    for row, (line, fields) in enumerate(_records(path, sep), -1):
        begins.add(line)
        if len(fields) != width:
            wrong.add(line)
            broken[row] = _wrong_width(line, fields, width)
    content, keeps = io.BytesIO(), True
    for number, text in enumerate(_lines(path), 1):
        if number in begins:
            keeps = number not in wrong
            if not keeps:
                content.write((sep * (width - 1) if width > 1 else '""').encode() + b"\n")
        if keeps:
            content.write(text.encode())
    content.seek(0)
    return path.rewritten(content), broken


def _unclosed_quote(path: Source, sep: str) -> CliError:
    last = 1
    for line, _ in _records(path, sep):
        last = line
    return CliError(f"{path}: a quotation mark in the record that begins on line {last} is never closed")


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
            raise _unclosed_quote(path, sep) from None
        _check_shape(path, sep, len(options["names"]))
        raise CliError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        for _ in _lines(path):
            pass
        raise CliError(f"{path}: {error}") from None


@dataclass
class Table:
    """The columns of a CSV file: numbers as float64, all else as text, missing values as NaN.

    A row keeps its position in the file as its index, so that `line` can find it again after rows were dropped. The
    columns in `text` are text by the caller's wish. `inexact` has the first row of columns of whole numbers that
    float64 cannot tell apart, with the number; `misfits` that of columns with a number that is not written as the
    conventions say. `target` is the column that is fitted to, or None where a saved model is applied. `broken` has the
    rows whose records have too many fields or too few, which are read as empty, with what they have.
    """

    source: Source
    sep: str
    frame: Any
    text: frozenset[str]
    conventions: Conventions
    inexact: dict[str, tuple[int, str]]
    misfits: dict[str, tuple[int, str]]
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
        records = _records(self.source, self.sep)
        next(records)
        return next(line for position, (line, _) in enumerate(records) if position == row)

    def is_text(self, name: str) -> bool:
        """Whether a column is text. One of which more than half are numbers is a column of numbers with mistakes."""
        if name in self.text:
            return True
        values = self.frame[name]
        if values.dtype.kind == "f":
            return False
        numbers = numerals.to_numbers(values, self.conventions).notna().sum()
        return bool(2 * numbers <= values.notna().sum())

    def check_text(self, name: str) -> None:
        """Raises for a column of text most of which look like numbers or dates that are written in another way."""
        if name in self.text:
            return
        values = self.frame[name].dropna()
        if values.empty:
            return
        number = numerals.to_numbers(values, self.conventions).notna()
        keep = f"or keep its texts as {self._as_texts(name)}"
        separated = values.map(numerals.is_separated)
        if separated.any() and 2 * (number | separated).sum() > len(values):
            row = separated.idxmax()
            raise CliError(
                f"{self.source}: column {name!r} seems to hold numbers, such as {values[row]!r} on line "
                f"{self.line(row)}; {numerals.separator_hint(values[row])}, {keep}"
            )
        notation = values.map(numerals.is_notation) & ~number
        if notation.any() and 2 * (number | notation).sum() > len(values):
            row = notation.idxmax()
            raise CliError(
                f"{self.source}: column {name!r} seems to hold numbers, such as {values[row]!r} on line "
                f"{self.line(row)}; {numerals.notation_hint(values[row])}, {keep}"
            )
        dates = values.map(numerals.is_date)
        if 2 * dates.sum() > len(values):
            row = dates.idxmax()
            parts = f"pass --dates {name!r}{numerals.date_format_hint(values[row])} for year, month, day and weekday, "
            raise CliError(
                f"{self.source}: column {name!r} seems to hold dates, such as {values[row]!r} on line "
                f"{self.line(row)}; {'' if name == self.target else parts}{keep}"
            )

    def _as_texts(self, name: str) -> str:
        """The option under which a column's texts are what they are."""
        if name == self.target:
            return "classes with --task classification"
        return f"categories with --categorical {name!r}"

    def _remedy(self, name: str) -> str:
        """What can be done about a column of numbers that cannot be read."""
        if not self.fits:
            return "correct it"
        if name == self.target:
            return "correct it, choose another target, or pass --task classification"
        return f"correct it, leave the column out with --ignore {name!r}, or pass --categorical {name!r}"

    def unit(self, name: str) -> str | None:
        """What stands beside the numbers of a column (a currency or percent sign), "" for nothing, None: no number.

        Raises where it is not the same beside all.
        """
        found = numerals.units(self.frame[name], self.conventions)
        kinds = sorted(set(found))
        if len(kinds) < 2:
            if kinds or self.frame[name].dtype.kind != "f":
                return kinds[0] if kinds else None
            return "" if (self.frame[name].fillna(0) != 0).any() else None
        first, second = (found[found == kind].index[0] for kind in kinds[:2])
        values = self.frame[name]
        what = f"mixes the units {listed(kinds)}" if kinds[0] else f"has {kinds[1]} beside some numbers and not others"
        raise CliError(
            f"{self.source}: column {name!r} {what}, such as {values[first]!r} on line {self.line(first)} and "
            f"{values[second]!r} on line {self.line(second)}; write it in one of them"
        )

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64 with NaN for missing values; raises on text and on infinite values."""
        values = self.readable(name)
        column = self.frame[name]
        wrong = np.isnan(values) & column.notna().to_numpy()
        if wrong.any():
            first = int(wrong.argmax())
            text, hint = str(column.iloc[first]), self._remedy(name)
            if numerals.is_separated(text):
                hint = numerals.separator_hint(text)
            elif numerals.is_notation(text):
                hint = numerals.notation_hint(text)
            more = f", and {int(wrong.sum()) - 1:,} more like it" if wrong.sum() > 1 else ""
            raise CliError(
                f"{self.source}: column {name!r} should hold numbers, but line {self.line(column.index[first])} has "
                f"{text!r}{more}; {hint}"
            )
        infinite = np.isinf(values)
        if infinite.any():
            row = column.index[int(infinite.argmax())]
            raise CliError(f"{self.source}: column {name!r} holds an infinite value on line {self.line(row)}")
        return values

    def readable(self, name: str) -> np.ndarray:
        """As ``numbers``, with NaN for texts that are none; raises for a column that would be misread."""
        column = self.frame[name]
        if name in self.inexact:
            row, number = self.inexact[name]
            raise CliError(
                f"{self.source}: column {name!r} holds whole numbers beyond 2^53 ({number} on line {self.line(row)}), "
                f"of which float64 loses digits; {self._remedy(name)}"
            )
        if name in self.misfits:
            row, number = self.misfits[name]
            raise CliError(
                f"{self.source}: column {name!r} has {number!r} on line {self.line(row)}, which does not fit the "
                f"--thousands and --decimal given; {numerals.misfit_hint(number, self.conventions)}"
            )
        self.unit(name)
        values: np.ndarray = numerals.to_numbers(column, self.conventions).to_numpy(dtype=np.float64)
        return values


def _keep_first(found: dict[str, tuple[int, str]], name: str, texts: Any, wrong: Any) -> None:
    """Notes the first row of a column that is wrong, with its text."""
    # A column without a value has the type of its texts.
    if len(wrong) and wrong.any():
        row = wrong.idxmax()
        found[name] = int(row), str(texts[row])


def _parse_whole(source: Source, sep: str, **options: Any) -> Any:
    """As _parse, but a record that is too short is an error, too: pandas fills it with missing values."""
    frame = _parse(source, sep, **options)
    if frame[options["names"][-1]].isna().any():
        _check_shape(source, sep, len(options["names"]))
    return frame


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
    names = _header(source, sep)
    options = conventions.options()
    # pandas needs distinct names, so each is its position until the columns without a name are gone.
    keys = list(range(len(names)))
    dtype = {key: str for key in keys if names[key] in text}
    readable, broken = source, dict[int, str]()
    try:
        frame = _parse_whole(source, sep, names=keys, dtype=dtype, **options)
    except _WrongWidth:
        if fits:
            raise
        readable, broken = _with_empty_records(source, sep, len(names))
        frame = _parse(readable, sep, names=keys, dtype=dtype, **options)
    # Only int and float are numbers to us: what pandas made of the rest (booleans, say) is read again as it stands.
    again = [key for key in keys if frame[key].dtype.kind not in "iuf"]
    large = [key for key in keys if key not in again and frame[key].abs().max() >= numerals.LARGEST_WHOLE]
    inexact: dict[str, tuple[int, str]] = {}
    misfits: dict[str, tuple[int, str]] = {}
    # Of separators pandas takes out whatever there is.
    separated = conventions.thousands is not None or conventions.decimal != "."
    written = [key for key in keys if key not in again and (separated or key in large)]
    if again or written:
        # Thousands separators would be taken out of texts, too.
        strings = _parse(
            readable, sep, names=keys, usecols=again + written, dtype=str, **{**options, "thousands": None}
        )
        for key in again:
            stripped = strings[key].str.strip()
            frame[key] = stripped.where(stripped != "")
        for key in again + written:
            texts = strings[key].dropna().str.strip()
            texts = texts[texts != ""]
            _keep_first(inexact, names[key], texts, numerals.plain(texts, conventions).map(numerals.is_inexact))
            if separated and names[key] not in text:
                passes = key in written or numerals.to_numbers(texts, conventions).notna()
                _keep_first(misfits, names[key], texts, passes & numerals.misfits(texts, conventions))
    nameless = [str(key + 1) for key in keys if not names[key]]
    if nameless:
        note(f"{source}: column {listed(nameless)} has no name in the header and is left out")
    frame = frame[[key for key in keys if names[key]]].rename(columns=dict(enumerate(names)))
    floats = {name: np.float64 for name in frame.columns if frame[name].dtype.kind in "iu"}
    return Table(
        source, sep, frame.astype(floats), frozenset(text), conventions, inexact, misfits, fits, target, broken
    )
