"""Whether a function as loss is a mean over rows, as it must be where rows are computed in chunks."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from onestep._torch_private import tree_leaves, tree_map_only
from onestep.evaluation.losses import Loss, rows_of

# Outputs and target.
Rows: TypeAlias = tuple[Tensor, Any]

# Values of a loss over all rows and over parts of them agree to this many ε.
_SAME_ROUNDINGS = 1000
_REMEDY = (
    "For class weights or an ignored class pass torch's own: nn.CrossEntropyLoss(weight=..., ignore_index=...) or a "
    "functools.partial of F.cross_entropy; otherwise a function that divides by the number of rows alone"
)
# So many rows of a chunk are kept, to be compared together with those of the next.
_KEPT = 64


class RowMeans:
    """Looks at one chunk of rows after another and raises if the loss over some of them is not the mean over parts.

    Chunks of rows would be weighted by their rows where the function weights them otherwise: by the weights of their
    classes, by how many of them are not ignored, or not at all. Each chunk is cut in two in several places, and rows of
    it are put together with rows of the chunk before, since chunks may each have one class alone. All is done with
    outputs of random size too: where a model gives the same for all rows, as one of zeros, all weights give one mean.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self._before: Rows | None = None

    def add(self, outputs: Tensor, target: Any) -> None:
        """Compares the loss of a chunk's rows with that of parts of them and, with some, of the chunk before.

        Raises:
            ValueError: with what the function gave, and the remedy.
        """
        rows = rows_of(outputs, target)
        if self.loss.name != "function" or rows == 0 or len(outputs) % rows or not outputs.is_floating_point():
            return
        cuts = sorted({1, rows // 3 or 1, rows // 2} if rows > 1 else ())
        chunk = outputs.detach(), target
        some = _part(chunk, 0, min(rows, _KEPT))
        together = None if self._before is None else _joined(self._before, some)
        with torch.no_grad():
            self._compare(chunk, cuts)
            if self._before is not None and together is not None:
                self._compare(together, [rows_of(*self._before)])
        self._before = _part(chunk, max(0, rows - _KEPT), rows)

    def _compare(self, rows: Rows, cuts: list[int]) -> None:
        """Raises unless the loss is the mean over its two parts at every cut, as it is and with noise."""
        self._compare_parts(rows, cuts, "")
        # On the CPU: a GPU that is given a probability of 2 by a kernel's assertion is lost to the process.
        outputs, target = tree_map_only(Tensor, lambda t: t.cpu(), rows)
        noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
        noisy = outputs + noise.to(outputs.dtype).mul_(outputs.square().mean().sqrt().clamp_min_(1.0))
        self._compare_parts((noisy, target), cuts, " of random outputs")

    def _compare_parts(self, rows: Rows, cuts: list[int], of: str) -> None:
        n = rows_of(*rows)
        close = _SAME_ROUNDINGS * torch.finfo(rows[0].dtype).eps
        whole = self._sum_of(rows) if cuts else None
        if whole is not None and math.isnan(whole) and _are_labels_of_finite_scores(rows):
            raise ValueError(
                f"loss is nan over {n} rows{of}, whose outputs are finite; expected a mean over rows, which is a "
                f"number also where all of their labels are ignored. {_REMEDY}"
            )
        if whole is None or not math.isfinite(whole):
            return
        for cut in cuts:
            first, second = self._sum_of(_part(rows, 0, cut)), self._sum_of(_part(rows, cut, n))
            if first is None or second is None:
                continue
            # A part without a loss, NaN, where the whole has one, is no part of a mean.
            if not abs(whole - (first + second)) <= close * max(abs(whole), abs(first), abs(second)):
                raise ValueError(
                    f"loss is {whole / n:.6g} over {n} rows{of} and {(first + second) / n:.6g} as the mean of its "
                    f"values over the first {cut} and the others; expected a mean over rows, since rows are computed "
                    f"in chunks. {_REMEDY}"
                )

    def _sum_of(self, rows: Rows) -> float | None:
        """The loss times the rows; None where it raises, as of some numbers of rows, or of noise.

        Where it has to be taken, the error will be seen.
        """
        try:
            return self.loss.sum(*rows).item()
        except Exception:
            return None


def _are_labels_of_finite_scores(rows: Rows) -> bool:
    outputs, target = rows
    leaves = [leaf for leaf in tree_leaves(target) if isinstance(leaf, Tensor)]
    return bool(leaves) and not any(leaf.is_floating_point() for leaf in leaves) and bool(outputs.isfinite().all())


def _part(rows: Rows, begin: int, end: int) -> Rows:
    """Some rows. A row's outputs, of which there may be several, follow each other where a model flattens them."""
    outputs, target = rows
    each = len(outputs) // rows_of(*rows)
    return outputs[begin * each : end * each], tree_map_only(Tensor, lambda t: t[begin:end] if t.dim() else t, target)


def _joined(before: Rows, after: Rows) -> Rows | None:
    """Rows of two chunks as one; None where their shapes do not allow it."""
    first, second = (
        [leaf for leaf in tree_leaves(rows) if isinstance(leaf, Tensor) and leaf.dim() > 0] for rows in (before, after)
    )
    if [leaf.shape[1:] for leaf in first] != [leaf.shape[1:] for leaf in second]:
        return None
    both = iter([torch.cat(pair) for pair in zip(first, second, strict=True)])
    joined: Rows = tree_map_only(Tensor, lambda leaf: next(both) if leaf.dim() > 0 else leaf, after)
    return joined
