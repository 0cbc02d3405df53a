"""CPU kernels of scaled dot-product attention: allocate the results and call csrc/attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import register
from onestep.ops.attention import schema
from onestep.ops.attention.arguments import NO_TANGENTS, as_tangents, plain_arguments
from onestep.ops.attention.schema import Batch, EightGrads, Grads, Optional, Sizes
from onestep.ops.operands import ELEMENTS

Entries = dict[torch.dtype, Callable[..., None]]

_FORWARD: Entries = {torch.float32: _native.attention_forward_f32, torch.float64: _native.attention_forward_f64}
_JVP: Entries = {torch.float32: _native.attention_jvp_f32, torch.float64: _native.attention_jvp_f64}
_FORWARD_AND_JVP: Entries = {
    torch.float32: _native.attention_forward_and_jvp_f32,
    torch.float64: _native.attention_forward_and_jvp_f64,
}
_BACKWARD: Entries = {torch.float32: _native.attention_backward_f32, torch.float64: _native.attention_backward_f64}
_BACKWARD_JVP: Entries = {
    torch.float32: _native.attention_backward_jvp_f32,
    torch.float64: _native.attention_backward_jvp_f64,
}
_BACKWARD_AND_JVP: Entries = {
    torch.float32: _native.attention_backward_and_jvp_f32,
    torch.float64: _native.attention_backward_and_jvp_f64,
}


def _input(name: str, tensor: Optional, shape: Batch, dtype: torch.dtype, more_strides: Batch = ()) -> Any:
    """A tensor as the kernels take it (address, strides, element type, what keeps the memory), or None."""
    if tensor is None:
        return None
    if tensor.dtype != dtype:
        half = tensor.dtype == torch.bfloat16 and dtype == torch.float32
        if not half and tensor.dtype != torch.bool:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {dtype}")
    if tensor.shape != shape:
        try:
            tensor = tensor.expand(shape)
        except RuntimeError:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}") from None
    return tensor.data_ptr(), tensor.stride() + more_strides, ELEMENTS[tensor.dtype], tensor


def _inputs(
    sizes: Sizes,
    q: Optional,
    k: Optional,
    v: Optional,
    mask: Optional,
    out: Optional = None,
    lse: Optional = None,
    grad: Optional = None,
    grad_lse: Optional = None,
) -> dict[str, Any]:
    """The native operands by name. L and its cotangent get a stride of columns, which they do not have."""
    batch, heads, kv_heads, queries, keys, d, dv, dtype, _ = sizes
    rows = (*batch, heads, queries)
    key_rows = (*batch, kv_heads, keys)
    out_shape = (*rows, dv)
    return {
        "q": _input("query", q, (*rows, d), dtype),
        "k": _input("key", k, (*key_rows, d), dtype),
        "v": _input("value", v, (*key_rows, dv), dtype),
        "mask": _input("attn_mask", mask, (*rows, keys), dtype),
        "out": _input("out", out, out_shape, dtype),
        "lse": _input("lse", lse, rows, torch.float64, (0,)),
        "grad": _input("grad", grad, out_shape, dtype),
        "grad_lse": _input("grad_lse", grad_lse, rows, torch.float64, (0,)),
    }


@register(schema.attention, device="cpu")
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Optional, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    sizes = schema.check_operands(q, k, v, mask)
    out, lse = schema.empty_outputs(sizes, q)
    _FORWARD[sizes.dtype](
        **_inputs(sizes, q, k, v, mask),
        **NO_TANGENTS,
        **plain_arguments(sizes, scale, causal),
        to_out=out.data_ptr(),
        to_lse=lse.data_ptr(),
    )
    return out, lse


@register(schema.attention_jvp, device="cpu")
def _attention_jvp(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, mask, out, lse, dq, dk, dv, dmask, scale, causal = args
    sizes = schema.check_operands(q, k, v, mask, out, dq, dk, dv, dmask)
    dout, dlse = schema.empty_outputs(sizes, q)
    _JVP[sizes.dtype](
        **_inputs(sizes, q, k, v, mask, out, lse),
        **as_tangents(_inputs(sizes, dq, dk, dv, dmask)),
        **plain_arguments(sizes, scale, causal),
        to_out=dout.data_ptr(),
        to_lse=dlse.data_ptr(),
    )
    return dout, dlse


@register(schema.attention_and_jvp, device="cpu")
def _attention_and_jvp(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, mask, dq, dk, dv, dmask, scale, causal = args
    sizes = schema.check_operands(q, k, v, mask, dq, dk, dv, dmask)
    results = *schema.empty_outputs(sizes, q), *schema.empty_outputs(sizes, q)
    _FORWARD_AND_JVP[sizes.dtype](
        **_inputs(sizes, q, k, v, mask),
        **as_tangents(_inputs(sizes, dq, dk, dv, dmask)),
        **plain_arguments(sizes, scale, causal),
        to_out=results[0].data_ptr(),
        to_lse=results[1].data_ptr(),
        to_out_tangent=results[2].data_ptr(),
        to_lse_tangent=results[3].data_ptr(),
    )
    return results


def _run_backward(
    kernels: Entries,
    sizes: Sizes,
    primal: dict[str, Any],
    tangent: dict[str, Any],
    q: Tensor,
    mask: Optional,
    scale: float,
    causal: bool,
    mask_grad: bool,
) -> Grads:
    grads = schema.empty_grads(sizes, q, mask, mask_grad)
    if not schema.zeroed_without_scores(sizes, *grads):
        kernels[sizes.dtype](
            **primal,
            **tangent,
            **plain_arguments(sizes, scale, causal),
            **_native_grads(grads, mask_grad),
        )
    return grads


def _native_grads(grads: Grads, mask_grad: bool) -> dict[str, Any]:
    """The gradients as the kernels take them. Over a dimension of size 1 the mask's is a sum, which stride 0 says."""
    native_mask_grad = None
    if mask_grad:
        by_mask = grads[3]
        shape_and_strides = zip(by_mask.shape, by_mask.stride(), strict=True)
        strides = tuple(0 if size == 1 else stride for size, stride in shape_and_strides)
        native_mask_grad = by_mask.data_ptr(), strides, ELEMENTS[by_mask.dtype], by_mask
    q, k, v = (grad.data_ptr() for grad in grads[:3])
    return {"to_q_grad": q, "to_k_grad": k, "to_v_grad": v, "to_mask_grad": native_mask_grad}


@register(schema.attention_backward, device="cpu")
def _attention_backward(*args: Any) -> Grads:
    grad, grad_lse, q, k, v, mask, out, lse, scale, causal, mask_grad = args
    sizes = schema.check_operands(q, k, v, mask, out, grad, schema.column(grad_lse))
    primal = _inputs(sizes, q, k, v, mask, out, lse, grad, grad_lse)
    return _run_backward(_BACKWARD, sizes, primal, NO_TANGENTS, q, mask, scale, causal, mask_grad)


@register(schema.attention_backward_jvp, device="cpu")
def _attention_backward_jvp(*args: Any) -> Grads:
    grad, grad_lse, q, k, v, mask, out, lse, dgrad, dgrad_lse, dq, dk, dv, dmask, dout, dlse, *options = args
    sizes = schema.backward_jvp_sizes(args[:16])
    primal = _inputs(sizes, q, k, v, mask, out, lse, grad, grad_lse)
    tangent = as_tangents(_inputs(sizes, dq, dk, dv, dmask, dout, dlse, dgrad, dgrad_lse))
    return _run_backward(_BACKWARD_JVP, sizes, primal, tangent, q, mask, *options)


@register(schema.attention_backward_and_jvp, device="cpu")
def _attention_backward_and_jvp(*args: Any) -> EightGrads:
    grad, grad_lse, q, k, v, mask, out, lse, dgrad, dgrad_lse, dq, dk, dv, dmask, dout, dlse, *options = args
    scale, causal, mask_grad = options
    sizes = schema.backward_jvp_sizes(args[:16])
    grads = schema.empty_grads(sizes, q, mask, mask_grad)
    tangents = schema.empty_grads(sizes, q, mask, mask_grad)
    if not schema.zeroed_without_scores(sizes, *grads, *tangents):
        _BACKWARD_AND_JVP[sizes.dtype](
            **_inputs(sizes, q, k, v, mask, out, lse, grad, grad_lse),
            **as_tangents(_inputs(sizes, dq, dk, dv, dmask, dout, dlse, dgrad, dgrad_lse)),
            **plain_arguments(sizes, scale, causal),
            **_native_grads(grads, mask_grad),
            **as_tangents(_native_grads(tangents, mask_grad)),
        )
    return *grads, *tangents
