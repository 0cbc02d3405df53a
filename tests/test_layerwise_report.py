"""What ``onestep.layerwise`` reports of each layer, against the same computed by hand."""

import copy

import pytest
import torch
from torch import nn

from onestep.layerwise import LayerStatistics, Report, edit, merge, prune, quantize, refit, replace_blocks
from onestep.layerwise.rank import numerical_rank


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def low_rank(rows, features, rank, dtype=torch.float32):
    return (torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, features, dtype=torch.float64)).to(dtype)


DATA = {
    "all": (torch.randn(200, 24), 0, 24),
    "few rows": (torch.randn(3, 64), 0, 3),
    "factors": (low_rank(300, 40, 7), 0, 7),
    "with a mean": (low_rank(300, 40, 7) + 5.0, 0, 8),
    "two alike": (torch.randn(100, 12)[:, [*range(12), 3]], 0, 12),
    "scales": (torch.randn(200, 20) * torch.logspace(-8, 8, 20), 0, 20),
    "dead": (torch.randn(100, 16) * (torch.arange(16) > 3), 4, 12),
    "dead and few rows": (torch.randn(5, 16) * (torch.arange(16) > 3), 4, 5),
    "all dead": (torch.zeros(5, 6), 6, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", DATA)
def test_ranks_are_those_of_the_rows(case, dtype):
    X, dead, rank = DATA[case]
    report = quantize(nn.Sequential(nn.Linear(X.shape[1], 4)), X, dtype=dtype, progress=False)
    assert (report["0"].dead, report["0"].rank, report["0"].info) == (dead, rank, 0)
    assert ("rank deficient" in str(report)) == report["0"].rank_deficient == (rank < X.shape[1] - dead)
    # The rows' own rank; those of a low rank are rounded to float32.
    live = X[:, X.any(0)].double()
    assert rank == torch.linalg.matrix_rank(live / live.norm(dim=0), atol=1e-6)


def test_eigenvalues_are_counted_by_pivots():
    for size in (1, 2, 9, 130):
        for _ in range(5):
            X = low_rank(2 * size, size, max(1, size // 2), torch.float64)
            gram = X.mT @ X
            root = gram.diagonal().sqrt()
            values = torch.linalg.eigvalsh(gram / root / root[:, None])
            expected = int((values > size * torch.finfo(torch.float64).eps).sum())
            assert numerical_rank(gram, 2 * size) == expected == max(1, size // 2)


def test_every_function_reports_the_rank():
    X = torch.randn(200, 6)[:, [0, 1, 2, 3, 4, 5, 5, 0]]
    teacher = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).double()
    X = X.double()
    model = copy.deepcopy(teacher)
    found = [
        prune(copy.deepcopy(teacher), X, layers="0", progress=False),
        refit(model, X, teacher, layers="0", progress=False),
        replace_blocks(copy.deepcopy(teacher), X + 0.0, ["0"], steps=0, progress=False),
        edit(model, X[:2], torch.randn(2, 8), layer="0", statistics=LayerStatistics(model, "0").update(X)),
    ]
    for report in found:
        assert (report["0"].features, report["0"].rank, report["0"].dead) == (8, 6, 0)
        assert str(report).endswith("rank deficient")
    whole = replace_blocks(copy.deepcopy(teacher), X * (torch.arange(8) > 0), ["0"], steps=0, progress=False)["0"]
    assert (whole.dead, whole.rank) == (1, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merging_reports_into_what_it_is_given(dtype):
    models = [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype) for _ in range(2)]
    data = [torch.randn(40, 6).to(dtype), torch.randn(30, 6).to(dtype) * torch.arange(6)]
    data[0][:, 0] = 0
    # One feature is twice another, in both models' data.
    for X in data:
        X[:, 2] = 2 * X[:, 1]
    report = Report()
    merged = merge(models, data, shrinkage=0.0, damping=0.0, progress=False, report=report)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    first = report["0"]
    assert (first.rows, first.features, first.dead, first.rank) == (70, 6, 1, 4)
    assert first.info > 0
    assert 0 < first.damping < 1e-6
    # By rows: with the weights as they are, of whatever dtype, and their mean.
    mean = ((models[0][0].weight.double() + models[1][0].weight.double()) / 2).to(dtype)
    for weight, found in ((mean, first.error_before), (merged[0].weight, first.error)):
        pairs = [(model[0].weight.double(), X.double()) for model, X in zip(models, data, strict=True)]
        lost = sum(float((X @ (W - weight.double()).mT).detach().square().sum()) for W, X in pairs)
        whole = sum(float((X @ W.mT).detach().square().sum()) for W, X in pairs)
        assert abs(found / (lost / whole) - 1) < 1e-6
    assert first.error < first.error_before
    plain = merge(models, data, shrinkage=0.0, damping=0.0, progress=False)
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), merged.parameters(), strict=True))
    with pytest.raises(ValueError, match="report has 2 layers already; expected an empty one"):
        merge(models, data, progress=False, report=report)
    with pytest.raises(TypeError, match=r"report is dict; expected onestep\.layerwise\.Report"):
        merge(models, data, progress=False, report={})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("teacher", [None, True])
@pytest.mark.parametrize("solve", [prune, lambda *args, **options: quantize(*args, 8, **options)])
def test_errors_are_of_the_weights_that_are_written(solve, teacher, dtype):
    model = nn.Sequential(nn.Linear(24, 16)).to(dtype)
    X = (torch.randn(300, 24) @ torch.randn(24, 24)).to(dtype)
    rows, bias = X.double(), model[0].bias.detach().double()
    # Towards a teacher its outputs count, as they are in its dtype; without one the products with the weights.
    t = model(X).detach().double() if teacher else rows @ model[0].weight.detach().double().mT
    report = solve(model, X, teacher=teacher, dtype=torch.float64, progress=False)["0"]
    out = rows @ model[0].weight.detach().double().mT + (bias if teacher else 0.0)
    lost = (out - t).square().sum() / t.square().sum()
    assert abs(report.error / lost.item() - 1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_refit_reports_and_judges_the_weights_that_are_written(dtype):
    teacher = nn.Sequential(nn.Linear(24, 16)).to(dtype)
    # Features that nearly depend on each other: the solution is large, and its rounding loses more than it gains.
    X = (torch.randn(300, 24) @ torch.randn(24, 24)).to(dtype)
    changed = copy.deepcopy(teacher)
    with torch.no_grad():
        changed[0].weight += (0.1 * torch.randn(16, 24)).to(dtype)
        t = teacher(X).double()
        for model in (changed, copy.deepcopy(teacher)):
            was = float((X.double() @ model[0].weight.double().mT + model[0].bias.double() - t).square().sum())
            report = refit(model, X, teacher, progress=False)["0"]
            found = float((X.double() @ model[0].weight.double().mT + model[0].bias.double() - t).square().sum())
            whole = float(t.square().sum())
            assert abs(report.error_before - was / whole) < 1e-9
            assert abs(report.error - found / whole) < 1e-9
            assert found <= was
    # The teacher's own weights are the best of their dtype, or nearly: the last one was refitted to itself.
    assert report.error <= report.error_before


def test_pruning_by_size_removes_as_many_where_sizes_are_the_same():
    model, X = nn.Sequential(nn.Linear(16, 8)), torch.randn(200, 16)
    with torch.no_grad():
        # Of two sizes, half each, as after rounding to few bits.
        model[0].weight.copy_(torch.where(torch.arange(128).view(8, 16) % 2 > 0, 1.0, -0.5))
    before = model[0].weight.detach().double()
    report = prune(model, X, 0.25, teacher=None, dtype=torch.float64, progress=False)["0"]
    # The first half of the small ones.
    plain = before.clone()
    plain[:4, ::2] = 0
    rows = X.double()
    expected = (rows @ (plain - before).mT).square().sum() / (rows @ before.mT).square().sum()
    assert abs(report.error_before / expected.item() - 1) < 1e-9


def outputs(model, X):
    """Of each linear layer, its inputs and its outputs for rows, in float64, with the weights as they are."""
    found = {}
    hooks = [
        layer.register_forward_hook(lambda module, args, out, name=name: found.update({name: (args[0], out)}))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        model(X)
    for hook in hooks:
        hook.remove()
    return found


REPORTED = {
    "quantize": lambda model, X, teacher: quantize(model, X, bits=8, teacher=teacher, progress=False),
    "quantize once": lambda model, X, teacher: quantize(
        model, X, bits=8, teacher=teacher, sequential=False, progress=False
    ),
    "prune": lambda model, X, teacher: prune(model, X, 0.02, teacher=teacher, progress=False),
    "refit": lambda model, X, teacher: refit(model, X, teacher, dtype=torch.float32, progress=False),
}


@pytest.mark.parametrize("mean", [0, 10, 100])
@pytest.mark.parametrize("call", REPORTED)
def test_errors_are_true_where_features_have_a_large_mean(call, mean):
    """Sums of float32 have 7 digits of Σ‖t‖², which a mean makes large, and errors far below that are reported."""
    X = torch.randn(2000, 48) + mean * torch.randn(48)
    # A float64 model: what its layers are given and put out has no rounding, the sums have that of float32.
    teacher = nn.Sequential(nn.Linear(48, 32), nn.Identity(), nn.Linear(32, 8)).double()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight += 1e-3 * torch.randn_like(layer.weight) * (call == "refit")
    X = X.double()
    report = REPORTED[call](model, X, teacher)
    expected = outputs(teacher, X)
    # In one pass each layer's inputs are those of the model as it was.
    given = outputs(model, X) if call != "quantize once" else expected
    for name, (_, target) in expected.items():
        layer = model.get_submodule(name)
        with torch.no_grad():
            error = (target - layer(given[name][0])).square().sum() / target.square().sum()
        rounding = 1e-4 * report[name].error_before
        assert report[name].error == pytest.approx(float(error), rel=0.01, abs=rounding if call == "refit" else 0), name
    assert all(layer.error < 1e-4 for layer in report.layers)


@pytest.mark.parametrize("sparsity", [0.5, (4, 8)])
def test_pruning_loses_no_more_than_the_smallest_weights_where_inputs_nearly_depend_on_each_other(sparsity):
    """As in a model whose rows are of 61 tokens: the sweep lost 8 % where removing the smallest weights lost 7 %."""
    tokens = torch.randn(61, 64)
    X = (tokens / tokens.square().mean(1, keepdim=True).sqrt())[torch.randint(61, (1536,))]
    white = torch.randn(1536, 64)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    for rows, more in ((X, sparsity == 0.5), (white, False)):
        pruned = copy.deepcopy(model)
        layer = prune(pruned, rows, sparsity, progress=False)["0"]
        assert layer.error < layer.error_before
        assert (layer.damping > 0.02) == more and layer.damping <= 1.0
        with torch.no_grad():
            wanted = model(rows)
            lost = (pruned(rows) - wanted).square().sum() / wanted.square().sum()
        assert layer.error == pytest.approx(float(lost), rel=1e-3)
        assert float((pruned[0].weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("keep_zeros", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refit_reports_the_error_after_the_solve_where_layers_have_the_dtype_of_the_sums(dtype, bias, keep_zeros):
    X = (torch.randn(200, 8) @ (torch.eye(8) + 0.4 * torch.randn(8, 8))).to(dtype)
    teacher = nn.Sequential(nn.Linear(8, 3, bias=bias)).to(dtype)
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model[0].weight.add_(torch.randn(3, 8)).mul_(torch.rand(3, 8) < 0.7)
        wanted = teacher(X)
        before = float((wanted - model(X)).square().sum() / wanted.square().sum())
    found = refit(model, [X], teacher, dtype=dtype, keep_zeros=keep_zeros, progress=False)["0"]
    error = float((wanted - model(X)).detach().square().sum() / wanted.square().sum())
    assert error < 0.9 * before
    assert found.error_before == pytest.approx(before, rel=1e-4)
    assert found.error == pytest.approx(error, rel=0.1, abs=1e-6)
