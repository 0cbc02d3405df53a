"""Batches of as many sequences as places: which rows are padding where modules have the places first."""

import pytest
import torch
from torch import nn

from onestep.layerwise import LayerStatistics, edit, quantize, replace_blocks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ragged(count):
    """A mask (sequences, places) that is not the one of the other order."""
    return torch.arange(count)[None] < torch.arange(count).roll(2)[:, None].clamp(min=1)


class Own(nn.Module):
    """Sequences first outside, places first inside; no module of torch.nn that says so."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(40, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        x = torch.tanh(self.inner(self.embedding(input_ids).transpose(0, 1)))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x.transpose(0, 1))


def rows_of(model, name, batch, kept, places_first):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return (seen[0].transpose(0, 1) if places_first else seen[0])[kept].double()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("length", [6, 7])
def test_encoders_of_torch(batch_first, length):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first), 2).eval()
    kept = ragged(7)[:6, :length]
    x = torch.randn(6, length, 8)
    batch = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": ~kept}
    statistics = LayerStatistics(model, "*linear?", dtype=torch.float64).update(batch)
    # Without nested tensors, as the sums are.
    model.use_nested_tensor = False
    for name in ("layers.0.linear1", "layers.1.linear2"):
        expected = rows_of(model, name, batch, kept, not batch_first)
        assert statistics[name].count == len(expected)
        torch.testing.assert_close(statistics[name].gram, expected.mT @ expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_that_turns_its_input_round(sequential):
    model, kept = Own(), ragged(6)
    batch = {"input_ids": torch.randint(20, (6, 6)), "attention_mask": kept.long()}
    statistics = LayerStatistics(model, dtype=torch.float64).update(batch)
    for name in ("inner", "blocks.1", "head"):
        expected = rows_of(model, name, batch, kept, name != "head")
        torch.testing.assert_close(statistics[name].gram, expected.mT @ expected, rtol=1e-6, atol=1e-6)
    report = quantize(model, [batch, {"input_ids": torch.randint(20, (6, 9))}], sequential=sequential, progress=False)
    assert {layer.rows for layer in report.layers} == {int(kept.sum()) + 54}
    x = rows_of(model, "blocks.0", batch, kept, True)
    report = replace_blocks(model, batch, ["blocks.0"], ridge=0.0, steps=0, progress=False)
    assert report.layers[0].rows == len(x)


def test_where_neither_is_known_it_is_refused():
    batch = {"input": torch.randn(6, 6, 8), "attention_mask": ragged(6).long()}

    class Plain(nn.Linear):
        def forward(self, input, attention_mask):
            return super().forward(input)

    with pytest.raises(ValueError, match=r"6 sequences of as many places, so that which of the two come first"):
        LayerStatistics(Plain(8, 8)).update(batch)
    LayerStatistics(Plain(8, 8)).update({**batch, "attention_mask": torch.ones(6, 6).tril() + torch.ones(6, 6).triu()})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [5, 6])
@pytest.mark.parametrize("layer", ["inner", "blocks.1", "head"])
def test_edits_are_of_the_last_place(layer, count, padded):
    model, kept = Own(), ragged(6)[:count]
    if not padded:
        kept = torch.ones_like(kept)
    text = LayerStatistics(model, layer).collect([{"input_ids": torch.randint(40, (9, 7))}], progress=False)
    subjects = {"input_ids": torch.randperm(40)[: 6 * count].view(count, 6), "attention_mask": kept.long()}
    last = kept.sum(1) - 1
    expected = rows_of(model, layer, subjects, torch.ones_like(kept), layer != "head").reshape(count, 6, 8)
    keys = expected[torch.arange(count), last]
    targets = torch.randn(count, 8)
    edit(model, subjects, targets, layer=layer, statistics=text, strength=1e8)
    module = model.get_submodule(layer)
    found = keys.float() @ module.weight.mT + module.bias
    assert (found - targets).norm() < 0.05 * targets.norm()


def test_xlnet_has_the_places_first():
    transformers = pytest.importorskip("transformers")
    model = transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=20, d_model=8, n_layer=2, n_head=2, d_inner=12)
    ).eval()
    kept = ragged(6)
    batch = {"input_ids": torch.randint(20, (6, 6)), "attention_mask": kept.long()}
    name = "transformer.layer.1.ff.layer_1"
    sums = LayerStatistics(model, name, dtype=torch.float64).update(batch)[name]
    expected = rows_of(model, name, batch, kept, True)
    torch.testing.assert_close(sums.gram, expected.mT @ expected, rtol=1e-5, atol=1e-5)
