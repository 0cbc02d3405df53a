"""What the public functions accept, brought to what the ops take."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

from onestep._torch_private import forward_level, transforms_active
from onestep.ops.operands import check_dense

_HALF = (torch.bfloat16, torch.float16)
_READ = (torch.float32, torch.float64)


def floating(name: str, value: Tensor, like: Tensor | None = None) -> Tensor:
    """The tensor itself, in float32 if it was bfloat16 or float16; raises if the kernels cannot read it.

    ``like`` is the first operand, on whose device this one must be.
    """
    plain = type(value) is Tensor and value.dtype in _READ and value.layout is torch.strided
    if plain and value.is_cpu and (like is None or like.is_cpu):
        return value
    check_dense(name, value, like)
    if value.dtype in _HALF:
        return value.float()
    if value.dtype not in _READ:
        raise TypeError(f"{name} has dtype {value.dtype}; expected float32, float64, bfloat16 or float16")
    return value


def features(X: object) -> Tensor:
    """The rows X (…,n,d) as the kernels of the normal equations read them: bfloat16 and float16 as they are."""
    if isinstance(X, Tensor) and X.dtype in _HALF:
        check_dense("X", X)
        return X
    return floating("X", X)  # type: ignore[arg-type]


def result_dtype(X: Tensor) -> torch.dtype:
    """The dtype of everything but X, and of the results."""
    return torch.float32 if X.dtype in _HALF else X.dtype


def as_columns(name: str, value: Tensor, matrix: Tensor, rows: int) -> tuple[Tensor, bool]:
    """Right-hand sides (…,rows,k), and whether they came as vectors (…,rows).

    As in torch.linalg.solve, ``value`` is a batch of vectors if it has one dimension, or the shape of ``matrix`` less
    its columns; otherwise it is a batch of matrices.
    """
    dims = value.dim()
    if dims >= matrix.dim():
        return value, False
    if dims == 0:
        raise ValueError(f"{name} has shape (); expected (..., {rows}, k) or (..., {rows})")
    is_vector = dims == 1 or (dims == matrix.dim() - 1 and value.shape == matrix.shape[:-1])
    return (value.unsqueeze(-1), True) if is_vector else (value, False)


def ridge_per_feature(ridge: Tensor, X: Tensor, batch: torch.Size) -> Tensor:
    """The penalty as (…,d), with stride 0 where it repeats.

    It is a scalar (), one penalty per problem (the batch shape, or (…,1)), or one per feature (…,d).
    """
    d = X.shape[-1]
    penalty = floating("ridge", ridge, X).to(result_dtype(X))
    if penalty.dim() == 0:
        return penalty.expand(d)
    per_feature = penalty.shape[-1] in (1, d) and _broadcasts(penalty.shape[:-1], batch)
    if penalty.shape == batch:
        if per_feature and penalty.shape[-1] == d > 1:
            raise ValueError(
                f"ridge has shape {tuple(ridge.shape)}, which may mean one penalty per problem or one per feature: "
                "pass ridge.unsqueeze(-1) for the first, ridge.unsqueeze(0) for the second"
            )
        penalty = penalty.unsqueeze(-1)
    elif not per_feature:
        raise ValueError(
            f"ridge has shape {tuple(ridge.shape)}; expected (), the batch shape {tuple(batch)}, (..., 1) or (..., {d})"
        )
    return penalty.expand(*penalty.shape[:-1], d)


def _broadcasts(*shapes: torch.Size) -> bool:
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return True


def number(name: str, value: object, least: float, most: float, meaning: str) -> float:
    """A real number from [least, most]; raises TypeError or ValueError otherwise, NaN included."""
    if type(value) is float and least <= value <= most:
        return value
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {type(value).__name__}; expected {meaning}")
    result = float(value)
    if not least <= result <= most:
        raise ValueError(f"{name}={value}; expected {meaning}")
    return result


def steps(name: str, value: object) -> int:
    """A number of steps, from 0 to 1000."""
    if type(value) is int and 0 <= value <= 1000:
        return value
    meaning = "an integer from 0 to 1000"
    if not isinstance(value, Integral):
        raise TypeError(f"{name} is {type(value).__name__}; expected {meaning}")
    if not 0 <= int(value) <= 1000:
        raise ValueError(f"{name}={value}; expected {meaning}")
    return int(value)


def values_are_known(tensor: Tensor) -> bool:
    """Whether the tensor's values may decide the path: on the CPU, and not while tracing or inside a transform."""
    return not (not tensor.is_cpu or torch.compiler.is_compiling() or transforms_active() or forward_level() >= 0)
