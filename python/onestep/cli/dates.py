"""Texts that stand for dates: how they are read, which parts of a date they say, and what to do about others."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from . import days
from .errors import CliError

# The parts of a date, and what pandas calls them.
PARTS = {"year": "year", "month": "month", "day": "day", "weekday": "day_of_week"}

_MONTH = r"(?i:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATE = re.compile(
    r"\d{4}([-/.])\d{1,2}\1\d{1,2}(?:[T ].*)?|\d{1,2}([-/.])\d{1,2}\2(?:\d{4}|\d{2})(?: .*)?|\d{4}[-/](?:0[1-9]|1[0-2])"
    rf"|\d{{1,2}}[-. ]*{_MONTH}[-, ]*(?:\d{{4}}|\d{{2}})|{_MONTH}[ -]*(?:\d{{1,2}},? +)?\d{{4}}"
    # A point behind the last number, and blanks behind the points.
    r"|\d{1,2}\. ?\d{1,2}\. ?\d{4}\.?|\d{4}\. ?\d{1,2}\. ?\d{1,2}\.?|(?:19|20)\d{6}T\d{4,6}.*"
    # Months of a year, and dates of East Asia, which may have no year.
    r"|(?:0?[1-9]|1[0-2])[-/](?:19|20)\d{2}|\d{4}\s?[\u5e74\ub144]\s?\d{1,2}\s?[\u6708\uc6d4](?:\s?\d{1,2}\s?[\u65e5\uc77c])?"
    r"|\d{1,2}\s?[\u6708\uc6d4]\s?\d{1,2}\s?[\u65e5\uc77c]"
)
# Dates with the name of a month, of which one of year and day may not be said, behind a weekday and before a time.
_NAME = (
    r"(?i:jan(?:uary?)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_WEEKDAY = (
    r"(?i:mon(?:day)?|tue(?:s(?:day)?)?|wed(?:nesday)?|thu(?:r(?:s(?:day)?)?)?|fri(?:day)?|sat(?:urday)?|sun(?:day)?)"
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?i:st|nd|rd|th)?"
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2})?"
_GAP = r"[-/., ]{1,2}"
_NAMED = re.compile(
    rf"(?:{_WEEKDAY}[.,]? *)?(?:{_DAY}{_GAP}(?:of )?{_NAME}(?:{_GAP}'?(?:\d{{4}}|\d{{2}}))?"
    rf"|{_NAME}{_GAP}{_DAY}(?:,? *\d{{4}})?|{_NAME}{_GAP}'?\d{{2}}|\d{{4}}{_GAP}{_NAME}(?:{_GAP}{_DAY})?"
    rf"|{_NAME} +{_DAY},? +{_CLOCK} +\d{{4}})(?:,? {_CLOCK}.*)?"
)
_ORDINAL = re.compile(r"\d(?:st|nd|rd|th)\b", re.IGNORECASE)
# Weeks of ISO 8601 and quarters, which name no day.
_SPAN = re.compile(r"\d{4}[- ]?(?:W\d{2}(?:-?[1-7])?|Q[1-4])|Q[1-4][-/ ]?\d{4}", re.IGNORECASE)
_TIME = re.compile(r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?: ?[AaPp]\.?[Mm]\.?)?")
# What ISO 8601 says of a date: a year, a year and a month, or a day, which a time may follow.
_ISO_YEAR, _ISO_MONTH, _ISO_DAY = r"\d{4}", r"\d{4}-\d{2}", r"\d{4}([-/]?)\d{2}\1\d{2}(?:[Tt ].*)?"
_UNPADDED = re.compile(r"\d{4}-\d{1,2}-\d{1,2}(?!\d)")
# A time of day with its distance from UTC.
_OFFSET = re.compile(r"^(.*\d[Tt ]\d{2}.*?)\s*(?:[Zz]|[-+]\d{2}(?::?\d{2})?)$")
# Eight or six digits are a date only between these years; other numbers have such digits by chance, but seldom all of
# a column.
_FIRST_YEAR, _LAST_YEAR = 1900, 2100
# The format of dates that are read as numbers with decimals, such as 05.2023.
MONTHS_OF_YEARS = "%m.%Y"
_ENOUGH_DATES = 5


def is_date(text: str) -> bool:
    """Whether a text looks like a date, a week or a quarter."""
    return bool(_DATE.fullmatch(text) or _NAMED.fullmatch(text) or _SPAN.fullmatch(text))


def is_unpadded(text: str) -> bool:
    """Whether a text is a date such as 2023-1-5, whose month and day want a second digit to be of ISO 8601."""
    return bool(_UNPADDED.match(text)) and not re.match(_ISO_DAY, text)


def is_time(text: str) -> bool:
    """Whether a text looks like a time of day without a date."""
    return bool(_TIME.fullmatch(text))


def remedy(text: str, name: str) -> str:
    """What to do that a column with such a date is read as dates."""
    if _SPAN.fullmatch(text):
        return "weeks and quarters are not read: write a day of each, such as 2023-01-30"
    if _ORDINAL.search(text):
        return "days such as 1st are not read: write dates such as 2023-01-30"
    first, *others = _formats(text) or [""]
    if not first:
        iso = re.match(r"\d{4}-\d|\d{8}T", text) and not is_unpadded(text)
        option = "" if iso else " --date-format FORMAT, such as %d/%m/%Y,"
        parts = "year and month" if iso and re.fullmatch(_ISO_MONTH, text) else "year, month, day and weekday"
        return f"pass --dates {name!r}{option} for {parts}"
    also = "".join(f", or {other!r} for {_listed_parts(other)}" for other in others)
    return f"pass --dates {name!r} --date-format {first!r} for {_listed_parts(first)}{also}"


def likely_format(text: str) -> str:
    """The format that such a date is probably written in."""
    return (_formats(text) or ["%d/%m/%Y"])[0]


def _listed_parts(written: str) -> str:
    *parts, last = (part for part, says in _format_says(written).items() if says)
    return f"{', '.join(parts)} and {last}" if parts else last


def _formats(text: str) -> list[str]:
    """The formats that --dates may need beside it to read such a date; none for year-month-day, or if unknown."""
    if is_unpadded(text):
        clock = _UNPADDED.sub("", text, count=1)
        for pattern, written in (("", ""), (r"[ T]\d{1,2}:\d{2}", "%H:%M"), (r"[ T]\d{1,2}:\d{2}:\d{2}", "%H:%M:%S")):
            if re.fullmatch(pattern, clock):
                return [f"%Y-%m-%d{clock[:1]}{written}"]
    for pattern, written in (
        (r"\d{4}/\d{1,2}/\d{1,2}", "%Y/%m/%d"),
        (r"\d{4}\.\d{1,2}\.\d{1,2}", "%Y.%m.%d"),
        (r"\d{4}\.\d{1,2}\.\d{1,2}\.", "%Y.%m.%d."),
        (r"\d{4}\. \d{1,2}\. \d{1,2}\.", "%Y. %m. %d."),
        (r"\d{4}/\d{2}", "%Y/%m"),
        (r"\d{1,2}/\d{4}", "%m/%Y"),
        (r"\d{1,2}-\d{4}", "%m-%Y"),
        # With dots the day comes first everywhere.
        (r"\d{1,2}\.\d{1,2}\.\d{4}", "%d.%m.%Y"),
        (r"\d{1,2}\.\d{1,2}\.\d{4}\.", "%d.%m.%Y."),
        (r"\d{1,2}\. \d{1,2}\. \d{4}", "%d. %m. %Y"),
        (r"\d{1,2}\.\d{1,2}\.\d{2}", "%d.%m.%y"),
    ):
        if re.fullmatch(pattern, text):
            return [written]
    if days.is_pair(text):
        return days.formats([text])
    if re.search("[\u5e74\ub144\u6708\uc6d4]", text):
        # A year, a month and perhaps a day, or a month and a day, with a word behind each.
        codes = iter(("%Y", "%m", "%d")[not re.search("[\u5e74\ub144]", text) :])
        return [re.sub(r"\d+", lambda _: next(codes), text)]
    return _named_formats(text) if re.search(_NAME, text) else []


def _named_formats(text: str) -> list[str]:
    """The formats of a date with the name of a month. Of Jan-23 there are two: 23 may be the year, and the day."""
    named, clock = [], r"\d{1,2}:\d{2}:\d{2}|\d{1,2}:\d{2}"
    for part in re.findall(rf"{clock}| [-+]\d{{4}}$|\d+|[A-Za-z]+|.", text):
        if re.fullmatch(clock, part):
            named.append("%H:%M:%S" if part.count(":") == 2 else "%H:%M")
        elif re.fullmatch(r" [-+]\d{4}", part):
            named.append(" %z")
        elif re.fullmatch(_WEEKDAY, part):
            named.append("%a" if len(part) == 3 else "%A")
        elif re.fullmatch(_NAME, part):
            named.append("%b" if len(part) == 3 else "%B")
        elif part.isalpha():
            return []
        else:
            named.append("%Y" if re.fullmatch(r"\d{4}", part) else part)
    short = [place for place, part in enumerate(named) if part.isdigit()]
    if "%Y" in named or len(short) == 2:
        readings: tuple[str, ...] = ("%d%y",)
    else:
        month = next(place for place, part in enumerate(named) if part in ("%b", "%B"))
        readings = ("%y", "%d") if short and short[0] > month else ("%d", "%y")
        if short and ("'" in named or int(named[short[0]]) not in range(1, 32)):
            readings = ("%y",)
        elif short and (len(named[short[0]]) < 2 or {"%a", "%A"} & set(named)):
            readings = ("%d",)
    found = []
    for reading in readings:
        codes = dict(zip(short, re.findall("%.", reading), strict=False))
        found.append("".join(codes.get(place, part) for place, part in enumerate(named)))
    return found


def digits_hint(values: np.ndarray, name: str) -> str | None:
    """The options under which numbers such as 20230325 or 202303 are dates, where all of a column may be; else None.

    Of 1032023 it is for the caller to see that the text is 01032023.
    """
    values = values[~np.isnan(values)]
    if len(np.unique(values)) < _ENOUGH_DATES:
        return None
    if (values % 1).all():
        # 05.2023, whose number is 5.2023.
        months, years = np.floor(values), np.round(values % 1 * 1e4, 6)
        dated = (months >= 1) & (months <= 12) & (years >= _FIRST_YEAR) & (years <= _LAST_YEAR) & (years % 1 == 0)
        return f"--dates {name!r} --date-format {MONTHS_OF_YEARS}" if dated.all() else None
    if (values % 1).any():
        return None
    texts = pd.Series([f"{value:.0f}" for value in values])
    for digits, written, option in ((8, "%Y%m%d", ""), (6, "%Y%m", " --date-format %Y%m")):
        if texts.str.len().eq(digits).all() and values.min() > 0:
            years = pd.to_datetime(texts, format=written, errors="coerce").dt.year
            if years.between(_FIRST_YEAR, _LAST_YEAR).all():
                return f"--dates {name!r}{option}"
    # Day or month first: one of the two zeros that it may begin with is lost.
    if not (texts.str.len().isin([7, 8]).all() and values.min() > 0 and texts.str[:-4].nunique() > 1):
        return None
    orders = [
        written
        for written in ("%d%m%Y", "%m%d%Y")
        if pd.to_datetime(texts.str.zfill(8), format=written, errors="coerce")
        .dt.year.between(_FIRST_YEAR, _LAST_YEAR)
        .all()
    ]
    return f"--dates {name!r} --date-format {' or '.join(orders)}" if orders else None


def parse(texts: Any, written: str | None) -> Any:
    """Texts as dates, NaT for those that are none. A time's distance from UTC does not change the day written.

    Dates without a year are of one that has a 29 February.
    """
    texts = texts.astype("string")
    if written is None:
        iso = texts.str.fullmatch(f"{_ISO_YEAR}|{_ISO_MONTH}|{_ISO_DAY}").fillna(False).astype(bool)
        local = texts.where(iso).str.replace(_OFFSET, r"\1", regex=True)
        return pd.to_datetime(local, format="ISO8601", errors="coerce")
    whole = written
    if not _format_says(written)["year"]:
        whole, texts = f"%Y {written}", "2000 " + texts
    try:
        # A format of which Python knows nothing is told here; pandas says that no text fits it.
        datetime.strptime("", whole)
    except (ValueError, IndexError, re.error) as error:
        if "does not match" not in str(error):
            raise CliError(f"--date-format {written!r} is no format of dates: {error}") from None
    if "%z" in written:
        return pd.to_datetime(texts.map(lambda text: _local_time(text, whole), na_action="ignore"), errors="coerce")
    try:
        return pd.to_datetime(texts, format=whole, errors="coerce")
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
