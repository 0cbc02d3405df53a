"""Arrays of other libraries, by DLPack: in as tensors over the same memory, out as what the caller gave."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from onestep._fork import safe_after_fork

P = ParamSpec("P")
R = TypeVar("R")


def takes_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function of tensors take the CPU's arrays of NumPy, JAX, TensorFlow and others; results are of their kind.

    Lists of arrays are taken where the function takes lists of tensors. Without a copy, both ways; arrays with negative
    strides, and numpy arrays that are read-only, of another byte order or fields of records, are copied. Results of a
    kind that knows DLPack but not the array API standard are numpy arrays. Derivatives are torch's alone: other
    libraries see values. Arrays and tensors cannot be mixed. Calls with tensors pass straight through. In a forked
    child torch's conversions, such as those of 16-bit tensors, are on one thread.
    """

    @safe_after_fork
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
            result: Any = mapped(back, function(*inputs, **named))
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
    try:
        # torch 2.13 ends the process at a negative stride.
        return from_dlpack(_forwards(value))
    except BufferError:
        native = getattr(getattr(value, "dtype", None), "newbyteorder", None)
        if native is None:
            raise
        # numpy's, of another byte order or a field of records: a copy has neither.
        return from_dlpack(value.astype(native("=")))


def _forwards(value: Any) -> Any:
    """The array, or a copy of one that runs backwards along a dimension."""
    view = value
    if not isinstance(getattr(value, "strides", None), tuple):
        try:
            view = numpy.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError):
            # Of a type that numpy has not. torch says what is wrong with it, if anything is.
            return value
    return view.copy() if any(stride < 0 for stride in view.strides) else value


def giver(like: Any) -> Callable[[Tensor], Any]:
    """What makes of a tensor an array of the same library as ``like``; of one that does not say how, a numpy array.

    It can be pickled.
    """
    package = type(like).__module__.partition(".")[0]
    if package == "tensorflow":
        return _as_tensorflow
    if package in ("jax", "jaxlib"):
        return _as_jax
    if package == "numpy" or not hasattr(like, "__array_namespace__"):
        # numpy.from_dlpack would make an array that cannot be written into.
        return Tensor.numpy
    namespace = like.__array_namespace__()
    return functools.partial(_of_namespace, namespace.__name__ if isinstance(namespace, ModuleType) else namespace)


def _as_tensorflow(tensor: Tensor) -> Any:
    return import_module("tensorflow").experimental.dlpack.from_dlpack(tensor.contiguous().__dlpack__())


def _as_jax(tensor: Tensor) -> Any:
    # JAX takes no strides but those of rows first.
    return import_module("jax.numpy").from_dlpack(tensor.contiguous())


def _of_namespace(namespace: Any, tensor: Tensor) -> Any:
    """By the array API standard; ``namespace`` is a module's name or an object."""
    return (import_module(namespace) if isinstance(namespace, str) else namespace).from_dlpack(tensor)


def mapped(give: Callable[[Tensor], Any], result: Any) -> Any:
    """A result with its tensors as ``give`` makes them: a tensor, a list, or a tuple of some, which may have names."""
    if isinstance(result, Tensor):
        return give(result)
    if isinstance(result, list):
        return [mapped(give, part) for part in result]
    if isinstance(result, tuple):
        parts = [mapped(give, part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result
