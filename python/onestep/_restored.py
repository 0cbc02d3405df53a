"""Changes of a user's model for the time of a ``with`` block, which are put back whatever interrupts it.

Python handles signals between bytecodes: a Ctrl-C may come before the first line of an ``__exit__``, or after the last
one of an ``__enter__``, and what is written in Python then leaves the model changed. These context managers change and
put back in compiled code (csrc/bindings/restored.cpp), in which no interrupt comes. Use them in a ``with`` statement
alone, not through ``contextlib``, whose own steps are Python's.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from torch import nn

from onestep import _native
from onestep._torch_private import hook_tables

# A mapping, a key of it, and the value that it gets.
Entry: TypeAlias = tuple[MutableMapping[Any, Any], Any, Any]

_numbers = itertools.count()


def replaced(entries: Iterable[Entry]) -> AbstractContextManager[None]:
    """mapping[key] is value for each (mapping, key, value) in here."""
    return _native.Replaced(list(entries))


def hooks(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]], *, before: bool = False) -> list[Entry]:
    """What ``replaced`` takes for ``hooked``."""
    entries: list[Entry] = []
    for layer, hook in pairs:
        key = ("onestep", next(_numbers))
        called, with_kwargs = hook_tables(layer, before=before)
        # A hook that is there without its mark would be called with other arguments.
        entries += [(with_kwargs, key, True), (called, key, hook)]
    return entries


def hooked(
    pairs: Iterable[tuple[nn.Module, Callable[..., Any]]], *, before: bool = False
) -> AbstractContextManager[None]:
    """For each (layer, hook), hook(layer, args, kwargs, output) is called after the layer, or hook(layer, args, kwargs)
    before it.

    As by ``register_forward_hook`` and ``register_forward_pre_hook`` of torch.nn.Module, with_kwargs=True.
    """
    return replaced(hooks(pairs, before=before))


def eval_mode(*models: nn.Module) -> AbstractContextManager[None]:
    """All modules in eval mode, and afterwards in the modes that they had; the last thread that leaves puts them back.

    What ``model.eval()`` would do besides, where a class overrides it, is not done.
    """
    return _native.EvalMode([module for model in models for module in model.modules()])


def own_modes(model: nn.Module) -> AbstractContextManager[None]:
    """Inside ``eval_mode``: all modules in the modes that they had before, for a step that drops and learns."""
    return _native.OwnMode(list(model.modules()))


os.register_at_fork(after_in_child=_native.release_other_threads)
