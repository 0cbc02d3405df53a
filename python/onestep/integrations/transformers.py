"""Hugging Face models on onestep's attention: ``register_attention()``, then ``attn_implementation="onestep"``."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "onestep.integrations.transformers needs transformers, which is not installed: pip install transformers",
        name="transformers",
    ) from error

from onestep.functional import scaled_dot_product_attention

NAME = "onestep"


def register_attention() -> None:
    """Makes ``attn_implementation="onestep"`` known to transformers, for ``from_pretrained`` and ``from_config``.

    Masks are those of transformers' "sdpa": boolean, or none where a causal mask says it all. So an architecture that
    transformers refuses for "sdpa" is refused here, too, with a ValueError in transformers' words: it does not read
    such masks, or does not call the attention that is registered. So is one whose code asks for "sdpa" by name, as
    those with sparse attention do.

    The attention is that of ``scaled_dot_product_attention`` in ``onestep.functional``: heads (batch, heads, tokens,
    features) in float32, float64, bfloat16 or float16, with derivatives of every order, up to the second in O(tokens)
    memory. Attention weights (``output_attentions=True``) are not made: their place holds None. "softcap", sinks and
    paged caches raise NotImplementedError when the model runs.

    May be called more than once. Nothing else in transformers changes, and models with other implementations run as
    before.

    Examples:
        >>> import torch  # a model with second derivatives at O(T) memory
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> from onestep.integrations.transformers import register_attention
        >>> register_attention()
        >>> config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="onestep").eval()
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 20])
    """
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if not hasattr(PreTrainedModel.get_correct_attn_implementation, _CHECKS_ONESTEP):
        PreTrainedModel.get_correct_attn_implementation = _checked(PreTrainedModel.get_correct_attn_implementation)


# Marks transformers' check once it is wrapped, so that registering twice does not wrap it twice.
_CHECKS_ONESTEP = "_checks_onestep"


def _checked(get_correct_attn_implementation: Any) -> Any:
    """transformers' check of the implementation that a model is asked for, which lets any registered name pass."""

    @functools.wraps(get_correct_attn_implementation)
    def check(self: Any, requested_attention: str | None, is_init_check: bool = False) -> Any:
        if requested_attention == NAME:
            _check_supports_masks(self, is_init_check)
        return get_correct_attn_implementation(self, requested_attention, is_init_check)

    setattr(check, _CHECKS_ONESTEP, True)
    return check


def _check_supports_masks(model: Any, is_init_check: bool) -> None:
    try:
        model.get_correct_attn_implementation("sdpa", is_init_check)
    except (ValueError, ImportError) as error:
        raise ValueError(f'attn_implementation="{NAME}" works where "sdpa" does: {error}') from None
    if not model._can_set_attn_implementation():
        raise ValueError(
            f'{type(model).__name__} does not take attn_implementation="{NAME}": its attention does not go through '
            'transformers\' AttentionInterface. Use attn_implementation="sdpa" within '
            "onestep.functional.replace_attention() instead."
        )
    if _asks_by_name(model):
        raise ValueError(
            f'{type(model).__name__} does not take attn_implementation="{NAME}": its code asks for "sdpa" by that '
            'name, and does for it what it does for no other. Use attn_implementation="sdpa" within '
            "onestep.functional.replace_attention() instead."
        )


# How the code of a model asks for an implementation by its name: a branch for "sdpa" (sparse attention, which masks all
# but the largest scores, is there alone), or a table of classes.
_BY_NAME = re.compile(
    r"""_attn_implementation\s*(==|!=|in|not\s+in)\s[^\n]*["']sdpa["']|_CLASSES\[[\w.]*attn_implementation\]"""
)


def _asks_by_name(model: Any) -> bool:
    """Whether the code of a model treats "sdpa" as no other implementation, so that it would be wrong under ours."""
    modules = {kind.__module__ for kind in type(model).__mro__ if issubclass(kind, PreTrainedModel)}
    return any(map(_module_asks_by_name, modules - {PreTrainedModel.__module__}))


@functools.cache
def _module_asks_by_name(name: str) -> bool:
    try:
        return _BY_NAME.search(inspect.getsource(sys.modules[name])) is not None
    except (OSError, TypeError, KeyError):
        # Code without a file.
        return False


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
