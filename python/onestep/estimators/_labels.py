"""Class labels and their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from onestep.estimators._arrays import Array

# Integer labels in a range of at most so many values are counted instead of sorted.
_COUNTED_RANGE = 1 << 16


def encode_labels(y: Array) -> tuple[Array, Array]:
    """The sorted classes, and the class of each row as an index (n,) int64. ValueError if y is no vector of labels."""
    labels = column_or_1d(y, warn=True)
    # torch and the kernels know this machine's byte order alone.
    labels = labels.astype(labels.dtype.newbyteorder("="), copy=False)
    if labels.dtype.kind in "iub" and labels.size > 0:
        least = int(labels.min())
        if int(labels.max()) - least < _COUNTED_RANGE:
            # Unsigned labels above 2⁶³ are in no signed type; differences of small signed ones are not in their own.
            wide = np.dtype(np.uint64 if labels.dtype.kind == "u" else np.int64).type
            offsets = np.subtract(labels, wide(least), dtype=wide, casting="unsafe").astype(np.int64, copy=False)
            present = np.bincount(offsets) > 0
            classes = (np.flatnonzero(present).astype(wide) + wide(least)).astype(labels.dtype)
            return classes, offsets if present.all() else (np.cumsum(present) - 1)[offsets]
    else:
        check_classification_targets(labels)
    classes, indices = np.unique(labels, return_inverse=True)
    return classes, indices.astype(np.int64, copy=False)


def check_balanced(class_weight: Any, classes: Array, indices: Array, weight: Tensor | None) -> None:
    """Raises where ``class_weight="balanced"`` has a class without weight: no factor gives it its share."""
    if not (isinstance(class_weight, str) and class_weight == "balanced") or weight is None:
        return
    counted = np.bincount(indices, weight.numpy(), len(classes))
    if not counted.all():
        raise ValueError(
            "class_weight='balanced' gives every class the same weight, and sample_weight is zero in all rows of class "
            f"{classes[counted == 0].tolist()[0]!r}: leave them out, or pass a dict of weights"
        )
