"""Padding is left out of ``onestep.layerwise`` wherever it goes: flattened, to experts, a decoder, torch's encoders."""

import copy
import warnings

import pytest
import torch
from torch import nn

from onestep.layerwise import LayerStatistics, edit, quantize, replace_blocks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lengths(places, *counts):
    """A mask with so many places of each sequence."""
    return (torch.arange(places)[None] < torch.tensor(counts)[:, None]).long()


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Mixture(nn.Module):
    """Places in one dimension; each goes to the two experts with the largest scores."""

    def __init__(self, width=6, experts=3, scaled=False):
        super().__init__()
        self.router, self.scaled = nn.Linear(width, experts), scaled
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))

    def forward(self, x, attention_mask=None):
        rows = x.reshape(-1, x.shape[-1])
        score, chosen = self.router(rows).topk(2, dim=-1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            position, place = torch.where(chosen.mT == index)
            given = rows[place] * score[place, position, None] if self.scaled else rows[place]
            out.index_add_(0, place, expert(given))
        return out.view_as(x)


@pytest.mark.parametrize("experts", [2, 3])
def test_a_mixture_of_modules_gets_no_padding(experts):
    model = Mixture(experts=experts)
    x, mask = torch.randn(4, 7, 6), lengths(7, 3, 7, 1, 5)
    statistics = LayerStatistics(model, dtype=torch.float64).update({"x": x, "attention_mask": mask})
    # One sequence at a time, cut to its length, has no padding to be left out.
    expected = LayerStatistics(model, dtype=torch.float64)
    for sequence, length in zip(x, mask.sum(1).tolist(), strict=True):
        expected.update(sequence[None, :length])
    assert statistics["router"].count == 16
    for name in statistics.names:
        assert statistics[name].count == expected[name].count
        torch.testing.assert_close(statistics[name].gram, expected[name].gram, rtol=1e-5, atol=1e-5)


def test_rows_that_a_model_computes_in_one_dimension():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(9, 6), nn.Linear(6, 2)

        def forward(self, codes, attention_mask):
            return self.layer(torch.tanh(self.embedding(codes)).reshape(-1, 6))

    model, codes, mask = Flat(), torch.randint(9, (4, 7)), lengths(7, 3, 7, 1, 5)
    sums = LayerStatistics(model, dtype=torch.float64).update({"codes": codes, "attention_mask": mask})["layer"]
    rows = torch.tanh(model.embedding(codes))[mask.bool()].detach().double()
    torch.testing.assert_close(sums.gram, rows.mT @ rows)


def test_rows_that_are_found_nowhere_are_told():
    model = Mixture(scaled=True)
    batch = {"x": torch.randn(4, 7, 6), "attention_mask": lengths(7, 3, 7, 1, 5)}
    statistics = LayerStatistics(model)
    with pytest.warns(UserWarning, match=r"padding cannot be told apart .* all count: 'experts.0.up' ") as caught:
        statistics.update(batch)
    assert len(caught) == 1 and "'experts.0.down'" in str(caught[0].message)
    assert " and 3 more. " in str(caught[0].message)
    # Said once.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics.update(batch)


@pytest.mark.parametrize("experts,each", [(4, 1), (2, 2)])
def test_stacked_experts_get_no_padding(experts, each):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=experts,
        num_experts_per_tok=each,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, mask = torch.randint(20, (3, 9)), lengths(9, 4, 9, 6)
    statistics = LayerStatistics(model, "*.layers.*", dtype=torch.float64)
    statistics.update({"input_ids": ids, "attention_mask": mask})
    expected = LayerStatistics(model, "*.layers.*", dtype=torch.float64)
    for sequence, length in zip(ids, mask.sum(1).tolist(), strict=True):
        expected.update({"input_ids": sequence[None, :length]})
    assert statistics["model.layers.1.self_attn.q_proj"].count == 19
    # In order only one of an expert's weights is looked at.
    report = quantize(copy.deepcopy(model), {"input_ids": ids, "attention_mask": mask}, teacher=None, progress=False)
    assert sum(layer.rows for layer in report.layers if "layers.0.mlp.experts.down" in layer.name) == 19 * each
    for name in statistics.names:
        assert statistics[name].count == expected[name].count
        torch.testing.assert_close(statistics[name].gram, expected[name].gram, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("places", [6, 9])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_decoder_has_its_own_mask(places, sequential):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {
        "input_ids": torch.randint(1, 20, (3, 9)),
        "attention_mask": lengths(9, 4, 9, 6),
        "decoder_input_ids": torch.randint(1, 20, (3, places)),
        "decoder_attention_mask": lengths(places, 5, 2, 6),
    }
    layers = ["*.SelfAttention.q", "*.EncDecAttention.[qk]", "*.wo", "lm_head"]
    report = quantize(model, batch, layers=layers, sequential=sequential, progress=False)
    rows = {layer.name: layer.rows for layer in report.layers}
    assert {rows[name] for name in rows if name.startswith("encoder.")} == {19}
    assert {rows[name] for name in rows if name.endswith("EncDecAttention.k")} == {19}
    assert {rows[name] for name in rows if name.startswith("decoder.") and not name.endswith("EncDecAttention.k")} == {
        13
    }
    assert rows["lm_head"] == 13


def encoder(batch_first=True):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoders_of_torch_take_their_mask(batch_first, kind):
    model, x, mask = encoder(batch_first).eval(), torch.randn(3, 7, 8), lengths(7, 4, 7, 6)
    padding = mask == 0 if kind is torch.bool else torch.zeros(3, 7).masked_fill(mask == 0, -torch.inf)
    batch = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": padding}
    expected = LayerStatistics(model)
    for sequence, length in zip(x, (4, 7, 6), strict=True):
        cut = sequence[None, :length]
        expected.update(cut if batch_first else cut.transpose(0, 1))
    statistics = LayerStatistics(model).update(batch)
    assert statistics["layers.1.linear2"].count == 17
    torch.testing.assert_close(
        statistics["layers.1.linear2"].gram, expected["layers.1.linear2"].gram, rtol=1e-4, atol=1e-4
    )
    report = quantize(model, [batch], layers="*linear?", progress=False)
    assert {layer.rows for layer in report.layers} == {17}
    nested = getattr(model, "use_nested_tensor", None)
    assert nested is batch_first
    found = replace_blocks(copy.deepcopy(model), [batch], ["layers.1"], progress=False)
    assert found.layers[0].rows == 17
    # The encoder reads attributes of its first layer.
    before = list(model.layers)
    with pytest.raises(ValueError, match=r"does not run with a linear map in the place of \['layers\.0'\] .*self_attn"):
        replace_blocks(model, [batch], ["layers.0"], progress=False)
    assert [id(layer) for layer in model.layers] == [id(layer) for layer in before]


class Windows(nn.Module):
    """Pads its input to whole windows of 8 places."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, attention_mask=None):
        wide = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 8))
        return self.head(torch.tanh(self.inner(wide))[:, : x.shape[1]])


def test_places_that_the_mask_has_not_are_told():
    model = Windows()
    batch = {"x": torch.randn(3, 20, 6), "attention_mask": lengths(20, 20, 5, 9)}
    with pytest.warns(UserWarning, match=r"padding cannot be told apart .* all count: 'inner' \(3, 24, 6\)\. Where"):
        statistics = LayerStatistics(model).update(batch)
    assert (statistics["inner"].count, statistics["head"].count) == (72, 34)
    with pytest.raises(ValueError, match="'inner' is given 24 places of each subject; expected 20"):
        edit(model, batch, torch.randn(3, 6), layer="inner", statistics=statistics)
    batch["attention_mask"] = torch.ones(3, 20)
    with pytest.raises(ValueError, match="'inner' is given 24 places of each subject; expected 20"):
        edit(model, batch, torch.randn(3, 6), layer="inner", statistics=statistics)
    edit(model, batch, torch.randn(3, 6), layer="head", statistics=statistics)


@pytest.mark.parametrize("order", ["places first", "heads first", "whole"])
def test_rows_of_heads_have_their_places_mask(order):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, attention_mask=None):
            x = x.unflatten(-1, (2, 4))
            return self.layer(
                {"places first": x, "heads first": x.transpose(1, 2), "whole": x.flatten(-2)[..., :4]}[order]
            )

    x, mask = torch.randn(3, 7, 8), lengths(7, 4, 7, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sums = LayerStatistics(Heads(), dtype=torch.float64).update({"x": x, "attention_mask": mask})["layer"]
    rows = x[mask.bool()].double()
    rows = rows[:, :4] if order == "whole" else rows.reshape(-1, 4)
    assert sums.count == len(rows)
    torch.testing.assert_close(sums.gram, rows.mT @ rows)


@pytest.mark.parametrize("kind", ["added", "bool", "each two places", "added to each two places"])
def test_masks_of_each_two_places(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.BertModel(config).eval()
    ids, mask = torch.randint(20, (3, 9)), lengths(9, 4, 9, 6)
    expected = LayerStatistics(model, "encoder.*", dtype=torch.float64).update(
        {"input_ids": ids, "attention_mask": mask}
    )
    whole = mask.bool()[:, None, None]
    whole = whole if kind in ("added", "bool") else whole.expand(3, 1, 9, 9)
    if kind.startswith("added"):
        whole = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
    batch = {"input_ids": ids, "attention_mask": whole}
    sums = LayerStatistics(model, "encoder.*", dtype=torch.float64).update(batch)
    for name in sums.names:
        assert sums[name].count == 19
        torch.testing.assert_close(sums[name].gram, expected[name].gram, rtol=1e-4, atol=1e-4)


def test_one_sequence_without_its_dimension():
    model = nn.TransformerEncoderLayer(8, 2, 12).eval()
    batch = {"src": torch.randn(7, 8), "src_key_padding_mask": torch.arange(7) > 4}
    assert LayerStatistics(model).update(batch)["linear1"].count == 5
