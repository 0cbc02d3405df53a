"""Multi-head attention on onestep's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep._fork import safe_after_fork
from onestep.functional import replace_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with derivatives of every order; parameters are interchangeable.

    The kernel runs where ``need_weights=False`` and no dropout is active; with
    ``need_weights=True``, torch's default, the weights are asked for, which are O(T²), and torch's own operations
    run.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch's. The kernel takes float32, float64 and bfloat16 on the CPU.

    Raises:
        ValueError: ``embed_dim`` or ``num_heads`` is not above 0.
        AssertionError: ``embed_dim`` is no multiple of ``num_heads``. These errors are torch's own.

    Examples:
        >>> import torch
        >>> from onestep.nn import MultiheadAttention
        >>> layer, x = MultiheadAttention(8, 2, batch_first=True), torch.zeros(1, 5, 8)
        >>> layer(x, x, x, need_weights=False)[0].shape
        torch.Size([1, 5, 8])
    """

    @safe_after_fork
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
        """Attention of the queries over keys and values, as torch's; T queries, S keys, N sequences.

        All are of the parameters' dtype, but masks, which may be boolean.

        Args:
            query: (T, N, E), with ``batch_first`` (N, T, E), or (T, E) of one sequence.
            key, value: (S, N, kdim) and (S, N, vdim), likewise.
            key_padding_mask: (N, S) or (S,), boolean or additive: True or -inf where a key is left out.
            need_weights: whether to return the weights, which are O(T·S), by torch's own operations.
            attn_mask: (T, S) or (N·heads, T, S), boolean (True: left out) or additive.
            average_attn_weights: whether weights are averaged over heads.
            is_causal: that ``attn_mask`` is the causal mask, which must be given.

        Returns:
            The outputs in the shape of ``query``, with E features, and the weights (N, T, S), (N, heads, T, S) or None.

        Raises:
            RuntimeError, AssertionError: shapes or dtypes do not fit, or ``is_causal`` has no mask (torch's own).
        """
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
