"""Files that are written, with errors of one line."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from onestep import _files

from .errors import CliError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` only once it is complete."""
    try:
        with _files.replacing(path) as file:
            yield file
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """Raises for a path that `replacing` could not write, before any work is done for it."""
    try:
        target = _files.replaced_by(path)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}") from None
    if path.is_dir():
        raise CliError(f"cannot write {path}: it is a directory")
    if path.is_socket():
        raise CliError(f"cannot write {path}: it is a socket; pass a file or a pipe")
    if target is None:
        if not os.access(path, os.W_OK):
            raise CliError(f"cannot write {path}: no permission to write to it")
        return
    if not target.parent.is_dir():
        raise CliError(f"cannot write {path}: there is no directory {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise CliError(f"cannot write {path}: no permission to write in {target.parent}")
