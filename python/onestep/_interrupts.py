"""What torch keeps for a thread, put back after an interrupt that torch's own context managers did not see."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from onestep import _forward_mode
from onestep._fork import entering, leaving, one_thread_after_fork
from onestep._torch_private import (
    forward_grad_enabled,
    function_modes,
    pop_function_mode,
    pop_transforms,
    set_forward_grad_enabled,
    set_grad_enabled,
    transform_depth,
)

Function = TypeVar("Function", bound=Callable[..., Any])


class TorchState:
    """Whether gradients are recorded, the torch function modes and the torch.func transforms of this thread.

    ``with torch.no_grad()`` and its like are written in Python: where a Ctrl-C comes at the first instruction of their
    __exit__, gradients stay off. Models are put back by onestep._restored.
    """

    def __init__(self) -> None:
        self.grad, self.forward = torch.is_grad_enabled(), forward_grad_enabled()
        self.modes, self.depth = function_modes(), transform_depth()

    def restore(self, error: BaseException) -> None:
        """Makes it as it was, after an error that left the code since."""
        if (interrupt := interrupt_behind(error)) is not None:
            # Contexts that are generators, as those of torch.func, end with the frames that hold them. Whoever keeps
            # the traceback, as an interactive session does, would keep them open.
            traceback.clear_frames(interrupt.__traceback__)
            traceback.clear_frames(error.__traceback__)
        if transform_depth() > self.depth:
            pop_transforms(self.depth)
        while function_modes() > self.modes:
            pop_function_mode()
        set_grad_enabled(self.grad)
        set_forward_grad_enabled(self.forward)
        if interrupt is not None:
            _forward_mode.settle(interrupt)


def interrupt_behind(error: BaseException) -> BaseException | None:
    """The error if it is a KeyboardInterrupt or the like, or one that came up while such a one was handled."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and isinstance(found, Exception) and id(found) not in seen:
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None if found is None or isinstance(found, Exception) else found


def undisturbed(function: Function) -> Function:
    """A function after whose errors torch's state of the thread is as before, wherever an interrupt came.

    It is also ``safe_after_fork``: both in one frame, for the warnings that count frames.

    torch.func's own contexts fail where they do not find the level that they entered; the interrupt behind such an
    error is raised in its place.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        state = TorchState()
        try:
            with one_thread_after_fork():
                args, kwargs = entering(args, kwargs)
                return leaving(function(*args, **kwargs))
        except BaseException as error:
            state.restore(error)
            interrupt = interrupt_behind(error)
            if interrupt is None or interrupt is error:
                raise
        raise interrupt

    return cast(Function, call)
