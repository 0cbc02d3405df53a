"""Dates without a year, such as 09/02: whether the month or the day comes first is told by all texts of a column."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

# Days of the months, in a year that has a 29 February.
_DAYS = np.array([0, 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])
# Two numbers, and perhaps a time of day. In ISO 8601 two dashes stand in the place of the year.
_PAIR = re.compile(r"(--)?(\d{1,2})(-|/|\. ?| [-/] )(\d{1,2})(\.?)(?:([ T])\d{1,2}:\d{2}(:\d{2})?( ?[AaPp][Mm])?)?")
# Stands for a date that is missing.
_NONE = ("00", "00")
# This part of a column's texts must fit a format: a few may be mistakes.
_NEARLY_ALL = 0.9
# Texts of a column are taken for fractions or ranges where at most so many differ.
_FRACTIONS = 10
# So many different numbers are hardly all days of a year by chance. A number that begins with a zero tells as much.
_ENOUGH = 10


def is_pair(text: str) -> bool:
    """Whether a text is two numbers of one or two digits with - or / or a point between them."""
    return bool(_PAIR.fullmatch(text))


def _share(order: str, first: np.ndarray, second: np.ndarray) -> float:
    """How many of the pairs are dates in that order, such as "%m %d"."""
    month, other = (first, second) if order.startswith("%m") else (second, first)
    known = (month >= 1) & (month <= 12)
    if "%d" in order:
        known &= (other >= 1) & (other <= _DAYS[np.where(known, month, 0)])
    return float(known.mean())


def formats(texts: Iterable[str]) -> list[str]:
    """The formats in which nearly all of these texts are dates: days of a year, or months of a year of two digits."""
    pairs = [pair for text in texts if (pair := _PAIR.fullmatch(text)) and pair.group(2, 4) != _NONE]
    if not pairs:
        return []
    dashes, _, mark, _, dot, gap, seconds, noon = pairs[0].groups()
    first, second = (np.array([int(pair[group]) for pair in pairs]) for group in (2, 4))
    orders = ["%m %d"] if dashes else ["%m %d", "%d %m"]
    if "." in mark:
        # With points the day comes first nearly everywhere.
        orders = orders[::-1]
    elif not dashes and _padded(pairs) and all(len(pair[2]) == len(pair[4]) == 2 for pair in pairs):
        # Days are on both sides of 12; years of two digits come first only where no month could.
        orders += ["%m %y"] if (second > 12).all() or (second <= 12).all() else []
        orders += ["%y %m"] if (first > 12).all() else []
    found = [order for order in orders if _share(order, first, second) >= _NEARLY_ALL]
    clock = f"{gap}{'%I' if noon else '%H'}:%M{':%S' if seconds else ''}" if gap else ""
    if noon:
        clock += " %p" if noon.startswith(" ") else "%p"
    return [(dashes or "") + mark.join(order.split()) + dot + clock for order in (found[:1] if "." in mark else found)]


def _padded(pairs: Iterable[re.Match[str]]) -> bool:
    return any(number.startswith("0") for pair in pairs for number in (pair[2], pair[4]))


def may_be_fractions(texts: Iterable[str]) -> bool:
    """Whether a few different texts may as well be fractions, such as 1/2 and 3/4, or ranges such as 1-5 and 6-10."""
    pairs = [pair for text in texts if (pair := _PAIR.fullmatch(text))]
    plain = all(pair[3].strip() in ("-", "/") and not (pair[1] or pair[5] or pair[6]) for pair in pairs)
    return (
        len(pairs) <= _FRACTIONS
        and plain
        and not _padded(pairs)
        and all(int(pair[2]) <= int(pair[4]) for pair in pairs)
    )


def options(found: list[str], name: str) -> str:
    """The options under which a column is read as dates without a year, for formats that suit it."""
    # A format that begins with dashes is taken for an option, unless it is joined to its own.
    joined = "=" if found[0].startswith("-") else " "
    said = f"--dates {name!r} --date-format{joined}{found[0]!r}"
    if len(found) == 1:
        return f"{said} for {_parts(found[0], ('%y', '%m', '%d'))}"
    readings = [f"{written!r} if {_parts(written)}" for written in found[1:]]
    return f"{said} if {_parts(found[0])} are meant, or {', or '.join(readings)}"


def _parts(written: str, order: Sequence[str] = ()) -> str:
    """What a format says, as it is written or in the order of these codes."""
    words = {"%m": "month", "%d": "day", "%y": "year"}
    codes = re.findall("%[mdy]", written)
    return " and ".join(words[code] for code in (sorted(codes, key=order.index) if order else codes))


def format_of_numbers(values: np.ndarray, texts: Callable[[], Any]) -> str | None:
    """The format in which numbers such as 9.02 or 902 are all days of a year, if their texts are 09.02 or 0902.

    Args:
        values: the numbers of a column.
        texts: reads what the file has for them.
    """
    values = values[~np.isnan(values)]
    with np.errstate(all="ignore"):
        if values.size == 0 or not (values >= 1).all() or (values > 3112).any():
            return None
        whole = not (values % 1).any()
        digits = values if whole else np.round(values * 100, 6)
    if (digits % 1).any():
        return None
    first, second = (digits // 100).astype(int), (digits % 100).astype(int)
    orders = [order for order in ("%d %m", "%m %d") if _share(order, first, second) == 1]
    if not orders:
        return None
    written = texts()
    padded = written.str.startswith("0").any()
    form = r"\d{4}" if whole else r"\d{1,2}\.\d{2}"
    enough = not whole and len(np.unique(digits)) >= _ENOUGH
    if not (padded or enough) or not written.str.fullmatch(form).all():
        return None
    return orders[0].replace(" ", "" if whole else ".")
