"""Derivatives of scaled dot-product attention.

Four ops are enough up to order two. The tangent of ``attention`` is ``attention_jvp``, its gradient
``attention_backward``. Both are linear, in the tangents and in the cotangents, and each is the transpose of the other.
``attention_backward_jvp`` differentiates both with respect to the operands, since second derivatives are symmetric. A d
in front of an argument's name marks a tangent (in csrc/attention ``d`` and ``dv`` are sizes).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from onestep.ops._derivatives import OpFunction, register_derivatives, register_values_and_tangents
from onestep.ops.attention.formulas import formula_backward_jvp, formula_jvp, pull_back
from onestep.ops.attention.schema import (
    EightGrads,
    Optional,
    attention,
    attention_and_jvp,
    attention_backward,
    attention_backward_and_jvp,
    attention_backward_jvp,
    attention_jvp,
)


def _cast(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its operand, which may have been broadcast, and may be bfloat16."""
    # Asked here, since under torch.func each call of torch costs as much as a small kernel.
    if grad.shape != like.shape:
        grad = grad.sum_to_size(like.shape)
    return grad if grad.dtype == like.dtype else grad.to(like.dtype)


class _Attention(OpFunction):
    @staticmethod
    def forward_and_jvp(args: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        out, lse, dout, dlse = attention_and_jvp.dispatched(*args[:4], *tangents[:4], *args[4:])
        return (out, lse), (dout, dlse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scale, ctx.causal = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Optional, grad_lse: Optional) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return ()
        wanted = ctx.needs_input_grad[3]
        grads = attention_backward.dispatched(grad, grad_lse, *saved, ctx.scale, ctx.causal, wanted)
        return _operand_grads(grads, saved[:4], wanted)

    @staticmethod
    def jvp(ctx: Any, dq: Optional, dk: Optional, dv: Optional, dmask: Optional, *unused: Any) -> tuple[Any, Any]:
        if dq is None and dk is None and dv is None and dmask is None:
            return None, None
        result: tuple[Tensor, Tensor] = attention_jvp.dispatched(
            *ctx.saved_tensors, dq, dk, dv, dmask, ctx.scale, ctx.causal
        )
        return result


def _operand_grads(grads: Any, operands: tuple[Any, ...], mask_grad: bool) -> tuple[Any, ...]:
    """The gradients of q, k, v and mask in their shapes and types."""
    q, k, v, mask = operands
    return _cast(grads[0], q), _cast(grads[1], k), _cast(grads[2], v), _cast(grads[3], mask) if mask_grad else None


class _AttentionJvp(OpFunction):
    @staticmethod
    def forward_composite(*args: Any) -> Any:
        """The formula at O(T²) memory. It computes out and lse itself, so that derivatives go through them."""
        return formula_jvp(*args[:4], *args[6:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scale, ctx.causal = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Optional, grad_lse: Optional) -> tuple[Any, ...]:
        """Gradients of ⟨G, J(x)ẋ⟩, where x are the operands and ẋ their tangents.

        With respect to ẋ that is J(x)ᵀG: attention_backward. With respect to x it is the tangent of J(x)ᵀG along ẋ,
        since second derivatives are symmetric: attention_backward_jvp.
        """
        q, k, v, mask, out, lse, dq, dk, dv, dmask, dout, dlse = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return ()
        by_operands: tuple[Any, ...] = (None,) * 4
        by_tangents: tuple[Any, ...] = (None,) * 4
        needs = ctx.needs_input_grad
        options = ctx.scale, ctx.causal
        if any(needs[:4]):
            grads = attention_backward_jvp.dispatched(
                grad, grad_lse, q, k, v, mask, out, lse, None, None, dq, dk, dv, dmask, dout, dlse, *options, needs[3]
            )
            by_operands = _operand_grads(grads, (q, k, v, mask), needs[3])
        if any(needs[6:10]):
            grads = attention_backward.dispatched(grad, grad_lse, q, k, v, mask, out, lse, *options, needs[9])
            by_tangents = tuple(
                _cast(pulled, tangent) if need else None
                for pulled, tangent, need in zip(grads, (dq, dk, dv, dmask), needs[6:10], strict=True)
            )
        return *by_operands, None, None, *by_tangents


def _and_jvp_apart(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """attention_and_jvp as two ops, which have derivatives."""
    q, k, v, mask, dq, dk, dv, dmask, scale, causal = args
    out, lse = attention.dispatched(q, k, v, mask, scale, causal)
    tangents = attention_jvp.dispatched(q, k, v, mask, out, lse, dq, dk, dv, dmask, scale, causal)
    return out, lse, *tangents


def _output_tangents(
    primals: Any, tangents: Any, dout: Optional, dlse: Optional, scale: float, causal: bool
) -> tuple[Optional, Optional]:
    """Ȯ and L̇ that belong to the tangents of q, k, v and mask: those given, or computed. None if all tangents are."""
    if all(tangent is None for tangent in tangents):
        return None, None
    if dout is None or dlse is None:
        dout, dlse = attention_jvp.dispatched(*primals, *tangents, scale, causal)
    return dout, dlse


class _AttentionBackward(OpFunction):
    @staticmethod
    def forward_and_jvp(args: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        dgrad, dgrad_lse, *operand_tangents, dout, dlse = tangents[:8]
        *_, scale, causal, mask_grad = args
        dout, dlse = _output_tangents(args[2:8], operand_tangents, dout, dlse, scale, causal)
        results = attention_backward_and_jvp.dispatched(
            *args[:8], dgrad, dgrad_lse, *operand_tangents, dout, dlse, scale, causal, mask_grad
        )
        return results[:4], (*results[4:7], results[7] if mask_grad else None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scale, ctx.causal, ctx.mask_grad = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        if not ctx.mask_grad:
            ctx.mark_non_differentiable(output[3])

    @staticmethod
    def backward(ctx: Any, uq: Optional, uk: Optional, uv: Optional, umask: Optional) -> tuple[Any, ...]:
        """Gradients of ⟨u, J(x)ᵀG⟩ = ⟨J(x)u, G⟩, where u are the cotangents of the results.

        With respect to G (and g) that is J(x)u: attention_jvp along u. With respect to x it is the tangent of J(x)ᵀG
        along u, since second derivatives are symmetric: attention_backward_jvp.
        """
        grad, grad_lse, q, k, v, mask, out, lse = ctx.saved_tensors
        umask = umask if ctx.mask_grad else None
        if uq is None and uk is None and uv is None and umask is None:
            return ()
        needs = ctx.needs_input_grad
        options = ctx.scale, ctx.causal
        dout, dlse = attention_jvp.dispatched(q, k, v, mask, out, lse, uq, uk, uv, umask, *options)
        by_operands: tuple[Any, ...] = (None,) * 4
        if any(needs[2:6]):
            grads = attention_backward_jvp.dispatched(
                grad, grad_lse, q, k, v, mask, out, lse, None, None, uq, uk, uv, umask, dout, dlse, *options, needs[5]
            )
            by_operands = _operand_grads(grads, (q, k, v, mask), needs[5])
        return (
            _cast(dout, grad) if needs[0] else None,
            _cast(dlse, grad_lse) if needs[1] else None,
            *by_operands,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        dgrad: Optional,
        dgrad_lse: Optional,
        dq: Optional,
        dk: Optional,
        dv: Optional,
        dmask: Optional,
        dout: Optional,
        dlse: Optional,
        *unused: Any,
    ) -> tuple[Any, ...]:
        options = ctx.scale, ctx.causal
        dout, dlse = _output_tangents(ctx.saved_tensors[2:], (dq, dk, dv, dmask), dout, dlse, *options)
        if dout is None and dgrad is None and dgrad_lse is None:
            return (None,) * 4
        grads = attention_backward_jvp.dispatched(
            *ctx.saved_tensors, dgrad, dgrad_lse, dq, dk, dv, dmask, dout, dlse, *options, ctx.mask_grad
        )
        return *grads[:3], grads[3] if ctx.mask_grad else None


class _AttentionBackwardJvp(OpFunction):
    """Derivatives of order three, by the formula in torch's ops.

    The formula computes out, lse, dout and dlse itself, from the other arguments. So all gradients go to those.
    """

    @staticmethod
    def forward_composite(*args: Any) -> Any:
        """The formula at O(T²) memory. It computes out, lse and their tangents itself."""
        return formula_backward_jvp(*args[:6], *args[8:14], *args[16:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scale, ctx.causal, ctx.mask_grad = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        if not ctx.mask_grad:
            ctx.mark_non_differentiable(output[3])

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        options = ctx.scale, ctx.causal, ctx.mask_grad
        pulled = pull_back(formula_backward_jvp, (*tensors[:6], *tensors[8:14]), options, grads)
        return *pulled[:6], None, None, *pulled[6:]


def _backward_and_jvp_apart(*args: Any) -> EightGrads:
    """attention_backward_and_jvp as two ops, which have derivatives."""
    grads = attention_backward.dispatched(*args[:8], *args[16:])
    return *grads, *attention_backward_jvp.dispatched(*args)


register_values_and_tangents(attention_and_jvp, _and_jvp_apart)
register_values_and_tangents(attention_backward_and_jvp, _backward_and_jvp_apart)
register_derivatives(attention, _Attention)
register_derivatives(attention_jvp, _AttentionJvp)
register_derivatives(attention_backward, _AttentionBackward)
register_derivatives(attention_backward_jvp, _AttentionBackwardJvp)
