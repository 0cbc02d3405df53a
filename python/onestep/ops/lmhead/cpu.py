"""CPU kernels of the language-model head: allocate the results and call csrc/lmhead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import register
from onestep.ops.lmhead import schema
from onestep.ops.operands import kernel_batch, operand, optional_operand

_KERNELS: dict[torch.dtype, Callable[..., None]] = {
    torch.float32: _native.linear_cross_entropy_f32,
    torch.float64: _native.linear_cross_entropy_f64,
    torch.bfloat16: _native.linear_cross_entropy_bf16,
}


def _run(given: schema.TangentArguments, tangent: bool) -> schema.Results:
    """The gradient, or with ``tangent`` its tangent."""
    input, weight, bias = given.operands
    target, row_weight, wanted = given.target, given.row_weight, given.wanted
    classes, features = weight.shape
    schema.check_targets(target, classes, given.ignore_index)
    rows = tuple(target.shape)
    out = schema.empty_results(input, weight, bias, wanted, row_weight.dtype)
    addresses = [
        gradient.data_ptr() if wants and like is not None else 0
        for gradient, like, wants in zip(out[2:], given.operands, wanted, strict=True)
    ]
    _KERNELS[input.dtype](
        input=operand(input, rows, 1),
        weight=operand(weight, (), 2),
        bias=optional_operand(bias, (), 1),
        target=operand(target, rows, 0),
        row_weight=operand(row_weight, rows, 0),
        rows=kernel_batch(rows),
        d=features,
        v=classes,
        ignore_index=given.ignore_index,
        label_smoothing=given.label_smoothing,
        tangent=tangent,
        gauss_newton=given.gauss_newton,
        input_tangent=optional_operand(given.input_tangent, rows, 1),
        weight_tangent=optional_operand(given.weight_tangent, (), 2),
        bias_tangent=optional_operand(given.bias_tangent, (), 1),
        row_weight_tangent=optional_operand(given.row_weight_tangent, rows, 0),
        value=out[0].data_ptr(),
        loss=out[1].data_ptr(),
        grad_input=addresses[0],
        grad_weight=addresses[1],
        grad_bias=addresses[2],
    )
    value, losses, *gradients = out
    grad_input, grad_weight, grad_bias = (gradient.to(input.dtype) for gradient in gradients)
    return value, losses, grad_input, grad_weight, grad_bias


@register(schema.linear_cross_entropy, device="cpu")
def _linear_cross_entropy(
    row_weight: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    wanted: Sequence[bool],
) -> schema.Results:
    schema.check(row_weight, input, weight, bias, target)
    given = schema.TangentArguments(
        row_weight, None, input, weight, bias, target, None, None, None, ignore_index, label_smoothing, False, wanted
    )
    return _run(given, tangent=False)


@register(schema.linear_cross_entropy_tangent, device="cpu")
def _linear_cross_entropy_tangent(*args: Any) -> schema.Results:
    given = schema.TangentArguments(*args)
    given.check()
    return _run(given, tangent=True)
