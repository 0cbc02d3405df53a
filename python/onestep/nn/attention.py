"""Multi-head attention on onestep's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.functional import replace_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with derivatives of every order at O(T) memory; parameters are interchangeable.

    The kernel runs where ``need_weights=False`` and no dropout is active; with
    ``need_weights=True``, torch's default, the weights are asked for, which are O(T²), and torch's own operations
    run.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch's.

    Examples:
        >>> import torch
        >>> from onestep.nn import MultiheadAttention
        >>> layer, x = MultiheadAttention(8, 2, batch_first=True), torch.zeros(1, 5, 8)
        >>> layer(x, x, x, need_weights=False)[0].shape
        torch.Size([1, 5, 8])
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's; shapes (T, N, E), (N, T, E) with ``batch_first``, or (T, E)."""
        with replace_attention():
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
