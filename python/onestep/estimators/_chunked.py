"""Points of generalised linear models on rows that their kernels do not read, such as float16: a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from onestep.curvature import GLMPoint, glm
from onestep.linalg.narrow import row_chunks, rows_of_chunk, widened_chunks
from onestep.ops.glm import FAMILIES, glm_point, glm_product
from onestep.ops.glm.schema import COMPUTE_DTYPES


def point_of(
    X: Tensor, y: Tensor, W: Tensor, family: str, *, weight: Tensor | None, intercept: bool
) -> GLMPoint | ChunkedPoint:
    """``glm`` of X in place where it reads X's type, else the same in chunks that are converted."""
    if X.dtype in COMPUTE_DTYPES:
        return glm(X, y, W, family, weight=weight, intercept=intercept)
    return ChunkedPoint(X, y, W, family, weight, intercept)


class ChunkedPoint:
    """What solvers ask of a ``GLMPoint``: loss, grad, products and curvature, each in a pass over X by chunks."""

    def __init__(self, X: Tensor, y: Tensor, W: Tensor, family: str, weight: Tensor | None, intercept: bool) -> None:
        self._X, self._weight, self._family, self._intercept = X, weight, FAMILIES[family], intercept
        self._matrix = W[:, None] if W.dim() == 1 else W
        targets = y[:, None] if y.dim() == 1 else y
        loss, total = torch.zeros((), dtype=torch.float64), torch.zeros(self._matrix.shape, dtype=torch.float64)
        # A row for each chunk; a point's curvature is longer than its rows by a few elements.
        kept: Tensor | None = None
        for rows, x in self._chunks():
            part, grad, curvature = glm_point(x, targets[rows], self._matrix, self._of(rows), self._family, intercept)
            loss, total = loss + part, total + grad
            if kept is None:
                kept = curvature.new_empty(-(-len(X) // len(x)), len(curvature))
            kept[rows.start // rows_of_chunk(X.shape[1]), : len(curvature)] = curvature
        assert kept is not None
        self._curvatures, self._slack = kept, len(curvature) - self._matrix.shape[1] * len(x)
        self.loss, self.grad = loss, total.reshape(W.shape)

    def hvp(self, V: Tensor) -> Tensor:
        """XᵀC(XV), V in the shape of W."""
        total = torch.zeros(self._matrix.shape, dtype=torch.float64)
        block = V.reshape(1, *self._matrix.shape)
        for (rows, x), kept in zip(self._chunks(), self._curvatures, strict=True):
            curvature = kept[: len(x) * self._matrix.shape[1] + self._slack]
            total += glm_product(block, x, self._matrix, self._of(rows), curvature, self._family, self._intercept)[0]
        return total.reshape(V.shape)

    def output_curvature(self) -> Tensor:
        """wℓ″, or P for softmax (n, k)."""
        n, k = len(self._X), self._matrix.shape[1]
        result = self._curvatures.new_empty(n, k)
        for rows, kept in zip(row_chunks(*self._X.shape), self._curvatures, strict=True):
            result[rows] = kept[: (rows.stop - rows.start) * k].view(-1, k)
        return result

    def diagonal_curvature(self) -> Tensor:
        """∂²loss/∂η² of each row and output with itself (n, k)."""
        curvature = self.output_curvature()
        if self._family == FAMILIES["softmax"]:
            curvature = curvature * (1 - curvature)
            if self._weight is not None:
                curvature = curvature * self._weight[:, None]
        return curvature

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        return widened_chunks(self._X)

    def _of(self, rows: slice) -> Tensor | None:
        return None if self._weight is None else self._weight[rows]


class CentredPoint(ChunkedPoint):
    """The same of the rows X - shift in float64; y, W and weight are float64."""

    def __init__(
        self, X: Tensor, y: Tensor, W: Tensor, family: str, weight: Tensor | None, shift: Tensor, *, intercept: bool
    ) -> None:
        self._shift = shift
        super().__init__(X, y, W, family, weight, intercept)

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in row_chunks(*self._X.shape):
            x = self._X[rows].to(torch.float64, copy=True).sub_(self._shift)
            if self._weight is not None:
                # Rows of no weight may hold anything.
                x[self._weight[rows] == 0] = 0.0
            yield rows, x
