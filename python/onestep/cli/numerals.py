"""Texts that stand for numbers and dates: what is understood, and what is refused with the option that settles it."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from .source import Conventions

_CURRENCIES = "$€£¥"
_BEFORE = re.compile(rf"^([-+]?)\s*[{_CURRENCIES}]\s*")
_AFTER = re.compile(rf"\s*[%{_CURRENCIES}]$")
_SYMBOL = re.compile(rf"[%{_CURRENCIES}]")
# Digits in groups, or with decimals behind a comma: 1,037 and 1.037.000 and 3,5 and 1 037,25.
_SEPARATED = re.compile(r"[-+]?(?:\d{1,3}(?:[,.' \u00a0\u202f]\d{3})+(?:[.,]\d+)?|\d+,\d+)")
# Negative in parentheses or with the sign behind, hexadecimal, in groups by underscores, digits of other scripts.
_NOTATION = re.compile(r"\(\d[\d.,]*\)|\d[\d.,]*-|0[xX][0-9a-fA-F]+|\d+(?:_\d+)+|[-+]?\d+(?:[.,]\d+)?(?:[eE][-+]?\d+)?")
_MINUS = "\u2212"  # of typesetters
_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?:[T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.](?:\d{4}|\d{2})(?: .*)?")
_SEPARATORS = ",.' \u00a0\u202f"
_WHOLE = re.compile(r"([-+]?\d{16,})(?:\.0*)?")
# From here on float64 skips whole numbers.
LARGEST_WHOLE = 2**53


def _without_signs(values: Any) -> Any:
    """The texts with a plain minus, and without a currency or percent sign."""
    texts = values.astype("string").str.replace(_MINUS, "-", regex=False)
    return texts.str.replace(_BEFORE, r"\1", regex=True).str.replace(_AFTER, "", regex=True)


def plain(values: Any, conventions: Conventions) -> Any:
    """The texts as Python writes numbers: without a currency or percent sign, without thousands separators."""
    texts = _without_signs(values)
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


def symbols(values: Any) -> list[str]:
    """The currency and percent signs that stand beside the numbers of a column of texts."""
    if values.dtype.kind in "fiu":
        return []
    return sorted(set(values.dropna().astype(str).str.extract(f"({_SYMBOL.pattern})", expand=False).dropna()))


def is_separated(text: str) -> bool:
    """Whether a text looks like a number with thousands separators or a decimal comma."""
    return bool(_SEPARATED.fullmatch(_AFTER.sub("", _BEFORE.sub(r"\1", text))))


def is_notation(text: str) -> bool:
    """Whether a text is a number in a notation that is not read as one; ask after ``to_numbers`` has not."""
    return bool(_NOTATION.fullmatch(text))


def is_date(text: str) -> bool:
    """Whether a text looks like a date."""
    return bool(_DATE.fullmatch(text))


def is_inexact(text: str) -> bool:
    """Whether a text is a whole number that float64 may not hold."""
    whole = _WHOLE.fullmatch(text)
    return whole is not None and abs(int(whole[1])) > LARGEST_WHOLE


def misfits(values: Any, conventions: Conventions) -> Any:
    """Which of the texts pass for numbers, but are not written as the conventions say: 3,5 where , groups thousands."""
    texts = _without_signs(values)
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
    found = [c for c in text if c in _SEPARATORS]
    if len(set(found)) > 1:
        return f"pass --thousands {found[0]!r} --decimal {found[-1]!r}"
    options = [f"--thousands {found[0]!r}"] if re.search(r"(?<!\d)\d{1,3}(?:\D\d{3})+(?!\d)", text) else []
    if found == [","]:
        options.append("--decimal ','")
    return "pass " + " or ".join(options or [f"--thousands {found[0]!r}"])
