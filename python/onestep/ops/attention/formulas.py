"""Attention's products in torch's own ops, at O(T²) memory, for derivatives beyond the kernels'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onestep.ops.attention.schema import COMPUTE_DTYPES, Grads, Optional, result_dtype


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
        self.scores, self.blind = scores, blind
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


def formula_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Optional, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    at = _Formulas(q, k, v, mask, scale, causal)
    lse = torch.logsumexp(at.scores, -1).masked_fill(at.blind.squeeze(-1), -torch.inf)
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
    """Gradients in the op's dtype, with the mask's from that of the scores."""
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
    _, dL, dO = _Formulas(q, k, v, mask, scale, causal).push(dq, dk, dv, dmask)
    return dO.to(result_dtype(q)), dL.double()


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
    dS, dL, dO = at.push(dq, dk, dv, dmask)
    G = torch.zeros_like(at.O) if grad is None else at.cast(grad)
    dG = torch.zeros_like(at.O) if dgrad is None else at.cast(dgrad)
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
    return _results(grads, dT, q, mask, mask_grad)


def pull_back(
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
