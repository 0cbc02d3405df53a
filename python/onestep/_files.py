"""Files that are written: a regular file is replaced once the new one is complete, anything else is written to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# File systems take names of 255 bytes, of which the file beside another one takes some for its process.
_LONGEST_NAME = 200


def replaced_by(path: Path) -> Path | None:
    """The regular file that a path means, behind symbolic links, there or not; None: what is there is written to."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    target = Path(os.path.realpath(path))
    # Links of the kernel's, such as /dev/stdout, may have no name behind them, or that of another file.
    return target if stat.S_ISREG(found.st_mode) and target.exists() and target.samefile(path) else None


def _partial(target: Path, process: str) -> str:
    """The name of the file that a process writes in the target's place; a long name is told by its hash."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{glob.escape(name) if process == '*' else name}.{process}.partial"


def _remove_leftovers(target: Path) -> None:
    """Removes what killed processes have left beside the target: nobody holds the lock of such a file any more."""
    for path in target.parent.glob(_partial(target, "*")):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[BinaryIO]:
    """A file beside the target that takes its place at the end, with its mode and owner if it exists."""
    if not target.parent.is_dir():
        # The name of the file beside it says nothing to who asked for another.
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(target.parent))
    _remove_leftovers(target)
    partial = target.with_name(_partial(target, str(os.getpid())))
    old = target.stat() if target.exists() else None
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode)
    try:
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode & 0o666)) as file:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if old is None:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield file
        with partial.open("rb") as file:
            # Others may have put a file of their own there, with a mode of its own.
            if old is not None and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` only once it is complete, with the mode of the file it replaces.

    A process that is killed at any moment leaves the old file or the new one. Symbolic links stay, and the file behind
    them is replaced. What exists and is no regular file, such as a pipe or a device, is written to. A regular file may
    also be written by the name that it has meanwhile (``is_regular``).
    """
    target = replaced_by(path)
    with path.open("wb") if target is None else _beside(target) as file:
        yield file


def is_regular(file: BinaryIO) -> bool:
    """Whether a file is a regular one, no pipe and no device."""
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
