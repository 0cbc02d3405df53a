"""The order in which layers are solved, where it is not that of their calls."""

import copy

import pytest
import torch
from torch import nn

from onestep.layerwise import prune, quantize, refit


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x))


@pytest.mark.parametrize("solve", [lambda *args, **options: quantize(*args, 3, 8, **options), prune])
def test_layers_whose_weights_others_use_come_first_and_are_mended(solve):
    """nn.MultiheadAttention does not call its out_proj, which is rounded or pruned without rows."""
    model, data = Encoder().eval(), [torch.randn(20, 7, 8) for _ in range(3)]
    wanted = torch.cat([model(x) for x in data]).detach()
    solved = copy.deepcopy(model)
    report = solve(solved, data, progress=False)
    projections = [f"encoder.layers.{i}.self_attn.out_proj" for i in range(2)]
    assert [layer.name for layer in report.layers][:2] == projections
    assert [report[name].rows for name in projections] == [0, 0]
    assert all(layer.rows == 420 for layer in report.layers[2:])
    # The head is last, so that its error is that of the model, with all that the others have become.
    assert report.layers[-1].name == "head"
    lost = float((torch.cat([solved(x) for x in data]).detach() - wanted).square().sum() / wanted.square().sum())
    assert report["head"].error == pytest.approx(lost, rel=1e-3)


def test_refit_leaves_them_and_solves_the_others():
    model, data = Encoder().eval(), [torch.randn(20, 7, 8) for _ in range(3)]
    student = copy.deepcopy(model)
    prune(student, data, 0.5, progress=False)
    before = student.encoder.layers[0].self_attn.out_proj.weight.clone()
    report = refit(student, data, model, progress=False)
    assert torch.equal(student.encoder.layers[0].self_attn.out_proj.weight, before)
    assert report["head"].error < report["head"].error_before
