"""What statistics of a layer are made of, in memory or in files."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Names of files that have one for a moment.
_PREFIX, _SUFFIX = "tmp", ".sums"


class Storage:
    """Where matrices are kept: in memory, or in files of a folder that the system reads and writes as it has memory.

    In memory they are on the device that they were computed on; those of files are on the CPU.

    A file has no name once it is mapped, so that nothing is left of it when its matrix is gone, however the process
    ends. Only a process that is killed between the two leaves a name, which the next one with this folder removes.

    Args:
        folder: made if it is not there; None: memory.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Files that are in use, by this process or another, need no names.
            for left in self.folder.glob(f"{_PREFIX}*{_SUFFIX}"):
                left.unlink(missing_ok=True)

    def keep(self, matrix: Tensor) -> Tensor:
        """The matrix, or a copy of it in a file."""
        if self.folder is None:
            return matrix
        return self._file(matrix).copy_(matrix)

    def at(self, matrix: Tensor, device: torch.device | str) -> Tensor:
        """The matrix on a device, or as it is where matrices are kept in files."""
        return matrix.to(device) if self.folder is None else matrix

    def add(self, one: Tensor, other: Tensor) -> Tensor:
        """The sum of two matrices; they are left as they are."""
        if self.folder is None:
            return one + other.to(one.device)
        return torch.add(one.cpu(), other.cpu(), out=self._file(one))

    def _file(self, like: Tensor) -> Tensor:
        if like.numel() == 0:
            return torch.empty_like(like, device="cpu")
        handle, path = tempfile.mkstemp(dir=self.folder, prefix=_PREFIX, suffix=_SUFFIX)
        os.close(handle)
        try:
            return torch.from_file(path, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
        finally:
            # Another process that begins may have removed it.
            Path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class InputSums:
    """Over the rows x that reached a layer.

    Attributes:
        gram: (d,d), Σxxᵀ, float32 or float64, as ``LayerStatistics`` was told.
        total: (d,), Σx, likewise.
        count: rows.

    Examples:
        >>> import torch
        >>> from onestep.layerwise import LayerStatistics
        >>> statistics = LayerStatistics(torch.nn.Sequential(torch.nn.Linear(2, 3)))
        >>> statistics.update(torch.ones(4, 2))["0"].total
        tensor([4., 4.])
    """

    gram: Tensor
    total: Tensor
    count: int

    def plus(self, other: InputSums, storage: Storage) -> InputSums:
        """The sums over both, in new matrices.

        Args:
            other: of the same features and dtype, on any device.
            storage: where the sum is kept, in memory or in a file.

        Returns:
            The sums over the rows of both.

        Raises:
            RuntimeError: the two are of different numbers of features (torch's own).
        """
        total = self.total + other.total.to(self.total.device)
        return InputSums(storage.add(self.gram, other.gram), total, self.count + other.count)


@dataclass(frozen=True)
class TargetSums:
    """Over the rows x that reached a layer and the teacher's outputs t for them.

    Attributes:
        cross: (d,k), Σxtᵀ.
        total: (k,), Σt.
        square: (), Σ‖t‖².
        whole: None; where the sums are not of t but of what the layer lacks of it, t − Wx − b: Σ‖t‖².
    """

    cross: Tensor
    total: Tensor
    square: Tensor
    whole: Tensor | None = None

    def plus(self, other: TargetSums, storage: Storage) -> TargetSums:
        """The sums over both."""
        device = self.total.device
        cross, total = storage.add(self.cross, other.cross), self.total + other.total.to(device)
        whole = None if self.whole is None or other.whole is None else self.whole + other.whole.to(device)
        return TargetSums(cross, total, self.square + other.square.to(device), whole)
