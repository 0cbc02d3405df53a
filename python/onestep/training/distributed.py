"""Sums over the processes of torch.distributed, in which a failure anywhere is an error everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from onestep.training.data import Share


def share() -> Share:
    """This process's place; (0, 1) where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return Share(dist.get_rank(), dist.get_world_size())
    return Share()


def summed(compute: Callable[[], tuple[Tensor, list[float]]]) -> tuple[Tensor, list[float]]:
    """The sums over all processes of compute(), a tensor and some numbers.

    If it raises in one process, that process raises its error and all others a RuntimeError, instead of waiting for it.
    """
    if share().size == 1:
        return compute()
    error: Exception | None = None
    tensor = torch.empty(0)
    numbers: list[float] = []
    try:
        tensor, numbers = compute()
    except Exception as caught:
        error = caught
    failures = torch.tensor(float(error is not None), dtype=torch.float64)
    _collective(dist.all_reduce, failures)
    if error is not None:
        raise error
    if failures:
        raise RuntimeError(f"onestep.fit: {int(failures)} of {share().size} processes failed; see their errors")
    values = torch.tensor(numbers, dtype=torch.float64)
    _collective(dist.all_reduce, values)
    if tensor.numel():
        tensor = tensor.contiguous()
        _collective(dist.all_reduce, tensor)
    return tensor, values.tolist()


def same_everywhere(tensors: list[Tensor]) -> None:
    """Gives every process the first one's values."""
    if share().size > 1:
        for tensor in tensors:
            _collective(dist.broadcast, tensor, 0)


def _collective(operation: Callable[..., Any], *arguments: Any) -> None:
    try:
        operation(*arguments)
    except RuntimeError as error:
        raise RuntimeError("onestep.fit: lost the connection to another process, which has probably died") from error
