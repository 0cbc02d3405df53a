"""Schemas of scaled dot-product attention, and of the ops that its derivatives up to order two are made of.

``attention`` gives O and L = logsumexp(S). L is float64 always: all probabilities of a row are computed from it, so
that its rounding would be an error that they share. The formulas are in csrc/attention/attention.hpp.

The other ops take O and L as ``out`` and ``lse``, so as not to compute them again. These must be what ``attention``
gave for the same q, k, v and mask, and derivatives treat them as functions of those: no gradient goes to ``out`` or
``lse`` (docs/decisions/0002-cached-factor.md). Likewise ``dout`` and ``dlse``, their tangents. A name with a d in front
is the tangent of an argument; G is the cotangent of O (``grad``), g that of L (``grad_lse``). All ops run at O(T) extra
memory:

=========================  ==================================================================
``attention_jvp``          tangents of O and L
``attention_backward``     gradients of ⟨G, O⟩ + ⟨g, L⟩
``attention_backward_jvp`` tangents of these gradients, which are also their gradients, since
                           the Hessian of ⟨G, O⟩ + ⟨g, L⟩ is symmetric
``attention_and_jvp``,     the results of an op and their tangents, for which the scores are
``..._backward_and_jvp``   computed once; forward mode calls these
=========================  ==================================================================

Beyond these (forward mode twice, order three) derivatives are those of the same formulas in torch's ops, at O(T²)
memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from onestep.ops._cuda import runs_on_cuda
from onestep.ops._library import call_batched, define
from onestep.ops.operands import MOST_BATCH_DIMS, broadcast_batch, check_dims, check_like, check_size

Batch = tuple[int, ...]
Optional = Tensor | None
Grads = tuple[Tensor, Tensor, Tensor, Tensor]
EightGrads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# The type that the kernels compute in. float16 is for CUDA alone, see ``check_dtype``.
COMPUTE_DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def result_dtype(q: Tensor) -> torch.dtype:
    """The dtype of results: CUDA kernels round theirs to q's dtype, CPU kernels return what they compute in."""
    return q.dtype if runs_on_cuda(q) else COMPUTE_DTYPES[q.dtype]


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a dtype that no kernel of the tensor's device takes."""
    if tensor.dtype not in COMPUTE_DTYPES or (tensor.dtype == torch.float16 and not runs_on_cuda(tensor)):
        expected = "torch.float32, torch.float64 or torch.bfloat16, or torch.float16 on CUDA"
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {expected}")


class Sizes(NamedTuple):
    """What the shapes of q, k, v and mask say."""

    batch: Batch
    heads: int
    kv_heads: int
    queries: int
    keys: int
    d: int
    dv: int
    dtype: torch.dtype  # computed in
    results: torch.dtype

    def rows(self, cols: int) -> Batch:
        return (*self.batch, self.heads, self.queries, cols)

    def key_rows(self, cols: int) -> Batch:
        return (*self.batch, self.kv_heads, self.keys, cols)


def check_operands(q: Tensor, k: Tensor, v: Tensor, mask: Optional, *others: Optional) -> Sizes:
    """Checks the operands; errors name them as torch's function does.

    ``others`` have three dimensions of their own, too. Only their batch dimensions are looked at here; the kernels
    check the rest, when they expand them.
    """
    check_dtype("query", q)
    dtype = COMPUTE_DTYPES[q.dtype]
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        check_like(name, tensor, q)
        check_dims(name, tensor, 3, "(..., heads, length, features)")
    *_, heads, queries, d = q.shape
    *_, kv_heads, keys, k_d = k.shape
    *_, v_heads, v_keys, dv = v.shape
    if (k_d, v_keys, v_heads) != (d, keys, kv_heads):
        check_size("key", k, -1, d, f"(..., keys, {d}): as many features as query")
        check_size("value", v, -2, keys, f"(..., {keys}, features): as many rows as key")
        check_size("value", v, -3, kv_heads, f"(..., {kv_heads}, keys, features): as many heads as key")
    if d == 0:
        raise ValueError(f"query has shape {tuple(q.shape)}; expected one feature at least")
    if kv_heads == 0:
        raise ValueError(f"key has shape {tuple(k.shape)}; expected one head at least")
    if heads % kv_heads != 0:
        raise ValueError(
            f"query has shape {tuple(q.shape)} and key {tuple(k.shape)}; "
            "expected as many heads as key, or a multiple of them"
        )
    batches = [tuple(tensor.shape)[:-3] for tensor in (q, k, v, mask, *others) if tensor is not None]
    if mask is not None:
        if mask.dtype not in (torch.bool, q.dtype, dtype):
            raise TypeError(f"attn_mask has dtype {mask.dtype}; expected torch.bool or {q.dtype}, like query")
        if mask.device != q.device:
            raise ValueError(f"attn_mask is on device {mask.device}; expected {q.device}, like the other operands")
        check_dims("attn_mask", mask, 3, "(..., heads, queries, keys)")
        for dim, size in zip((-3, -2, -1), (heads, queries, keys), strict=True):
            if mask.shape[dim] not in (1, size):
                raise ValueError(
                    f"attn_mask has shape {tuple(mask.shape)}; expected one that broadcasts to "
                    f"(..., {heads}, {queries}, {keys})"
                )
    batch = broadcast_batch("query, key, value, attn_mask", *batches)
    if len(batch) > MOST_BATCH_DIMS:
        raise ValueError(f"batch dimensions {batch}; expected at most {MOST_BATCH_DIMS}")
    return Sizes(batch, heads, kv_heads, queries, keys, d, dv, dtype, result_dtype(q))


# ------------------------------------------------------------------------------------------------------------ attention


def empty_outputs(sizes: Sizes, q: Tensor) -> tuple[Tensor, Tensor]:
    shape = sizes.rows(sizes.dv)
    # Sizes as arguments of their own take a microsecond less than a tuple.
    return q.new_empty(*shape, dtype=sizes.results), q.new_empty(*shape[:-1], dtype=torch.float64)


def forward_results(
    q: Tensor, k: Tensor, v: Tensor, mask: Optional, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    return empty_outputs(check_operands(q, k, v, mask), q)


attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float scale, bool causal) "
    "-> (Tensor, Tensor)",
    fake=forward_results,
    own_dims=(3, 3, 3, 3),
)


# -------------------------------------------------------------------------------------------------------- attention_jvp


_JVP_DIMS = (3, 3, 3, 3, 3, 2, 3, 3, 3, 3)


def jvp_results(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, mask, out, _, *tangents = args[:10]
    return empty_outputs(check_operands(q, k, v, mask, out, *tangents), q)


attention_jvp = define(
    "attention_jvp(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor out, Tensor lse, "
    "Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dmask, float scale, bool causal) -> (Tensor, Tensor)",
    fake=jvp_results,
    own_dims=_JVP_DIMS,
)


# ---------------------------------------------------------------------------------------------------- attention_and_jvp


def and_jvp_results(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = check_operands(*args[:8])
    return *empty_outputs(sizes, args[0]), *empty_outputs(sizes, args[0])


def _and_jvp_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Where tangents alone are mapped, the value is computed once."""
    if any(dim is not None for dim in in_dims[:4]):
        return call_batched(attention_and_jvp, args, in_dims, (3,) * 8), (0,) * 4
    out, lse = attention.dispatched(*args[:4], *args[8:])
    jvp_dims = (*in_dims[:4], None, None, *in_dims[4:])
    jvp_args = (*args[:4], out, lse, *args[4:])
    tangents = call_batched(attention_jvp, jvp_args, jvp_dims, _JVP_DIMS)
    return (out, lse, *tangents), (None, None, 0, 0)


attention_and_jvp = define(
    "attention_and_jvp(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? dq, "
    "Tensor? dk, Tensor? dv, Tensor? dmask, float scale, bool causal) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=and_jvp_results,
    vmap=_and_jvp_vmap,
)


# --------------------------------------------------------------------------------------------------- attention_backward


def empty_grads(sizes: Sizes, q: Tensor, mask: Optional, mask_grad: bool) -> Grads:
    """Empty gradients. That of the mask keeps the dimensions of size 1 over which the mask is broadcast."""
    shape: Batch = (*sizes.batch, 0)
    if mask_grad:
        if mask is None or mask.dtype == torch.bool:
            raise ValueError("mask_grad=True needs an attn_mask that is added to the scores")
        own = tuple(mask.shape)
        shape = sizes.batch[: len(sizes.batch) + 3 - len(own)] + own
    return (
        q.new_empty(sizes.rows(sizes.d), dtype=sizes.results),
        q.new_empty(sizes.key_rows(sizes.d), dtype=sizes.results),
        q.new_empty(sizes.key_rows(sizes.dv), dtype=sizes.results),
        q.new_empty(shape, dtype=sizes.dtype),
    )


def zeroed_without_scores(sizes: Sizes, *grads: Tensor) -> bool:
    """Whether there is no score at all (no batch element, head, query or key); if so, sets the gradients to zero."""
    if 0 not in (*sizes.batch, sizes.heads, sizes.queries, sizes.keys):
        return False
    for grad in grads:
        grad.zero_()
    return True


def backward_results(*args: Any) -> Grads:
    grad, grad_lse, q, k, v, mask, out, _, _, _, mask_grad = args
    return empty_grads(check_operands(q, k, v, mask, out, grad, column(grad_lse)), q, mask, mask_grad)


def column(lse: Optional) -> Optional:
    """L, or its cotangent, with a dimension of columns, as ``check_operands`` takes ``others``."""
    return None if lse is None else lse.unsqueeze(-1)


attention_backward = define(
    "attention_backward(Tensor? grad, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_mask, Tensor out, Tensor lse, float scale, bool causal, bool mask_grad) -> (Tensor, Tensor, "
    "Tensor, Tensor)",
    fake=backward_results,
    own_dims=(3, 2, 3, 3, 3, 3, 3, 2),
)


# ----------------------------------------------------------------------------------------------- attention_backward_jvp


_BACKWARD_JVP_DIMS = (3, 2, 3, 3, 3, 3, 3, 2, 3, 2, 3, 3, 3, 3, 3, 2)


def backward_jvp_sizes(tensors: tuple[Any, ...]) -> Sizes:
    grad, grad_lse, q, k, v, mask, out, _, dgrad, dgrad_lse, dq, dk, dv, dmask, dout, _ = tensors
    others = (out, grad, column(grad_lse), dgrad, column(dgrad_lse), dq, dk, dv, dmask, dout)
    return check_operands(q, k, v, mask, *others)


def backward_jvp_results(*args: Any) -> Grads:
    tensors, (_, _, mask_grad) = args[:16], args[16:]
    return empty_grads(backward_jvp_sizes(tensors), tensors[2], tensors[5], mask_grad)


attention_backward_jvp = define(
    "attention_backward_jvp(Tensor? grad, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_mask, Tensor out, Tensor lse, Tensor? dgrad, Tensor? dgrad_lse, Tensor? dq, Tensor? dk, "
    "Tensor? dv, Tensor? dmask, Tensor? dout, "
    "Tensor? dlse, float scale, bool causal, bool mask_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=backward_jvp_results,
    own_dims=_BACKWARD_JVP_DIMS,
)


# ------------------------------------------------------------------------------------------- attention_backward_and_jvp


def backward_and_jvp_results(*args: Any) -> EightGrads:
    return *backward_jvp_results(*args), *backward_jvp_results(*args)


def _backward_and_jvp_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Where tangents alone are mapped, the gradients are computed once."""
    if any(dim is not None for dim in in_dims[:8]):
        results = call_batched(attention_backward_and_jvp, args, in_dims, _BACKWARD_JVP_DIMS)
        return results, (0,) * 8
    grads = attention_backward.dispatched(*args[:8], *args[16:])
    tangents = call_batched(attention_backward_jvp, args, in_dims, _BACKWARD_JVP_DIMS)
    return (*grads, *tangents), (None,) * 4 + (0,) * 4


attention_backward_and_jvp = define(
    "attention_backward_and_jvp(Tensor? grad, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_mask, Tensor out, Tensor lse, Tensor? dgrad, Tensor? dgrad_lse, Tensor? dq, Tensor? dk, "
    "Tensor? dv, Tensor? dmask, "
    "Tensor? dout, Tensor? dlse, float scale, bool causal, bool mask_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=backward_and_jvp_results,
    vmap=_backward_and_jvp_vmap,
)
