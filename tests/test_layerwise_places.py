"""``onestep.layerwise.replace_blocks`` where a model gives its blocks something by their place."""

import copy

import pytest
import torch
from layerwise_cases import Block
from torch import nn

from onestep.layerwise import replace_blocks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def masks_of(model, ids):
    """The mask that each block with attention is given, by the block."""
    seen = {}
    for block in model.model.layers:
        if hasattr(block, "self_attn"):

            def hook(module, args, kwargs, block=block):
                seen[block] = kwargs["attention_mask"]

            block.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for block in model.model.layers:
        block._forward_pre_hooks.clear()
        block._forward_pre_hooks_with_kwargs.clear()
    return list(seen.values())


@pytest.mark.parametrize("window", [4, 4096])
@pytest.mark.parametrize("family", ["Gemma2", "Cohere2", "Gemma3", "Qwen3"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_keep_the_masks_of_their_kinds(family, count, window):
    import transformers

    config = getattr(transformers, family + ("TextConfig" if family == "Gemma3" else "Config"))
    kinds = {"layer_types": ["full_attention", "full_attention", "sliding_attention"] * 2} if family == "Gemma3" else {}
    if family == "Qwen3":
        kinds = {"use_sliding_window": True, "max_window_layers": 2}
    config = config(**SIZES, **kinds, sliding_window=window)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(3, 40, (4, 12))
    before, weights = masks_of(model, ids), copy.deepcopy(model.state_dict())
    layer_types, blocks = list(config.layer_types), [f"model.layers.{i}" for i in range(1, 1 + count)]
    shifted = layer_types[2 : 7 - count] != layer_types[1 + count :]
    try:
        replace_blocks(model, {"input_ids": ids}, blocks, steps=0, progress=False)
    except ValueError as error:
        assert shifted
        old = next(i for i in range(1 + count, 6) if layer_types[i] != layer_types[i + 1 - count])
        assert f"model.layers.{old} would become {layer_types[old + 1 - count]!r} where it is" in str(error)
        assert type(config.layer_types) is list
        assert config.layer_types == layer_types
        # As it was, and with the number of blocks that the message has.
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        number = int(str(error).split(": replace ")[1].split(" blocks from model.layers.1")[0].split(" or ")[-1])
        blocks = [f"model.layers.{i}" for i in range(1, 1 + number)]
        replace_blocks(model, {"input_ids": ids}, blocks, steps=0, progress=False)
        count = number
    else:
        assert not shifted
    assert len(model.model.layers) == 7 - count
    for one, other in zip(masks_of(model, ids), before[:1] + before[1 + count :], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_a_second_run_is_looked_at_by_its_own_places():
    import transformers

    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, sliding_window=4)).eval()
    ids = torch.randint(3, 40, (4, 12))
    before = masks_of(model, ids)
    replace_blocks(model, {"input_ids": ids}, [f"model.layers.{i}" for i in range(3)], steps=0, progress=False)
    with pytest.raises(ValueError, match=r"layers\.2 would become 'full_attention' where.*: replace 1, 3 or 4 blocks"):
        replace_blocks(model, {"input_ids": ids}, ["model.layers.0", "model.layers.1"], steps=0, progress=False)
    replace_blocks(model, {"input_ids": ids}, ["model.layers.0"], steps=0, progress=False)
    assert all(torch.equal(one, other) for one, other in zip(masks_of(model, ids), before[3:], strict=True))


class Scaled(nn.Module):
    """What each block is given beside the hidden state is its place's."""

    def __init__(self, by_place):
        super().__init__()
        self.layers, self.by_place = nn.ModuleList(Pair() for _ in range(5)), by_place
        self.places = nn.Parameter(torch.randn(5, 12))

    def forward(self, x):
        for place, layer in enumerate(self.layers):
            x = layer(x, shift=self.places[place if self.by_place else 0])
        return x / len(self.layers)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(12)

    def forward(self, x, shift):
        return self.block(x + shift)


def test_blocks_that_are_given_what_is_their_places_are_refused():
    x = torch.randn(4, 30, 12)
    replace_blocks(Scaled(by_place=False), x, ["layers.1", "layers.2"], progress=False)
    replace_blocks(Scaled(by_place=True), x, ["layers.3", "layers.4"], progress=False)
    replace_blocks(Scaled(by_place=True), x, ["layers.1"], progress=False)
    model = Scaled(by_place=True)
    before, modules = model(x), list(model.layers)
    with pytest.raises(ValueError, match=r"gives layers\.3 other arguments than before once it has another place"):
        replace_blocks(model, x, ["layers.1", "layers.2"], progress=False)
    assert list(model.layers) == modules
    assert torch.equal(model(x), before)
