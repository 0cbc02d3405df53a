"""numpy arrays and data frames as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from onestep._torch_private import tree_map_only


def from_numpy(data: Any, like: Tensor) -> Any:
    """Tuples, lists and dicts with a tensor for each numpy array or data frame in them; everything else as it is.

    Numbers with a fractional part get the dtype of ``like``, which is a model's parameter: numpy's default is float64,
    torch's float32. Integers stay integers, since they are classes or indices, and booleans booleans. Memory is shared
    where the dtype is the same.

    Raises:
        TypeError: an array or a data frame holds something else than real numbers.
    """

    def convert(leaf: Any) -> Tensor:
        array = leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf.to_numpy())
        if array.dtype.kind not in "fiub":
            what = "numpy array" if array is leaf else type(leaf).__name__
            hint = "" if array is leaf else ": astype(float) its columns, and make 0 and 1 of categories"
            raise TypeError(f"data holds a {what} of dtype {array.dtype}; expected real numbers{hint}")
        # torch has no negative strides, no read-only memory and few operations on unsigned integers.
        kind = array.dtype.newbyteorder("=") if array.dtype.kind in "fb" else np.dtype(np.int64)
        if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
            raise TypeError(f"data holds a numpy array of {array.dtype} with values beyond int64")
        plain = np.require(array, dtype=kind, requirements=["C", "W"])
        tensor = torch.from_numpy(plain)
        return tensor.to(like.dtype) if tensor.is_floating_point() else tensor

    # Frames and series of pandas and polars have to_numpy.
    return tree_map_only(lambda leaf: isinstance(leaf, np.ndarray) or hasattr(leaf, "to_numpy"), convert, data)
