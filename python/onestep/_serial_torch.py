"""Torch's loops on the calling thread alone, beside onestep's kernels, which share theirs between threads as always."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from onestep import _native

_state = threading.local()
# Up to so many numbers torch's loops take less than a millisecond; to wait for a thread costs several (0305).
_FEW = 1 << 19
# On one thread the eigendecomposition of so many rows takes about a millisecond, of twice as many about six (0321).
_SMALL_MATRIX = 128


def _function(library: str, name: str) -> Callable[[int], int] | None:
    """A C function int → int of a library that torch has loaded already, or None."""
    try:
        function = getattr(ctypes.CDLL(library, mode=os.RTLD_NOLOAD), name)
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
    found: Callable[[int], int] = function
    return found


# Both set a number for the calling thread only: OpenMP's, and MKL's, which goes before OpenMP's and is 0 if not set.
set_openmp_threads = _function("libgomp.so.1", "omp_set_num_threads")
_set_mkl = _function("libtorch_cpu.so", "MKL_Set_Num_Threads_Local")


@contextmanager
def serial_torch() -> Iterator[None]:
    """Torch and MKL compute on the calling thread in here; onestep's kernels use as many threads as outside.

    For code that calls our kernels and, between them, short operations of torch. A parallel region of torch's ends in
    OpenMP's barrier, and OpenMP's threads spin for milliseconds after it on the core that our helper wants: where
    another process has one of the cores, this costs far more than such an operation gains by two threads (decision
    0181). Nothing but the calling thread's own settings is changed. Without MKL or libgomp nothing happens.
    """
    if set_openmp_threads is None or _set_mkl is None or getattr(_state, "inside", False):
        yield
        return
    # Asking comes first: it also sets OpenMP's number in a thread that has not used torch before.
    threads = torch.get_num_threads()
    before = 0
    try:
        _state.inside = True
        _native.set_own_thread_count(threads)
        set_openmp_threads(1)
        before = _set_mkl(1)
        yield
    finally:
        # One within the other, so that an interrupt between two of them does not keep the rest from being undone.
        try:
            set_openmp_threads(threads)
        finally:
            try:
                _set_mkl(before)
            finally:
                try:
                    _native.set_own_thread_count(0)
                finally:
                    _state.inside = False


def serial_for(numbers: int) -> AbstractContextManager[None]:
    """``serial_torch`` around an operation on so many numbers, if they are few, such as a sum of two tensors.

    For operations whose bits do not depend on the number of threads: each number of the result is made by itself.
    """
    return serial_torch() if numbers <= _FEW else nullcontext()


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` of one matrix A (n,n), on the calling thread where it is small.

    MKL opens eight parallel regions for one of 64 rows, and more for larger ones, for a quarter of a millisecond in
    all. From 51 rows on its last bits depend on the number of threads: here they do only beyond 128.
    """
    with serial_torch() if len(A) <= _SMALL_MATRIX else nullcontext():
        values, vectors = torch.linalg.eigh(A)
    return values, vectors
