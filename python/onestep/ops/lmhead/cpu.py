"""CPU kernels of the language-model head: allocate the results and call csrc/lmhead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def _run(
    row_weight: Tensor,
    row_weight_tangent: Tensor | None,
    operands: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    ignore_index: int,
    label_smoothing: float,
    tangent: bool,
    gauss_newton: bool,
    wanted: Sequence[bool],
) -> schema.Results:
    input, weight, bias = operands
    classes, features = weight.shape
    schema.check_targets(target, classes, ignore_index)
    rows = tuple(target.shape)
    out = schema.empty_results(input, weight, bias, wanted, row_weight.dtype)
    addresses = [
        gradient.data_ptr() if wants and like is not None else 0
        for gradient, like, wants in zip(out[2:], operands, wanted, strict=True)
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
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        tangent=tangent,
        gauss_newton=gauss_newton,
        input_tangent=optional_operand(tangents[0], rows, 1),
        weight_tangent=optional_operand(tangents[1], (), 2),
        bias_tangent=optional_operand(tangents[2], (), 1),
        row_weight_tangent=optional_operand(row_weight_tangent, rows, 0),
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
    operands, nothing = (input, weight, bias), (None, None, None)
    return _run(row_weight, None, operands, target, nothing, ignore_index, label_smoothing, False, False, wanted)


@register(schema.linear_cross_entropy_tangent, device="cpu")
def _linear_cross_entropy_tangent(
    row_weight: Tensor,
    row_weight_tangent: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    input_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    gauss_newton: bool,
    wanted: Sequence[bool],
) -> schema.Results:
    tangents = (input_tangent, weight_tangent, bias_tangent)
    options = (ignore_index, label_smoothing, gauss_newton)
    schema.tangent_results(
        row_weight, row_weight_tangent, input, weight, bias, target, *tangents, *options, (False,) * 3
    )
    return _run(
        row_weight,
        row_weight_tangent,
        (input, weight, bias),
        target,
        tangents,
        ignore_index,
        label_smoothing,
        True,
        gauss_newton,
        wanted,
    )
