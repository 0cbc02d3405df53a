"""``attn_implementation="onestep"`` over the architectures of the installed transformers, each as a small model.

Each one gives eager attention's output, or is refused wherever transformers refuses "sdpa".
"""

import os

import pytest
import torch

transformers = pytest.importorskip("transformers")

import transformers_by_hand as hand  # noqa: E402
import transformers_cases as cases  # noqa: E402

from onestep.integrations.transformers import register_attention  # noqa: E402

MOST_PARAMETERS = 30_000_000
# These are compared, or refused, under every version of transformers that is supported: they are never skipped. The
# second line of each are models of images, the third those with sparse or compressed attention.
COMPARED = {"bart", "bert", "gpt2", "gpt_neox", "llama", "mistral", "opt", "roberta", "t5"}
COMPARED |= {"vit", "deit", "dinov2"}
REFUSED = {"bloom", "codegen", "megatron-bert", "mpnet", "mpt", "roformer"}
REFUSED |= {"convnext", "resnet"}
# Of other versions these may be missing.
SPARSE = {"deepseek_v3", "deepseek_v32", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text", "big_bird", "bigbird_pegasus"}
SPARSE |= {"longformer", "led", "qwen3_moe", "switch_transformers", "beit", "siglip"}
# Architectures of LOOKED_AT that cannot be built here, and why.
LOOKED_AT = "5.23."
LEFT_OUT = {
    **dict.fromkeys(("gemma3n", "timm_wrapper"), "needs timm"),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "all its layers take keys and values from others, which its own configuration refuses",
    ),
}


def selected(classes):
    """Those that were looked at by hand, and every third of the others, which mostly share attention with them."""
    always = COMPARED | REFUSED | SPARSE
    step = 1 if os.environ.get("ONESTEP_ALL_ARCHITECTURES") else 3
    others = sorted((kind, name) for kind, name in classes.items() if kind not in always)[::step]
    return sorted([*((kind, name) for kind, name in classes.items() if kind in always), *others])


def output(model, inputs):
    result = model(**inputs)
    logits = getattr(result, "logits", None)
    return result[0] if logits is None else logits


def refusal(model_type, name, way, implementation):
    """Why transformers, or onestep, does not take an implementation of attention for a model; None if it does."""
    try:
        with torch.device("meta"):
            cases.build(model_type, name, way, implementation)
    except ValueError as error:
        if "implementation" in str(error):
            return str(error)
        raise
    return None


def check(kind, model_type, name, way):
    """Raises AssertionError unless a model is refused where it must be, or gives the outputs of eager attention."""
    refused, by_sdpa = (refusal(model_type, name, way, implementation) for implementation in ("onestep", "sdpa"))
    ours = refused is not None and ("by that name" in refused or "does not go through" in refused)
    assert ours or (refused is None) == (by_sdpa is None), refused
    assert (model_type in REFUSED) <= (refused is not None)
    assert (model_type in COMPARED) <= (refused is None)
    if refused is not None:
        assert ours or 'attn_implementation="onestep" works where "sdpa" does' in refused
        return
    with torch.device("meta"):
        parameters = sum(part.numel() for part in cases.build(model_type, name, way, "eager").parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"the small configuration has {parameters:,} parameters")
    model = cases.build(model_type, name, way, "eager")
    inputs, real = hand.INPUTS[model_type]() if model_type in hand.INPUTS else cases.inputs(kind)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    expected = output(model, inputs)
    got = output(cases.build(model_type, name, way, "onestep"), inputs)
    if expected.shape[: real.ndim] == real.shape:
        got, expected = got[real], expected[real]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


TEXT, IMAGES = cases.architectures()
ARCHITECTURES = [
    pytest.param(
        kind,
        *pair,
        id=pair[0],
        marks=[pytest.mark.long] if index % 3 and pair[0] not in COMPARED | REFUSED | SPARSE else [],
    )
    for kind, classes in (("text", TEXT), ("images", IMAGES))
    for index, pair in enumerate(selected(classes))
]


@pytest.mark.parametrize(("kind", "model_type", "name"), ARCHITECTURES)
def test_output_is_eager_attentions_or_refused(kind, model_type, name):
    register_attention()
    if model_type in LEFT_OUT and transformers.__version__.startswith(LOOKED_AT):
        pytest.skip(f"{model_type}: {LEFT_OUT[model_type]}")
    failures = []
    with torch.no_grad():
        for way in (*([hand.by_hand] if hand.knows(model_type) else []), *cases.WAYS):
            try:
                return check(kind, model_type, name, way)
            except AssertionError:
                raise
            except Exception as error:  # an architecture whose sizes have other names, or that reads something else
                failures.append(f"{way.__name__}: {type(error).__name__}: {error}")
    if model_type in COMPARED | REFUSED or transformers.__version__.startswith(LOOKED_AT):
        pytest.fail(f"no small {model_type}: {failures}")
    pytest.skip(f"no small {model_type}: {failures}")


@pytest.mark.parametrize("change", ["set", "named"])
def test_refusal_of_a_model_that_exists(change):
    """By set_attn_implementation, or by a subclass that declares no support."""
    register_attention()
    configuration = cases.by_attributes("codegen")
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
