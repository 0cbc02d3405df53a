"""torch.func.jvp beside other threads that use torch's forward mode, which knows nothing of threads.

torch has one level of forward mode for the whole process. The outermost ``jvp``, whichever thread it is in, opens it;
those that run meanwhile share it; where the first one ends, it is closed and the tangents of all are dropped. Results
are wrong then, or there is an error. Our own threads take turns (``evaluation.exclusive``), but a user's ``jvp`` does
not know of that (decision 0191). So:

- We open the level ourselves, around our calls, and close it when nobody else uses it. While somebody does it stays
  open, which lets them finish; a thread that waits for them closes it.
- Where somebody else has opened it, we wait a little for them to end, and raise ``BusyError``: callers take reverse
  mode twice.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from onestep._torch_private import (
    TransformType,
    close_level,
    forget_levels,
    interpreter_stack,
    open_level,
    recount_levels,
    tree_map,
)

# How long to wait for others to leave forward mode: several products of a small model.
_PATIENCE_SECONDS = 0.02
# How often it is looked whether they have.
_POLL_SECONDS = 0.001

# Held by who uses the level for us.
_region = threading.RLock()
_closer: threading.Thread | None = None


class BusyError(RuntimeError):
    """Another thread is inside torch's forward mode."""


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """``torch.func.jvp``, right beside another thread's, with tangents of the outputs' dtype.

    Forward mode makes a float64 tangent of a float32 tensor of shape () times a Python float (torch 2.13).

    Raises:
        BusyError: another thread's has begun first and does not end soon.
    """
    outputs, pushed = _alone(lambda: torch.func.jvp(function, primals, tangents))
    return outputs, tree_map(lambda tangent, output: tangent.to(output.dtype), pushed, outputs)


def jacfwd(function: Callable[..., Any], point: Any) -> Any:
    """``torch.func.jacfwd(function)(point)``, likewise."""
    return _alone(lambda: torch.func.jacfwd(function)(point))


def _alone(compute: Callable[[], Any]) -> Any:
    if _own_levels() > 0:
        return compute()  # inside another jvp of this thread, which has the level and outlives us
    with _region:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not open_level():
            if time.monotonic() > deadline:
                raise BusyError("another thread is inside torch's forward mode (torch.func.jvp)")
            time.sleep(_POLL_SECONDS)
        try:
            return compute()
        finally:
            _leave()


def _own_levels() -> int:
    """How many jvp this thread is in."""
    return sum(level.key() == TransformType.Jvp for level in interpreter_stack() or ())


def _leave() -> None:
    global _closer
    if not close_level() and _closer is None:
        _closer = threading.Thread(target=_close_later, name="onestep-forward-mode", daemon=True)
        _closer.start()


def _close_later() -> None:
    global _closer
    while True:
        time.sleep(_POLL_SECONDS)
        if _region.acquire(blocking=False):
            try:
                if close_level():
                    _closer = None
                    return
            finally:
                _region.release()


def settle(interrupt: BaseException) -> None:
    """Counts again after an interrupt, which may have come while torch counted that a jvp begins or ends.

    A level that the interrupted call opened and nobody uses is closed.
    """
    if _own_levels() == 0:
        with _region:  # Another thread of ours may be about to use the level.
            recount_levels(interrupt)
            _leave()


def _renew() -> None:
    """A forked child has only the thread that forked: others are in no jvp any more."""
    global _region, _closer
    _region, _closer = threading.RLock(), None
    if _own_levels() == 0:
        forget_levels()


os.register_at_fork(after_in_child=_renew)
