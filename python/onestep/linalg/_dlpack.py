"""Arrays of other libraries, by DLPack: in as tensors over the same memory, out as what the caller gave."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

P = ParamSpec("P")
R = TypeVar("R")


def takes_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function of tensors take the CPU's arrays of NumPy, JAX, TensorFlow and others; results are of their kind.

    Lists of arrays are taken where the function takes lists of tensors. Without a copy, both ways; numpy arrays that
    are read-only are copied. Derivatives are torch's alone: other libraries see values. Arrays and tensors cannot be
    mixed. Calls with tensors pass straight through.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if args and isinstance(args[0], Tensor):
            return function(*args, **kwargs)
        values = [part for value in (*args, *kwargs.values()) for part in _parts(value)]
        arrays = [value for value in values if is_foreign(value)]
        if len({type(value) for value in arrays}) != 1 or any(isinstance(value, Tensor) for value in values):
            # None, or mixed with tensors, which the function refuses.
            return function(*args, **kwargs)
        back = giver(arrays[0])
        inputs: Any = [as_tensor(value) for value in args]
        named: Any = {name: as_tensor(value) for name, value in kwargs.items()}
        with torch.no_grad():
            result: Any = _map(back, function(*inputs, **named))
        return result  # type: ignore[no-any-return]

    return wrapped


def _parts(value: Any) -> Sequence[Any]:
    """What a list holds, or the value alone."""
    return value if isinstance(value, (list, tuple)) else (value,)


def is_foreign(value: Any) -> bool:
    """Whether a value is an array of another library."""
    return hasattr(value, "__dlpack__") and not isinstance(value, Tensor)


def as_tensor(value: Any) -> Any:
    """An array of another library as a tensor over its memory, a list of them as a list; anything else as it is.

    Raises:
        ValueError: it is not on the CPU. BufferError, TypeError: it has a type or a layout that DLPack has not.
    """
    if isinstance(value, (list, tuple)) and any(is_foreign(part) for part in value):
        return [as_tensor(part) for part in value]
    if not is_foreign(value):
        return value
    if value.__dlpack_device__()[0] != 1:
        raise ValueError(f"an array of {type(value).__module__} is not in the CPU's memory; expected one that is")
    flags = getattr(value, "flags", None)
    if getattr(flags, "writeable", True) is False and hasattr(value, "copy"):
        value = value.copy()
    return from_dlpack(value)


def giver(like: Any) -> Callable[[Tensor], Any]:
    """What makes of a tensor an array of the same library as ``like``."""
    package = type(like).__module__.partition(".")[0]
    if package == "tensorflow":
        dlpack = sys.modules["tensorflow"].experimental.dlpack
        return lambda tensor: dlpack.from_dlpack(tensor.contiguous().__dlpack__())
    if package in ("jax", "jaxlib"):
        # JAX takes no strides but those of rows first.
        numpy = sys.modules["jax"].numpy
        return lambda tensor: numpy.from_dlpack(tensor.contiguous())
    if not hasattr(like, "__array_namespace__"):
        raise TypeError(f"{type(like).__module__}.{type(like).__name__} does not say how to make one from DLPack")
    namespace = like.__array_namespace__()
    return lambda tensor: namespace.from_dlpack(tensor)


def _map(give: Callable[[Tensor], Any], result: Any) -> Any:
    """The tensors of a result, which may be a list, or a tuple with names."""
    if isinstance(result, Tensor):
        return give(result)
    if isinstance(result, list):
        return [_map(give, part) for part in result]
    if isinstance(result, tuple):
        parts = [_map(give, part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result
