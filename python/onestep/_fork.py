"""Torch and BLAS in a forked child: on one thread, since a pool of OpenMP's threads does not survive a fork."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

from onestep._serial_torch import set_openmp_threads

Function = TypeVar("Function", bound=Callable[..., Any])

_forked = False
_lock = threading.Lock()
_inside = 0
_threads = 1


@contextmanager
def one_thread_after_fork() -> Iterator[None]:
    """In a forked child torch and MKL compute on one thread in here; elsewhere nothing happens. Also a decorator.

    libgomp, which torch and MKL share, keeps its pool of threads over a fork, and the first parallel region in the
    child waits for threads that only the parent has. A region of one thread does not ask the pool. Our own kernels are
    serial in a forked child anyway (csrc/base/parallel.cpp).
    """
    global _inside, _threads
    if not _forked:
        yield
        return
    # OpenMP keeps the number for each Python thread, so each sets and restores its own.
    own = torch.get_num_threads()
    with _lock:
        if _inside == 0:
            _threads = own
        _inside += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_threads)
            if set_openmp_threads is not None:
                set_openmp_threads(own)


def safe_after_fork(function: Function) -> Function:
    """The same as the decorator ``one_thread_after_fork()``, for what is called often: elsewhere it costs 0.1 µs."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _forked:
            return function(*args, **kwargs)
        with one_thread_after_fork():
            return function(*args, **kwargs)

    return cast(Function, call)


def _mark() -> None:
    """Runs in the child, which has only the thread that forked: nobody is inside, and the lock is free."""
    global _forked, _lock, _inside
    _forked, _lock = True, threading.Lock()
    if _inside:
        _inside = 0
        torch.set_num_threads(_threads)


os.register_at_fork(after_in_child=_mark)
