"""Models whose first blocks were replaced by a map go on from a cache of keys and values as from the beginning."""

import copy

import pytest
import torch

from onestep.layerwise import load, replace_blocks, save

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def model_of(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=4, n_head=2, n_positions=40)
    elif kind == "gemma2":
        # The first block that sees all places is the second one.
        config = transformers.Gemma2Config(**SIZES, **HEADS, sliding_window=4)
    else:
        config = transformers.LlamaConfig(**SIZES, **HEADS)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model, "transformer.h" if kind == "gpt2" else "model.layers"


def gap(model, ids, static=False):
    """Between the last place's logits from a cache of all places before, in two parts, and from all at once."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=40) if static else None
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        cache = model(input_ids=ids[:, :7], use_cache=True, past_key_values=cache).past_key_values
        cache = model(input_ids=ids[:, 7:-1], use_cache=True, past_key_values=cache).past_key_values
        found = model(input_ids=ids[:, -1:], use_cache=True, past_key_values=cache).logits[:, -1]
    return ((found - whole).norm() / whole.norm()).item()


RUNS = [("llama", [0]), ("llama", [0, 1]), ("gpt2", [0]), ("gpt2", [1, 2]), ("gemma2", [1]), ("gemma2", [0, 1, 2])]


@pytest.mark.parametrize("kind,blocks", RUNS)
def test_a_cache_knows_its_places(kind, blocks, tmp_path):
    model, where = model_of(kind)
    fresh = copy.deepcopy(model)
    ids = torch.randint(30, (2, 16))
    data = [{"input_ids": torch.randint(30, (8, 12))}]
    replace_blocks(model, data, [f"{where}.{block}" for block in blocks], steps=0, progress=False)
    save(model, tmp_path / "short.safetensors")
    for one in (model, load(fresh, tmp_path / "short.safetensors")):
        assert gap(one, ids) < 1e-5
    if len(blocks) == 2:
        # The map itself may be replaced with a block more.
        replace_blocks(model, data, [f"{where}.{block}" for block in range(blocks[0] + 1)], steps=0, progress=False)
        assert gap(model, ids) < 1e-5


def test_generated_text_is_the_same_with_a_cache():
    model, where = model_of("llama")
    data = [{"input_ids": torch.randint(30, (8, 12))}]
    replace_blocks(model, data, [f"{where}.0"], steps=0, progress=False)
    ids = torch.randint(30, (2, 8))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = [model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert torch.equal(*found)
    assert gap(model, torch.randint(30, (2, 16)), static=True) < 1e-5
