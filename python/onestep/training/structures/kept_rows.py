"""Rows of numbers that are computed once and kept: in memory, or in a file where they take too much of it."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

# Of the memory that is free, what rows may take; joining their parts takes as much again for a moment.
_SHARE_OF_FREE = 0.25


def most_kept_bytes() -> int:
    """How much may be kept in memory: a quarter of what is free, as the system or the control group says."""
    free = math.inf
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if most.isdigit():
            free = min(free, int(most) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except OSError:
        pass
    if math.isinf(free):
        # Not Linux: half of what there is, if that can be known.
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 20
        free = pages * 4096 / 2
    return max(0, int(_SHARE_OF_FREE * free))


class KeptRows:
    """Parts of a tensor, added row by row.

    Parts that lie one after the other in memory, as slices of one tensor do, are joined without a copy and count for
    nothing. Others are kept as they are until they take more than ``most_bytes``; from there on they are in a temporary
    file (in TMPDIR), which the system deletes with the process, and the result reads it in place.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._parts: list[Tensor] = []
        self._file: IO[bytes] | None = None
        self._rows = 0

    def add(self, part: Tensor) -> None:
        """Rows (m, …) after those that are there; not to be changed later."""
        part = part.detach()
        self._rows += len(part)
        if self._file is not None:
            part.contiguous().numpy().tofile(self._file)
        elif self._parts and _follows(self._parts[-1], part):
            last = self._parts[-1]
            self._parts[-1] = last.as_strided((len(last) + len(part), *last.shape[1:]), last.stride())
        else:
            self._parts.append(part)
            self._bytes += part.numel() * part.element_size() if len(self._parts) > 1 else 0
            if self._bytes > self._most_bytes:
                self._spill()

    def _spill(self) -> None:
        # Unlinked, so that nothing is left behind whatever happens.
        self._file = tempfile.TemporaryFile(prefix="onestep-features-")  # noqa: SIM115
        for part in self._parts:
            part.contiguous().numpy().tofile(self._file)
        self._parts = self._parts[:1]

    @property
    def on_disk(self) -> bool:
        """Whether they are in a file."""
        return self._file is not None

    def tensor(self) -> Tensor:
        """All rows."""
        if self._file is None:
            return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        like = self._parts[0]
        self._file.flush()
        dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
        return torch.from_numpy(np.memmap(self._file, dtype, "c", shape=(self._rows, *like.shape[1:])))


def _follows(last: Tensor, part: Tensor) -> bool:
    """Whether the rows of ``part`` are in memory where the next ones of ``last`` would be."""
    same = last.dtype == part.dtype and last.shape[1:] == part.shape[1:] and last.stride() == part.stride()
    if not same or last.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
        return False
    return part.storage_offset() == last.storage_offset() + len(last) * last.stride(0)
