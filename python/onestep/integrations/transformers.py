"""Hugging Face models on onestep's attention: ``register_attention()``, then ``attn_implementation="onestep"``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from onestep.functional import scaled_dot_product_attention

NAME = "onestep"


def register_attention() -> None:
    """Makes ``attn_implementation="onestep"`` known to transformers, for ``from_pretrained`` and ``from_config``.

    Masks are those of transformers' "sdpa": boolean, or none where a causal mask says it all.
    """
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _with_bias(position_bias: Tensor, attention_mask: Tensor | None) -> Tensor:
    """A bias of positions and a mask as one additive mask."""
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return position_bias.masked_fill(~attention_mask, -torch.inf)
    return position_bias + attention_mask


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: heads first in, (batch, length, heads, features) out; no weights."""
    for unsupported in ("softcap", "s_aux", "cache"):
        if kwargs.get(unsupported) is not None:
            raise NotImplementedError(f'attn_implementation="{NAME}" does not support {unsupported}; use "eager"')
    queries, keys = query.shape[-2], key.shape[-2]
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    # One query is the last of its sequence and sees every key.
    is_causal = is_causal and attention_mask is None and queries > 1
    if position_bias is not None:
        if is_causal:
            attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
            is_causal = False
        attention_mask = _with_bias(position_bias, attention_mask)
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        is_causal,
        scale=scaling,
        enable_gqa=query.shape[-3] != key.shape[-3],
    )
    return out.transpose(1, 2).contiguous(), None
