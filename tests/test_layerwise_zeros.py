"""Quantising a pruned model: zeros that stay, and what the other weights make up for."""

import copy

import pytest
import torch
from layerwise_cases import Model, correlated
from torch import nn

from onestep.layerwise import LayerStatistics, edit, load, merge, prune, quantize, refit, save
from onestep.layerwise.masked import solve_masked


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def sweep_by_hand(W, A, zeros, order, bits, group_size, symmetric):
    """GPTQ's loop in float64, with the grids of W and weights that are set to 0."""
    most, d = 2**bits - 1, W.shape[1]
    damped = A + 0.01 * A.diagonal().mean() * torch.eye(d, dtype=A.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    scale, zero = torch.empty_like(W), torch.empty_like(W)
    for start in range(0, d, group_size):
        part = W[:, start : start + group_size]
        low, high = part.amin(1, True).clamp(max=0), part.amax(1, True).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale[:, start : start + group_size] = (high - low) / most
        zero[:, start : start + group_size] = (most + 1) / 2 if symmetric else (-low / (high - low) * most).round()
    left = W.clone()
    for step, j in enumerate(order.tolist()):
        codes = ((left[:, j] / scale[:, j]).round() + zero[:, j]).clamp(0, most)
        q = (scale[:, j] * (codes - zero[:, j])).masked_fill(zeros[:, j], 0.0)
        ahead = order[step + 1 :]
        left[:, ahead] -= ((left[:, j] - q) / U[step, step])[:, None] * U[step, step + 1 :]
        left[:, j] = q
    return left


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"symmetric": True, "group_size": 5}])
@pytest.mark.parametrize("teacher", [None, True])
def test_weights_are_those_of_the_loop_by_hand(options, teacher):
    X = correlated(1, 300, 24)[0].double() * torch.linspace(0.5, 2.0, 24)
    model = nn.Sequential(nn.Linear(24, 10, bias=False)).double()
    prune(model, X, (2, 4), progress=False)
    weight = model[0].weight.detach().clone()
    zeros = weight == 0
    options = {"group_size": 8, **options}
    report = quantize(model, X, 4, keep_zeros=True, teacher=teacher, dtype=torch.float64, progress=False, **options)
    A = X.mT @ X / len(X)
    in_order = options.get("act_order", True)
    order = A.diagonal().argsort(descending=True) if in_order else torch.arange(24)
    expected = sweep_by_hand(weight, A, zeros, order, 4, options["group_size"], options.get("symmetric", False))
    found = model[0].weight.detach()
    assert not found[zeros].any() and bool((found == 0).double().mean() < 0.7)
    # But for ties, which symmetric grids have at their ends.
    same = ((found - expected).abs() < 1e-9).all(1)
    assert same.all() if "symmetric" not in options else same.sum() >= 4
    error = float(((weight - found) @ A * (weight - found)).sum() / (weight @ A * weight).sum())
    assert report["0"].error == pytest.approx(error, rel=1e-6)
    assert error < report["0"].error_before
    assert torch.equal(report.quantized["0"].dequantize(), found)


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pruned_model_is_quantised_with_its_zeros(sparsity, dtype, tmp_path):
    model, data = Model(), [correlated(10, 20, 12) for _ in range(3)]
    model, data = model.to(dtype), [x.to(dtype) for x in data]
    teacher = copy.deepcopy(model)
    prune(model, data, sparsity, progress=False)
    zeros = {name: value == 0 for name, value in model.state_dict().items() if name.endswith("weight")}
    lost = copy.deepcopy(model)
    quantize(lost, data, 4, 12, teacher=teacher, progress=False)
    assert any(bool(lost.state_dict()[name][places].any()) for name, places in zeros.items())
    report = quantize(model, data, 4, 12, teacher=teacher, keep_zeros=True, progress=False)
    assert not any(bool(model.state_dict()[name][places].any()) for name, places in zeros.items())
    assert sum(layer.error for layer in report.layers) < 0.9 * sum(layer.error_before for layer in report.layers)
    save(model, tmp_path / "codes", report.quantized)
    again = load(copy.deepcopy(teacher), tmp_path / "codes")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_the_sweep_begins_at_the_closest_weights_with_the_zeros():
    """8 bits are nearly exact, so that what is left is what the least squares of each row leave."""
    X = correlated(1, 400, 16)[0].double()
    teacher = nn.Sequential(nn.Linear(16, 6)).double()
    model = copy.deepcopy(teacher)
    zeros = torch.rand(6, 16) < 0.5
    with torch.no_grad():
        model[0].weight.masked_fill_(zeros, 0.0)
    wanted = teacher(X).detach()
    least = 0.0
    for row, gone in enumerate(zeros):
        rest = wanted[:, row] - model[0].bias[row].detach()
        solved = torch.linalg.lstsq(X[:, ~gone], rest[:, None]).solution
        least += float((X[:, ~gone] @ solved - rest[:, None]).square().sum())
    report = quantize(
        model, X, 8, None, teacher=teacher, keep_zeros=True, damping=1e-6, dtype=torch.float64, progress=False
    )["0"]
    assert report.error * float(wanted.square().sum()) == pytest.approx(least, rel=0.01)
    assert report.error < 0.9 * report.error_before


def test_equations_of_features_of_their_own():
    A = torch.randn(30, 7, dtype=torch.float64)
    system, right, zeros = A.mT @ A, torch.randn(7, 5, dtype=torch.float64), torch.rand(5, 7) < 0.4
    zeros[3] = True
    solved, info = solve_masked(system, right, zeros)
    assert info == 0 and not solved[zeros].any()
    for row, gone in enumerate(zeros):
        kept = ~gone
        torch.testing.assert_close(solved[row, kept], torch.linalg.solve(system[kept][:, kept], right[kept, row]))
    assert solve_masked(-system, right, torch.zeros_like(zeros))[1] > 0


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
def test_no_layer_loses_more_than_rounded_to_nearest(act_order, group_size):
    """From a few rows, of a few outputs, the sweep may lose more."""
    fallen = 0
    for _ in range(40):
        model, X = nn.Sequential(nn.Linear(16, 1)), torch.randn(64, 16) * (3 * torch.rand(16))
        options = {"group_size": group_size, "act_order": act_order, "progress": False}
        report = quantize(model, X, 8, **options)
        weight, layer = model[0].weight.detach(), report["0"]
        assert layer.error <= layer.error_before
        assert torch.equal(report.quantized["0"].dequantize(), weight)
        fallen += layer.error == layer.error_before
    assert 0 < fallen < 20


def test_zeros_of_a_mended_model_stay():
    model, X = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), correlated(1, 200, 12)[0]
    teacher = copy.deepcopy(model)
    prune(model, X, 0.5, progress=False)
    refit(model, X, teacher, progress=False)
    zeros = [model[i].weight == 0 for i in (0, 2)]
    quantize(model, X, 4, 12, keep_zeros=True, progress=False)
    assert all(not model[i].weight[places].any() for i, places in zip((0, 2), zeros, strict=True))


def merged(model, data, **options):
    merge([model, model], [data, data], **options)


def edited(model, data, *, damping, progress):
    edit(model, data, data, layer="0", statistics=LayerStatistics(model, "0"), damping=damping)


@pytest.mark.parametrize("call", [quantize, prune, merged, edited])
@pytest.mark.parametrize("damping,error", [(True, TypeError), (-1.0, ValueError), (float("nan"), ValueError)])
def test_a_damping_is_refused_before_data_is_gone_through(call, damping, error):
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("ran")

    with pytest.raises(error, match=r"damping is .* expected a finite number of 0 or more"):
        call(nn.Sequential(nn.Linear(3, 3), Never()), torch.ones(2, 3), damping=damping, progress=False)
