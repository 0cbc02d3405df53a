"""Vectors that an operator multiplies, in all their forms, as a block (p,k)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from onestep.evaluation.parameters import ParameterVector


def as_block(v: Any, name: str, names: list[str], parameters: ParameterVector) -> Tensor:
    """v as (p,k): (p,) and (p,k) tensors, or a dict of tensors by the parameters' names.

    Raises:
        ValueError, TypeError: ``v``, which the message calls ``name``, is none of these.
    """
    p = len(parameters)
    if isinstance(v, Tensor):
        if v.dim() not in (1, 2) or len(v) != p:
            raise ValueError(f"{name} has shape {tuple(v.shape)}; expected ({p},) or ({p}, k)")
        _check_kind(v, name, parameters)
        block = v.detach().reshape(p, -1 if v.dim() == 1 else v.shape[1])
    elif isinstance(v, Mapping):
        block = _block_of_mapping(v, name, names, parameters)
    else:
        raise TypeError(f"{name} is {type(v).__name__}; expected a tensor or a dict of tensors")
    if not all_finite(block):
        raise ValueError(f"{name} holds NaN or infinity; expected finite numbers")
    return block


def _block_of_mapping(v: Mapping[str, Any], name: str, names: list[str], parameters: ParameterVector) -> Tensor:
    if v.keys() != set(names):
        differing = ", ".join(sorted(map(str, v.keys() ^ set(names))))
        raise ValueError(f"{name} and the model's trainable parameters hold different names: {differing}")
    columns = _columns(v[names[0]], parameters.tensors[0])
    parts = []
    for key, parameter in zip(names, parameters.tensors, strict=True):
        part = v[key]
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}[{key!r}] is {type(part).__name__}; expected a tensor")
        _check_kind(part, f"{name}[{key!r}]", parameters)
        shape = tuple(parameter.shape)
        if tuple(part.shape) != shape + columns:
            if part.dim() == len(shape) + 1 and tuple(part.shape[1:]) == shape:
                raise ValueError(
                    f"{name}[{key!r}] has shape {tuple(part.shape)}; expected {(*shape, part.shape[0])}: vectors "
                    "of a block are its last dimension, here they seem to be the first. Use movedim(0, -1)"
                )
            others = f"{shape + columns} as the first" if columns else f"{shape} or {(*shape, 'k')}"
            raise ValueError(f"{name}[{key!r}] has shape {tuple(part.shape)}; expected {others}")
        parts.append(part.detach().reshape(parameter.numel(), *(columns or (1,))))
    return torch.cat(parts)


def _check_kind(v: Tensor, name: str, parameters: ParameterVector) -> None:
    if v.dtype != parameters.dtype or v.device != parameters.device:
        raise ValueError(f"{name} is {v.dtype} on {v.device}; expected {parameters.dtype} on {parameters.device}")


def like(v: Any, block: Tensor, names: list[str], parameters: ParameterVector) -> Any:
    """(p,k) in the form of v."""
    if isinstance(v, Tensor):
        return block.reshape(v.shape)
    parts = block.split(parameters.sizes)
    return {name: part.reshape(v[name].shape) for name, part in zip(names, parts, strict=True)}


def _columns(part: Any, parameter: Tensor) -> tuple[int, ...]:
    """(k,) for a block, () for a vector."""
    blocked = isinstance(part, Tensor) and part.dim() == parameter.dim() + 1
    return (part.shape[-1],) if blocked else ()


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity, told by the sum wherever that is finite, which is one pass."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
