"""Ops of scaled dot-product attention: ``attention`` and the products that close its derivatives of order two.

``attention`` gives O and L = logsumexp(S); L is float64 always, since all of a row's probabilities have its rounding in
common. In the other ops ``out`` and ``lse`` are those of the same q, k, v and mask: a cached function of them, not
arguments of their own. All products run at O(T) extra memory:

=========================  ==================================================================
``attention_jvp``          tangents of O and L
``attention_backward``     gradients of ⟨G, O⟩ + ⟨g, L⟩
``attention_backward_jvp`` tangents of these gradients, which are also their gradients, since
                           the Hessian of ⟨G, O⟩ + ⟨g, L⟩ is symmetric
``attention_and_jvp``,     an op and its tangents with one recompute of the scores: what forward
``..._backward_and_jvp``   mode calls
=========================  ==================================================================

Beyond these (forward mode twice, order three) derivatives are those of the same formulas in torch's ops, at O(T²)
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import (
    OpFunction,
    call_batched,
    define,
    register_derivatives,
    register_values_and_tangents,
)
from onestep.ops._operands import MOST_BATCH_DIMS, broadcast_batch, check_dims, check_like, check_size

Batch = tuple[int, ...]
Optional = Tensor | None
Grads = tuple[Tensor, Tensor, Tensor, Tensor]

# The type that the kernels compute in, and return.
COMPUTE_DTYPES = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}

_KERNELS: dict[tuple[str, torch.dtype], Callable[..., None]] = {
    (name, dtype): getattr(_native, f"attention_{name}_{suffix}")
    for dtype, suffix in ((torch.float32, "f32"), (torch.float64, "f64"))
    for name in ("forward", "jvp", "forward_and_jvp", "backward", "backward_jvp", "backward_and_jvp")
}


class _Sizes(NamedTuple):
    """What the shapes of q, k, v and mask say."""

    batch: Batch
    heads: int
    kv_heads: int
    queries: int
    keys: int
    d: int
    dv: int
    dtype: torch.dtype

    def rows(self, cols: int) -> Batch:
        return (*self.batch, self.heads, self.queries, cols)

    def key_rows(self, cols: int) -> Batch:
        return (*self.batch, self.kv_heads, self.keys, cols)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Optional, *others: Optional) -> _Sizes:
    """Checks q, k, v and mask; ``others`` are only asked for their batch dimensions, three trailing ones aside."""
    dtype = COMPUTE_DTYPES.get(q.dtype)
    if dtype is None:
        raise TypeError(f"q has dtype {q.dtype}; expected torch.float32, torch.float64 or torch.bfloat16")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_like(name, tensor, q)
        check_dims(name, tensor, 3, "(..., heads, length, features)")
    *_, heads, queries, d = q.shape
    *_, kv_heads, keys, k_d = k.shape
    *_, v_heads, v_keys, dv = v.shape
    if (k_d, v_keys, v_heads) != (d, keys, kv_heads):
        check_size("k", k, -1, d, f"(..., keys, {d}): as many features as q")
        check_size("v", v, -2, keys, f"(..., {keys}, features): as many rows as k")
        check_size("v", v, -3, kv_heads, f"(..., {kv_heads}, keys, features): as many heads as k")
    if d == 0 or kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; "
            "expected features and as many heads as k, or a multiple of them"
        )
    batches = [tuple(tensor.shape)[:-3] for tensor in (q, k, v, mask, *others) if tensor is not None]
    if mask is not None:
        if mask.dtype not in (torch.bool, q.dtype, dtype):
            raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool or {q.dtype}, like q")
        if mask.device != q.device:
            raise ValueError(f"mask is on device {mask.device}; expected {q.device}, like the other operands")
        check_dims("mask", mask, 3, "(..., heads, queries, keys)")
        for dim, size in zip((-3, -2, -1), (heads, queries, keys), strict=True):
            if mask.shape[dim] not in (1, size):
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)}; expected one that broadcasts to "
                    f"(..., {heads}, {queries}, {keys})"
                )
    batch = broadcast_batch(*batches)
    if len(batch) > MOST_BATCH_DIMS:
        raise ValueError(f"batch dimensions {batch}; expected at most {MOST_BATCH_DIMS}")
    return _Sizes(batch, heads, kv_heads, queries, keys, d, dv, dtype)


def _input(name: str, tensor: Optional, shape: Batch, dtype: torch.dtype, more_strides: Batch = ()) -> Any:
    """A tensor as the kernels take it (address, strides, whether it is bfloat16, what keeps the memory), or None."""
    if tensor is None:
        return None
    half = False
    if tensor.dtype != dtype:
        half = tensor.dtype == torch.bfloat16 and dtype == torch.float32
        if not half and tensor.dtype != torch.bool:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {dtype}")
    if tensor.shape != shape:
        try:
            tensor = tensor.expand(shape)
        except RuntimeError:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}") from None
    return tensor.data_ptr(), tensor.stride() + more_strides, half, tensor


def _inputs(
    sizes: _Sizes,
    q: Optional,
    k: Optional,
    v: Optional,
    mask: Optional,
    out: Optional = None,
    lse: Optional = None,
    grad: Optional = None,
    grad_lse: Optional = None,
) -> tuple[Any, ...]:
    """The native AttentionInputs."""
    batch, heads, kv_heads, queries, keys, d, dv, dtype = sizes
    rows = (*batch, heads, queries)
    key_rows = (*batch, kv_heads, keys)
    out_shape = (*rows, dv)
    return (
        _input("q", q, (*rows, d), dtype),
        _input("k", k, (*key_rows, d), dtype),
        _input("v", v, (*key_rows, dv), dtype),
        _input("mask", mask, (*rows, keys), dtype),
        _input("out", out, out_shape, dtype),
        _input("lse", lse, rows, torch.float64, (0,)),
        _input("grad", grad, out_shape, dtype),
        _input("grad_lse", grad_lse, rows, torch.float64, (0,)),
    )


_NO_INPUTS = (None,) * 8


def _arguments(sizes: _Sizes, mask: Optional, scale: float, causal: bool) -> tuple[Any, ...]:
    """The plain arguments that all kernels share."""
    return sizes.batch, sizes[1:7], scale, causal, mask is not None and mask.dtype == torch.bool


def _cast(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of an operand that was broadcast and is perhaps bfloat16."""
    # Asked here, since under torch.func each call of torch costs as much as a small kernel.
    if grad.shape != like.shape:
        grad = grad.sum_to_size(like.shape)
    return grad if grad.dtype == like.dtype else grad.to(like.dtype)


# ------------------------------------------------------------------------------------------ the formulas in torch's ops


class _Formulas:
    """P and what is made of it as plain torch expressions, which have derivatives of every order, at O(T²) memory."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional, scale: float, causal: bool) -> None:
        self.dtype = COMPUTE_DTYPES[q.dtype]
        self.scale = scale
        self.kv_heads = k.shape[-3]
        self.group = q.shape[-3] // self.kv_heads
        self.q, self.k, self.v = self.cast(q), self.per_query_head(k), self.per_query_head(v)
        scores = self.products(self.q, self.k)
        hidden = torch.zeros((), dtype=torch.bool, device=q.device)
        if mask is not None:
            hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
            if mask.dtype != torch.bool:
                scores = scores + mask.masked_fill(hidden, 0)
        if causal:
            hidden = hidden | torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        hidden = hidden.expand(scores.shape)
        # Rows without keys get P = 0; their softmax is taken of other numbers, so that no derivative of it is NaN.
        blind = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden & ~blind, -torch.inf)
        self.P = torch.softmax(scores, -1).masked_fill(blind, 0)
        self.O = self.P @ self.v

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)

    def per_query_head(self, tensor: Tensor) -> Tensor:
        tensor = self.cast(tensor)
        return tensor if self.group == 1 else tensor.repeat_interleave(self.group, -3)

    def per_kv_head(self, tensor: Tensor) -> Tensor:
        return tensor if self.group == 1 else tensor.unflatten(-3, (self.kv_heads, self.group)).sum(-3)

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        return self.scale * (q @ k.mT)

    def push(self, dq: Optional, dk: Optional, dv: Optional, dmask: Optional) -> tuple[Tensor, Tensor, Tensor]:
        """Ṡ, L̇ and Ȯ."""
        dS = torch.zeros_like(self.P)
        if dq is not None:
            dS = dS + self.products(self.cast(dq), self.k)
        if dk is not None:
            dS = dS + self.products(self.q, self.per_query_head(dk))
        if dmask is not None:
            dS = dS + dmask
        weighed = self.P * dS
        dL = weighed.sum(-1)
        dO = weighed @ self.v - dL.unsqueeze(-1) * self.O
        if dv is not None:
            dO = dO + self.P @ self.per_query_head(dv)
        return dS, dL, dO


def _formula_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional,
    dq: Optional,
    dk: Optional,
    dv: Optional,
    dmask: Optional,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    _, dL, dO = _Formulas(q, k, v, mask, scale, causal).push(dq, dk, dv, dmask)
    return dO, dL.double()


def _formula_backward_jvp(
    grad: Optional,
    grad_lse: Optional,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional,
    dgrad: Optional,
    dgrad_lse: Optional,
    dq: Optional,
    dk: Optional,
    dv: Optional,
    dmask: Optional,
    scale: float,
    causal: bool,
    mask_grad: bool,
) -> Grads:
    at = _Formulas(q, k, v, mask, scale, causal)
    dS, dL, dO = at.push(dq, dk, dv, dmask)
    G = torch.zeros_like(at.O) if grad is None else grad
    dG = torch.zeros_like(at.O) if dgrad is None else dgrad
    delta = (G * at.O).sum(-1, keepdim=True)
    ddelta = (dG * at.O + G * dO).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - at.cast(grad_lse).unsqueeze(-1)
    if dgrad_lse is not None:
        ddelta = ddelta - at.cast(dgrad_lse).unsqueeze(-1)
    dP = at.P * (dS - dL.unsqueeze(-1))
    pulled = dG @ at.v.mT
    if dv is not None:
        pulled = pulled + G @ at.per_query_head(dv).mT
    centred = G @ at.v.mT - delta
    T = at.P * centred
    dT = dP * centred + at.P * (pulled - ddelta)
    grad_q, grad_k = dT @ at.k, dT.mT @ at.q
    if dk is not None:
        grad_q = grad_q + T @ at.per_query_head(dk)
    if dq is not None:
        grad_k = grad_k + T.mT @ at.cast(dq)
    grads = (scale * grad_q, at.per_kv_head(scale * grad_k), at.per_kv_head(dP.mT @ G + at.P.mT @ dG))
    if mask is None or not mask_grad:
        return *grads, q.new_empty((*at.O.shape[:-3], 0), dtype=at.dtype)
    missing = dT.dim() - mask.dim()
    return *grads, dT.sum_to_size(dT.shape[:missing] + mask.shape)


def _pull_back(
    formula: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Optional, ...],
    options: tuple[Any, ...],
    cotangents: tuple[Optional, ...],
) -> list[Optional]:
    """The gradients for all tensors of a formula of tensors and options."""
    places = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.is_floating_point()]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for place, tensor in zip(places, inputs, strict=True):
            arguments[place] = tensor
        return formula(*arguments, *options)

    linearized: tuple[tuple[Tensor, ...], Any] = torch.func.vjp(function, *(tensors[place] for place in places))  # type: ignore[assignment]
    outputs, pullback = linearized
    filled = tuple(
        torch.zeros_like(output) if cotangent is None else cotangent
        for output, cotangent in zip(outputs, cotangents, strict=True)
    )
    result: list[Optional] = [None] * len(tensors)
    for place, grad in zip(places, pullback(filled), strict=True):
        result[place] = grad
    return result


# ------------------------------------------------------------------------------------------------------------ attention


def _empty_outputs(sizes: _Sizes, q: Tensor) -> tuple[Tensor, Tensor]:
    shape = sizes.rows(sizes.dv)
    return q.new_empty(shape, dtype=sizes.dtype), q.new_empty(shape[:-1], dtype=torch.float64)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, mask: Optional, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return _empty_outputs(_check(q, k, v, mask), q)


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Optional, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    sizes = _check(q, k, v, mask)
    out, lse = _empty_outputs(sizes, q)
    _KERNELS["forward", sizes.dtype](
        _inputs(sizes, q, k, v, mask),
        _NO_INPUTS,
        *_arguments(sizes, mask, scale, causal),
        out.data_ptr(),
        lse.data_ptr(),
    )
    return out, lse


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> (Tensor, Tensor)",
    cpu=_forward_cpu,
    fake=_forward_fake,
    own_dims=(3, 3, 3, 3),
)


class _Attention(OpFunction):
    @staticmethod
    def forward_and_jvp(args: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        out, lse, dout, dlse = torch.ops.onestep.attention_and_jvp.default(*args[:4], *tangents[:4], *args[4:])
        return (out, lse), (dout, dlse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scale, ctx.causal = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Optional, grad_lse: Optional) -> tuple[Any, ...]:
        q, k, v, mask, _, _ = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 6
        wanted = ctx.needs_input_grad[3]
        grads = torch.ops.onestep.attention_backward.default(
            grad, grad_lse, *ctx.saved_tensors, ctx.scale, ctx.causal, wanted
        )
        return *_operand_grads(grads, (q, k, v, mask), wanted), None, None

    @staticmethod
    def jvp(ctx: Any, dq: Optional, dk: Optional, dv: Optional, dmask: Optional, *unused: Any) -> tuple[Any, Any]:
        if dq is None and dk is None and dv is None and dmask is None:
            return None, None
        result: tuple[Tensor, Tensor] = torch.ops.onestep.attention_jvp.default(
            *ctx.saved_tensors, dq, dk, dv, dmask, ctx.scale, ctx.causal
        )
        return result


def _operand_grads(grads: Any, operands: tuple[Any, ...], mask_grad: bool) -> tuple[Any, ...]:
    """The gradients of q, k, v and mask in their shapes and types."""
    q, k, v, mask = operands
    return _cast(grads[0], q), _cast(grads[1], k), _cast(grads[2], v), _cast(grads[3], mask) if mask_grad else None


# -------------------------------------------------------------------------------------------------------- attention_jvp


_JVP_DIMS = (3, 3, 3, 3, 3, 2, 3, 3, 3, 3)


def _jvp_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional,
    out: Tensor,
    lse: Tensor,
    dq: Optional,
    dk: Optional,
    dv: Optional,
    dmask: Optional,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(_check(q, k, v, mask, out, dq, dk, dv, dmask), q)


def _jvp_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional,
    out: Tensor,
    lse: Tensor,
    dq: Optional,
    dk: Optional,
    dv: Optional,
    dmask: Optional,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    sizes = _check(q, k, v, mask, out, dq, dk, dv, dmask)
    dout, dlse = _empty_outputs(sizes, q)
    _KERNELS["jvp", sizes.dtype](
        _inputs(sizes, q, k, v, mask, out, lse),
        _inputs(sizes, dq, dk, dv, dmask),
        *_arguments(sizes, mask, scale, causal),
        dout.data_ptr(),
        dlse.data_ptr(),
    )
    return dout, dlse


define(
    "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    "Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dmask, float scale, bool causal) -> (Tensor, Tensor)",
    cpu=_jvp_cpu,
    fake=_jvp_fake,
    own_dims=_JVP_DIMS,
)


class _AttentionJvp(OpFunction):
    @staticmethod
    def forward_composite(*args: Any) -> Any:
        """The formula at O(T²) memory; it derives out and lse from the other arguments."""
        return _formula_jvp(*args[:4], *args[6:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scale, ctx.causal = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Optional, grad_lse: Optional) -> tuple[Any, ...]:
        """⟨G, J(x)ẋ⟩: by ẋ a backward pass, by x that pass' tangent along ẋ."""
        q, k, v, mask, out, lse, dq, dk, dv, dmask, dout, dlse = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 12
        by_operands: tuple[Any, ...] = (None,) * 4
        by_tangents: tuple[Any, ...] = (None,) * 4
        needs = ctx.needs_input_grad
        options = ctx.scale, ctx.causal
        if any(needs[:4]):
            grads = torch.ops.onestep.attention_backward_jvp.default(
                grad, grad_lse, q, k, v, mask, out, lse, None, None, dq, dk, dv, dmask, dout, dlse, *options, needs[3]
            )
            by_operands = _operand_grads(grads, (q, k, v, mask), needs[3])
        if any(needs[6:10]):
            grads = torch.ops.onestep.attention_backward.default(
                grad, grad_lse, q, k, v, mask, out, lse, *options, needs[9]
            )
            by_tangents = tuple(
                _cast(pulled, tangent) if need else None
                for pulled, tangent, need in zip(grads, (dq, dk, dv, dmask), needs[6:10], strict=True)
            )
        return *by_operands, None, None, *by_tangents, None, None


# ---------------------------------------------------------------------------------------------------- attention_and_jvp


def _and_jvp_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = _check(*args[:8])
    return *_empty_outputs(sizes, args[0]), *_empty_outputs(sizes, args[0])


def _and_jvp_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, mask, dq, dk, dv, dmask, scale, causal = args
    sizes = _check(q, k, v, mask, dq, dk, dv, dmask)
    results = *_empty_outputs(sizes, q), *_empty_outputs(sizes, q)
    _KERNELS["forward_and_jvp", sizes.dtype](
        _inputs(sizes, q, k, v, mask),
        _inputs(sizes, dq, dk, dv, dmask),
        *_arguments(sizes, mask, scale, causal),
        *(result.data_ptr() for result in results),
    )
    return results


def _and_jvp_apart(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, mask, dq, dk, dv, dmask, scale, causal = args
    out, lse = torch.ops.onestep.attention.default(q, k, v, mask, scale, causal)
    tangents = torch.ops.onestep.attention_jvp.default(q, k, v, mask, out, lse, dq, dk, dv, dmask, scale, causal)
    return out, lse, *tangents


def _and_jvp_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Where tangents alone are mapped, the value is computed once."""
    if any(dim is not None for dim in in_dims[:4]):
        return call_batched(torch.ops.onestep.attention_and_jvp.default, args, in_dims, (3,) * 8), (0,) * 4
    out, lse = torch.ops.onestep.attention.default(*args[:4], *args[8:])
    jvp_dims = (*in_dims[:4], None, None, *in_dims[4:])
    jvp_args = (*args[:4], out, lse, *args[4:])
    tangents = call_batched(torch.ops.onestep.attention_jvp.default, jvp_args, jvp_dims, _JVP_DIMS)
    return (out, lse, *tangents), (None, None, 0, 0)


define(
    "attention_and_jvp(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dmask, "
    "float scale, bool causal) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_and_jvp_cpu,
    fake=_and_jvp_fake,
    vmap=_and_jvp_vmap,
)


# --------------------------------------------------------------------------------------------------- attention_backward


def _grads_fake(sizes: _Sizes, q: Tensor, mask: Optional, mask_grad: bool) -> Grads:
    """Empty gradients. That of the mask keeps the dimensions of size 1 over which the mask is broadcast."""
    shape: Batch = (*sizes.batch, 0)
    if mask_grad:
        if mask is None or mask.dtype == torch.bool:
            raise ValueError("mask_grad=True needs a mask that is added to the scores")
        own = tuple(mask.shape)
        shape = sizes.batch[: len(sizes.batch) + 3 - len(own)] + own
    return (
        q.new_empty(sizes.rows(sizes.d), dtype=sizes.dtype),
        q.new_empty(sizes.key_rows(sizes.d), dtype=sizes.dtype),
        q.new_empty(sizes.key_rows(sizes.dv), dtype=sizes.dtype),
        q.new_empty(shape, dtype=sizes.dtype),
    )


def _grads_cpu(
    name: str,
    sizes: _Sizes,
    primal: tuple[Any, ...],
    tangent: tuple[Any, ...],
    q: Tensor,
    mask: Optional,
    scale: float,
    causal: bool,
    mask_grad: bool,
) -> Grads:
    grads = _grads_fake(sizes, q, mask, mask_grad)
    arguments = _arguments(sizes, mask, scale, causal)
    _KERNELS[name, sizes.dtype](primal, tangent, *arguments, _native_grads(sizes, grads, mask_grad))
    return grads


def _native_grads(sizes: _Sizes, grads: Grads, mask_grad: bool) -> tuple[int, int, int, Any]:
    """The gradients as the kernels take them."""
    native_mask_grad = None
    if mask_grad:
        by_mask = grads[3]
        if sizes.queries == 0 or sizes.keys == 0:
            by_mask.zero_()
        shape_and_strides = zip(by_mask.shape, by_mask.stride(), strict=True)
        strides = tuple(0 if size == 1 else stride for size, stride in shape_and_strides)
        native_mask_grad = by_mask.data_ptr(), strides, False, by_mask
    q, k, v = (grad.data_ptr() for grad in grads[:3])
    return q, k, v, native_mask_grad


def _backward_fake(
    grad: Optional,
    grad_lse: Optional,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask_grad: bool,
) -> Grads:
    return _grads_fake(_check(q, k, v, mask, out, grad, _column(grad_lse)), q, mask, mask_grad)


def _column(lse: Optional) -> Optional:
    return None if lse is None else lse.unsqueeze(-1)


def _backward_cpu(
    grad: Optional,
    grad_lse: Optional,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask_grad: bool,
) -> Grads:
    sizes = _check(q, k, v, mask, out, grad, _column(grad_lse))
    primal = _inputs(sizes, q, k, v, mask, out, lse, grad, grad_lse)
    return _grads_cpu("backward", sizes, primal, _NO_INPUTS, q, mask, scale, causal, mask_grad)


define(
    "attention_backward(Tensor? grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
    "Tensor lse, float scale, bool causal, bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
    own_dims=(3, 2, 3, 3, 3, 3, 3, 2),
)


def _moved_outputs(
    primals: Any, moves: Any, dout: Optional, dlse: Optional, scale: float, causal: bool
) -> tuple[Optional, Optional]:
    """The tangents of O and L that belong to those of q, k, v and mask, computed where they are not given."""
    if all(moved is None for moved in moves):
        return None, None
    if dout is None or dlse is None:
        dout, dlse = torch.ops.onestep.attention_jvp.default(*primals, *moves, scale, causal)
    return dout, dlse


class _AttentionBackward(OpFunction):
    @staticmethod
    def forward_and_jvp(args: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        dgrad, dgrad_lse, *moves, dout, dlse = tangents[:8]
        *_, scale, causal, mask_grad = args
        dout, dlse = _moved_outputs(args[2:8], moves, dout, dlse, scale, causal)
        results = torch.ops.onestep.attention_backward_and_jvp.default(
            *args[:8], dgrad, dgrad_lse, *moves, dout, dlse, scale, causal, mask_grad
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
        """⟨u, J(x)ᵀG⟩: by G a forward-mode pass along u, by x the tangent of the backward pass along u."""
        grad, grad_lse, q, k, v, mask, out, lse = ctx.saved_tensors
        umask = umask if ctx.mask_grad else None
        if uq is None and uk is None and uv is None and umask is None:
            return (None,) * 11
        needs = ctx.needs_input_grad
        options = ctx.scale, ctx.causal
        dout, dlse = torch.ops.onestep.attention_jvp.default(q, k, v, mask, out, lse, uq, uk, uv, umask, *options)
        by_operands: tuple[Any, ...] = (None,) * 4
        if any(needs[2:6]):
            grads = torch.ops.onestep.attention_backward_jvp.default(
                grad, grad_lse, q, k, v, mask, out, lse, None, None, uq, uk, uv, umask, dout, dlse, *options, needs[5]
            )
            by_operands = _operand_grads(grads, (q, k, v, mask), needs[5])
        return (
            _cast(dout, grad) if needs[0] else None,
            _cast(dlse, grad_lse) if needs[1] else None,
            *by_operands,
            None,
            None,
            None,
            None,
            None,
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
        dout, dlse = _moved_outputs(ctx.saved_tensors[2:], (dq, dk, dv, dmask), dout, dlse, *options)
        if dout is None and dgrad is None and dgrad_lse is None:
            return (None,) * 4
        grads = torch.ops.onestep.attention_backward_jvp.default(
            *ctx.saved_tensors, dgrad, dgrad_lse, dq, dk, dv, dmask, dout, dlse, *options, ctx.mask_grad
        )
        return *grads[:3], grads[3] if ctx.mask_grad else None


# ----------------------------------------------------------------------------------------------- attention_backward_jvp


_BACKWARD_JVP_DIMS = (3, 2, 3, 3, 3, 3, 3, 2, 3, 2, 3, 3, 3, 3, 3, 2)


def _backward_jvp_sizes(tensors: tuple[Any, ...]) -> _Sizes:
    grad, grad_lse, q, k, v, mask, out, _, dgrad, dgrad_lse, dq, dk, dv, dmask, dout, _ = tensors
    others = (out, grad, _column(grad_lse), dgrad, _column(dgrad_lse), dq, dk, dv, dmask, dout)
    return _check(q, k, v, mask, *others)


def _backward_jvp_fake(*args: Any) -> Grads:
    mask_grad: bool = args[18]
    return _grads_fake(_backward_jvp_sizes(args[:16]), args[2], args[5], mask_grad)


def _backward_jvp_cpu(*args: Any) -> Grads:
    grad, grad_lse, q, k, v, mask, out, lse, dgrad, dgrad_lse, dq, dk, dv, dmask, dout, dlse, *options = args
    sizes = _backward_jvp_sizes(args[:16])
    primal = _inputs(sizes, q, k, v, mask, out, lse, grad, grad_lse)
    tangent = _inputs(sizes, dq, dk, dv, dmask, dout, dlse, dgrad, dgrad_lse)
    return _grads_cpu("backward_jvp", sizes, primal, tangent, q, mask, *options)


define(
    "attention_backward_jvp(Tensor? grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
    "Tensor lse, Tensor? dgrad, Tensor? dgrad_lse, Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dmask, Tensor? dout, "
    "Tensor? dlse, float scale, bool causal, bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_backward_jvp_cpu,
    fake=_backward_jvp_fake,
    own_dims=_BACKWARD_JVP_DIMS,
)


class _AttentionBackwardJvp(OpFunction):
    """Derivatives of order three. out, lse, dout and dlse are functions of the other arguments, which get them all."""

    @staticmethod
    def forward_composite(*args: Any) -> Any:
        """The formula at O(T²) memory; it derives out, lse and their tangents from the other arguments."""
        return _formula_backward_jvp(*args[:6], *args[8:14], *args[16:])

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
        pulled = _pull_back(_formula_backward_jvp, (*tensors[:6], *tensors[8:14]), options, grads)
        return *pulled[:6], None, None, *pulled[6:], None, None, None, None, None


# ------------------------------------------------------------------------------------------- attention_backward_and_jvp

EightGrads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _backward_and_jvp_fake(*args: Any) -> EightGrads:
    return *_backward_jvp_fake(*args), *_backward_jvp_fake(*args)


def _backward_and_jvp_cpu(*args: Any) -> EightGrads:
    grad, grad_lse, q, k, v, mask, out, lse, dgrad, dgrad_lse, dq, dk, dv, dmask, dout, dlse, *options = args
    scale, causal, mask_grad = options
    sizes = _backward_jvp_sizes(args[:16])
    grads = _grads_fake(sizes, q, mask, mask_grad)
    tangents = _grads_fake(sizes, q, mask, mask_grad)
    _KERNELS["backward_and_jvp", sizes.dtype](
        _inputs(sizes, q, k, v, mask, out, lse, grad, grad_lse),
        _inputs(sizes, dq, dk, dv, dmask, dout, dlse, dgrad, dgrad_lse),
        *_arguments(sizes, mask, scale, causal),
        _native_grads(sizes, grads, mask_grad),
        _native_grads(sizes, tangents, mask_grad),
    )
    return *grads, *tangents


def _backward_and_jvp_apart(*args: Any) -> EightGrads:
    grads = torch.ops.onestep.attention_backward.default(*args[:8], *args[16:])
    return *grads, *torch.ops.onestep.attention_backward_jvp.default(*args)


def _backward_and_jvp_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Where tangents alone are mapped, the gradients are computed once."""
    ops = torch.ops.onestep
    if any(dim is not None for dim in in_dims[:8]):
        results = call_batched(ops.attention_backward_and_jvp.default, args, in_dims, _BACKWARD_JVP_DIMS)
        return results, (0,) * 8
    grads = ops.attention_backward.default(*args[:8], *args[16:])
    tangents = call_batched(ops.attention_backward_jvp.default, args, in_dims, _BACKWARD_JVP_DIMS)
    return (*grads, *tangents), (None,) * 4 + (0,) * 4


define(
    "attention_backward_and_jvp(Tensor? grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? mask, "
    "Tensor out, Tensor lse, Tensor? dgrad, Tensor? dgrad_lse, Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dmask, "
    "Tensor? dout, Tensor? dlse, float scale, bool causal, bool mask_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_backward_and_jvp_cpu,
    fake=_backward_and_jvp_fake,
    vmap=_backward_and_jvp_vmap,
)


register_values_and_tangents("attention_and_jvp", _and_jvp_apart)
register_values_and_tangents("attention_backward_and_jvp", _backward_and_jvp_apart)
register_derivatives("attention", _Attention)
register_derivatives("attention_jvp", _AttentionJvp)
register_derivatives("attention_backward", _AttentionBackward)
register_derivatives("attention_backward_jvp", _AttentionBackwardJvp)
