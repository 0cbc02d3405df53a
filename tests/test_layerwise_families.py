"""``onestep.layerwise`` on small random models of transformers' families, with padding."""

import copy

import pytest
import torch

from onestep.layerwise import LayerStatistics, edit, merge, prune, quantize, refit, save

transformers = pytest.importorskip("transformers")

TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 1}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
GPT2 = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}

# The model, its configuration, and a layer to edit.
FAMILIES = {
    "llama": ("LlamaForCausalLM", {**TOKENS, **SIZES, **HEADS}, "model.layers.1.mlp.down_proj"),
    "phi3": ("Phi3ForCausalLM", {**TOKENS, **SIZES, **HEADS}, "model.layers.0.mlp.gate_up_proj"),
    "gpt2": ("GPT2LMHeadModel", GPT2, "transformer.h.1.mlp.c_proj"),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**TOKENS, **SIZES, **HEADS, **MIXTURE, "head_dim": 8}, "lm_head"),
    "t5": ("T5ForConditionalGeneration", T5, "decoder.block.1.layer.2.DenseReluDense.wo"),
    "bert": ("BertForSequenceClassification", {**TOKENS, **SIZES}, "bert.encoder.layer.1.output.dense"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family, tmp_path):
    torch.manual_seed(0)
    kind, options, edited = FAMILIES[family]
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**options)).eval()
    lengths = torch.tensor([10, 7, 4, 9])
    mask = (torch.arange(10) < lengths[:, None]).long()
    data = [{"input_ids": torch.randint(3, 40, (4, 10)), "attention_mask": mask} for _ in range(3)]
    if family == "t5":
        data = [{**batch, "decoder_input_ids": batch["input_ids"], "decoder_attention_mask": mask} for batch in data]
    statistics = LayerStatistics(model).collect(data, progress=False)
    each = {statistics[name].count for name in statistics.names if ".experts." not in name}
    # Once for each place that is no padding; layers that pool have a row for each sequence.
    assert each == ({90, 12} if family == "bert" else {90})
    experts = [statistics[name].count for name in statistics.names if ".experts.down_proj" in name]
    assert sum(experts) == (2 * 2 * 90 if experts else 0)

    small = copy.deepcopy(model)
    report = quantize(small, data, bits=3, group_size=8, progress=False)
    reached = [layer for layer in report.layers if layer.rows]
    assert sum(layer.error for layer in reached) < 0.8 * sum(layer.error_before for layer in reached)
    save(small, tmp_path / "packed.safetensors", report.quantized)

    sparse = copy.deepcopy(model)
    prune(sparse, data, progress=False)
    if experts:
        before = copy.deepcopy(sparse.state_dict())
        with pytest.raises(ValueError, match=r"Leave such layers out: layers=\['\*', '!\*\.experts\.\*'\]"):
            refit(sparse, data, model, progress=False)
        assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())
    report = refit(sparse, data, model, layers=["*", "!*.experts.*"], progress=False)
    assert all(layer.error <= layer.error_before for layer in report.layers)

    merged = merge([model, sparse], [data, data], progress=False)
    assert all(parameter.isfinite().all() for parameter in merged.parameters())
    features = len(statistics[edited].gram)
    outputs = model.get_submodule(edited)(torch.zeros(1, features)).shape[-1]
    changed = edit(model, data[0], torch.randn(4, outputs), layer=edited, statistics=statistics, strength=1e4)
    assert changed.layers[0].error < 0.5 * changed.layers[0].error_before
