"""What the random calls of fuzz.py share: how a call is judged, and tensors of any shape, strides and dtype."""

from __future__ import annotations

import contextlib
import faulthandler
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

from onestep.optim import NonFiniteError

# A call that runs longer hangs: the sizes are small.
# A first call may import pandas or torch's compiler, on a machine that others use.
SECONDS_PER_CALL = 120
# NonFiniteError is what fit and the operators promise for rows with NaN, naming the row.
ALLOWED = (ValueError, TypeError, torch.linalg.LinAlgError, np.linalg.LinAlgError, NotImplementedError, MemoryError)
ALLOWED += (NonFiniteError,)
SIZES = (0, 1, 2, 3, 5, 8, 9, 16, 17, 33)
FLOATS = (torch.float32, torch.float64)
OTHER_DTYPES = (torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool, torch.complex64)

# A function, its arguments, and words by which its errors may name what is wrong, beside the arguments' names.
Call = tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]


class ForeignError(AssertionError):
    """An error that a user cannot act on."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises in a call that does not end; faulthandler shows where a call that cannot be interrupted is."""

    def stop(*_: object) -> None:
        raise ForeignError(f"no answer after {SECONDS_PER_CALL} s")

    faulthandler.dump_traceback_later(2 * SECONDS_PER_CALL, exit=True)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_PER_CALL)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def attempt(function: Callable[..., Any], arguments: dict[str, Any], names: tuple[str, ...] = ()) -> Any:
    """Calls the function; an error must be one of ALLOWED and name an argument."""
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(**arguments)
    except ALLOWED as error:
        known = {*arguments, *names}
        if not isinstance(error, MemoryError) and not any(re.search(rf"\b{name}\b", str(error)) for name in known):
            raise ForeignError(f"{type(error).__name__} names no argument of {sorted(known)}: {error}") from error
    except ForeignError:
        raise
    except Exception as error:
        raise ForeignError(f"{type(error).__name__}: {error}") from error
    return None


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], *, positive: bool = False, classes: int | None = None) -> torch.Tensor:
    """A tensor of this shape, one time in eight of another one or of a dtype that is not taken; of any strides."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    odd = draw(st.integers(0, 15))
    if odd == 0:
        shape = tuple(draw(st.lists(st.sampled_from(SIZES), max_size=4)))
    dtype = draw(st.sampled_from(OTHER_DTYPES)) if odd == 1 else draw(st.sampled_from(FLOATS))
    layout = draw(st.sampled_from(("contiguous", "transposed", "sliced", "expanded")))
    if layout == "expanded" and shape:
        values = torch.randn(*shape[:-1], 1, generator=generator, dtype=torch.float64).expand(shape)
    elif layout == "transposed" and len(shape) >= 2:
        values = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator, dtype=torch.float64).mT
    elif layout == "sliced" and shape:
        values = torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=generator, dtype=torch.float64)[..., 1::2]
    else:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if classes is not None and odd != 1:
        return torch.randint(-1 if odd == 2 else 0, max(classes, 1) + (odd == 3), shape, generator=generator)
    if positive and odd != 4:
        values = values.abs()
    if odd == 5 and values.numel():
        values = values.contiguous().clone()
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = draw(
            st.sampled_from((float("nan"), float("inf"), 1e300, -1e300))
        )
    if odd == 6:
        values = values * 1e-30
    return values.to(dtype)


def maybe(draw: Any, strategy: Any) -> Any:
    return draw(strategy) if draw(st.booleans()) else None


def same_dtype(draw: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Seven times in eight all floating tensors get one dtype."""
    if draw(st.integers(0, 7)):
        dtype = draw(st.sampled_from((*FLOATS, torch.bfloat16)))
        arguments = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in arguments.items()
        }
    return arguments


@st.composite
def sizes(draw: Any) -> tuple[tuple[int, ...], int, int, int]:
    """Batch, n, d, k."""
    batch = tuple(draw(st.lists(st.sampled_from((0, 1, 2, 3)), max_size=2)))
    return batch, *(draw(st.sampled_from(SIZES)) for _ in range(3))


def array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
