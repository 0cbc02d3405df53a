"""The records of a CSV file as Python's csv module sees them: the header, widths, and the line each begins on."""

import codecs
import csv
import io
import re
from collections.abc import Iterator

from .errors import CliError, count, listed
from .source import Source


def decoded_lines(source: Source) -> Iterator[str]:
    """The lines of a file with their ends, without a byte order mark; raises where they are not UTF-8."""
    with source.open() as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise CliError(
                    f"{source}: line {number} is not UTF-8 (byte 0x{byte:02x}); pass the encoding of the file, such as "
                    "--encoding cp1252 for one of Excel on Windows, or save it as UTF-8"
                ) from None


def records(source: Source, sep: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file with the line each begins on, without the blank ones that pandas skips too.

    A line is blank where nothing but spaces and tabs stand on it; one that holds "" or " " is a record.
    """
    last = ""

    def lines() -> Iterator[str]:
        nonlocal last
        for text in decoded_lines(source):
            last = text
            yield text

    reader = csv.reader(lines(), delimiter=sep, skipinitialspace=True)
    blank = " \t\r\n".replace(sep, "")
    line = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            # The module's own advice on a lone carriage return is about how Python opens files.
            cause = "a carriage return inside the line" if "new-line character" in str(error) else error
            raise CliError(f"{source}: line {reader.line_num}: {cause}") from None
        if fields is None:
            return
        if reader.line_num > line or last.strip(blank):
            yield line, fields
        line = reader.line_num + 1


def read_header(source: Source, sep: str) -> list[str]:
    """The names of the columns, empty for those without one; raises unless the file is a table with rows."""
    with source.open() as file:
        start = file.read(1 << 16)
    if b"\0" in start:
        # In UTF-16 every other byte of a heading in Latin letters is NUL.
        orders = [order for order, at in (("le", 1), ("be", 0)) if start[:64][at::2].strip(b"\0") == b""]
        hint = f"; pass --encoding utf-16-{orders[0]} if it is UTF-16 without a byte order mark" if orders else ""
        raise CliError(f"{source} is not a text file (it holds NUL bytes){hint}")
    found = records(source, sep)
    _, fields = next(found, (0, []))
    if not fields:
        raise CliError(f"{source} is empty")
    # A line of Excel's own, which says how the fields are separated.
    if re.fullmatch(r"(?i)sep=.?", fields[0].strip()) and not any(fields[1:]):
        raise CliError(f"{source}: line 1 is {sep.join(fields)!r}, a note for spreadsheets; delete this line")
    if next(found, None) is None:
        raise CliError(f"{source} has a header but no rows")
    names = [name.strip() for name in fields]
    if not any(names):
        raise CliError(f"{source}: the header, its first line that is not blank, names no column")
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise CliError(f"{source}: the header names a column twice: {listed(twice)}; rename one of them")
    if len(names) == 1 and sep == ",":
        for other, option in ((";", "';'"), ("\t", "tab"), ("|", "'|'")):
            if other in names[0]:
                raise CliError(f"{source}: the fields seem to be separated by {option}; pass --sep {option}")
    return names


class WrongWidth(CliError):
    """A record has more fields than the header, or fewer."""


def _wrong_width(line: int, fields: list[str], width: int) -> str:
    return f"line {line} has {count(len(fields), 'field')}, but the header has {width}"


def check_widths(source: Source, sep: str, width: int) -> None:
    """Raises at the first record that has not so many fields."""
    for line, fields in records(source, sep):
        if len(fields) != width:
            raise WrongWidth(f"{source}: {_wrong_width(line, fields, width)}")


def with_empty_records(source: Source, sep: str, width: int) -> tuple[Source, dict[int, str]]:
    """The table with an empty record for each that has too many fields or too few; these rows, and what they have."""
    begins, wrong, broken = set[int](), set[int](), dict[int, str]()
    for row, (line, fields) in enumerate(records(source, sep), -1):
        begins.add(line)
        if len(fields) != width:
            wrong.add(line)
            broken[row] = _wrong_width(line, fields, width)
    content, keeps = io.BytesIO(), True
    for number, text in enumerate(decoded_lines(source), 1):
        if number in begins:
            keeps = number not in wrong
            if not keeps:
                content.write((sep * (width - 1) if width > 1 else '""').encode() + b"\n")
        if keeps:
            content.write(text.encode())
    content.seek(0)
    return source.rewritten(content), broken


def unclosed_quote(source: Source, sep: str) -> CliError:
    """The error of a file that ends inside quotation marks."""
    last = 1
    for line, _ in records(source, sep):
        last = line
    return CliError(f"{source}: a quotation mark in the record that begins on line {last} is never closed")
