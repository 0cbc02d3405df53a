"""Products with a scipy.sparse matrix and with its transpose, by our own kernel, which uses all threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep.ops.sparse import sparse_multiply


@dataclass(frozen=True)
class Rows:
    """A sparse matrix by rows (CSR): ``values`` and the columns that they are in, row r's from ``offsets[r]`` on."""

    offsets: Tensor
    indices: Tensor
    values: Tensor

    @staticmethod
    def of(X: Any) -> Rows:
        """The arrays of a scipy.sparse CSR matrix, in place."""
        # scipy allows indices and offsets of unlike types.
        wide = X.indptr.dtype != np.int32 or X.indices.dtype != np.int32
        kind = np.int64 if wide else np.int32
        offsets, indices = (array.astype(kind, copy=False) for array in (X.indptr, X.indices))
        # torch warns of arrays that may not be written to, such as maps of files.
        arrays = (a if a.flags.writeable else a.copy() for a in (offsets, indices, X.data))
        return Rows(*map(torch.from_numpy, arrays))

    def part(self, rows: slice) -> Rows:
        """Some of the rows, without a copy."""
        return Rows(self.offsets[rows.start : rows.stop + 1], self.indices, self.values)

    def multiply(self, V: np.ndarray) -> np.ndarray:
        """XV (n, k) or (n,) for V (d, k) or (d,)."""
        right = torch.from_numpy(V).to(self.values.dtype)
        found = sparse_multiply(self.offsets, self.indices, self.values, right if right.dim() == 2 else right[:, None])
        product: np.ndarray = (found if right.dim() == 2 else found[:, 0]).numpy()
        return product


@dataclass(frozen=True)
class SparseProducts:
    """XV and XᵀZ for X (n, d) in CSR form, float32 or float64, in that type and the same for any number of threads.

    A row of the result is summed by one thread, in the order of X's elements. XᵀZ takes a copy of X by columns, made
    when it is first asked for: reading rows of Z, it is many times faster than adding to rows of the result.

    Attributes:
        X: scipy.sparse CSR.
        chunk: rows that are computed together, or None for all.
    """

    X: Any
    chunk: int | None = None

    @cached_property
    def _rows(self) -> Rows:
        return Rows.of(self.X)

    @cached_property
    def chunks(self) -> list[slice]:
        """The chunks of rows."""
        n = int(self.X.shape[0])
        step = self.chunk or max(n, 1)
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]

    @cached_property
    def _columns(self) -> list[Rows] | None:
        """Xᵀ of each chunk by rows; None where their offsets would take more memory than the elements."""
        offsets = len(self.chunks) * (self.X.shape[1] + 1) * self.X.indptr.itemsize
        if len(self.chunks) > 1 and offsets > self.X.nnz * (self.X.data.itemsize + self.X.indices.itemsize):
            return None
        return [Rows.of((self.X[rows] if len(self.chunks) > 1 else self.X).T.tocsr()) for rows in self.chunks]

    def multiply(self, V: np.ndarray, number: int = 0) -> np.ndarray:
        """XV (n, k) for V (d, k), or (n,) for (d,): of the chunk of this number."""
        return self._rows.part(self.chunks[number]).multiply(V)

    def transposed_multiply(self, Z: np.ndarray, number: int = 0) -> np.ndarray:
        """XᵀZ (d, k) for Z (n, k), or (d,) for (n,): of the chunk of this number."""
        if self._columns is None:
            product: np.ndarray = self.X[self.chunks[number]].T @ Z
            return product
        return self._columns[number].multiply(Z)
