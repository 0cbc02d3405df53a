"""Files of checkpoints, which are written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from onestep._files import replacing

FORMAT = "onestep.fit/4"


def save(path: Path, state: dict[str, Any]) -> None:
    """Replaces the file in one step: a process killed at any moment leaves the old or the new one."""
    with replacing(path) as file:
        torch.save(state, file)


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
