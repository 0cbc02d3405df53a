"""Class labels and their numbers."""

from __future__ import annotations

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from onestep.estimators._arrays import Array

# Integer labels in a range of at most so many values are counted instead of sorted.
_COUNTED_RANGE = 1 << 16


def encode_labels(y: Array) -> tuple[Array, Array]:
    """The sorted classes, and the class of each row as an index (n,) int64. ValueError if y is no vector of labels."""
    labels = column_or_1d(y, warn=True)
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
