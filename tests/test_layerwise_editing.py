"""``onestep.layerwise.edit`` with large strengths and subjects that are alike."""

import copy

import pytest
import torch
from torch import nn

from onestep.layerwise import LayerStatistics, edit


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def text_of(model):
    return LayerStatistics(model).update(torch.randn(500, 12))


@pytest.mark.parametrize("strength", [1e4, 1e7, 1e9, 1e12, 1e30])
def test_the_same_subject_twice_gets_the_mean_of_its_targets(strength):
    model, keys, targets = nn.Sequential(nn.Linear(12, 7)), torch.randn(3, 12), torch.randn(6, 7)
    statistics = text_of(model)
    report = edit(model, keys.repeat(2, 1), targets, layer="0", statistics=statistics, strength=strength)["0"]
    mean = (targets[:3] + targets[3:]) / 2
    torch.testing.assert_close(model(keys).detach(), mean, rtol=0, atol=20 / strength + 1e-5)
    least = 2 * (targets[:3] - mean).square().sum() / targets.square().sum()
    assert abs(report.error / least.item() - 1) < 1e-3


@pytest.mark.parametrize("strength", [1e5, 1e6, 1e7, 1e9])
def test_subjects_that_are_nearly_alike_are_written_as_in_float64(strength):
    model, keys, targets = nn.Sequential(nn.Linear(12, 7)), torch.randn(3, 12), torch.randn(6, 7)
    keys = torch.cat([keys, keys + 1e-3 * torch.randn(3, 12)])
    wide = copy.deepcopy(model).double()
    statistics = text_of(model)
    found = edit(model, keys, targets, layer="0", statistics=statistics, strength=strength)["0"].error
    # By the definition: the least of strength · Σ‖missing − change · k‖² + E‖change · x‖².
    C = statistics["0"].gram.double() / 500
    C += 1e-4 * C.diagonal().mean() * torch.eye(12)
    K = keys.double().mT
    missing = (targets.double() - wide(keys.double())).detach().mT
    change = torch.linalg.solve(C / strength + K @ K.mT, K @ missing.mT).mT
    lost = (missing - change @ K).square().sum() / targets.double().square().sum()
    assert abs(found / lost.item() - 1) < 1e-2
    assert (model[0].weight - wide[0].weight - change).norm() < 1e-4 * change.norm()


@pytest.mark.parametrize("strength", [1e20, 1e308, 1e-300])
def test_any_strength_has_a_solution(strength):
    model, keys, targets = nn.Sequential(nn.Linear(12, 7)), torch.randn(20, 12), torch.randn(20, 7)
    statistics, before = text_of(model), model[0].weight.detach().clone()
    edit(model, keys, targets, layer="0", statistics=statistics, strength=strength)
    # More subjects than features: the least-squares solution, or none of it.
    best = torch.linalg.lstsq(keys.double(), (targets - model[0].bias).detach().double()).solution.mT.float()
    torch.testing.assert_close(model[0].weight.detach(), before if strength < 1 else best, rtol=1e-4, atol=1e-5)
