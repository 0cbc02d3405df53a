"""Files of checkpoints, which are written whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from onestep._files import replacing

FORMAT = "onestep.fit/4"
# What a checkpoint has at least.
_PARTS = {"method": str, **dict.fromkeys(("identity", "model", "source", "run", "result"), dict)}


def save(path: Path, state: dict[str, Any]) -> None:
    """Replaces the file in one step: a process killed at any moment leaves the old or the new one."""
    with replacing(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """The state that ``save`` wrote; executes no code from the file."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']!r}, not {FORMAT!r}")
        lacking = [name for name, kind in _PARTS.items() if not isinstance(state.get(name), kind)]
        if lacking:
            raise ValueError(f"it has no {lacking[0]!r}")
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(path, str(error)) from error
    return state


def require_file(path: Path) -> None:
    """Raises for what is there and no regular file, nor a link to one: a pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise ValueError(f"checkpoint {path} is no regular file, nor a link to one; pass the path of a file")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """What is missing in the parts of a checkpoint while they are taken over is told of its file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, repr(error)) from error


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"checkpoint {path} was not written by onestep.fit, or is damaged: {why}; pass another file")
