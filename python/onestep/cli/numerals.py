"""Texts that stand for numbers and dates: what is understood, and what is refused with the option that settles it."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

import pandas as pd

from .source import Conventions

# What may stand beside a number and is left out: signs of currencies, as in $5, US$5 and 5 €, the
# codes of ISO 4217 that are no words of English or names of software, and parts of a hundred or a thousand.
_CURRENCIES = (  # the characters of Unicode 15 whose category is Sc, in ranges
    "\u0024\u00a2-\u00a5\u058f\u060b\u07fe-\u07ff\u09f2-\u09f3\u09fb\u0af1\u0bf9\u0e3f\u17db"
    "\u20a0-\u20c0\ua838\ufdfc\ufe69\uff04\uffe0-\uffe1\uffe5-\uffe6\U00011fdd-\U00011fe0\U0001e2ff"
    "\U0001ecb0"
)
_CODES = (
    "AED ARS AUD BDT BGN BRL CAD CHF CLP CNY CZK DKK EGP EUR GBP HKD HUF IDR ILS INR ISK JPY KES KRW KWD KZT LKR MXN "
    "MYR NGN NOK NZD PKR PLN QAR RUB SAR SEK SGD THB TWD UAH USD VND ZAR"
)
_CODE = f"(?i:{_CODES.replace(' ', '|')})"
_PARTS = "%\u2030\uff05"
_UNIT = rf"[A-Z]{{0,3}}[{_CURRENCIES}]|{_CODE}|[{_PARTS}]"
_BEFORE = re.compile(rf"^([-+]?)\s*(?:{_UNIT})\s*(?=[-+.,\d])")
_AFTER = re.compile(rf"(?<=[\d.,])\s*(?:{_UNIT})$")
# A grouping sign: those of keyboards, of typesetters (’), and their spaces.
_SEPARATORS = ",.' \u2019\u00a0\u202f"
# Digits in groups, or with decimals behind a comma: 1,037 and 1.037.000 and 3,5 and 1 037,25.
_SEPARATED = re.compile(rf"[-+]?(?:\d{{1,3}}(?:[{_SEPARATORS}]\d{{2,3}})*[{_SEPARATORS}]\d{{3}}(?:[.,]\d+)?|\d+,\d+)")
# Negative in parentheses or with the sign behind, with a letter for thousands or millions, hexadecimal, in groups by
# underscores, digits of other scripts.
_NOTATION = re.compile(
    r"\([-+\d.,' ]*\d[\d.,' ]*\)|\d[\d.,]*-|[-+]?\d+(?:[.,]\d+)? ?(?:[kKMBT]|[mb]n|Mio\.?|Mrd\.?)"
    r"|0[xX][0-9a-fA-F]+|\d+(?:_\d+)+|[-+]?\d+(?:[.,]\d+)?(?:[eE][-+]?\d+)?"
)
_MINUS = "\u2212"  # of typesetters
_MONTH = r"(?i:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATE = re.compile(
    r"\d{4}([-/.])\d{1,2}\1\d{1,2}(?:[T ].*)?|\d{1,2}([-/.])\d{1,2}\2(?:\d{4}|\d{2})(?: .*)?|\d{4}[-/](?:0[1-9]|1[0-2])"
    rf"|\d{{1,2}}[-. ]*{_MONTH}[-, ]*(?:\d{{4}}|\d{{2}})|{_MONTH}[ -]*(?:\d{{1,2}},? +)?\d{{4}}"
)
_WHOLE = re.compile(r"([-+]?\d{16,})(?:\.0*)?")
# A time of day with its distance from UTC.
_OFFSET = re.compile(r"^(.*\d[Tt ]\d{2}.*?)\s*(?:[Zz]|[-+]\d{2}(?::?\d{2})?)$")
# From here on float64 skips whole numbers.
LARGEST_WHOLE = 2**53


def _without_units(values: Any) -> Any:
    """The texts with a plain minus, and without a unit."""
    texts = values.astype("string").str.replace(_MINUS, "-", regex=False)
    return texts.str.replace(_BEFORE, r"\1", regex=True).str.replace(_AFTER, "", regex=True)


def plain(values: Any, conventions: Conventions) -> Any:
    """The texts as Python writes numbers: without a unit, without thousands separators."""
    texts = _without_units(values)
    if conventions.thousands:
        grouped = re.compile(rf"(?<=\d){re.escape(conventions.thousands)}(?=\d{{3}})")
        texts = texts.str.replace(grouped, "", regex=True)
    if conventions.decimal != ".":
        texts = texts.str.replace(conventions.decimal, ".", regex=False)
    return texts


def to_numbers(values: Any, conventions: Conventions) -> Any:
    """The numbers that a column holds as float64, NaN where a text is not one."""
    if values.dtype.kind in "fiu":
        return values
    return pd.to_numeric(plain(values, conventions), errors="coerce").astype("float64")


def unit(text: str) -> str:
    """What stands beside the number that a text holds, such as $, USD or %; empty if nothing does."""
    found = [
        match[0].strip().lstrip("+-").strip().upper() for match in (_BEFORE.search(text), _AFTER.search(text)) if match
    ]
    return " and ".join(found)


def units(values: Any, conventions: Conventions) -> Any:
    """The unit of each number of a column of texts but 0, which is the same in all, as a Series; "" for none."""
    if values.dtype.kind in "fiu":
        return pd.Series([], dtype=object)
    numbers = to_numbers(values, conventions)
    return values[numbers.notna() & (numbers != 0)].map(unit)


def is_separated(text: str) -> bool:
    """Whether a text looks like a number with thousands separators or a decimal comma."""
    return bool(_SEPARATED.fullmatch(_AFTER.sub("", _BEFORE.sub(r"\1", text))))


def is_notation(text: str) -> bool:
    """Whether a text is a number in a notation that is not read as one; ask after ``to_numbers`` has not."""
    text = re.sub(rf"^([-+]?)\(([-+]?)\s*(?:{_UNIT})\s*", r"\1(\2", text)
    text = re.sub(rf"\s*(?:{_UNIT})\)$", ")", text)
    return bool(_NOTATION.fullmatch(_AFTER.sub("", _BEFORE.sub(r"\1", text))))


def notation_hint(text: str) -> str:
    """What to write instead."""
    if "(" in text or text.endswith("-"):
        return "write negative numbers with a minus before them, as in -1234.5"
    return "write them with the digits 0 to 9, as in -1234.5"


def is_date(text: str) -> bool:
    """Whether a text looks like a date."""
    return bool(_DATE.fullmatch(text))


def date_format_hint(text: str) -> str:
    """The option that --dates needs beside it to read such a date; empty for year, month, day."""
    if re.match(r"\d{4}-", text):
        return ""
    for pattern, written in (
        (rf"\d+ {_MONTH} \d{{4}}", "%d %b %Y"),
        (rf"\d+-{_MONTH}-\d{{4}}", "%d-%b-%Y"),
        (rf"{_MONTH} \d+, \d{{4}}", "%b %d, %Y"),
        (rf"{_MONTH} \d{{4}}", "%b %Y"),
    ):
        if re.fullmatch(pattern, text):
            word = re.sub(r"[^A-Za-z]", "", text)
            return f" --date-format {written.replace('%b', '%B' if len(word) > 3 else '%b')!r}"
    return " --date-format FORMAT, such as %d/%m/%Y,"


def local(texts: Any) -> Any:
    """Texts of dates and times without their distance from UTC: the day that is written is the day that is meant."""
    return texts.str.replace(_OFFSET, r"\1", regex=True)


def is_inexact(text: str) -> bool:
    """Whether a text is a whole number that float64 may not hold, also one such as 9.007199254740993e15."""
    whole = _WHOLE.fullmatch(text)
    if whole is not None:
        return abs(int(whole[1])) > LARGEST_WHOLE
    mantissa, e, _ = text.lower().partition("e")
    if not e or sum(c.isdigit() for c in mantissa) < 16:
        return False
    try:
        value = Decimal(text)
    except InvalidOperation:
        return False
    return abs(value) > LARGEST_WHOLE and value == value.to_integral_value() and value != Decimal(float(text))


def misfits(values: Any, conventions: Conventions) -> Any:
    """Which of the texts pass for numbers, but are not written as the conventions say: 3,5 where , groups thousands."""
    texts = _without_units(values)
    decimal = re.escape(conventions.decimal)
    groups = ""
    if conventions.thousands:
        # Three digits in each group; in India two in all but the last.
        mark = re.escape(conventions.thousands)
        groups = rf"|\d{{1,3}}(?:{mark}\d{{3}})+|\d{{1,2}}(?:{mark}\d{{2}})+{mark}\d{{3}}"
    written = rf"[-+]?(?:(?:\d+{groups})(?:{decimal}\d*)?|{decimal}\d+)(?:[eE][-+]?\d+)?|[-+]?(?:inf|infinity|nan)"
    return ~texts.str.fullmatch(f"(?i:{written})").fillna(True).astype(bool)


def misfit_hint(text: str, conventions: Conventions) -> str:
    """What a text that misfits should have been, and the options under which it is right."""
    known = (conventions.decimal, conventions.thousands)
    others = [c for c in text if c in _SEPARATORS and c not in known]
    if others and not conventions.thousands:
        return f"pass --thousands {others[0]!r} --decimal {conventions.decimal!r} if it stands between thousands"
    return "thousands stand in groups of three digits, and the decimal character once behind them"


def separator_hint(text: str) -> str:
    """The options that say what the separators of a text mean."""
    number = _AFTER.sub("", _BEFORE.sub(r"\1", text))
    found = [c for c in number if c in _SEPARATORS]
    if len(set(found)) > 1:
        return f"pass --thousands {found[0]!r} --decimal {found[-1]!r}"
    grouped = re.search(r"(?<!\d)\d{1,3}(?:\D\d{2,3})*\D\d{3}(?!\d)", number)
    options = [f"--thousands {found[0]!r}"] if grouped else []
    if found == [","]:
        options.append("--decimal ','")
    return "pass " + " or ".join(options or [f"--thousands {found[0]!r}"])
