"""``onestep.layerwise.replace_blocks`` against the same done by hand."""

import copy

import pytest
import torch
from layerwise_cases import Block, Model, correlated, inputs_of
from torch import nn

from onestep.layerwise import replace_blocks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_blocks_become_a_linear_map():
    model = Model(width=12, blocks=4).double()
    data = [correlated(4, 30, 12).double() for _ in range(2)]
    x = inputs_of(model.blocks[1], lambda: [model(batch) for batch in data])
    t = inputs_of(model.blocks[3], lambda: [model(batch) for batch in data])
    report = replace_blocks(model, data, ["blocks.1", "blocks.2"], ridge=0.0, steps=0, progress=False)
    assert len(model.blocks) == 3
    assert isinstance(model.blocks[1], nn.Linear)
    rows = torch.cat([x, torch.ones(len(x), 1)], 1)
    expected = torch.linalg.lstsq(rows, t).solution
    torch.testing.assert_close(torch.cat([model.blocks[1].weight.mT, model.blocks[1].bias[None]]).detach(), expected)
    lost = (rows @ expected - t).square().sum() / t.square().sum()
    assert abs(report["blocks.1"].error / lost.item() - 1) < 1e-6
    assert abs(report["blocks.1"].error_before / ((x - t).square().sum() / t.square().sum()).item() - 1) < 1e-6
    with pytest.raises(ValueError, match="expected neighbours of one container"):
        replace_blocks(model, data, ["blocks.0", "blocks.2"])


class Normed(nn.Module):
    """What follows the blocks depends on the directions of their rows alone."""

    def __init__(self, in_tuple):
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.norm, self.head, self.in_tuple = nn.LayerNorm(8), nn.Linear(8, 4), in_tuple

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = block(x)
        out = self.head(self.norm(x))
        return {"hidden": x[0, 0, 0], "logits": out} if self.in_tuple else out


@pytest.mark.parametrize("in_tuple", [False, True])
def test_steps_bring_what_the_model_puts_out_closer(in_tuple):
    teacher = Normed(in_tuple)
    # Rows of very different sizes, of which the closest map to the blocks looks at the largest alone.
    x = correlated(6, 30, 8) * torch.logspace(-1, 1, 30)[:, None]
    data = [{"x": part, "attention_mask": (torch.rand(2, 30) > 0.2).long()} for part in x.split(2)]

    def lost(model):
        found = []
        for batch in data:
            one, other = (m(**batch)["logits"] if in_tuple else m(**batch) for m in (model, teacher))
            found.append((one - other)[batch["attention_mask"].bool()].square().sum())
        return sum(found).item()

    losses = []
    for steps in (0, 3, 12):
        model = copy.deepcopy(teacher)
        again = copy.deepcopy(teacher)
        torch.manual_seed(steps)
        report = replace_blocks(model, data, ["blocks.1", "blocks.2"], steps=steps, progress=False)
        torch.manual_seed(steps + 1)
        replace_blocks(again, data, ["blocks.1", "blocks.2"], steps=steps, progress=False)
        assert torch.equal(model.blocks[1].weight, again.blocks[1].weight)
        assert all(parameter.grad is None for parameter in model.parameters())
        losses.append(lost(model))
    assert losses[2] < losses[1] < 0.7 * losses[0]
    # The best map of all, for comparison by another way.
    best = copy.deepcopy(model).blocks[1]
    optimizer = torch.optim.LBFGS(best.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    model.blocks[1] = best

    def closure():
        optimizer.zero_grad()
        found = [
            ((model(**batch)["logits"] if in_tuple else model(**batch)) - wanted)[batch["attention_mask"].bool()]
            for batch, wanted in zip(data, outputs, strict=True)
        ]
        loss = torch.cat(found).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        outputs = [teacher(**batch)["logits"] if in_tuple else teacher(**batch) for batch in data]
    optimizer.step(closure)
    assert lost(model) < losses[2] < 3 * lost(model)
    # What is reported is of the run's end, as it is with the map that was found.
    with torch.no_grad():
        rows, wanted = [], []
        for batch in data:
            kept = batch["attention_mask"].bool()
            first = teacher.blocks[0](batch["x"])
            rows.append(first[kept])
            wanted.append(teacher.blocks[2](teacher.blocks[1](first))[kept])
        rows, wanted = torch.cat(rows), torch.cat(wanted)
        expected = (again.blocks[1](rows) - wanted).square().sum() / wanted.square().sum()
    assert abs(report["blocks.1"].error / expected.item() - 1) < 1e-3


class Pair(nn.Module):
    def __init__(self, second):
        super().__init__()
        self.inner, self.second = nn.Linear(4, 4), second

    def forward(self, x):
        return torch.tanh(self.inner(x)), (x if self.second else None)


class Pairs(nn.Module):
    def __init__(self, second, used):
        super().__init__()
        self.layers, self.used = nn.ModuleList(Pair(second) for _ in range(3)), used

    def forward(self, x):
        for layer in self.layers:
            x, more = layer(x)
            # As T5 takes position biases from block to block, and goes on without where there are none.
            x = x + 0.1 * more if self.used and more is not None else x
        return x


@pytest.mark.parametrize("second", [False, True])
def test_blocks_that_return_more_than_a_map_can_are_refused_where_it_is_used(second):
    x = torch.randn(50, 4)
    model = Pairs(second, used=False)
    replace_blocks(model, x, ["layers.1"], progress=False)
    assert model(x).shape == x.shape
    assert len(model.layers[1](x)) == 2
    if second:
        model = Pairs(second, used=True)
        with pytest.raises(ValueError, match="return more than the hidden state, and the model uses it"):
            replace_blocks(model, x, ["layers.1"], progress=False)
        assert all(type(layer) is Pair for layer in model.layers)
    with pytest.raises(ValueError, match=r"steps is -1"):
        replace_blocks(model, x, ["layers.1"], steps=-1, progress=False)
