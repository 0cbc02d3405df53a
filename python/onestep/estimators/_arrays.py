"""Arrays of numpy, torch and others over the same memory, and the checks of what estimators are given."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from sklearn.model_selection import check_cv
from sklearn.utils import assert_all_finite
from sklearn.utils.validation import check_array
from torch import Tensor

from onestep.linalg.dlpack import as_tensor, giver, is_foreign
from onestep.linalg.narrow import widened_chunks

Array = npt.NDArray[Any]

# What X may be without conversion; anything else becomes the first, as in scikit-learn.
FLOATS = (np.float64, np.float32)


class _WritableAlias:
    """The memory of a read-only array, declared writable: torch warns of any that is not, and nothing here writes."""

    def __init__(self, array: Array) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._owner = array


def from_other(name: str, value: Any) -> Any:
    """An array of JAX, TensorFlow or another library that knows DLPack as a tensor over its memory; others as is."""
    if isinstance(value, (Tensor, np.ndarray)) or not is_foreign(value):
        return value
    try:
        return as_tensor(value)
    except (BufferError, TypeError, RuntimeError) as error:
        # Of a type that DLPack has not, such as text.
        if hasattr(value, "__array__"):
            return np.asarray(value)
        raise TypeError(f"{name} is {type(value).__name__}, which DLPack cannot read: {error}") from error


def to_numpy(name: str, value: Any) -> Any:
    """A tensor, or what ``from_other`` makes one of, as a numpy view of its memory; anything else as it came.

    Tensors are detached, and 16-bit floats become fp32.
    """
    value = from_other(name, value)
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cpu":
        raise ValueError(f"{name} is on device '{value.device}'; expected a CPU tensor: pass {name}.cpu()")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}; expected a dense tensor: pass {name}.to_dense()")
    value = value.detach().resolve_conj().resolve_neg()
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    return value.numpy()


def is_stored(X: Any) -> bool:
    """Whether X is read as it is stored, in chunks: 16-bit floats, and integers in a file (numpy.memmap)."""
    if isinstance(X, Tensor):
        return X.dtype in (torch.bfloat16, torch.float16) and X.layout == torch.strided and X.device.type == "cpu"
    kinds = "iub" if isinstance(X, np.memmap) else ""
    return isinstance(X, np.ndarray) and X.dtype.isnative and (X.dtype == np.float16 or X.dtype.kind in kinds)


def stored_array(X: Any) -> Array:
    """X as numpy for the checks of its shape; of bfloat16, which numpy lacks, the bits."""
    if not isinstance(X, Tensor):
        return np.asarray(X)
    X = X.detach()
    array: Array = (X.view(torch.int16) if X.dtype == torch.bfloat16 else X).numpy()
    return array


def to_tensor(array: Array) -> Tensor:
    """A tensor over `array`'s memory, of any strides and even if read-only; only negative strides force a copy."""
    if any(stride < 0 or stride % array.itemsize for stride in array.strides) or not array.flags.aligned:
        return torch.from_numpy(np.array(array, order="C"))
    if not array.flags.writeable:
        array = np.asarray(_WritableAlias(array))
    return torch.from_numpy(array)


def as_array(value: Tensor) -> Any:
    """A numpy array, or a numpy scalar if it has no dimensions."""
    return value.numpy()[()]


def giver_of(like: Any) -> Callable[[Tensor], Any]:
    """What makes results of tensors for a caller who works with arrays such as ``like``: of the same library."""
    if isinstance(like, Tensor):
        return lambda value: value
    return giver(like) if is_foreign(like) and not isinstance(like, np.ndarray) else as_array


def give_labels(labels: Array, like: Any) -> Any:
    """Labels as ``like``'s library has them; text, which it may not have, as numpy has it."""
    return giver_of(like)(torch.from_numpy(labels)) if labels.dtype.kind in "biuf" else labels


def sparse_operand(X: Any) -> Any:
    """X itself, but a torch tensor in CSR or CSC form as a scipy matrix over its memory."""
    if isinstance(X, Tensor) and X.layout in (torch.sparse_csr, torch.sparse_csc) and X.device.type == "cpu":
        X = X.detach()
        rows_first = X.layout == torch.sparse_csr
        outer, inner = (X.crow_indices(), X.col_indices()) if rows_first else (X.ccol_indices(), X.row_indices())
        values = X.values().float() if X.dtype in (torch.bfloat16, torch.float16) else X.values()
        shape = tuple(X.shape) if rows_first else tuple(X.shape)[::-1]
        matrix = csr_array((values.numpy(), inner.numpy(), outer.numpy()), shape=shape)
        X = matrix if rows_first else matrix.T
    return X


def check_finite(X: Tensor) -> None:
    """ValueError that says what X holds, if that is not finite; in chunks."""
    for _, chunk in widened_chunks(X):
        assert_all_finite(chunk.numpy(), input_name="X")


def rows_for_splitter(X: Tensor) -> Array:
    """X (n, d) as splitters of scikit-learn take it; zeros of no memory where numpy lacks its type."""
    zeros = np.broadcast_to(np.float32(0), tuple(X.shape))
    return zeros if X.dtype == torch.bfloat16 else X.numpy()


def splits_of(cv: Any, X: Tensor, y: Array, *, classifier: bool) -> Iterator[tuple[Array, Array]]:
    """The rows of each fold, (train, test), of scikit-learn's ``cv``; an error names it."""
    expected = "a number of folds from 2, a splitter, or pairs of row numbers (train, test)"
    if isinstance(cv, (bool, dict, Tensor)):
        raise TypeError(f"cv is {cv!r}; expected {expected}")
    count = 0
    try:
        for train, test in check_cv(cv, y, classifier=classifier).split(rows_for_splitter(X), y):
            count += 1
            yield train, test
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"cv={cv!r}: {error}; expected {expected}") from error
    if count == 0:
        raise ValueError(f"cv={cv!r} has no folds; expected {expected}")


def check_alphas(name: str, value: Any, *, positive: bool) -> Array:
    """A penalty or several as fp64 of at most one dimension, each finite and >= 0, or > 0 if `positive`."""
    wanted = "positive" if positive else "non-negative"
    try:
        alphas = np.asarray(to_numpy(name, value))
        if alphas.dtype.kind not in "iuf":
            raise TypeError(alphas.dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a {wanted} number or a list of them, got {value!r}") from error
    if alphas.ndim > 1 or alphas.size == 0:
        raise ValueError(f"{name} must be a number or a non-empty 1-D list, got an array of shape {alphas.shape}")
    if not np.all(np.isfinite(alphas)) or np.any(alphas < 0) or (positive and np.any(alphas == 0)):
        raise ValueError(f"{name} must be {wanted} and finite, got {value!r}")
    return alphas.astype(np.float64)


def check_flag(name: str, value: Any) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_weight(sample_weight: Any, n: int, dtype: Any) -> Array:
    """Weights (n,) of `dtype` from a number or an array (n,): finite, none negative, at least one positive."""
    weight = to_numpy("sample_weight", sample_weight)
    if isinstance(weight, numbers.Number) or getattr(weight, "ndim", 1) == 0:
        weight = np.full(n, weight)
    try:
        weight = check_array(weight, ensure_2d=False, dtype=dtype, input_name="sample_weight")
    except (TypeError, ValueError) as error:
        if "sample_weight" in str(error):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"sample_weight is {sample_weight!r}; expected numbers of 0 or more ({error})") from error
    if weight.shape != (n,):
        raise ValueError(f"sample_weight has shape {weight.shape}; expected a number or shape ({n},)")
    if np.any(weight < 0):
        raise ValueError(f"sample_weight must not be negative, got {weight.min()}")
    if not np.any(weight):
        raise ValueError("sample_weight is zero for every row; at least one must be positive")
    result: Array = weight
    return result
