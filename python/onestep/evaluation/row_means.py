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
        # A row's outputs follow each other where a model flattens them.
        each = len(outputs) // rows
        outputs = outputs.detach()

        def part(begin: int, end: int) -> Rows:
            return outputs[begin * each : end * each], tree_map_only(Tensor, lambda t: t[begin:end], target)

        with torch.no_grad():
            for cut in sorted({1, rows // 3 or 1, rows // 2} if rows > 1 else ()):
                self._compare((outputs, target), part(0, cut), part(cut, rows))
            some = part(0, min(rows, _KEPT))
            together = None if self._before is None else _joined(self._before, some)
            if self._before is not None and together is not None:
                self._compare(together, self._before, some)
        self._before = part(max(0, rows - _KEPT), rows)

    def _compare(self, whole: Rows, first: Rows, second: Rows) -> None:
        """Raises unless the loss of the whole is the mean over its two parts, as it is and with noise."""
        self._compare_sums("", whole, first, second)
        # On the CPU: a GPU that is given a probability of 2 by a kernel's assertion is lost to the process.
        (outputs, target), (some, of_some), (_, of_others) = tree_map_only(
            Tensor, lambda t: t.cpu(), (whole, first, second)
        )
        noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
        noisy = outputs + noise.to(outputs.dtype).mul_(outputs.square().mean().sqrt().clamp_min_(1.0))
        cut = len(some)
        self._compare_sums(" of random outputs", (noisy, target), (noisy[:cut], of_some), (noisy[cut:], of_others))

    def _compare_sums(self, of: str, *parts: Rows) -> None:
        """Compares the losses of a whole and its two parts, times their rows."""
        try:
            whole, first, second = (self.loss.sum(*part).item() for part in parts)
        except Exception:
            # It cannot be taken of any rows, or of noise; where it has to be taken, the error will be seen.
            return
        close = _SAME_ROUNDINGS * torch.finfo(parts[0][0].dtype).eps
        # A part without a loss, NaN, where the whole has one, is no part of a mean.
        same = abs(whole - (first + second)) <= close * max(abs(whole), abs(first), abs(second))
        if same or not math.isfinite(whole):
            return
        rows, cut = rows_of(*parts[0]), rows_of(*parts[1])
        raise ValueError(
            f"loss is {whole / rows:.6g} over {rows} rows{of} and {(first + second) / rows:.6g} as the mean of its "
            f"values over the first {cut} and the others; expected a mean over rows, since rows are computed in "
            "chunks. For class weights or an ignored class pass torch's own: nn.CrossEntropyLoss(weight=..., "
            "ignore_index=...) or a functools.partial of F.cross_entropy; otherwise a function that divides by the "
            "number of rows alone"
        )


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
