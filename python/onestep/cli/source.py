"""Where a table comes from, and how it writes numbers, dates and missing values."""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CliError

STANDARD_INPUT = Path("-")


class Source:
    """A CSV file, or standard input or a pipe, copied to a temporary file since it is read more than once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = str(path)
        if path == STANDARD_INPUT:
            self._name = "standard input"
            if sys.stdin is None:
                raise CliError("standard input is closed; pass a file, or send the table to standard input")
            self._keep(sys.stdin.buffer)
        elif path.is_dir():
            raise CliError(f"{path} is a directory, not a CSV file")
        elif not path.exists():
            raise CliError(f"no such file: {path}")
        elif path.is_fifo():
            # As the shell's <(command) gives one.
            with path.open("rb") as pipe:
                self._keep(pipe)
        elif not path.is_file():
            raise CliError(f"{path} is not a file, nor a pipe")

    def _keep(self, stream: BinaryIO) -> None:
        """Copies what a stream holds, which can be read once."""
        self._copy = tempfile.NamedTemporaryFile(suffix=".csv")  # noqa: SIM115 (deleted with this object)
        shutil.copyfileobj(stream, self._copy)
        self._copy.flush()
        self.path = Path(self._copy.name)

    def rewritten(self, content: BinaryIO) -> Source:
        """A source of the same name that holds something else."""
        result = copy.copy(self)
        result._keep(content)
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
    missing: the texts that mean a missing value beside the empty field; None: those that pandas knows (NA, null ...).
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
        options: dict[str, Any] = {"thousands": self.thousands, "decimal": self.decimal}
        if self.missing is not None:
            options |= {"keep_default_na": False, "na_values": ["", *self.missing]}
        return options
