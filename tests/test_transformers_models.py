"""``attn_implementation="onestep"`` over the architectures of the installed transformers, each as a small model.

Each one gives eager attention's output, or is refused wherever transformers refuses "sdpa".
"""

import os

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers.models.auto import modeling_auto  # noqa: E402

from onestep.integrations.transformers import register_attention  # noqa: E402

TOKENS, WIDTH, HEADS, LAYERS = 50, 32, 4, 2
# Names that configurations use for the sizes of a model.
SMALL = (
    (TOKENS, "vocab_size"),
    (WIDTH, "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim emb_dim"),
    (48, "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim d_inner ffn_hidden_size"),
    (24, "moe_intermediate_size shared_expert_intermediate_size"),
    (
        LAYERS,
        "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers num_experts_per_tok num_key_value_heads",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
        "num_local_experts n_routed_experts sliding_window rotary_dim",
    ),
    (WIDTH // HEADS, "head_dim d_kv d_head kv_lora_rank q_lora_rank v_head_dim"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len"),
    (0, "pad_token_id"),
    (0.0, "dropout attention_dropout hidden_dropout"),
    (1, "bos_token_id decoder_start_token_id"),
    (2, "eos_token_id"),
)
MOST_PARAMETERS = 10_000_000
# These are compared, or refused, under every version of transformers that is supported: they are never skipped.
COMPARED = {"bart", "bert", "gpt2", "gpt_neox", "llama", "mistral", "opt", "roberta", "t5"}
REFUSED = {"bloom", "codegen", "megatron-bert", "mpnet", "mpt", "roformer"}


def architectures():
    """One architecture for each kind of configuration: its name and its class."""
    classes = {}
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for model_type, name in names.items():
            classes.setdefault(model_type, name if isinstance(name, str) else name[0])
    # Most of the others share their attention with one that is compared: every third one, or all.
    step = 1 if os.environ.get("ONESTEP_ALL_ARCHITECTURES") else 3
    always = COMPARED | REFUSED
    others = sorted((kind, name) for kind, name in classes.items() if kind not in always)[::step]
    return sorted([*((kind, name) for kind, name in classes.items() if kind in always), *others])


def small_configuration(model_type):
    configuration = transformers.CONFIG_MAPPING[model_type]()
    text = configuration.get_text_config()
    for part in {id(part): part for part in (configuration, text)}.values():
        for value, names in SMALL:
            for name in names.split():
                if getattr(part, name, None) is not None:
                    setattr(part, name, value)
        for name in ("layer_types", "mlp_layer_types"):
            if getattr(part, name, None) is not None:
                setattr(part, name, list(getattr(part, name))[:LAYERS])
    return configuration


def output(model, inputs):
    result = model(**inputs)
    logits = getattr(result, "logits", None)
    return result[0] if logits is None else logits


# Those that were looked at by hand, and every third of the others.
ARCHITECTURES = [
    pytest.param(*pair, id=pair[0], marks=[pytest.mark.long] if index % 3 and pair[0] not in COMPARED | REFUSED else [])
    for index, pair in enumerate(architectures())
]


@pytest.mark.parametrize(("model_type", "name"), ARCHITECTURES)
def test_output_is_eager_attentions_or_refused(model_type, name):
    register_attention()
    inputs = {"input_ids": torch.randint(3, TOKENS, (2, 9), generator=torch.Generator().manual_seed(0))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 6:] = 0
    real = inputs["attention_mask"].bool()

    def build(implementation):
        torch.manual_seed(0)
        model = getattr(transformers, name)._from_config(
            small_configuration(model_type), attn_implementation=implementation
        )
        return model.eval()

    def refused(implementation):
        try:
            build(implementation)
        except ValueError as error:
            return str(error)
        return None

    with torch.no_grad():
        try:
            with torch.device("meta"):
                parameters = sum(parameter.numel() for parameter in build("eager").parameters())
            if parameters > MOST_PARAMETERS:
                pytest.skip(f"the small configuration of {model_type} has {parameters:,} parameters")
            model = build("eager")
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = inputs["input_ids"]
            expected = output(model, inputs)
        except Exception as error:  # an architecture whose sizes have other names, or that takes other inputs
            if model_type in COMPARED | REFUSED:
                raise
            pytest.skip(f"no small {model_type}: {type(error).__name__}: {error}")
        refusal = refused("onestep")
        by_name = refusal is not None and 'asks for "sdpa" by that name' in refusal
        assert by_name or (refusal is None) == (refused("sdpa") is None), refusal
        assert (model_type in REFUSED) <= (refusal is not None)
        assert (model_type in COMPARED) <= (refusal is None)
        if refusal is not None:
            assert by_name or 'attn_implementation="onestep" works where "sdpa" does' in refusal
            return
        got = output(build("onestep"), inputs)
    if expected.shape[:2] == real.shape:
        got, expected = got[real], expected[real]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("change", ["set", "named"])
def test_refusal_of_a_model_that_exists(change):
    """By set_attn_implementation, or by a subclass that declares no support."""
    register_attention()
    configuration = small_configuration("codegen")
    if change == "named":
        with pytest.raises(ValueError, match="CodeGenForCausalLM does not support"):
            transformers.AutoModelForCausalLM.from_config(configuration, attn_implementation="onestep")
        return
    model = transformers.AutoModelForCausalLM.from_config(configuration)
    model.set_attn_implementation("onestep")  # transformers warns, and leaves it
    assert model.config._attn_implementation == "eager"


def test_registering_twice_wraps_once():
    register_attention()
    check = transformers.PreTrainedModel.get_correct_attn_implementation
    register_attention()
    assert transformers.PreTrainedModel.get_correct_attn_implementation is check


@pytest.mark.parametrize(
    "name",
    ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM", "SamVisionModel", "SamHQVisionModel", "Gemma4ForCausalLM"],
)
def test_models_that_ask_for_sdpa_by_name_are_refused(name):
    """Sparse attention was dense, 17 % off and more; others ended in KeyError."""
    register_attention()
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    with torch.device("meta"), pytest.raises(ValueError, match=f"{name} does not take .* by that name"):
        kind._from_config(kind.config_class(), attn_implementation="onestep")
