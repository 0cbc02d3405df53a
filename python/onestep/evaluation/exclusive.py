"""One lock for what only one thread of a process can do at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from onestep._fork import one_thread_after_fork

_lock = threading.RLock()
_forked = False


def exclusive() -> AbstractContextManager[object]:
    """Waits until no other thread is inside, and keeps others out. A thread that is inside may enter again.

    torch's forward mode counts its levels per process, not per thread: two threads inside ``torch.func.jvp`` get each
    other's tangents. ``torch.func.functional_call`` puts other parameters into a module that threads may share, and an
    epoch of a shuffling DataLoader is drawn from the process's random numbers. One lock serves all three, since with
    several of them two threads could wait for each other. It is held for one chunk of rows at a time.
    """
    # The lock itself: an interrupt finds no gap between it and the ``with`` statement.
    return _on_one_thread() if _forked else _lock


@contextmanager
def _on_one_thread() -> Iterator[None]:
    with _lock, one_thread_after_fork():
        yield


def _renew() -> None:
    """A forked child has only the thread that forked, which does not release what other threads held."""
    global _lock, _forked
    _lock, _forked = threading.RLock(), True


os.register_at_fork(after_in_child=_renew)
