"""Scaled dot-product attention with derivatives of every order, up to the second at O(T) memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onestep._fork import safe_after_fork
from onestep.ops.attention import attention


def _check(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> None:
    """Checks what the op does not, which has no ``dropout_p`` and always has heads."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (..., length, features)")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p={dropout_p}; expected a probability, from 0 to 1")
    if dropout_p > 0:
        raise NotImplementedError(
            f"dropout_p={dropout_p}; expected 0: the derivatives recompute the probabilities, and dropout would make "
            "each of them another function. Call model.eval(), or pass dropout_p=0.0 and drop outputs instead."
        )


def _with_heads(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() > 2 else tensor.unsqueeze(0)


def _shared_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The operands with heads as the kernels take them: as many for value as for key, for query a multiple of them."""
    heads = query.shape[-3], key.shape[-3], value.shape[-3]
    if enable_gqa and heads[1] == heads[2] > 0 and heads[0] % heads[1] == 0:
        return query, key, value
    if enable_gqa:
        raise ValueError(
            f"query, key and value have {heads[0]}, {heads[1]} and {heads[2]} heads; "
            "expected as many in value as in key, and in query a multiple of them"
        )
    if heads[1] == heads[2] and heads[1] in (1, heads[0]):
        return query, key, value
    most = max(heads)
    if any(count not in (1, most) for count in heads):
        raise ValueError(
            f"query, key and value have {heads[0]}, {heads[1]} and {heads[2]} heads; "
            "expected as many in each, or one, or enable_gqa=True"
        )
    expanded = [tensor.expand(*tensor.shape[:-3], most, *tensor.shape[-2:]) for tensor in (query, key, value)]
    return expanded[0], expanded[1], expanded[2]


@safe_after_fork
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes softmax(scale · query keyᵀ + mask) value; takes what torch's function of the same name takes.

    Values, gradients, forward mode, forward over reverse and reverse over reverse (Hessian-vector products) are exact
    and take memory that grows with the length T, not with T²: scores are computed by tiles, and again for derivatives
    (Dao et al., FlashAttention, NeurIPS 2022; Dao, FlashAttention-2, 2023). For these the log-sum-exp of each row is
    kept, and for the second order its tangent.
    Forward mode twice and derivatives of order three run on torch's own ops, at O(T²) memory.

    Rows of ``query`` that see no key give zeros, with zero gradients. On the CPU, inputs are read in place, whatever
    their strides, and results are bitwise the same for any number of threads. bfloat16 is accumulated in float32.

    Args:
        query: (..., Hq, T, E), or (T, E); float32, float64 or bfloat16, on a CPU or a GPU, or there float16.
        key: (..., H, S, E). Batch dimensions broadcast.
        value: (..., H, S, Ev).
        attn_mask: broadcasts to (..., Hq, T, S). bool: False hides the key; float: added to the scores, differentiable.
        dropout_p: 0.
        is_causal: the query at position i sees the keys 0 to i, of those that ``attn_mask`` leaves.
        scale: what the products are multiplied by; 1/√E by default.
        enable_gqa: grouped queries: query head h reads key and value head h // (Hq / H), without copies.

    Returns:
        (..., Hq, T, Ev), in the dtype of ``query``.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit.
        NotImplementedError: ``dropout_p`` > 0.

    Examples:
        >>> import torch
        >>> from onestep.functional import scaled_dot_product_attention
        >>> q, k, v = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
        >>> out = scaled_dot_product_attention(q, k, v)
        >>> (slope,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        >>> slope.square().sum().backward()  # a second derivative
        >>> out.shape, q.grad.shape
        (torch.Size([1, 2, 5, 8]), torch.Size([1, 2, 5, 8]))
    """
    _check(query, key, value, dropout_p)
    q, k, v = _shared_heads(_with_heads(query), _with_heads(key), _with_heads(value), enable_gqa)
    most_dims = max(q.dim(), k.dim(), v.dim())
    mask = attn_mask
    if mask is not None:
        if mask.dim() > most_dims:
            raise ValueError(
                f"attn_mask has shape {tuple(mask.shape)}; expected at most as many dimensions as query, key and value"
            )
        mask = mask.reshape((1,) * (most_dims - mask.dim()) + tuple(mask.shape))
        if mask.dtype == torch.float32 and query.dtype == torch.float64:
            mask = mask.double()
    factor = 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)
    out: Tensor = attention(q, k, v, mask, factor, is_causal)[0]
    if out.dtype != query.dtype:
        out = out.to(query.dtype)
    return out.squeeze(0) if max(query.dim(), key.dim(), value.dim()) == 2 and out.dim() == 3 else out
