"""torch.distributed as evaluation and linalg use it: a place, and collectives that say what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


def initialised() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def place(group: Any = None) -> tuple[int, int]:
    """This process's number in the group, -1 if it is not in it, and the group's size; (0, 1) without a group."""
    return (dist.get_rank(group), dist.get_world_size(group)) if initialised() else (0, 1)


def collective(operation: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Calls an operation that all processes take part in; RuntimeError says so if one of them does not answer."""
    try:
        operation(*arguments, **options)
    except RuntimeError as error:
        raise RuntimeError("onestep: lost the connection to another process, which has probably died") from error


def add_up(*tensors: Tensor, group: Any = None) -> None:
    """Each tensor becomes its sum over the processes of a group."""
    for tensor in tensors:
        if tensor.numel():
            collective(dist.all_reduce, tensor, group=group)
