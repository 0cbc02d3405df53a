"""Texts that stand for numbers: what is understood, and what is refused with the option that settles it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

import pandas as pd

from . import units
from .source import Conventions

# Spaces of typesetters, which no keyboard has, stand for the plain one in options, and the straight apostrophe for ’.
_SPACES = " \u00a0\u2009\u202f"
_APOSTROPHES = "'\u2019"
# A grouping sign.
_SEPARATORS = f",.{_APOSTROPHES}{_SPACES}"
# Digits in groups, or with decimals behind a comma: 1,037 and 1.037.000 and 3,5 and 1 037,25.
_SEPARATED = re.compile(rf"[-+]?(?:\d{{1,3}}(?:[{_SEPARATORS}]\d{{2,3}})*[{_SEPARATORS}]\d{{3}}(?:[.,]\d+)?|\d+,\d+)")
# Negative in parentheses or with the sign behind, with a letter for thousands or millions, hexadecimal, in groups by
# underscores, digits of other scripts.
_NOTATION = re.compile(
    r"\([-+\d.,' ]*\d[\d.,' ]*\)|\d[\d.,]*-|[-+]?\d+(?:[.,]\d+)*[\s]?(?:[kKMBT]|[mb]n|Mio\.?|Mrd\.?|Tsd\.?"
    r"|(?i:lakhs?|lacs?|crores?|cr\.?|thousand|million|billion))|0[xX][0-9a-fA-F]+|\d+(?:_\d+)+|[-+]?\d+(?:[.,]\d+)?(?:[eE][-+]?\d+)?"
)
# A price without cents.
_PRICE = re.compile(rf"[-+]?\d[\d{_SEPARATORS}]*[.,](?:--?|[\u2013\u2014])")
_LARGE = re.compile(r"([-+]?\d{16,})(?:\.\d*)?")
# From here on float64 skips whole numbers.
LARGEST_WHOLE = 2**53


def of_each(values: Any, function: Callable[[str], Any]) -> Any:
    """The function of each text of a Series without missing values, which is asked once about equal ones."""
    return values.map({text: function(text) for text in values.unique()})


def _without_units(values: Any) -> Any:
    """The texts with a plain minus, and without a unit."""
    places, texts = pd.factorize(values.astype("string"))
    # A missing value has place -1, which no text has.
    return units.strip(pd.Series(texts)).reindex(places).set_axis(values.index)


def _mark(character: str) -> str:
    """The pattern of a separator, with those that look alike."""
    for alike in (_SPACES, _APOSTROPHES):
        if character in alike:
            return f"[{alike}]"
    return re.escape(character)


def plain(values: Any, conventions: Conventions) -> Any:
    """The texts as Python writes numbers: without a unit, without thousands separators."""
    texts = _without_units(values)
    if conventions.thousands:
        # In India the groups have two digits but for the last; whether they are right is for ``misfits`` to say.
        grouped = re.compile(rf"(?<=\d){_mark(conventions.thousands)}(?=\d{{2,3}})")
        texts = texts.str.replace(grouped, "", regex=True)
    if conventions.decimal != ".":
        texts = texts.str.replace(conventions.decimal, ".", regex=False)
    return texts


def to_numbers(values: Any, conventions: Conventions) -> Any:
    """The numbers that a column holds as float64, NaN where a text is not one."""
    if values.dtype.kind in "fiu":
        return values
    return pd.to_numeric(plain(values, conventions), errors="coerce").astype("float64")


def as_class(value: float) -> str:
    """The name of a class that is a number: the shortest, with all digits of a whole number."""
    return f"{value:.0f}" if 1e15 <= abs(value) <= LARGEST_WHOLE and value % 1 == 0 else f"{value:.15g}"


def unit(text: str) -> str:
    """What stands beside the number that a text holds, such as $, USD or %; empty if nothing does."""
    return " and ".join(dict.fromkeys(units.marks(text)))


def unit_of_each(values: Any, conventions: Conventions) -> Any:
    """The unit of each number of a column of texts but 0, which is the same in all, as a Series; "" for none."""
    if values.dtype.kind in "fiu":
        return pd.Series([], dtype=object)
    numbers = to_numbers(values, conventions)
    return of_each(values[numbers.notna() & (numbers != 0)], unit)


def is_separated(text: str) -> bool:
    """Whether a text looks like a number with thousands separators or a decimal comma."""
    return bool(_SEPARATED.fullmatch(units.stripped(text)))


def count_separators(text: str) -> int:
    """How many kinds of separators stand in a number."""
    return len({" " if c in _SPACES else c for c in units.stripped(text) if c in _SEPARATORS})


def is_notation(text: str) -> bool:
    """Whether a text is a number in a notation that is not read as one; ask after ``to_numbers`` has not."""
    number = units.stripped(units.without_inner(text))
    return bool(_NOTATION.fullmatch(number) or _PRICE.fullmatch(number))


def notation_hint(text: str) -> str:
    """What to write instead."""
    text = units.stripped(text)
    if _PRICE.fullmatch(text):
        return f"write prices without the dash behind them, {text.rstrip('-–—')[:-1]} for {text}"
    if "(" in text or text.endswith("-"):
        return "write negative numbers with a minus before them, as in -1234.5"
    if re.search(r"\d,\d+[eE]", text):
        return "pass --decimal ','"
    return "write them with the digits 0 to 9, as in -1234.5"


def missing_option(text: str) -> str:
    """The option under which a text is a missing value."""
    # A text that begins like an option is taken for one, unless it is joined to its own.
    return f"--missing={shlex.quote(text)}" if text.startswith("-") else f"--missing {text!r}"


def is_inexact(text: str) -> bool:
    """Whether a text is a number beyond 2^53 that float64 may not hold, also one such as 9.007199254740993e15."""
    whole = _LARGE.fullmatch(text)
    if whole is not None:
        # Python converts no more than some thousand digits.
        digits = whole[1].lstrip("+-0")
        return len(digits) > 16 or int(digits or "0") > LARGEST_WHOLE
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
        mark = _mark(conventions.thousands)
        groups = rf"|\d{{1,3}}(?:{mark}\d{{3}})+|\d{{1,2}}(?:{mark}\d{{2}})+{mark}\d{{3}}"
    written = rf"[-+]?(?:(?:\d+{groups})(?:{decimal}\d*)?|{decimal}\d+)(?:[eE][-+]?\d+)?|[-+]?(?:inf|infinity|nan)"
    return ~texts.str.fullmatch(f"(?i:{written})").fillna(True).astype(bool)


def misfit_hint(text: str, conventions: Conventions) -> str:
    """What a text that misfits should have been, and the options under which it is right."""
    known = (conventions.decimal, conventions.thousands)
    others = [" " if c in _SPACES else c for c in text if c in _SEPARATORS and c not in known]
    if others and not conventions.thousands:
        return f"pass --thousands {others[0]!r} --decimal {conventions.decimal!r} if it stands between thousands"
    return "thousands stand in groups of three digits, and the decimal character once behind them"


def separator_hint(text: str) -> str:
    """The options that say what the separators of a text mean."""
    number = units.stripped(text)
    found = [" " if c in _SPACES else c for c in number if c in _SEPARATORS]
    thousands, decimal = f"--thousands {found[0]!r}", f"--decimal {found[-1]!r}"
    if len(set(found)) > 1:
        return f"pass {thousands} {decimal}"
    if found[0] == ".":
        # A point is no decimal character then.
        return f"pass {thousands} --decimal ','"
    if found != [","]:
        return f"pass {thousands}"
    grouped = re.search(r"(?<!\d)\d{1,3}\D\d{3}(?!\d)", number)
    return f"pass {thousands} or {decimal}" if grouped else f"pass {decimal}"
