"""Checks of operands, and how the native kernels get them: as addresses and strides.

Checks of shape, dtype and device are made on every device and on fakes. Checks of values read them, for which a GPU
would have to be waited for: ``reads_values`` is False there, and a kernel reports bad values by ``info``, or by NaN
where the op has no ``info``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Address, strides, and the tensor, which keeps the memory while the kernel runs.
Operand = tuple[int, tuple[int, ...], Tensor]

# torch does not list it as exported.
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

# csrc/base/operand.hpp, kMaxBatchDims
MOST_BATCH_DIMS = 8
# csrc/base/operand.hpp, Element
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}

# The dtypes of most kernels.
FLOATING = (torch.float32, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is float32 or float64."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected torch.float32 or torch.float64")


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raises unless the tensor has the dtype (TypeError) and the device (ValueError) of the first operand."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {like.dtype}, like the other operands")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on device {tensor.device}; expected {like.device}, like the other operands")


def check_dense(name: str, value: object, like: Tensor | None = None) -> None:
    """Raises unless ``value`` is a dense tensor (TypeError, ValueError) on the device of ``like`` (ValueError).

    An op says by itself if there is no kernel for the device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; expected torch.Tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}; expected a dense (torch.strided) tensor")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on device {value.device}; expected {like.device}, like the other operands")


def check_dims(name: str, tensor: Tensor, least: int, meaning: str) -> None:
    """Raises ValueError if the tensor has fewer dimensions than its matrix part."""
    if tensor.dim() < least:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {meaning}")


def check_size(name: str, tensor: Tensor, dim: int, size: Any, meaning: str) -> None:
    """Raises ValueError unless one dimension, counted from the last (-1), has the given size."""
    if tensor.dim() < -dim or tensor.shape[dim] != size:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {meaning}")


def broadcast_batch(names: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The broadcast batch shape; ValueError names the operands and all shapes if there is none."""
    first = shapes[0]
    for shape in shapes:
        if shape != first:
            break
    else:
        return first
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        listed = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{names}: batch dimensions do not broadcast: got {listed}") from None


def operand(tensor: Tensor, batch: tuple[int, ...], own: int) -> Operand:
    """Address and strides of a tensor broadcast to the batch shape, read in place."""
    if not batch and tensor.dim() == own:
        return tensor.data_ptr(), tensor.stride(), tensor
    shape = tensor.shape
    cut = len(shape) - own
    if shape[:cut] != batch:
        tensor = tensor.expand((*batch, *shape[cut:]))
    if len(batch) > MOST_BATCH_DIMS:
        # The one case that copies: more batch dimensions than the kernels address.
        tensor = tensor.reshape((*kernel_batch(batch), *shape[cut:]))
    return tensor.data_ptr(), tensor.stride(), tensor


def kernel_batch(batch: tuple[int, ...]) -> tuple[int, ...]:
    """The batch shape as the kernels see it; see ``operand``."""
    if len(batch) <= MOST_BATCH_DIMS:
        return batch
    count = 1
    for size in batch:
        count *= size
    return (count,)


def empty_factor(like: Tensor, batch: tuple[int, ...], order: int) -> Tensor:
    """Memory for lower factors L (…,order,order), column-major as LAPACK's: the kernels write U = Lᵀ row-major."""
    strides = [order * order] * len(batch)
    for dim in range(len(batch) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(batch[dim + 1], 1)
    return like.new_empty_strided((*batch, order, order), (*strides, 1, order))


def empty_info(like: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Memory for the problems' statuses."""
    # Sizes as arguments of their own take half a microsecond less than a tuple; there may be none.
    return like.new_empty(*batch, dtype=torch.int32) if batch else like.new_empty((), dtype=torch.int32)


def optional_operand(tensor: Tensor | None, batch: tuple[int, ...], own: int) -> Operand | None:
    """``operand``, or None for None."""
    return None if tensor is None else operand(tensor, batch, own)


def reads_values(tensor: Tensor) -> bool:
    """Whether values are checked before the kernel runs: on the CPU alone, since a GPU would have to be waited for."""
    return tensor.is_cpu


def check_not_negative(name: str, tensor: Tensor | None) -> None:
    """Raises ValueError if a CPU tensor has a negative value; see ``reads_values``.

    For CUDA implementations in emulation and compositions: the CPU kernels check by themselves.
    """
    # By numpy, since torch's own reductions hang in a forked child.
    if tensor is not None and reads_values(tensor) and (tensor.detach().numpy() < 0).any():
        raise ValueError(f"{name} has negative values; expected values >= 0")


def any_failed(info: Tensor) -> bool:
    """Whether any problem's status is not 0; waits for a GPU."""
    if not info.is_cpu:
        info = info.cpu()
    # By numpy, since torch's own ``any`` hangs in a forked child.
    return bool(info.item() if info.numel() == 1 else info.numpy().any())


def describe_failures(info: Tensor, what: str) -> str:
    """How many of the batch failed, and where the first few are."""
    failed = info.nonzero()
    places = [tuple(index) for index in failed[:3].tolist()]
    shown = ", ".join(
        f"{list(place)}: info={info[place].item()}" if place else f"info={info.item()}" for place in places
    )
    more = ", ..." if len(failed) > len(places) else ""
    return f"{len(failed)} of {info.numel()} {what} could not be solved ({shown}{more})"
