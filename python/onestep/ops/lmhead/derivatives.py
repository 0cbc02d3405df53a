"""Derivatives of the language-model head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from onestep._torch_private import (
    current_level,
    dispatch_modes,
    graph_is_kept,
    is_batched,
    is_tracking,
    level_of,
    temporarily_pop_interpreter_stack,
    unwrapped,
)
from onestep.ops._derivatives import OpFunction, register_derivatives
from onestep.ops.lmhead.schema import Results, linear_cross_entropy, linear_cross_entropy_tangent


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _scaled(scale: Tensor, gradient: Tensor) -> Tensor:
    """scale · gradient, which for the constant 1 (a loss that is differentiated itself) is the gradient uncopied.

    But not if the graph is kept for another backward: the caller may change in place what it is given.
    """
    kept = not torch.is_grad_enabled() and graph_is_kept()
    return gradient if not kept and _is_constant_one(scale) else (scale * gradient).to(gradient.dtype)


def _is_constant_one(scale: Tensor) -> bool:
    """Whether this is the number 1, and a constant of every derivative being taken; one torch.func level a call."""
    if type(scale) is not Tensor or torch.compiler.is_compiling() or dispatch_modes() != 0:
        return False
    if is_batched(scale):
        return False
    current = current_level()
    if current is None:
        return _is_constant(scale) and scale.item() == 1.0
    inner = scale
    if is_tracking(scale) and level_of(scale) == current:
        if not _is_constant(scale):
            return False
        inner = unwrapped(scale)
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
            results = linear_cross_entropy.dispatched(weights, *operands, target, *options, needed)
            gradients = [of if n else None for of, n in zip(results[2:], needed, strict=True)]
        # The gradient of a bias that is not there is empty.
        along = [
            of if wants and operand is not None else None
            for of, wants, operand in zip(of_gradients, ctx.wanted, operands, strict=True)
        ]
        if any(of is not None for of in along):
            _, pushed, *second = linear_cross_entropy_tangent.dispatched(
                row_weight, None, *operands, target, *along, *options, False, needed
            )
            of_row_weight = _sum(of_row_weight, pushed)
            gradients = [_sum(of, more) if n else None for of, more, n in zip(gradients, second, needed, strict=True)]
        return of_row_weight, *gradients

    @staticmethod
    def jvp(ctx: Any, d_row_weight: Any, d_input: Any, d_weight: Any, d_bias: Any, *unused: Any) -> Any:
        row_weight, *operands, target = ctx.saved_tensors
        return linear_cross_entropy_tangent.dispatched(
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


def _composite_tangent(*args: Any) -> Results:
    """linear_cross_entropy_tangent in torch's own ops, with the N × V logits: for derivatives of third order."""
    row_weight, row_weight_tangent, input, weight, bias, target = args[:6]
    input_tangent, weight_tangent, bias_tangent = args[6:9]
    ignore_index, label_smoothing, gauss_newton, wanted = args[9:]

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
    exist = (True, True, bias is not None)
    of_input, of_weight, of_bias = (
        of.reshape(shape).to(input.dtype) if wants and exists else input.new_zeros(0)
        for of, shape, wants, exists in zip(gradients, shapes, wanted, exist, strict=True)
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
            return ()
        row_weight, d_row_weight, *operands, target = tensors[:6]
        directions = tensors[6:]
        options = ctx.ignore_index, ctx.label_smoothing
        weights = _sum(None if of_value is None else of_value * row_weight, of_losses)
        d_weights = None if of_value is None or d_row_weight is None else of_value * d_row_weight
        _, losses, *of_directions = linear_cross_entropy.dispatched(weights, *operands, target, *options, needed[6:9])
        gradients: Sequence[Any] = linear_cross_entropy_tangent.dispatched(
            weights, d_weights, *operands, target, *directions, *options, False, needed[2:5]
        )[2:]
        of_row_weight = None if of_value is None else of_value * loss_tangents
        of_d_row_weight = None if d_weights is None else of_value * losses
        by_operand = [of if n else None for of, n in zip(gradients, needed[2:5], strict=True)]
        by_direction = [of if n else None for of, n in zip(of_directions, needed[6:9], strict=True)]
        return of_row_weight, of_d_row_weight, *by_operand, None, *by_direction


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
    gradients: list[Any] = [None] * (_DIFFERENTIABLE[-1] + 1)
    for place, gradient in zip(places, pullback(materialized), strict=True):
        gradients[place] = gradient
    return tuple(gradients)


register_derivatives(linear_cross_entropy, _LinearCrossEntropy)
register_derivatives(linear_cross_entropy_tangent, _LinearCrossEntropyTangent)
