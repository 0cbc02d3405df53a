"""Texts that stand for dates: how they are read, which parts of a date they say, and what to do about others."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from .errors import CliError

# The parts of a date, and what pandas calls them.
PARTS = {"year": "year", "month": "month", "day": "day", "weekday": "day_of_week"}

_MONTH = r"(?i:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATE = re.compile(
    r"\d{4}([-/.])\d{1,2}\1\d{1,2}(?:[T ].*)?|\d{1,2}([-/.])\d{1,2}\2(?:\d{4}|\d{2})(?: .*)?|\d{4}[-/](?:0[1-9]|1[0-2])"
    rf"|\d{{1,2}}[-. ]*{_MONTH}[-, ]*(?:\d{{4}}|\d{{2}})|{_MONTH}[ -]*(?:\d{{1,2}},? +)?\d{{4}}"
)
# Weeks of ISO 8601 and quarters, which name no day.
_SPAN = re.compile(r"\d{4}[- ]?(?:W\d{2}(?:-?[1-7])?|Q[1-4])|Q[1-4][-/ ]?\d{4}", re.IGNORECASE)
_TIME = re.compile(r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?: ?[AaPp]\.?[Mm]\.?)?")
# What ISO 8601 says of a date: a year, a year and a month, or a day, which a time may follow.
_ISO_YEAR, _ISO_MONTH, _ISO_DAY = r"\d{4}", r"\d{4}-\d{2}", r"\d{4}([-/]?)\d{2}\1\d{2}(?:[Tt ].*)?"
# A time of day with its distance from UTC.
_OFFSET = re.compile(r"^(.*\d[Tt ]\d{2}.*?)\s*(?:[Zz]|[-+]\d{2}(?::?\d{2})?)$")
# Eight or six digits are a date only between these years; other numbers have such digits by chance, but seldom all of
# a column.
_FIRST_YEAR, _LAST_YEAR = 1900, 2100
_ENOUGH_DATES = 5


def is_date(text: str) -> bool:
    """Whether a text looks like a date, a week or a quarter."""
    return bool(_DATE.fullmatch(text) or _SPAN.fullmatch(text))


def is_time(text: str) -> bool:
    """Whether a text looks like a time of day without a date."""
    return bool(_TIME.fullmatch(text))


def remedy(text: str, name: str) -> str:
    """What to do that a column with such a date is read as dates."""
    if _SPAN.fullmatch(text):
        return "weeks and quarters are not read: write a day of each, such as 2023-01-30"
    return f"pass --dates {name!r}{_format_hint(text)} for {_listed_parts(text)}"


def _listed_parts(text: str) -> str:
    month = re.fullmatch(rf"\d{{4}}[-/]\d{{2}}|{_MONTH}[ -]*\d{{4}}", text)
    return "year and month" if month else "year, month, day and weekday"


def _format_hint(text: str) -> str:
    """The option that --dates needs beside it to read such a date; empty for year, month, day."""
    if re.match(r"\d{4}-", text):
        return ""
    for pattern, written in (
        (r"\d{4}/\d{1,2}/\d{1,2}", "%Y/%m/%d"),
        (r"\d{4}\.\d{1,2}\.\d{1,2}", "%Y.%m.%d"),
        (r"\d{4}/\d{2}", "%Y/%m"),
        # With dots the day comes first everywhere.
        (r"\d{1,2}\.\d{1,2}\.\d{4}", "%d.%m.%Y"),
        (r"\d{1,2}\.\d{1,2}\.\d{2}", "%d.%m.%y"),
        (rf"\d+ {_MONTH} \d{{4}}", "%d %b %Y"),
        (rf"\d+-{_MONTH}-\d{{4}}", "%d-%b-%Y"),
        (rf"\d+-{_MONTH}-\d{{2}}", "%d-%b-%y"),
        (rf"{_MONTH} \d+, \d{{4}}", "%b %d, %Y"),
        (rf"{_MONTH} \d{{4}}", "%b %Y"),
    ):
        if re.fullmatch(pattern, text):
            word = re.sub(r"[^A-Za-z]", "", text)
            return f" --date-format {written.replace('%b', '%B' if len(word) > 3 else '%b')!r}"
    return " --date-format FORMAT, such as %d/%m/%Y,"


def digits_hint(values: np.ndarray, name: str) -> str | None:
    """The options under which numbers such as 20230325 or 202303 are dates, where all of a column may be; else None."""
    values = values[~np.isnan(values)]
    if len(np.unique(values)) < _ENOUGH_DATES or (values % 1).any():
        return None
    texts = pd.Series([f"{value:.0f}" for value in values])
    for digits, written, option in ((8, "%Y%m%d", ""), (6, "%Y%m", " --date-format %Y%m")):
        if texts.str.len().eq(digits).all() and values.min() > 0:
            years = pd.to_datetime(texts, format=written, errors="coerce").dt.year
            if years.between(_FIRST_YEAR, _LAST_YEAR).all():
                return f"--dates {name!r}{option}"
    return None


def parse(texts: Any, written: str | None) -> Any:
    """Texts as dates, NaT for those that are none. A time's distance from UTC does not change the day written."""
    texts = texts.astype("string")
    if written is None:
        iso = texts.str.fullmatch(f"{_ISO_YEAR}|{_ISO_MONTH}|{_ISO_DAY}").fillna(False).astype(bool)
        local = texts.where(iso).str.replace(_OFFSET, r"\1", regex=True)
        return pd.to_datetime(local, format="ISO8601", errors="coerce")
    try:
        # A format of which Python knows nothing is told here; pandas says that no text fits it.
        datetime.strptime("", written)
    except (ValueError, IndexError, re.error) as error:
        if "does not match" not in str(error):
            raise CliError(f"--date-format {written!r} is no format of dates: {error}") from None
    if "%z" in written:
        return pd.to_datetime(texts.map(lambda text: _local_time(text, written), na_action="ignore"), errors="coerce")
    try:
        return pd.to_datetime(texts, format=written, errors="coerce")
    except ValueError as error:
        raise CliError(f"--date-format {written!r} is no format of dates: {error}") from None


def _local_time(text: str, written: str) -> Any:
    try:
        return datetime.strptime(text, written).replace(tzinfo=None)
    except ValueError:
        return None


def said(texts: Any, written: str | None) -> dict[str, np.ndarray]:
    """Which of the parts each text says, by its name: 2023-01 says no day, and no weekday; nor does %b %Y."""
    if written is not None:
        return {part: np.full(len(texts), says) for part, says in _format_says(written).items()}
    texts = texts.astype("string")
    year, month = (texts.str.fullmatch(form).fillna(False).to_numpy(bool) for form in (_ISO_YEAR, _ISO_MONTH))
    day = ~(year | month)
    return {"year": day | year | month, "month": day | month, "day": day, "weekday": day}


def _format_says(written: str) -> dict[str, bool]:
    found = set(re.findall(r"%[-#]?([A-Za-z])", written.replace("%%", "")))
    whole = bool(found & set("cxDF"))
    of_week = bool(found & set("UWV") and found & set("wuaA"))
    year = whole or bool(found & set("yYG"))
    of_year = year and ("j" in found or of_week)
    month = whole or of_year or bool(found & set("mbBh"))
    day = whole or of_year or bool(found & set("de"))
    return {"year": year, "month": month, "day": day, "weekday": year and month and day}
