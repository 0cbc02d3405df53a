"""Files that ``onestep.layerwise`` reads and writes: which ones are refused, and with what words."""

import copy
import json
import os
import threading

import pytest
import torch
from safetensors import safe_open
from torch import nn

from onestep.layerwise import LayerStatistics, edit, load, quantize, refit, replace_blocks, save


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


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    file = tmp_path / "sums.pt"
    model, A = perceptron(), [torch.randn(5, 6) for _ in range(3)]
    statistics = LayerStatistics(model, "0").collect(A, checkpoint=file, progress=False)
    gram = statistics["0"].gram
    for other in ([torch.randn(5, 6) for _ in range(4)], A[:2], [A[1], A[0], A[2]], [{"input": x} for x in A]):
        for one in (statistics, LayerStatistics(model, "0")):
            count = one["0"].count
            with pytest.raises(ValueError, match=r"sums\.pt' is of other data, of which it has 3 batches"):
                one.collect(other, checkpoint=file, progress=False)
            assert one["0"].count == count
    assert torch.equal(statistics["0"].gram, gram)
    # More of the same are added, and data by themselves.
    fresh = LayerStatistics(model, "0")
    assert fresh.collect([*A, X], checkpoint=file, progress=False)["0"].count == 65
    assert fresh.collect(A, progress=False)["0"].count == 80
    # Files of before say nothing of their data.
    state = torch.load(file, weights_only=True)
    del state["read"]
    torch.save(state, file)
    assert LayerStatistics(model, "0").collect([X] * 5, checkpoint=file, progress=False)["0"].count == 115


def test_models_with_state_that_is_no_tensor_are_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    file = tmp_path / "extra.safetensors"
    with pytest.raises(TypeError, match=r"state has '_extra_state', dict; expected tensors"):
        save(Extra(6, 6), file)
    assert not file.exists()
    save(nn.Linear(6, 6), file)
    with pytest.raises(ValueError, match="of another model: it has no '_extra_state'"):
        load(Extra(6, 6), file)


@pytest.mark.parametrize("codes", [False, True])
def test_buffers_that_are_views_are_written(codes, tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("part", self.layer.weight.detach()[2:4])
            self.register_buffer("flat", self.layer.weight.detach().view(-1))
            self.register_buffer("turned", self.layer.weight.detach().mT)
            self.register_buffer("bits", self.layer.bias.detach().view(torch.int32))
            self.register_buffer("whole", torch.arange(10.0))
            self.register_buffer("first", self.whole[:4])

        def forward(self, x):
            return self.layer(x)

    model, fresh = Views(), Views()
    report = quantize(model, X, group_size=6, progress=False)
    save(model, tmp_path / "views.safetensors", report.quantized if codes else None)
    load(fresh, tmp_path / "views.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


@pytest.mark.parametrize("in_files", [False, True])
def test_statistics_come_through_a_pipe(tmp_path, in_files):
    """As the shell's <(command) gives one; the second time it was opened, it waited for another writer for ever."""
    file, pipe = tmp_path / "sums.pt", tmp_path / "pipe"
    model = perceptron()
    folder = tmp_path if in_files else None
    expected = LayerStatistics(model, "0").collect([X, X], progress=False)
    expected.save(file)
    os.mkfifo(pipe)
    for content in (file.read_bytes(), b"no statistics"):
        writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
        writer.start()
        found, errors = LayerStatistics(model, "0", folder=folder), []

        def read(found=found, errors=errors):
            try:
                found.load(pipe)
            except ValueError as error:
                errors.append(str(error))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(20)
        assert not reader.is_alive()
        writer.join(20)
        if content == b"no statistics":
            assert errors == [f"{pipe} is no file of LayerStatistics.save, or damaged"]
        else:
            assert not errors and found.batches == 2 and torch.equal(found["0"].gram, expected["0"].gram)
