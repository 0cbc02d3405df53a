"""Files that ``onestep.layerwise`` reads and writes: which ones are refused, and with what words."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from onestep.layerwise import LayerStatistics, edit, quantize, refit, replace_blocks, save


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def perceptron():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))


X = torch.randn(50, 6)


def test_statistics_of_other_layers_are_refused(tmp_path):
    file = tmp_path / "sums.pt"
    model, data = perceptron(), [X, X, X]
    LayerStatistics(model, "0").collect(data, checkpoint=file, progress=False)
    fewer = "not of the layer '2'; expected torch.float32 sums of 3 layers such as '0'"
    for read in (lambda s: s.load(file), lambda s: s.collect(data, checkpoint=file, progress=False)):
        statistics = LayerStatistics(model)
        with pytest.raises(ValueError, match=fewer):
            read(statistics)
        assert (statistics.batches, statistics["2"].count) == (0, 0)
    LayerStatistics(model).collect(data, checkpoint=tmp_path / "all.pt", progress=False)
    with pytest.raises(ValueError, match="of the layer '2', which this one has not"):
        LayerStatistics(model, "0").load(tmp_path / "all.pt")


def test_statistics_of_layers_without_rows_are_of_the_same_layers(tmp_path):
    file = tmp_path / "sums.pt"
    LayerStatistics(perceptron()).collect([X[:0]], checkpoint=file, progress=False)
    assert LayerStatistics(perceptron()).load(file)["2"].count == 0
    statistics = LayerStatistics(perceptron())
    statistics.save(file)
    assert statistics.load(file).batches == 0
    # Files without the names of all layers, as they were written before, are still read.
    LayerStatistics(perceptron()).update(X).save(file)
    state = torch.load(file, weights_only=True)
    del state["names"]
    torch.save(state, file)
    assert LayerStatistics(perceptron()).load(file)["2"].count == 50


@pytest.mark.parametrize("content", [b"hello\nworld, some text", b"a,b\n1,2\n", b"\x80", b"", b"h\x05.", b"# a page\n"])
def test_what_is_no_file_of_statistics_is_refused(content, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt is no file of LayerStatistics\.save"):
        LayerStatistics(perceptron()).load(file)
    with pytest.raises(FileNotFoundError):
        LayerStatistics(perceptron()).load(tmp_path / "nothing.pt")


def changed_by_refit(model, before):
    with torch.no_grad():
        before[2].weight += 1.0
    refit(model, X, before, layers="2", progress=False)


def changed_by_edit(model, before):
    statistics = LayerStatistics(model, "2").update(X)
    edit(model, X[:1], torch.ones(1, 6), layer="2", statistics=statistics)


def changed_by_hand(model, before):
    with torch.no_grad():
        model[2].weight[3, 4] += 1e-3


CHANGES = {
    "refit": changed_by_refit,
    "edit": changed_by_edit,
    "by hand": changed_by_hand,
    "a map": lambda model, before: replace_blocks(model, X, ["2"], progress=False),
    "another shape": lambda model, before: replace_blocks(model, X, ["0", "1"], progress=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_codes_of_other_weights_are_refused(change, tmp_path):
    model = perceptron()
    before = copy.deepcopy(model)
    report = quantize(model, X, layers="2", progress=False)
    save(model, tmp_path / "right.safetensors", report.quantized)
    CHANGES[change](model, before)
    with pytest.raises(
        ValueError, match=r"quantized\['2'\] has other weights than the layer '2'.*save without quantized"
    ):
        save(model, tmp_path / "wrong.safetensors", report.quantized)
    assert not (tmp_path / "wrong.safetensors").exists()
    save(model, tmp_path / "dense.safetensors")


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float64")])
def test_codes_are_those_of_a_model_that_has_another_dtype_since(dtypes, tmp_path):
    first, second = (getattr(torch, dtype) for dtype in dtypes)
    model = perceptron().to(first)
    report = quantize(model, X.to(first), progress=False)
    save(model.to(second), tmp_path / "small.safetensors", report.quantized)
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        assert sorted(json.loads(file.metadata()["onestep"])) == ["0", "2", "3"]
