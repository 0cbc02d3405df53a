"""Ops of the language-model head: ``linear_cross_entropy`` and ``linear_cross_entropy_tangent``.

Two kernels close the family under every composition of order two. The first gives the losses, their weighted sum and
that sum's gradient; the second the tangents of all of these. The gradient of a function of the gradient is, since the
Hessian is symmetric, the second kernel along the cotangents. Formulas in csrc/lmhead/lmhead.hpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from onestep import _native
from onestep.ops._library import OpFunction, define, register_derivatives
from onestep.ops._operands import check_like, kernel_batch, operand

# value, losses, and the gradients of input, weight and bias, empty where they are not wanted.
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_KERNELS = {
    torch.float32: _native.linear_cross_entropy_f32,
    torch.float64: _native.linear_cross_entropy_f64,
    torch.bfloat16: _native.linear_cross_entropy_bf16,
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in for an input of this dtype."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _check_shape(name: str, tensor: Tensor, shape: Sequence[Any], meaning: str) -> None:
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}: {meaning}")


def _check(row_weight: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    if input.dtype not in _KERNELS:
        raise TypeError(f"input has dtype {input.dtype}; expected torch.float32, torch.float64 or torch.bfloat16")
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


def _check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    # By numpy, since torch's own reductions hang in a forked child.
    values = target.numpy()
    outside = ((values < 0) | (values >= classes)) & (values != ignore_index)
    if outside.any():
        raise ValueError(
            f"target holds {values[outside][0]}; expected classes from 0 to {classes - 1}, "
            f"or ignore_index = {ignore_index}"
        )


def _results(input: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool], dtype: torch.dtype) -> Results:
    accumulated = accumulation_dtype(input.dtype)
    gradients = [
        input.new_empty(like.shape if like is not None and wants else (0,), dtype=dtype)
        for like, wants in zip((input, weight, bias), wanted, strict=True)
    ]
    losses = input.new_empty(input.shape[:-1], dtype=accumulated)
    return input.new_empty((), dtype=accumulated), losses, gradients[0], gradients[1], gradients[2]


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
) -> Results:
    input, weight, bias = operands
    classes, features = weight.shape
    _check_targets(target, classes, ignore_index)
    rows = tuple(target.shape)
    out = _results(input, weight, bias, wanted, row_weight.dtype)
    _KERNELS[input.dtype](
        operand(input, rows, 1),
        operand(weight, (), 2),
        None if bias is None else operand(bias, (), 1),
        operand(target, rows, 0),
        operand(row_weight, rows, 0),
        kernel_batch(rows),
        features,
        classes,
        ignore_index,
        label_smoothing,
        tangent,
        gauss_newton,
        None if tangents[0] is None else operand(tangents[0], rows, 1),
        None if tangents[1] is None else operand(tangents[1], (), 2),
        None if tangents[2] is None else operand(tangents[2], (), 1),
        None if row_weight_tangent is None else operand(row_weight_tangent, rows, 0),
        out[0].data_ptr(),
        out[1].data_ptr(),
        *(
            gradient.data_ptr() if wants and like is not None else 0
            for gradient, like, wants in zip(out[2:], operands, wanted, strict=True)
        ),
    )
    value, losses, *gradients = out
    grad_input, grad_weight, grad_bias = (gradient.to(input.dtype) for gradient in gradients)
    return value, losses, grad_input, grad_weight, grad_bias


# ------------------------------------------------------------------------------------------------ linear_cross_entropy


def _fake(
    row_weight: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    wanted: Sequence[bool],
) -> Results:
    _check(row_weight, input, weight, bias, target)
    return _results(input, weight, bias, wanted, input.dtype)


def _cpu(
    row_weight: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    wanted: Sequence[bool],
) -> Results:
    _check(row_weight, input, weight, bias, target)
    operands, nothing = (input, weight, bias), (None, None, None)
    return _run(row_weight, None, operands, target, nothing, ignore_index, label_smoothing, False, False, wanted)


define(
    "linear_cross_entropy(Tensor row_weight, Tensor input, Tensor weight, Tensor? bias, Tensor target, "
    "int ignore_index, float label_smoothing, bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _scaled(scale: Tensor, gradient: Tensor) -> Tensor:
    """scale · gradient, which for the constant 1 (a loss that is differentiated itself) is the gradient uncopied.

    But not if the graph is kept for another backward: the caller may change in place what it is given.
    """
    kept = not torch.is_grad_enabled() and torch._C._autograd._get_current_graph_task_keep_graph()
    return gradient if not kept and _is_constant_one(scale) else (scale * gradient).to(gradient.dtype)


def _is_constant_one(scale: Tensor) -> bool:
    """Whether this is the number 1, and a constant of every derivative being taken; one torch.func level a call."""
    if type(scale) is not Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() != 0:
        return False
    if functorch.is_batchedtensor(scale) or functorch.is_legacy_batchedtensor(scale):
        return False
    current = functorch.maybe_current_level()
    if current is None:
        return _is_constant(scale) and scale.item() == 1.0
    inner = scale
    if functorch.is_gradtrackingtensor(scale) and functorch.maybe_get_level(scale) == current:
        if not _is_constant(scale):
            return False
        inner = functorch.get_unwrapped(scale)
    with temporarily_pop_interpreter_stack():
        return _is_constant_one(inner)


def _is_constant(scale: Tensor) -> bool:
    return not scale.requires_grad and forward_ad.unpack_dual(scale, level=0).tangent is None


class _LinearCrossEntropy(OpFunction):
    """First order from the gradients of the forward pass where they fit, second order by the tangent op."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.wanted = inputs
        _, losses, *gradients = output
        ctx.save_for_backward(*tensors, losses, *gradients)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_value: Any, of_losses: Any, *of_gradients: Any) -> tuple[Any, ...]:
        row_weight, *operands, target, losses, grad_input, grad_weight, grad_bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        options = ctx.ignore_index, ctx.label_smoothing
        gradients: list[Tensor | None] = [None, None, None]
        of_row_weight = None if of_value is None else of_value * losses
        computed = all(w or not n for n, w in zip(needed, ctx.wanted, strict=True))
        if of_losses is None and of_value is not None and computed:
            saved = (grad_input, grad_weight, grad_bias)
            gradients = [_scaled(of_value, of) if n else None for of, n in zip(saved, needed, strict=True)]
        elif of_value is not None or of_losses is not None:
            weights = _sum(None if of_value is None else of_value * row_weight, of_losses)
            results = torch.ops.onestep.linear_cross_entropy.default(weights, *operands, target, *options, needed)
            gradients = [of if n else None for of, n in zip(results[2:], needed, strict=True)]
        along = [of if wants else None for of, wants in zip(of_gradients, ctx.wanted, strict=True)]
        if any(of is not None for of in along):
            _, pushed, *second = torch.ops.onestep.linear_cross_entropy_tangent.default(
                row_weight, None, *operands, target, *along, *options, False, needed
            )
            of_row_weight = _sum(of_row_weight, pushed)
            gradients = [_sum(of, more) if n else None for of, more, n in zip(gradients, second, needed, strict=True)]
        return of_row_weight, *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, d_row_weight: Any, d_input: Any, d_weight: Any, d_bias: Any, *unused: Any) -> Any:
        row_weight, *operands, target = ctx.saved_tensors
        return torch.ops.onestep.linear_cross_entropy_tangent.default(
            row_weight,
            d_row_weight,
            *operands,
            target,
            d_input,
            d_weight,
            d_bias,
            ctx.ignore_index,
            ctx.label_smoothing,
            False,
            ctx.wanted,
        )


# ----------------------------------------------------------------------------------------- linear_cross_entropy_tangent


def _tangent_fake(
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
) -> Results:
    _check(row_weight, input, weight, bias, target)
    if row_weight_tangent is not None:
        _check_row_weight("row_weight_tangent", row_weight_tangent, input)
    tangents = {"input": input_tangent, "weight": weight_tangent, "bias": bias_tangent}
    for (name, tangent), of in zip(tangents.items(), (input, weight, bias), strict=True):
        if tangent is None:
            continue
        if of is None:
            raise ValueError(f"{name}_tangent is given, but {name} is None")
        check_like(f"{name}_tangent", tangent, input)
        _check_shape(f"{name}_tangent", tangent, of.shape, f"as {name}")
    return _results(input, weight, bias, wanted, input.dtype)


def _tangent_cpu(
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
) -> Results:
    tangents = (input_tangent, weight_tangent, bias_tangent)
    options = (ignore_index, label_smoothing, gauss_newton)
    _tangent_fake(row_weight, row_weight_tangent, input, weight, bias, target, *tangents, *options, (False,) * 3)
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


define(
    "linear_cross_entropy_tangent(Tensor row_weight, Tensor? row_weight_tangent, Tensor input, Tensor weight, "
    "Tensor? bias, Tensor target, Tensor? input_tangent, Tensor? weight_tangent, Tensor? bias_tangent, "
    "int ignore_index, float label_smoothing, bool gauss_newton, bool[3] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_tangent_cpu,
    fake=_tangent_fake,
)


def _composite_tangent(
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
) -> Results:
    """linear_cross_entropy_tangent in torch's own ops, with the N × V logits: for derivatives of third order."""

    def rows(tensor: Tensor | None, *shape: int) -> Tensor | float:
        return 0.0 if tensor is None else tensor.to(row_weight.dtype).reshape(shape)

    classes, features = weight.shape
    h, dh = rows(input, -1, features), rows(input_tangent, -1, features)
    w, dw = rows(weight, classes, features), rows(weight_tangent, classes, features)
    y = target.reshape(-1, 1)
    counts = y != ignore_index
    c = torch.where(counts, row_weight.reshape(-1, 1), 0)
    dc = 0.0 if row_weight_tangent is None else torch.where(counts, row_weight_tangent.reshape(-1, 1), 0)

    def product(a: Any, b: Any) -> Any:
        return 0.0 if isinstance(a, float) or isinstance(b, float) else a @ b

    def transposed(a: Any) -> Any:
        return a if isinstance(a, float) else a.mT

    z = product(h, transposed(w)) + rows(bias, classes)
    dz = product(dh, transposed(w)) + product(h, transposed(dw)) + rows(bias_tangent, classes) + torch.zeros_like(z)
    q = (1.0 - label_smoothing) * (y == torch.arange(classes, device=y.device)).to(z.dtype) + label_smoothing / classes
    # Not log_softmax: in torch 2.13, backward through its tangent fails.
    shifted = z - z.amax(-1, keepdim=True).detach()
    log_p = shifted - shifted.exp().sum(-1, keepdim=True).log()
    p = log_p.exp()
    mean = (p * dz).sum(-1, keepdim=True)
    losses = torch.where(counts, -(q * log_p).sum(-1, keepdim=True), 0)
    tangents = torch.where(counts, mean - (q * dz).sum(-1, keepdim=True), 0)
    cross = c * (p - q)
    main = c * p * (dz - mean) + dc * (p - q)
    if gauss_newton:
        dh = dw = 0.0
    shapes = (input.shape, weight.shape, (classes,))
    gradients = (
        product(main, w) + product(cross, dw),
        product(main.mT, h) + product(cross.mT, dh),
        main.sum(0),
    )
    given = (True, True, bias is not None)
    of_input, of_weight, of_bias = (
        of.reshape(shape).to(input.dtype) if wants and exists else input.new_zeros(0)
        for of, shape, wants, exists in zip(gradients, shapes, wanted, given, strict=True)
    )
    return (c * tangents + dc * losses).sum(), tangents.reshape(target.shape), of_input, of_weight, of_bias


# Where the tensor arguments of the tangent op that have derivatives stand.
_DIFFERENTIABLE = (0, 1, 2, 3, 4, 6, 7, 8)


class _LinearCrossEntropyTangent(OpFunction):
    """The loss tangents are differentiated in reverse by the two kernels, all else by the composite."""

    @staticmethod
    def forward_composite(*args: Any) -> Any:
        """The composite with the logits."""
        return _composite_tangent(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.gauss_newton, ctx.wanted = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_value: Any, of_losses: Any, *of_gradients: Any) -> tuple[Any, ...]:
        *tensors, loss_tangents = ctx.saved_tensors
        needed = ctx.needs_input_grad
        along = [of if wants else None for of, wants in zip(of_gradients, ctx.wanted, strict=True)]
        if any(of is not None for of in along):
            return _third_order_backward(ctx, tensors, (of_value, of_losses, *along))
        if of_value is None and of_losses is None:
            return (None,) * 13
        row_weight, d_row_weight, *operands, target = tensors[:6]
        directions = tensors[6:]
        options = ctx.ignore_index, ctx.label_smoothing
        weights = _sum(None if of_value is None else of_value * row_weight, of_losses)
        d_weights = None if of_value is None or d_row_weight is None else of_value * d_row_weight
        _, losses, *of_directions = torch.ops.onestep.linear_cross_entropy.default(
            weights, *operands, target, *options, needed[6:9]
        )
        gradients: Sequence[Any] = torch.ops.onestep.linear_cross_entropy_tangent.default(
            weights, d_weights, *operands, target, *directions, *options, False, needed[2:5]
        )[2:]
        of_row_weight = None if of_value is None else of_value * loss_tangents
        of_d_row_weight = None if d_weights is None else of_value * losses
        by_operand = [of if n else None for of, n in zip(gradients, needed[2:5], strict=True)]
        by_direction = [of if n else None for of, n in zip(of_directions, needed[6:9], strict=True)]
        return of_row_weight, of_d_row_weight, *by_operand, None, *by_direction, None, None, None, None


def _of_differentiable(ctx: Any, tensors: Sequence[Any]) -> tuple[Any, tuple[Tensor, ...], list[int]]:
    """The composite as a function of the tensors that have derivatives, these, and their places."""
    places = [place for place in _DIFFERENTIABLE if tensors[place] is not None]

    def function(*values: Tensor) -> Results:
        arguments = list(tensors)
        for place, value in zip(places, values, strict=True):
            arguments[place] = value
        options: tuple[Any, ...] = (ctx.ignore_index, ctx.label_smoothing, ctx.gauss_newton, ctx.wanted)
        return _composite_tangent(*arguments, *options)

    return function, tuple(tensors[place] for place in places), places


def _third_order_backward(ctx: Any, tensors: Sequence[Any], cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    function, primals, places = _of_differentiable(ctx, tensors)
    linearized: tuple[Results, Any] = torch.func.vjp(function, *primals)  # type: ignore[assignment]
    outputs, pullback = linearized
    materialized = tuple(
        torch.zeros_like(output) if of is None else of for output, of in zip(outputs, cotangents, strict=True)
    )
    gradients: list[Any] = [None] * 13
    for place, gradient in zip(places, pullback(materialized), strict=True):
        gradients[place] = gradient
    return tuple(gradients)


register_derivatives("linear_cross_entropy", _LinearCrossEntropy)
register_derivatives("linear_cross_entropy_tangent", _LinearCrossEntropyTangent)
