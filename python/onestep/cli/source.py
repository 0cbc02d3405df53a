"""Where a table comes from, and how it writes numbers, dates and missing values."""

from __future__ import annotations

import codecs
import copy
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CliError

STANDARD_INPUT = Path("-")
# Byte order marks, of which that of UTF-32 begins like that of UTF-16, and what a file that begins with one is in.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
_AT_ONCE = 1 << 20
# What pandas takes for a missing value.
_USUAL_CODES = (
    *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    """What a stream holds, some at a time."""
    return iter(lambda: stream.read(_AT_ONCE), b"")


class Source:
    """A CSV file in UTF-8; anything else is copied to a temporary file in UTF-8: standard input, a pipe, other text.

    ``encoding`` is that of the text; None: what its byte order mark says, and UTF-8 without one.
    """

    def __init__(self, path: Path, encoding: str | None = None) -> None:
        self.path = path
        self._name = str(path)
        if path == STANDARD_INPUT:
            self._name = "standard input"
            if sys.stdin is None:
                raise CliError("standard input is closed; pass a file, or send the table to standard input")
            self._keep(_chunks(sys.stdin.buffer))
        elif path.is_dir():
            raise CliError(f"{path} is a directory, not a CSV file")
        elif not path.exists():
            raise CliError(f"no such file: {path}")
        elif path.is_fifo():
            # As the shell's <(command) gives one.
            with path.open("rb") as pipe:
                self._keep(_chunks(pipe))
        elif not path.is_file():
            raise CliError(f"{path} is not a file, nor a pipe")
        encoding = self._settle_encoding(encoding)
        if encoding != "utf-8":
            with self.open() as stream:
                self._keep(self._as_utf8(stream, encoding))

    def _settle_encoding(self, encoding: str | None) -> str:
        """The encoding of the file, by its byte order mark or as it was given; raises where the two differ."""
        with self.open() as file:
            start = file.read(4)
        marked = next((name for mark, name in _MARKS if start.startswith(mark)), None)
        given = None if encoding is None else codecs.lookup(encoding).name
        if given == "utf-8-sig":
            given = "utf-8"
        # utf-16 is any of utf-16-le and utf-16-be.
        if marked and given and given not in (marked, marked.removesuffix("-le").removesuffix("-be")):
            raise CliError(
                f"{self} begins with the byte order mark of {marked}, and --encoding is {encoding}; "
                "leave the option out"
            )
        return marked or given or "utf-8"

    def _as_utf8(self, stream: BinaryIO, encoding: str) -> Iterator[bytes]:
        """Text of another encoding as UTF-8, without a byte order mark; raises at the line that is none."""
        decoder, lines, first = codecs.getincrementaldecoder(encoding)(), 1, True
        try:
            for chunk in (*_chunks(stream), b""):
                text = decoder.decode(chunk, final=not chunk)
                lines += text.count("\n")
                yield (text.removeprefix("\ufeff") if first else text).encode()
                first = first and not text
        except UnicodeError as error:
            byte = ""
            if isinstance(error, UnicodeDecodeError):
                lines += error.object[: error.start].decode(encoding, "ignore").count("\n")
                byte = f" (byte 0x{error.object[error.start]:02x})"
            raise CliError(
                f"{self}: line {lines} is not {encoding}{byte}; pass the encoding of the file with --encoding"
            ) from None

    def _keep(self, chunks: Iterable[bytes]) -> None:
        """Copies bytes that can be read once."""
        kept = tempfile.NamedTemporaryFile(suffix=".csv")  # noqa: SIM115 (deleted with this object)
        for chunk in chunks:
            kept.write(chunk)
        kept.flush()
        self._copy, self.path = kept, Path(kept.name)

    def rewritten(self, content: BinaryIO) -> Source:
        """A source of the same name that holds something else."""
        result = copy.copy(self)
        result._keep(_chunks(content))
        return result

    def __str__(self) -> str:
        return self._name

    def open(self) -> BinaryIO:
        """The bytes of the file."""
        return self.path.open("rb")


@dataclass(frozen=True)
class Conventions:
    """How a file writes numbers and missing values.

    thousands: the character between groups of three digits, or None.
    decimal: the character before the decimals.
    missing: the texts that mean a missing value beside the empty field, with or without blanks around them; None:
        those that pandas knows (NA, null ...).
    """

    thousands: str | None = None
    decimal: str = "."
    missing: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.thousands == self.decimal:
            what = "the character before decimals, unless --decimal names another"
            remedy = "pass --decimal ',' as well" if self.decimal == "." else "pass --thousands '.', or leave it out"
            raise CliError(f"--thousands {self.thousands!r} is also {what}; {remedy}")

    def options(self) -> dict[str, Any]:
        """The options of pandas.read_csv that say so."""
        return {
            "thousands": self.thousands,
            "decimal": self.decimal,
            "keep_default_na": False,
            "na_values": sorted(self.codes),
        }

    @property
    def codes(self) -> frozenset[str]:
        """The fields that mean a missing value, without the blanks around them."""
        return frozenset(["", *(_USUAL_CODES if self.missing is None else map(str.strip, self.missing))])
