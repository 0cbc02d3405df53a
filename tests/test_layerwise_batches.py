"""Models that take another way for later batches than for the first are solved with all that their layers are given."""

import copy

import pytest
import torch
from torch import nn

from onestep.layerwise import quantize


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.again, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, n):
        for _ in range(n):
            x = torch.tanh(self.again(x))
        return self.head(x)


@pytest.mark.parametrize("order", [(1, 3), (3, 1), (0, 3)])
@pytest.mark.parametrize("teacher", [True, None])
def test_later_batches_may_call_a_layer_more_often(order, teacher):
    data = [{"x": torch.randn(10, 8), "n": n} for n in order]
    report = quantize(Loop(), data, teacher=teacher, progress=False)
    assert report["again"].rows == 10 * sum(order)


def test_layers_that_share_inputs_of_the_first_batch_alone_are_solved_one_after_the_other():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, after):
            y = self.a(x)
            return y + self.b(y if after else x)

    model = Two()
    data = [{"x": torch.randn(30, 8), "after": after} for after in (False, True)]
    before = copy.deepcopy(model.b)
    report = quantize(model, data, 3, 8, teacher=None, progress=False)
    assert abs(report["b"].error / lost(model, "b", before, data) - 1) < 1e-3


def lost(model, name, before, data):
    """Σ‖(W − Ŵ)x‖² / Σ‖Wx‖² of a layer's inputs, with all before it as they have become."""
    seen = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().double()))
    for batch in data:
        model(**batch)
    handle.remove()
    x, old, new = torch.cat(seen), before.weight.detach().double(), layer.weight.detach().double()
    return ((x @ (old - new).mT).square().sum() / (x @ old.mT).square().sum()).item()


class Chain(nn.Module):
    """``way`` of a batch keeps its blocks from being a chain."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, way):
        h, shift, list_ = x, x.mean(), []
        for i, block in enumerate(self.blocks):
            if way == "argument":
                shift = h.mean()
            elif way == "written":
                shift += h.mean()
            elif way == "memory":
                list_.append(h.mean())
            h = block(h, shift, list_, way == "in place")
            if i == 1:
                if way == "skip":
                    h = h + x
                elif way == "between":
                    h += x
                elif way == "elsewhere":
                    self.blocks[2].inner(x)
        return h


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, shift, memory, in_place):
        y = self.inner(x) + shift + sum(memory)
        return x.add_(y) if in_place else y


@pytest.mark.parametrize("way", ["plain", "skip", "argument", "written", "memory", "in place", "between", "elsewhere"])
def test_later_batches_may_be_no_chain(way):
    model = Chain()
    rows = [30, 40]
    x = [torch.randn(count, 8) for count in rows]

    def data():
        # Ways that write into their input get a copy of it.
        return [{"x": x[0].clone(), "way": "plain"}, {"x": x[1].clone(), "way": way}]

    class Data:
        def __iter__(self):
            return iter(data())

    before = copy.deepcopy(model.blocks[2].inner)
    report = quantize(model, Data(), 3, 8, teacher=None, progress=False, dtype=torch.float64)
    assert report["blocks.2.inner"].rows == sum(rows) + (40 if way == "elsewhere" else 0)
    with torch.no_grad():
        assert abs(report["blocks.2.inner"].error / lost(model, "blocks.2.inner", before, data()) - 1) < 1e-3
