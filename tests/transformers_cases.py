"""Small models of every architecture of the installed transformers, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

TOKENS, WIDTH, HEADS, LAYERS, PIXELS = 50, 32, 4, 2, 32
# Names that configurations use for the sizes of a model.
SMALL = (
    (TOKENS, "vocab_size"),
    (WIDTH, "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim emb_dim embed_dim"),
    (48, "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim d_inner ffn_hidden_size"),
    (24, "moe_intermediate_size shared_expert_intermediate_size"),
    (
        LAYERS,
        "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers num_experts_per_tok num_key_value_heads index_n_heads",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
        "num_local_experts n_routed_experts sliding_window rotary_dim index_topk window_size",
    ),
    (WIDTH // HEADS, "head_dim d_kv d_head kv_lora_rank q_lora_rank v_head_dim index_head_dim qk_head_dim patch_size"),
    # The two halves of a head with positions apart from the rest.
    (WIDTH // HEADS // 2, "qk_nope_head_dim qk_rope_head_dim"),
    (PIXELS, "image_size"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len"),
    (0, "pad_token_id"),
    (False, "use_cache"),
    (0.0, "dropout attention_dropout hidden_dropout"),
    (1, "bos_token_id decoder_start_token_id n_group topk_group"),
    (2, "eos_token_id"),
)
SIZES = {name: value for value, names in SMALL for name in names.split()}


def architectures() -> tuple[dict[str, str], dict[str, str]]:
    """One architecture for each kind of configuration, its class by its name: of text, and of images."""
    text: dict[str, str] = {}
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for model_type, name in names.items():
            text.setdefault(model_type, name if isinstance(name, str) else name[0])
    images = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return text, {kind: name if isinstance(name, str) else name[0] for kind, name in images.items() if kind not in text}


def _parts(configuration: Any) -> Iterator[Any]:
    """A configuration and those inside it, of text or images, say."""
    yield configuration
    for name in getattr(configuration, "sub_configs", None) or {}:
        if getattr(configuration, name, None) is not None:
            yield from _parts(getattr(configuration, name))


def _is_settable(configuration: Any, name: str) -> bool:
    """Whether an attribute is one size: not one for each of several stages, and not computed from others."""
    if isinstance(getattr(type(configuration), name, None), property):
        return False
    try:
        return isinstance(getattr(configuration, name, None), (int, float))
    except AttributeError:  # one that differs from layer to layer
        return False


def _kinds_of_layers(configuration: Any) -> int:
    """Makes the first layers one of each kind, such as sliding and full attention, and says how many there are."""
    kinds = {
        name: list(dict.fromkeys(getattr(configuration, name)))
        for name in ("layer_types", "mlp_layer_types")
        if isinstance(vars(configuration).get(name), (list, tuple)) and getattr(configuration, name)
    }
    layers = max([LAYERS, *map(len, kinds.values())])
    for name, found in kinds.items():
        setattr(configuration, name, [*found, *[found[-1]] * layers][:layers])
    return layers


def by_attributes(model_type: str) -> Any:
    """The default configuration with its sizes changed."""
    configuration = transformers.CONFIG_MAPPING[model_type]()
    for part in _parts(configuration):
        layers = _kinds_of_layers(part)
        for name, value in SIZES.items():
            stages = name == "embed_dim" and not _is_settable(part, "num_heads") and hasattr(part, "num_heads")
            if _is_settable(part, name) and not stages:
                setattr(part, name, layers if name == "num_hidden_layers" else value)
        if _is_settable(part, "qk_rope_head_dim") and _is_settable(part, "head_dim"):
            part.head_dim = part.qk_rope_head_dim
        # Keys and values of low rank have no groups of heads.
        if _is_settable(part, "kv_lora_rank") and _is_settable(part, "num_key_value_heads"):
            part.num_key_value_heads = part.num_attention_heads
    return configuration


def by_arguments(model_type: str) -> Any:
    """A configuration that computes the rest from its sizes, with layers enough for each kind of layer."""
    kind = transformers.CONFIG_MAPPING[model_type]
    default = kind().to_dict()
    sizes = {name: value for name, value in SIZES.items() if isinstance(default.get(name), (int, float))}
    return kind(**sizes | {"num_hidden_layers": 2 * LAYERS})


WAYS: tuple[Callable[[str], Any], ...] = (by_attributes, by_arguments)


def build(model_type: str, name: str, way: Callable[[str], Any], implementation: str) -> Any:
    """A model with an implementation of attention, always with the same weights, none of which are zeros.

    Some models begin with zeros where attention would change the output.
    """
    kind = getattr(transformers, name)
    configuration = way(model_type)
    if not isinstance(configuration, kind.config_class):
        configuration = configuration.get_text_config()
    torch.manual_seed(0)
    model = kind._from_config(configuration, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def inputs(kind: str) -> tuple[dict[str, Any], torch.Tensor]:
    """What a model of text or images reads, and which outputs do not belong to padding."""
    generator = torch.Generator().manual_seed(0)
    if kind == "images":
        return {"pixel_values": torch.randn(2, 3, PIXELS, PIXELS, generator=generator)}, torch.ones(2, dtype=torch.bool)
    tokens = torch.randint(3, TOKENS, (2, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask}, mask.bool()
