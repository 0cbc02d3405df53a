"""Files that are written: a regular file is replaced once the new one is complete, anything else is written to."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import CliError


def _replaced(path: Path) -> Path | None:
    """The regular file that a path means, behind symbolic links, there or not; None: what is there is written to."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    target = Path(os.path.realpath(path))
    # Links of the kernel's, such as /dev/stdout, may have no name behind them, or that of another file.
    return target if stat.S_ISREG(found.st_mode) and target.exists() and target.samefile(path) else None


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[BinaryIO]:
    """A file beside the target that takes its place at the end, with its mode and owner if it exists."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    old = target.stat() if target.exists() else None
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode)
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode & 0o666)) as file:
            if old is not None:
                if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                    with contextlib.suppress(PermissionError):
                        os.chown(partial, old.st_uid, old.st_gid)
                partial.chmod(mode)
            yield file
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` only once it is complete, with the mode of the file it replaces.

    Symbolic links stay, and the file behind them is replaced. What exists and is no regular file, such as a pipe or a
    device, is written to.
    """
    try:
        target = _replaced(path)
        with path.open("wb") if target is None else _beside(target) as file:
            yield file
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """Raises for a path that `replacing` could not write, before any work is done for it."""
    try:
        target = _replaced(path)
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
