"""``onestep.layerwise``: statistics, and each way of solving layers, against the same done by hand."""

import copy
import json
import os
import signal

import pytest
import torch
from layerwise_cases import Mixture, Model, correlated, inputs_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from onestep.layerwise import LayerStatistics, edit, merge, prune, quantize, refit, save


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_those_of_the_layers_inputs_and_are_shared():
    model = Model()
    data = [correlated(3, 4, 12) for _ in range(3)]
    statistics = LayerStatistics(model, ["blocks.*", "!*.down"], dtype=torch.float64).collect(data, progress=False)
    assert ["blocks.0.q", "blocks.0.k"] in statistics.shared()
    assert ["blocks.1.up"] in statistics.shared()
    rows = inputs_of(model.blocks[1].up, lambda: [model(batch) for batch in data]).double()
    assert statistics["blocks.1.up"].count == 36
    torch.testing.assert_close(statistics["blocks.1.up"].gram, rows.mT @ rows)
    torch.testing.assert_close(statistics["blocks.1.up"].total, rows.sum(0))
    assert model.training
    assert not model.blocks[0].q._forward_pre_hooks
    halves = [LayerStatistics(model, "blocks.*.up", dtype=torch.float64) for _ in range(2)]
    halves[0].collect(data[:1], progress=False)
    halves[1].collect(data[1:], progress=False)
    merged = halves[0].merge(halves[1])
    assert merged.batches == 3
    torch.testing.assert_close(merged["blocks.1.up"].gram, statistics["blocks.1.up"].gram)


def test_padding_is_left_out_and_experts_have_their_own_rows():
    model = nn.Sequential(nn.Linear(6, 6), Mixture(6))
    x = torch.randn(5, 8, 6)
    statistics = LayerStatistics(model).collect([(x,)], progress=False)
    assert [statistics[f"1.experts.{i}"].count for i in range(3)] == [4, 36, 0]
    rows = model[0](x).reshape(-1, 6)
    rows = rows[rows[:, 0].argsort(descending=True)[:4]]
    torch.testing.assert_close(statistics["1.experts.0"].gram, rows.mT @ rows)
    model, mask = Model(), torch.rand(5, 8) > 0.5
    batch = {"x": torch.randn(5, 8, 12), "attention_mask": mask.long()}
    sums = LayerStatistics(model, "head").update(batch)["head"]
    assert sums.count == int(mask.sum())
    x = batch["x"][mask]
    torch.testing.assert_close(sums.gram, model.blocks(x).mT @ model.blocks(x), rtol=1e-4, atol=1e-4)


def test_layers_that_stop_sharing_keep_what_they_shared():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x, both=True):
            return self.a(x) + self.b(x if both else x + 1)

    model, x = Switch(), torch.randn(4, 2)
    statistics = LayerStatistics(model).update(x).update((x, False))
    torch.testing.assert_close(statistics["a"].gram, 2 * x.mT @ x)
    torch.testing.assert_close(statistics["b"].gram, x.mT @ x + (x + 1).mT @ (x + 1))


@pytest.mark.long
def test_a_killed_collection_resumes_with_the_same_bits(tmp_path):
    layers, batches = 1000, 5
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(layers)))
    data = [torch.randn(5, 6) for _ in range(batches)]
    whole = LayerStatistics(model).collect(data, progress=False)
    in_files = LayerStatistics(model, folder=tmp_path / "sums").collect(data, progress=False)
    assert all(torch.equal(in_files[name].gram, whole[name].gram) for name in whole.names)
    assert not list((tmp_path / "sums").iterdir())  # they have no names
    checkpoint = tmp_path / "statistics.pt"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:

        class Reported(list):
            def __iter__(self):
                for index, batch in enumerate(super().__iter__()):
                    os.write(writer, bytes([index]))
                    yield batch

        LayerStatistics(model).collect(Reported(data), checkpoint=checkpoint, every=1, progress=False)
        os._exit(0)
    while os.read(reader, 1) != bytes([3]):
        pass
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    resumed = LayerStatistics(model).load(checkpoint)
    assert 0 < resumed.batches < batches
    # What is in the file is not run again, and other values in its place are refused.
    other = [torch.full_like(batch, 9.0) for batch in data[: resumed.batches]] + data[resumed.batches :]
    with pytest.raises(ValueError, match="is of other data"):
        LayerStatistics(model).collect(other, checkpoint=checkpoint, progress=False)
    calls, done = [], resumed.batches
    handle = model[0].register_forward_hook(lambda *unused: calls.append(1))
    resumed = LayerStatistics(model).collect(data, checkpoint=checkpoint, progress=False)
    handle.remove()
    assert resumed.batches == batches and len(calls) == batches - done
    assert resumed[str(layers - 1)].count == 5 * batches
    assert all(torch.equal(resumed[name].gram, whole[name].gram) for name in whole.names)
    in_files.load(checkpoint).merge(in_files)
    assert torch.equal(in_files["7"].gram, 2 * whole["7"].gram)
    with pytest.raises(ValueError, match=r"expected torch.float64 sums"):
        LayerStatistics(model, dtype=torch.float64).load(checkpoint)


def test_files_that_a_killed_process_left_are_removed(tmp_path):
    child = os.fork()
    if child == 0:
        # Killed when the file has its name.
        torch.from_file = lambda *unused, **also_unused: os.kill(os.getpid(), signal.SIGKILL)
        LayerStatistics(nn.Sequential(nn.Linear(3, 2)), folder=tmp_path).update(torch.ones(4, 3))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (tmp_path / "mine.txt").write_text("kept")
    assert len(list(tmp_path.iterdir())) == 2
    statistics = LayerStatistics(nn.Sequential(nn.Linear(3, 2)), folder=tmp_path).update(torch.ones(4, 3))
    assert torch.equal(statistics["0"].gram, torch.full((3, 3), 4.0))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ------------------------------------------------------------------------------------------------------------- compress


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"symmetric": True, "sequential": False}])
def test_quantised_layers_are_on_their_grids_and_lose_less(options, tmp_path):
    model = Model(width=32)
    data = [correlated(8, 16, 32) for _ in range(2)]
    before = copy.deepcopy(model)
    report = quantize(model, data, bits=3, group_size=16, layers=["*", "!head"], progress=False, **options)
    assert [layer.name for layer in report.layers][:2] == ["blocks.0.q", "blocks.0.k"]
    assert torch.equal(model.head.weight, before.head.weight)
    assert all(layer.error < layer.error_before for layer in report.layers)
    assert sum(layer.error for layer in report.layers) < 0.7 * sum(layer.error_before for layer in report.layers)
    quantized = report.quantized["blocks.1.up"]
    torch.testing.assert_close(model.blocks[1].up.weight, quantized.dequantize(), rtol=0, atol=0)
    assert quantized.codes.max() <= 7
    if "sequential" not in options:
        # The error that is reported is on the inputs that the layer gets in the quantised model, towards what it put
        # out before.
        rows = inputs_of(model.blocks[1].up, lambda: [model(batch) for batch in data])
        wanted = before.blocks[1].up(inputs_of(before.blocks[1].up, lambda: [before(batch) for batch in data]))
        expected = (wanted - model.blocks[1].up(rows)).square().sum() / wanted.square().sum()
        assert abs(report["blocks.1.up"].error / expected.item() - 1) < 1e-3
    save(model, tmp_path / "dense.safetensors")
    before.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    assert torch.equal(before(data[0]), model(data[0]))
    save(model, tmp_path / "packed.safetensors", report.quantized)
    packed = load_file(tmp_path / "packed.safetensors")
    with safe_open(tmp_path / "packed.safetensors", "pt") as file:
        assert json.loads(file.metadata()["onestep"])["blocks.1.up"] == {"bits": 3, "shape": [64, 32]}
    codes = torch.stack([packed["blocks.1.up.codes"] & 15, packed["blocks.1.up.codes"] >> 4], -1).flatten(1)
    scale, zero, group = (packed[f"blocks.1.up.{part}"] for part in ("scale", "zero", "group"))
    assert torch.equal(scale[:, group] * (codes - zero[:, group]), model.blocks[1].up.weight)


@pytest.mark.parametrize("act_order", [False, True])
def test_towards_a_teacher_layers_mend_what_those_before_lost(act_order):
    teacher = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    model, x = copy.deepcopy(teacher), correlated(1, 400, 12)[0].double()
    with torch.no_grad():
        model[0].weight += 0.2 * torch.randn(12, 12)
        model[2].bias += 1
    options = {"bits": 8, "group_size": 4, "layers": "2", "damping": 0.0, "act_order": act_order, "progress": False}
    rows, t = model[1](model[0](x)).detach(), teacher(x).detach()
    plain = copy.deepcopy(model)
    quantize(plain, x, dtype=torch.float64, **options)
    report = quantize(model, x, dtype=torch.float64, teacher=teacher, **options)["2"]
    # With 8 bits nearly the least that any weights lose; the bias stays.
    best = torch.linalg.lstsq(rows, t - model[2].bias).solution
    least = (rows @ best + model[2].bias - t).square().sum() / t.square().sum()
    lost = (model(x) - t).square().sum() / t.square().sum()
    assert abs(report.error / lost.item() - 1) < 1e-6
    assert least <= lost < 1.02 * least
    before = (plain(x) - t).square().sum() / t.square().sum()
    assert lost < 0.9 * before
    assert abs(report.error_before / before.item() - 1) < 0.05


def test_whole_models_lose_less_towards_a_teacher():
    model, (*data, held_out) = Model(width=16, blocks=8), correlated(40, 32, 16).split(8)
    for solve in (lambda *args, **keywords: quantize(*args, 3, 16, **keywords), prune):
        lost = []
        for teacher in (None, copy.deepcopy(model)):
            solved = copy.deepcopy(model)
            solve(solved, data, teacher=teacher, progress=False)
            lost.append((solved(held_out) - model(held_out)).square().sum().item())
        assert lost[1] < 0.9 * lost[0]


def test_fewer_rows_than_features_do_not_tell_what_a_teacher_wants():
    model, teacher, x = nn.Sequential(nn.Linear(20, 3)), nn.Sequential(nn.Linear(20, 3)), torch.randn(10, 20)
    found = [copy.deepcopy(model) for _ in range(2)]
    quantize(found[0], x, progress=False)
    report = quantize(found[1], x, teacher=teacher, progress=False)
    assert torch.equal(found[0][0].weight, found[1][0].weight)
    assert report["0"].rows == 10


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
def test_pruned_layers_lose_less_than_by_size(sparsity):
    model = Model(width=32)
    report = prune(model, [correlated(8, 32, 32)], sparsity, progress=False)
    assert sum(layer.error for layer in report.layers) < 0.8 * sum(layer.error_before for layer in report.layers)
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        assert abs((weight == 0).float().mean() - 0.5) < 0.02
        if sparsity == (2, 4):
            assert ((weight.reshape(len(weight), -1, 4) == 0).sum(-1) >= 2).all()


def test_starved_experts_and_dead_inputs():
    """Experts with fewer rows than features, or none, and inputs that are always 0."""
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), Mixture(40), nn.Linear(40, 8))
    with torch.no_grad():
        model[0].weight[3:6] = 0
        model[0].bias[3:6] = -1
    x = torch.randn(6, 20, 40)
    for damping in (0.0, 0.01):
        solved = copy.deepcopy(model)
        solve = quantize if damping == 0 else prune
        report = solve(solved, [x], damping=damping, progress=False)
        first = report["2.experts.0"]
        assert 0 < first.rows < 40
        assert (first.info > 0) == (damping == 0)
        # More, where pruning loses more than by size.
        assert 0 < first.damping < 0.011 or (damping > 0 and first.damping <= 1.0 and first.error < first.error_before)
        assert first.rank == min(first.rows, 40 - first.dead)
        assert "rank deficient" in str(report).split("2.experts.0")[1].split("\n")[0]
        assert first.dead >= 3
        assert report["2.experts.2"].rows == 0
        assert all(parameter.isfinite().all() for parameter in solved.parameters())
        assert solved(x).isfinite().all()


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 16))
    x = correlated(1, 100, 16)[0]
    before = model[0].weight.detach().clone()
    report = quantize(model, [x], bits=4, group_size=None, progress=False)
    assert report["0"].features == 16
    assert model[0].weight.shape == (16, 6)
    assert torch.equal(model[0].weight, report.quantized["0"].dequantize().mT)
    assert not torch.equal(model[0].weight, before)


# ----------------------------------------------------------------------------------------------------------- the others


def test_refit_solves_towards_the_teacher():
    teacher = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 4)).double()
    model = copy.deepcopy(teacher)
    x = correlated(1, 200, 10)[0].double()
    with torch.no_grad():
        model[0].weight += 0.1 * torch.randn(7, 10)
        model[2].weight += 0.1 * torch.randn(4, 7)
        model[2].bias += 1
    only = copy.deepcopy(model)
    report = refit(only, [x], teacher, layers="2", ridge=0.0, progress=False)
    rows = torch.cat([model[1](model[0](x)), torch.ones(200, 1)], 1).detach().double()
    expected = torch.linalg.lstsq(rows, teacher(x).detach()).solution
    torch.testing.assert_close(torch.cat([only[2].weight.mT, only[2].bias[None]]).detach(), expected)
    residual = (rows @ expected - teacher(x)).square().sum() / teacher(x).square().sum()
    assert abs(report["2"].error - residual.item()) < 1e-10
    assert report["2"].error < report["2"].error_before
    # All layers: the first can be what it was.
    refit(model, [x], teacher, ridge=0.0, progress=False)
    torch.testing.assert_close(model(x), teacher(x))


def test_refit_raises_a_ridge_that_will_not_do():
    """Two inputs that are alike leave nothing to solve for without a ridge; the report has the one that did."""
    teacher = nn.Sequential(nn.Linear(6, 5)).double()
    x = correlated(1, 80, 6)[0].double()
    x[:, 1] = x[:, 0]
    report = refit(copy.deepcopy(teacher), [x], teacher, ridge=0.0, progress=False)["0"]
    assert report.info == 2
    assert report.damping == 1e-12


def test_refit_keeps_zeros():
    teacher = nn.Sequential(nn.Linear(9, 5)).double()
    model, x = copy.deepcopy(teacher), correlated(1, 80, 9)[0].double()
    with torch.no_grad():
        model[0].weight[torch.rand(5, 9) < 0.5] = 0
    zeros = model[0].weight == 0
    refit(model, [x], teacher, ridge=0.0, progress=False)
    assert torch.equal(model[0].weight == 0, zeros)
    rows = torch.cat([x, torch.ones(80, 1)], 1)
    for output in range(5):
        kept = torch.cat([~zeros[output], torch.tensor([True])])
        expected = torch.linalg.lstsq(rows[:, kept], teacher(x)[:, [output]].detach()).solution[:, 0]
        torch.testing.assert_close(model[0].weight[output, kept[:-1]].detach(), expected[:-1])


def test_merging_is_exact_where_the_models_agree_and_weighs_inputs_else():
    one, two = (nn.Sequential(nn.Linear(6, 3, bias=False)).double() for _ in range(2))
    # Each model sees half of the features.
    x, y = torch.randn(50, 6).double(), torch.randn(50, 6).double()
    x[:, :3], y[:, 3:] = 0, 0
    merged = merge([one, two], [[x], [y]], shrinkage=0.0, progress=False)
    torch.testing.assert_close(merged(x), one(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged(y), two(y), rtol=1e-4, atol=1e-4)
    same = merge([one, copy.deepcopy(one)], [[x], [y]], progress=False)
    torch.testing.assert_close(same[0].weight, one[0].weight)


def test_edits_write_targets_and_leave_the_rest():
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 6)).double()
    text = correlated(1, 3000, 20)[0].double()
    statistics = LayerStatistics(model, "2", dtype=torch.float64).collect([text], progress=False)
    subjects, targets = torch.randn(3, 20).double() * 4, torch.randn(3, 6).double()
    before, keys = model(text).detach(), model[1](model[0](subjects)).detach()
    weight = model[2].weight.detach().clone()
    report = edit(model, subjects, targets, layer="2", statistics=statistics, strength=10.0, damping=0.0)
    C = statistics["2"].gram / statistics["2"].count / 10.0
    missing = targets - model[2].bias - keys @ weight.mT
    expected = weight + missing.mT @ keys @ torch.linalg.inv(C + keys.mT @ keys)
    torch.testing.assert_close(model[2].weight.detach(), expected.detach())
    assert report["2"].error < 0.05 * report["2"].error_before
    assert (model(text) - before).square().sum() < 0.5 * before.square().sum()
    # The factor is kept.
    begin = statistics.kept_factor("2", 0.0)[0].U
    assert statistics.kept_factor("2", 0.0)[0].U is begin


def test_bad_input():
    model, x = Model(), torch.randn(2, 3, 12)
    with pytest.raises(ValueError, match=r"no linear layer of the model matches 'nothing'"):
        quantize(model, [x], layers="nothing")
    with pytest.raises(ValueError, match="bits is 9"):
        quantize(model, [x], bits=9)
    with pytest.raises(TypeError, match="expected batches that can be gone through more than once"):
        quantize(model, iter([x]), progress=False)
    with pytest.raises(TypeError, match=r"does not take a batch \(Tensor, Tensor, Tensor\).*without targets"):
        quantize(model, [(x, x, x)], progress=False)
    report = prune(model, [x], layers="blocks.0.q", progress=False)
    with pytest.raises(KeyError, match=r"'0' is none of the layers \['blocks.0.q'\]"):
        report["0"]
    with pytest.raises(KeyError, match=r"'0' is none of the layers \['blocks.0.q'\]"):
        LayerStatistics(model, "blocks.0.q")["0"]
    with pytest.raises(ValueError, match="data has no batches"):
        prune(model, [], progress=False)
    with pytest.raises(ValueError, match=r"expected a multiple of 5"):
        prune(model, [x], (2, 5), progress=False)
    with pytest.raises(ValueError, match=r"the inputs of layer 'blocks.0.q' hold NaN"):
        quantize(model, [x * torch.nan], progress=False)
    for solve in (refit, quantize, prune):
        with pytest.raises(ValueError, match="teacher is model itself"):
            solve(model, [x], teacher=model)
    with pytest.raises(TypeError, match="teacher is str"):
        quantize(model, [x], teacher="model")
    with pytest.raises(ValueError, match="two or more"):
        merge([model], [[x]])


@pytest.mark.parametrize(
    "compress", [lambda m, X: prune(m, X, 0.5, progress=False), lambda m, X: quantize(m, X, 4, None, progress=False)]
)
def test_weights_of_dead_inputs_take_nothing_from_the_others(compress):
    """Half of the inputs are dead, with large weights: pruning half costs nothing, grids are of the others."""
    torch.manual_seed(0)
    X = torch.randn(500, 64)
    X[:, ::2] = 0
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight[:, ::2] *= 20
        before = model(X)
        compress(model, X)
        assert (model(X) - before).norm() < 0.1 * before.norm()
    assert not model[0].weight[:, ::2].any()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_teachers_outputs_are_those_before_what_follows_writes_into_them(in_place):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(20, 30), nn.ReLU(inplace=in_place), nn.Linear(30, 5))
    model, X = copy.deepcopy(teacher), torch.randn(400, 20)
    with torch.no_grad():
        model[0].weight.add_(0.3 * torch.randn(30, 20))
        report = refit(model, [X], teacher, progress=False)
        assert (model(X) - teacher(X)).norm() < 5e-3 * teacher(X).norm()
    assert report["0"].error < 1e-4


def test_a_tensor_that_is_changed_in_place_is_another_one_afterwards():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x.clone()
            x += 2 * self.first(x)
            x += self.second(x)
            return x

    torch.manual_seed(0)
    model, x = Residual(), torch.randn(50, 8)
    statistics = LayerStatistics(model).update(x)
    inside = x + 2 * model.first(x)
    assert statistics.shared() == [["first"], ["second"]]
    torch.testing.assert_close(statistics["second"].gram, (inside.mT @ inside).detach())


def test_collect_adds_all_batches_after_others():
    x, model = torch.randn(6, 8), nn.Linear(8, 4)
    statistics = LayerStatistics(model).update(x).collect([x, x], progress=False).collect([x], progress=False)
    assert (statistics[""].count, statistics.batches) == (24, 4)


def test_statistics_with_and_without_a_teacher_are_not_mixed():
    x, model = torch.randn(6, 8), nn.Linear(8, 4)
    taught = LayerStatistics(model, teacher=copy.deepcopy(model)).update(x)
    plain = LayerStatistics(model).update(x)
    with pytest.raises(ValueError, match="no outputs of a teacher"):
        taught.merge(plain)
    with pytest.raises(ValueError, match="has outputs of a teacher; expected none"):
        plain.merge(taught)


def test_refit_does_not_hold_the_bias_back():
    torch.manual_seed(0)
    teacher, x = nn.Linear(5, 3), 100 * torch.randn(1000, 5)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.bias += 10
    refit(nn.Sequential(model), [x], nn.Sequential(teacher), progress=False)
    torch.testing.assert_close(model.bias, teacher.bias, rtol=0, atol=1e-2)
