"""Files of checkpoints, which are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT = "onestep.fit/4"


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes beside the file and moves it into place: a process killed at any moment leaves the old or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """The state that ``save`` wrote; executes no code from the file."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["format"] != FORMAT:
            raise KeyError("format")
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"checkpoint {path} was not written by onestep.fit, or is damaged: {error}") from error
    return state
