"""Torch and BLAS in a forked child: on one thread, since a pool of OpenMP's threads does not survive a fork.

Also in backward passes through what our functions made, which the user starts: ``entering`` and ``leaving`` mark
where they come in and go out.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from onestep._serial_torch import set_openmp_threads
from onestep._torch_private import after_backward_pass, backward_pass, tree_map_only

Function = TypeVar("Function", bound=Callable[..., Any])

_forked = False
_lock = threading.Lock()
_inside = 0
_threads = 1
# The backward passes that are on one thread until they end.
_passes: set[int] = set()


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
    """In a forked child the function is on one thread, and so are backward passes through it; elsewhere 0.1 µs more."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _forked:
            return function(*args, **kwargs)
        with one_thread_after_fork():
            args, kwargs = entering(args, kwargs)
            return leaving(function(*args, **kwargs))

    return cast(Function, call)


def entering(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A function's arguments, of which a backward pass knows in a forked child that it leaves the function by them.

    Backward passes of every order between ``entering`` and ``leaving`` are on one thread there. The user starts them,
    but they run what the function made of torch's operations: conversions of 16-bit tensors, sums over what was
    broadcast and, in the second order, all that the formula of a derivative consists of.
    """
    if not _records():
        return args, kwargs
    # Once for each tensor: torch's attention asks whether query, key and value are one.
    views: dict[int, Tensor] = {}

    def view(value: Tensor) -> Tensor:
        if id(value) not in views:
            views[id(value)] = _entered(value)
        return views[id(value)]

    return tree_map_only((Tensor, Parameter), view, (args, kwargs))  # type: ignore[no-any-return]


def leaving(result: Any) -> Any:
    """A function's result, by which a backward pass comes in."""
    return tree_map_only(Tensor, _left, result) if _records() else result


def _records() -> bool:
    return _forked and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _entered(value: Tensor) -> Tensor:
    """An argument as a view: where a backward pass leaves the function, the next order's will come in."""
    plain = type(value) in (Tensor, Parameter) and value.layout is torch.strided and value.device.type == "cpu"
    if not (plain and value.requires_grad):
        return value
    view = value.view_as(value)
    if view.grad_fn is not None:
        view.grad_fn.register_hook(_after_node)
    return view


def _left(value: Tensor) -> Tensor:
    """A result: a backward pass comes in at the node that made it."""
    if value.grad_fn is not None:
        value.grad_fn.register_prehook(_before_node)
    return value


def _before_node(cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """Torch is on one thread from here to the end of the backward pass, wherever that leads."""
    number = backward_pass()
    if number not in _passes:
        context = _one_thread_in_pass(number)
        context.__enter__()
        # Nothing else holds the context: where the pass fails, torch drops what it should have called, which ends it.
        after_backward_pass(lambda: _end(context))
    if not torch.is_grad_enabled():
        return None
    return tuple(None if cotangent is None else _entered(cotangent) for cotangent in cotangents)


def _end(context: AbstractContextManager[None]) -> None:
    context.__exit__(None, None, None)


def _after_node(gradients: tuple[Tensor | None, ...], cotangents: tuple[Tensor | None, ...]) -> None:
    for gradient in gradients:
        if gradient is not None:
            _left(gradient)


@contextmanager
def _one_thread_in_pass(number: int) -> Iterator[None]:
    _passes.add(number)
    try:
        with one_thread_after_fork():
            yield
    finally:
        _passes.discard(number)


def _mark() -> None:
    """Runs in the child, which has only the thread that forked: nobody is inside, and the lock is free."""
    global _forked, _lock, _inside
    _forked, _lock = True, threading.Lock()
    _passes.clear()
    if _inside:
        _inside = 0
        torch.set_num_threads(_threads)


os.register_at_fork(after_in_child=_mark)
