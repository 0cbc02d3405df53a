"""Columns of text that seem to say something else than categories: they are refused, or it is told."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from . import dates, days, numerals, units
from .errors import CliError, listed, note
from .table import Table

# Words that say that there is no value, without their points and in small letters. A text without letters and digits
# says it too, such as - and ?, and so does what a spreadsheet writes for an error.
_NO_VALUE = {
    *("na", "n/a", "nan", "null", "none", "nil", "unknown", "missing", "not available", "not applicable", "no data"),
    *("no value", "not known", "not given", "not recorded", "tba", "tbd", "ka", "keine angabe", "unbekannt"),
}
_NO_VALUE_SIGNS = re.compile(r"[^\w+]+|_+|#(?:DIV/0|VALUE|REF|NAME|NUM|NULL|N/A|NV|WERT|BEZUG)[!?]?")
# Of a column with one frequent text and so many different others that hold a number it is told.
_SOME_NUMBERS = 3


def _says_no_value(text: str) -> bool:
    """Whether a text seems to mean that there is no value, as -, ? and n.a. do."""
    return bool(_NO_VALUE_SIGNS.fullmatch(text)) or text.casefold().replace(".", "") in _NO_VALUE


def check_text(table: Table, name: str) -> None:
    """Raises for a column of text most of which look like numbers or dates that are written in another way.

    Most of its values, that is, without those that seem to be missing: these may be more than all others together.
    """
    if name in table.text:
        return
    present = table.frame[name].dropna()
    none = numerals.of_each(present, _says_no_value).astype(bool)
    values = present[~none]
    if values.empty:
        return
    missing = _missing_hint(list(dict.fromkeys(present[none])))
    number = numerals.to_numbers(values, table.conventions).notna()
    plain = number
    separated = numerals.of_each(values, numerals.is_separated) & ~number
    notation = numerals.of_each(values, numerals.is_notation) & ~number & ~separated
    # Several ways may stand side by side, as in ($1,037) below $2,000.
    number |= separated | notation
    if 2 * number.sum() > len(values):
        if separated.any():
            # The text with most kinds of separators calls for all the options.
            row = values[separated].map(numerals.count_separators).idxmax()
            _refuse(table, name, "numbers", row, numerals.separator_hint(values[row]), missing)
        if notation.any():
            row = notation.idxmax()
            _refuse(table, name, "numbers", row, numerals.notation_hint(values[row]), missing)
        # Of plain numbers there are too few for a column of numbers, unless some values are missing.
        _refuse(table, name, "numbers", plain.idxmax(), missing)
    hint = "a target is a number or a class: write it as a number, such as the days since the first date"
    day, pair = numerals.of_each(values, dates.is_date), numerals.of_each(values, days.is_pair)
    found, row = _days_of_years(values[pair], 2 * pair.sum() > len(values))
    if found and not days.may_be_fractions(values[pair].unique()):
        if name != table.target:
            hint = f"pass {days.options(found, name)}"
        _refuse(table, name, "dates", row, hint, missing)
    # With a year in some and not in others.
    if day.any() and 2 * (day | pair).sum() > len(values):
        # 2023-10-15 needs no format, but 2023-1-5 beside it does.
        unpadded = day & numerals.of_each(values, dates.is_unpadded)
        row = (unpadded if unpadded.any() else day).idxmax()
        if name != table.target:
            hint = dates.remedy(values[row], name)
        _refuse(table, name, "dates", row, hint, missing)
    time = numerals.of_each(values, dates.is_time)
    if 2 * time.sum() > len(values):
        hint = "write them as numbers, such as 18.5 hours for 18:30"
        _refuse(table, name, "times of day", time.idxmax(), hint, missing)
    _check_measures(table, name, values, number, missing)


def _days_of_years(pairs: Any, are_most: bool) -> tuple[list[str], Any]:
    """The formats of texts that are dates without a year, if they are, and the row of one that is of the first."""
    found = days.formats(pairs.unique()) if are_most else []
    if not found:
        return [], None
    return found, dates.parse(pairs, found[0]).notna().idxmax()


def _missing_hint(texts: list[str]) -> str:
    """The options under which texts that seem to mean so are missing values; empty for no text."""
    if not texts:
        return ""
    options = " ".join(numerals.missing_option(text) for text in texts)
    verb = "means" if len(texts) == 1 else "mean"
    return f"pass {options} if {listed([repr(text) for text in texts])} {verb} that there is no value"


def _check_measures(table: Table, name: str, values: Any, number: Any, missing: str) -> None:
    """Raises where most values are numbers with a unit, as in 5 kg, or compared with one, as in < 5."""
    measures = numerals.of_each(values, units.measure).where(~number, "")
    counts = measures[measures != ""].value_counts()
    if counts.empty or 2 * (number.sum() + counts.sum()) <= len(values):
        return
    known = [unit for unit in counts.index if units.is_measure(unit)]
    # Letters that differ from value to value are part of a code, as in 5A.
    if 2 * counts.iloc[0] > counts.sum() or 2 * counts[known].sum() > counts.sum():
        row = measures[measures == counts.index[0]].index[0]
        _refuse(table, name, "numbers", row, "write the number alone, in one unit for the whole column", missing)


def _refuse(table: Table, name: str, what: str, row: int, *hints: str) -> None:
    raise CliError(
        f"{table.source}: column {name!r} seems to hold {what}, such as {str(table.frame[name][row])!r} on line "
        f"{table.line(row)}; {', and '.join(filter(None, hints))}, or keep its texts as {_as_texts(table, name)}"
    )


def _as_texts(table: Table, name: str) -> str:
    """The option under which a column's texts are what they are."""
    if name == table.target:
        return "classes with --task classification"
    return f"categories with --categorical {name!r}"


def tell_numbers_in_texts(table: Table, name: str) -> None:
    """Notes that a column becomes categories although most of its values begin or end with a number, as in zone 3."""
    values = table.frame[name].dropna()
    if name in table.text or values.empty:
        return
    pair = numerals.of_each(values, days.is_pair)
    found, row = _days_of_years(values[pair], 2 * pair.sum() > len(values))
    if found:
        note(
            f"column {name!r} is taken for categories; if texts such as {values[row]!r} are dates without a year, pass "
            f"{days.options(found, name)}; --categorical {name!r} ends this note"
        )
        return
    holds = numerals.of_each(values, units.holds_number)
    # A word that stands for no number, or for no value, may be more frequent than all numbers.
    words = values[~holds]
    most = "" if words.empty else str(words.value_counts().index[0])
    others, besides = values, ""
    if 2 * holds.sum() <= len(values) and values[holds].nunique() >= _SOME_NUMBERS:
        others, besides = values[values != most], f" but {most!r}"
    if 2 * holds.sum() > len(others):
        missing = f"; {numerals.missing_option(most)} if that means that there is no value" if besides else ""
        note(
            f"column {name!r} is taken for categories, although most of its values{besides} begin or end with a "
            f"number, such as {values[holds.idxmax()]!r}: write numbers alone if they are meant{missing}; "
            f"--categorical {name!r} ends this note"
        )


def tell_unit(table: Table, name: str) -> None:
    """Notes that the unit beside a column's numbers is left out."""
    unit = table.unit(name)
    if unit:
        found = numerals.unit_of_each(table.frame[name], table.conventions)
        example = table.frame[name][found.index[0]]
        read = numerals.to_numbers(table.frame[name].loc[[found.index[0]]], table.conventions).iloc[0]
        verb = "are" if " and " in unit else "is"
        note(f"column {name!r}: {unit} {verb} left out ({example} is read as {read:g})")


def tell_dates_in_numbers(table: Table, name: str, values: Any) -> None:
    """Notes that the numbers of a column may all be dates, as 20230325 may."""
    options = dates.digits_hint(values, name)
    if options is None:
        _tell_days_in_numbers(table, name, values)
        return
    reading = "" if name == table.target else f"; pass {options} if they are dates"
    example = f"{values[values == values][0]:.0f}"
    if options.endswith(dates.MONTHS_OF_YEARS):
        example = table.texts(name).dropna().iloc[0].strip()
    elif options.endswith("%Y"):
        # Numbers have lost the zeros that they began with.
        texts = table.texts(name).dropna().str.strip()
        if not texts.str.fullmatch(r"\d{8}").all():
            return
        example = texts.iloc[0]
    note(f"column {name!r} is taken for numbers, although all may be dates, such as {example}{reading}")


def _tell_days_in_numbers(table: Table, name: str, values: Any) -> None:
    """Notes that the numbers of a column may all be dates without a year, as 09.02 and 0902 may."""

    def texts() -> Any:
        return table.texts(name).dropna().str.strip()

    written = days.format_of_numbers(values, texts) if table.conventions.decimal == "." else None
    if written is not None:
        reading = "" if name == table.target else f"; pass {days.options([written], name)}, if they are dates"
        note(
            f"column {name!r} is taken for numbers, although all may be dates without a year, such as "
            f"{texts().iloc[0]}{reading}"
        )


def tell_leading_zeros(table: Table, name: str) -> None:
    """Notes that numbers of a column begin with zeros, as postcodes and other codes do."""
    with table.readable.open() as file:
        # Only then is the column read once more.
        some = re.search(rb"(?:^|[\s;,|\"])0\d", file.read(1 << 16))
    if not some or name in table.text or (table.frame[name] % 1 != 0).all():
        return
    texts = table.texts(name).dropna().str.strip()
    padded = texts[texts.str.fullmatch(r"0\d+")]
    if len(padded):
        note(
            f"column {name!r} is taken for numbers, although some begin with a zero, such as {padded.iloc[0]!r}: "
            f"pass --categorical {name!r} if they are codes"
        )


def tell_points(table: Table, name: str, values: np.ndarray) -> None:
    """Notes that points of a column may stand between thousands, as in 1.030 beside 950: no decimals end in 0 there."""
    values = np.abs(values[~np.isnan(values)])
    thousandths = np.round(values * 1000)
    pointed = thousandths % 1000 != 0
    if (
        table.conventions.thousands
        or table.conventions.decimal != "."
        or not pointed.any()
        or pointed.all()
        or (values[pointed] < 1).any()
        or values.max() >= 1000
        or (thousandths / 1000 != values).any()
    ):
        return
    texts = units.strip(table.texts(name).dropna().astype("string").str.strip())
    points = texts.str.contains(".", regex=False)
    ends = texts[points & texts.str.endswith("0")]
    if len(ends) and not points.all() and texts[points].str.fullmatch(r"[-+]?[1-9]\d{0,2}\.\d{3}").all():
        note(
            f"column {name!r}: {ends.iloc[0]} is read as {float(ends.iloc[0]):g}, and {texts[~points].iloc[0]} as it "
            "stands: pass --thousands '.' --decimal ',' if points stand between thousands"
        )


def read_as_missing(table: Table, names: list[str]) -> str:
    """Which texts of some columns were read as missing values, and the option that keeps them; empty for none."""
    if table.conventions.missing is not None:
        return ""
    for name in names:
        found = table.texts(name)[table.frame[name].isna()]
        found = found[found.notna() & (found.str.strip() != "")]
        if len(found):
            texts = listed([repr(text) for text in dict.fromkeys(found)], 3)
            return (
                f"column {name!r} has {texts} (line {table.line(found.index[0])}), read as missing; pass --missing "
                "without a text to read such texts as they stand, such as the country code NA"
            )
    return ""
