"""Schemas of the language-model head's ops: operands' checks, results' shapes.

Two kernels close the family under every composition of order two. ``linear_cross_entropy`` gives the losses, their
weighted sum and that sum's gradient; ``linear_cross_entropy_tangent`` the tangents of all of these. The gradient of a
function of the gradient is, since the Hessian is symmetric, the second kernel along the cotangents. Formulas in
csrc/lmhead/lmhead.hpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onestep.ops._cuda import runs_on_cuda
from onestep.ops._library import define
from onestep.ops.operands import check_like, reads_values

# value, losses, and the gradients of input, weight and bias, empty where they are not wanted.
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# The dtypes of input and weight that the kernels read, and what they compute in.
COMPUTE_DTYPES = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}
# What the CUDA kernels read beside these.
CUDA_DTYPES = {torch.float16: torch.float32}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in for an input of this dtype."""
    return (COMPUTE_DTYPES | CUDA_DTYPES).get(dtype, dtype)


def _check_shape(name: str, tensor: Tensor, shape: Sequence[Any], meaning: str) -> None:
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}: {meaning}")


def check_operands(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises unless shapes, dtypes and devices of what the scores are made of fit together."""
    if input.dtype not in COMPUTE_DTYPES and not (runs_on_cuda(input) and input.dtype in CUDA_DTYPES):
        raise TypeError(
            f"input has dtype {input.dtype}; expected torch.float32, torch.float64 or torch.bfloat16, "
            "or on a GPU torch.float16"
        )
    if input.dim() < 1:
        raise ValueError("input has shape (); expected (..., D)")
    check_like("weight", weight, input)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (V, D) with V > 0")
    classes, features = weight.shape
    _check_shape("input", input, (*input.shape[:-1], features), "as many features as weight")
    if bias is not None:
        check_like("bias", bias, input)
        _check_shape("bias", bias, (classes,), "one per row of weight")


def check(row_weight: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    """Raises unless shapes, dtypes and devices of the operands fit together."""
    check_operands(input, weight, bias)
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; expected class indices, torch.int64")
    if target.device != input.device:
        raise ValueError(f"target is on device {target.device}; expected {input.device}, like input")
    _check_shape("target", target, input.shape[:-1], "input's without the features")
    _check_row_weight("row_weight", row_weight, input)


def _check_row_weight(name: str, row_weight: Tensor, input: Tensor) -> None:
    expected = accumulation_dtype(input.dtype)
    if row_weight.dtype != expected:
        raise TypeError(f"{name} has dtype {row_weight.dtype}; expected {expected}")
    _check_shape(name, row_weight, input.shape[:-1], "one per row of input")


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises ValueError if a target is no class; on a GPU nothing is read, and the row's loss is NaN."""
    if not reads_values(target):
        return
    # By numpy, since torch's own reductions hang in a forked child.
    values = target.numpy()
    outside = ((values < 0) | (values >= classes)) & (values != ignore_index)
    if outside.any():
        raise ValueError(
            f"target holds {values[outside][0]}; expected classes from 0 to {classes - 1}, "
            f"or ignore_index = {ignore_index}"
        )


def empty_results(
    input: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool], dtype: torch.dtype
) -> Results:
    accumulated = accumulation_dtype(input.dtype)
    gradients = [
        input.new_empty(like.shape if like is not None and wants else (0,), dtype=dtype)
        for like, wants in zip((input, weight, bias), wanted, strict=True)
    ]
    losses = input.new_empty(input.shape[:-1], dtype=accumulated)
    return input.new_empty((), dtype=accumulated), losses, gradients[0], gradients[1], gradients[2]


# ------------------------------------------------------------------------------------------------ linear_cross_entropy


def head_results(
    row_weight: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    wanted: Sequence[bool],
) -> Results:
    check(row_weight, input, weight, bias, target)
    return empty_results(input, weight, bias, wanted, input.dtype)


linear_cross_entropy = define(
    "linear_cross_entropy(Tensor row_weight, Tensor input, Tensor weight, Tensor? bias, Tensor target, "
    "int ignore_index, float label_smoothing, bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=head_results,
)


# ----------------------------------------------------------------------------------------- linear_cross_entropy_tangent


class TangentArguments(NamedTuple):
    """What linear_cross_entropy_tangent gets. A tangent that is None is zero."""

    row_weight: Tensor
    row_weight_tangent: Tensor | None
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    input_tangent: Tensor | None
    weight_tangent: Tensor | None
    bias_tangent: Tensor | None
    ignore_index: int
    label_smoothing: float
    gauss_newton: bool
    wanted: Sequence[bool]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.input, self.weight, self.bias

    @property
    def tangents(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.input_tangent, self.weight_tangent, self.bias_tangent

    def check(self) -> None:
        """Raises unless shapes, dtypes and devices of all tensors fit together."""
        check(self.row_weight, *self.operands, self.target)
        if self.row_weight_tangent is not None:
            _check_row_weight("row_weight_tangent", self.row_weight_tangent, self.input)
        for name, tangent, of in zip(("input", "weight", "bias"), self.tangents, self.operands, strict=True):
            if tangent is None:
                continue
            if of is None:
                raise ValueError(f"{name}_tangent is given, but {name} is None")
            check_like(f"{name}_tangent", tangent, self.input)
            _check_shape(f"{name}_tangent", tangent, of.shape, f"as {name}")


def tangent_results(*args: Any) -> Results:
    given = TangentArguments(*args)
    given.check()
    return empty_results(*given.operands, given.wanted, given.input.dtype)


linear_cross_entropy_tangent = define(
    "linear_cross_entropy_tangent(Tensor row_weight, Tensor? row_weight_tangent, Tensor input, Tensor weight, "
    "Tensor? bias, Tensor target, Tensor? input_tangent, Tensor? weight_tangent, Tensor? bias_tangent, "
    "int ignore_index, float label_smoothing, bool gauss_newton, bool[3] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=tangent_results,
)
