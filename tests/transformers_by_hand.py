"""Sizes, by hand, of architectures that no general way makes small, and what some of them read instead of tokens.

See ``transformers_cases`` for the general ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers_cases import HEADS, LAYERS, PIXELS, TOKENS, WIDTH

_TEXT = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
_SLIDING = ["sliding_attention", "full_attention"]
_SHARED = {**_TEXT, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4, "layer_types": 2 * _SLIDING}
_BYTES = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_MUSIC = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "num_codebooks": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "use_cache": False,
}
_IMAGE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "patch_size": 8,
}
# How many places of the text an image takes, and the token that marks them.
_IMAGE_TOKENS, _MARK = 4, TOKENS - 1

ARGUMENTS: dict[str, dict[str, Any]] = {
    "bamba": {**_TEXT, **_STATE_SPACE, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_TEXT,
        **_STATE_SPACE,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "shared_intermediate_size": 24,
    },
    "zamba": {
        **_TEXT,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        "initializer_range": 0.2,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {
        **_TEXT,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "chunk_size": 4,
        "use_mamba_kernels": False,
        "initializer_range": 0.2,
        "adapter_rank": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "dbrx": {
        "vocab_size": TOKENS,
        "d_model": WIDTH,
        "n_heads": HEADS,
        "n_layers": LAYERS,
        "max_seq_len": 64,
        "pad_token_id": 0,
        "use_cache": False,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "dots1": {**_TEXT, **_EXPERTS, "n_shared_experts": 1, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "esm": {
        "vocab_size": TOKENS,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "mask_token_id": 3,
        "position_embedding_type": "rotary",
    },
    "hunyuan_v1_dense": {**_TEXT, "head_dim": 8},
    "hunyuan_v1_moe": {**_TEXT, "head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {
        **_TEXT,
        **_EXPERTS,
        "num_experts": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "ministral": {**_TEXT, "head_dim": 8, "sliding_window": 4, "layer_types": _SLIDING},
    "nemotron": {**_TEXT, "head_dim": 8},
    "dots3_note_text": {
        **_TEXT,
        **_EXPERTS,
        **_LATENT,
        "num_key_value_heads": HEADS,
        "n_routed_experts": 4,
        "shared_experts_intermediate_size": 24,
        "index_topk": 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
    },
    "gemma3n_text": {
        **_SHARED,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": TOKENS,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "qwen4_exp_text": {
        **_TEXT,
        **_EXPERTS,
        "head_dim": 8,
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "blt": {
        "vocab_size": TOKENS,
        "patch_size": 4,
        "local_attention_window_len": 8,
        "encoder_hash_byte_group_size": [2, 3],
        "encoder_hash_byte_group_vocab": 40,
        "pad_token_id": 0,
        "use_cache": False,
        "patcher_config": _BYTES,
        "encoder_config": {**_BYTES, "hidden_size_global": 2 * WIDTH},
        "decoder_config": {**_BYTES, "hidden_size_global": 2 * WIDTH},
        "global_config": {**_BYTES, "hidden_size": 2 * WIDTH},
    },
    "cohere_compass_text": {
        **_TEXT,
        "sliding_window": 4,
        "layer_types": _SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]} for kind in _SLIDING
        },
    },
    "deepseek_v2": {
        **_TEXT,
        **_EXPERTS,
        **_LATENT,
        "num_key_value_heads": HEADS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "esmc": {**_TEXT, "num_key_value_heads": HEADS},
    "swin": {
        "image_size": PIXELS,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "xmod": {
        **{name: value for name, value in _TEXT.items() if name != "num_key_value_heads"},
        "languages": ["en_XX"],
        "default_language": "en_XX",
    },
    "neomme": {**_TEXT, "head_dim": 16, "sliding_window": 4, "layer_types": _SLIDING, "embedding_rank": 8},
    "musicgen_decoder": _MUSIC,
    "musicgen_melody_decoder": _MUSIC,
    "shieldgemma2": {
        "text_config": {**_TEXT, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4},
        "vision_config": {**_IMAGE, "model_type": "siglip_vision_model", "image_size": PIXELS},
        "mm_tokens_per_image": _IMAGE_TOKENS,
        "image_token_index": _MARK,
        "boi_token_index": 5,
        "eoi_token_index": 6,
        "yes_token_index": 7,
        "no_token_index": 8,
    },
    "siglip2": {"vision_config": {**_IMAGE, "num_patches": 16}},
    "voxtral_realtime": {
        "text_config": {**_TEXT, "head_dim": 8, "sliding_window": 4},
        "audio_config": {
            **{name: value for name, value in _TEXT.items() if name not in ("pad_token_id", "num_key_value_heads")},
            "head_dim": 8,
            "sliding_window": 4,
            "num_mel_bins": 8,
        },
        "downsample_factor": 4,
        "audio_length_per_tok": 8,
    },
}
# Where the class that is tested has the configuration of a part.
PARTS = {
    "musicgen": "musicgen_decoder",
    "musicgen_melody": "musicgen_melody_decoder",
    "qwen4_exp": "qwen4_exp_text",
}


def knows(model_type: str) -> bool:
    """Whether there are sizes for an architecture."""
    return PARTS.get(model_type, model_type) in ARGUMENTS


def by_hand(model_type: str) -> Any:
    """A configuration of these sizes."""
    kind = PARTS.get(model_type, model_type)
    return transformers.CONFIG_MAPPING[kind](**ARGUMENTS[kind])


def _draws() -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _text_beside_images() -> tuple[dict[str, Any], torch.Tensor]:
    tokens = torch.randint(10, _MARK, (2, 6), generator=torch.Generator().manual_seed(0))
    image = torch.tensor([[5, *[_MARK] * _IMAGE_TOKENS, 6]] * 2)
    ids = torch.cat([image, tokens], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _draws()(2, 3, PIXELS, PIXELS)}
    return inputs | {"token_type_ids": (ids == _MARK).long()}, torch.ones(2, dtype=torch.bool)


def _patches() -> tuple[dict[str, Any], torch.Tensor]:
    """Patches of two images of different shapes, the smaller one padded."""
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 8:] = 0
    shapes = torch.tensor([[4, 4], [2, 4]])
    return {
        "pixel_values": _draws()(2, 16, 3 * 8 * 8),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }, torch.ones(2, dtype=torch.bool)


def _sound() -> tuple[dict[str, Any], torch.Tensor]:
    """One token for each eight frames."""
    tokens = torch.randint(3, TOKENS, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "input_features": _draws()(2, 8, 72)}, torch.ones(2, 9, dtype=torch.bool)


INPUTS: dict[str, Callable[[], tuple[dict[str, Any], torch.Tensor]]] = {
    "shieldgemma2": _text_beside_images,
    "siglip2": _patches,
    "voxtral_realtime": _sound,
}
