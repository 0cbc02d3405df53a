"""The ops of attention in torch's own ops, at O(T²) memory.

They run for derivatives beyond order two, and on CUDA for sizes that no kernel takes. Names are those of
csrc/attention/attention.hpp: dS is a gradient, ``S_tangent`` is Ṡ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onestep.ops.attention.schema import COMPUTE_DTYPES, Grads, Optional, result_dtype


class _Formulas:
    """P, O and their tangents as plain torch expressions, which have derivatives of every order."""

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
        # Rows that see no key get P = 0. Their softmax is taken of scores that are not hidden, since that of -inf alone
        # is NaN, and so are its derivatives, which masked_fill would not remove.
        sees_none = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden & ~sees_none, -torch.inf)
        self.P = torch.softmax(scores, -1).masked_fill(sees_none, 0)
        self.scores, self.sees_none = scores, sees_none
        self.O = self.P @ self.v

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)

    def per_query_head(self, tensor: Tensor) -> Tensor:
        """What each query head reads of a tensor of key and value heads."""
        tensor = self.cast(tensor)
        return tensor if self.group == 1 else tensor.repeat_interleave(self.group, -3)

    def per_kv_head(self, tensor: Tensor) -> Tensor:
        """The gradient of such a tensor from those of the query heads."""
        return tensor if self.group == 1 else tensor.unflatten(-3, (self.kv_heads, self.group)).sum(-3)

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        return self.scale * (q @ k.mT)

    def tangents(self, dq: Optional, dk: Optional, dv: Optional, dmask: Optional) -> tuple[Tensor, Tensor, Tensor]:
        """Ṡ, L̇ and Ȯ."""
        S_tangent = torch.zeros_like(self.P)
        if dq is not None:
            S_tangent = S_tangent + self.products(self.cast(dq), self.k)
        if dk is not None:
            S_tangent = S_tangent + self.products(self.q, self.per_query_head(dk))
        if dmask is not None:
            S_tangent = S_tangent + dmask
        weighed = self.P * S_tangent
        L_tangent = weighed.sum(-1)
        O_tangent = weighed @ self.v - L_tangent.unsqueeze(-1) * self.O
        if dv is not None:
            O_tangent = O_tangent + self.P @ self.per_query_head(dv)
        return S_tangent, L_tangent, O_tangent


def formula_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Optional, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    at = _Formulas(q, k, v, mask, scale, causal)
    lse = torch.logsumexp(at.scores, -1).masked_fill(at.sees_none.squeeze(-1), -torch.inf)
    return at.O.to(result_dtype(q)), lse.double()


def formula_backward(
    grad: Optional,
    grad_lse: Optional,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional,
    scale: float,
    causal: bool,
    mask_grad: bool,
) -> Grads:
    at = _Formulas(q, k, v, mask, scale, causal)
    G = torch.zeros_like(at.O) if grad is None else at.cast(grad)
    delta = (G * at.O).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - at.cast(grad_lse).unsqueeze(-1)
    dS = at.P * (G @ at.v.mT - delta)
    grads = (scale * (dS @ at.k), at.per_kv_head(scale * (dS.mT @ at.q)), at.per_kv_head(at.P.mT @ G))
    return _results(grads, dS, q, mask, mask_grad)


def _results(
    grads: tuple[Tensor, Tensor, Tensor], by_scores: Tensor, q: Tensor, mask: Optional, mask_grad: bool
) -> Grads:
    """Gradients in the op's dtype. That of the mask is that of the scores, summed to the mask's shape."""
    dtype = result_dtype(q)
    by_q, by_k, by_v = (grad.to(dtype) for grad in grads)
    if mask is None or not mask_grad:
        return by_q, by_k, by_v, q.new_empty((*by_scores.shape[:-3], 0), dtype=by_scores.dtype)
    missing = by_scores.dim() - mask.dim()
    return by_q, by_k, by_v, by_scores.sum_to_size(by_scores.shape[:missing] + mask.shape)


def formula_jvp(
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
    _, L_tangent, O_tangent = _Formulas(q, k, v, mask, scale, causal).tangents(dq, dk, dv, dmask)
    return O_tangent.to(result_dtype(q)), L_tangent.double()


def formula_backward_jvp(
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
    S_tangent, L_tangent, O_tangent = at.tangents(dq, dk, dv, dmask)
    G = torch.zeros_like(at.O) if grad is None else at.cast(grad)
    G_tangent = torch.zeros_like(at.O) if dgrad is None else at.cast(dgrad)
    delta = (G * at.O).sum(-1, keepdim=True)
    delta_tangent = (G_tangent * at.O + G * O_tangent).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - at.cast(grad_lse).unsqueeze(-1)
    if dgrad_lse is not None:
        delta_tangent = delta_tangent - at.cast(dgrad_lse).unsqueeze(-1)
    P_tangent = at.P * (S_tangent - L_tangent.unsqueeze(-1))
    dP_tangent = G_tangent @ at.v.mT
    if dv is not None:
        dP_tangent = dP_tangent + G @ at.per_query_head(dv).mT
    centred = G @ at.v.mT - delta
    dS = at.P * centred
    dS_tangent = P_tangent * centred + at.P * (dP_tangent - delta_tangent)
    by_q, by_k = dS_tangent @ at.k, dS_tangent.mT @ at.q
    if dk is not None:
        by_q = by_q + dS @ at.per_query_head(dk)
    if dq is not None:
        by_k = by_k + dS.mT @ at.cast(dq)
    by_v = P_tangent.mT @ G + at.P.mT @ G_tangent
    grads = (scale * by_q, at.per_kv_head(scale * by_k), at.per_kv_head(by_v))
    return _results(grads, dS_tangent, q, mask, mask_grad)


def pull_back(
    formula: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Optional, ...],
    options: tuple[Any, ...],
    cotangents: tuple[Optional, ...],
) -> list[Optional]:
    """The gradients of ⟨cotangents, formula(*tensors, *options)⟩ for the tensors; None for those that have none."""
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
