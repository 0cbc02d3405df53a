"""Layers solved by passes through one block at a time have the bits of whole passes, and models that are no chain of
blocks have whole ones."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from onestep.layerwise import chain, quantize, refit


class Block(nn.Module):
    def __init__(self, width, kind):
        super().__init__()
        self.up, self.down, self.kind = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), kind
        self.left = None  # a list that all blocks share

    def forward(self, x, shift=None, *, memory=None):
        if memory is not None:
            memory.append(x.mean())
            shift = sum(memory)
        if self.kind == "in place":
            return x.mul_(0.5).add_(self.down(torch.tanh(self.up(x))))
        if self.kind == "left behind":
            shift, self.left[0] = self.left[0], x.mean()
        return x + self.down(torch.tanh(self.up(x))) + (0 if shift is None else shift)


class Model(nn.Module):
    """Blocks in a list; ``kind`` is what keeps them from being a chain."""

    def __init__(self, kind="chain", width=8):
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(Block(width, kind) for _ in range(4))
        self.head = nn.Linear(width, 3)
        for layer in self.layers:
            layer.left = left = self.layers[0].left or [torch.zeros(())]
            layer.kind = "chain" if kind == "in place" and layer is self.layers[0] else kind
        self.left = left

    def forward(self, x, attention_mask=None):
        self.left[0] = torch.zeros(())
        x = self.first(x)
        shift = x.mean()
        memory = [] if self.kind == "memory" else None
        for layer in self.layers:
            x = layer(x, shift, memory=memory)
            if self.kind == "argument":
                shift = x.mean()
            if self.kind == "between":
                x = x.clamp(-10, 10)
        return self.head(x)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def solved(model, data, teacher, monkeypatch, *, whole):
    """Weights after refit and quantize, and how often a block was called."""
    model = copy.deepcopy(model)
    calls = []
    model.get_submodule("layers" if hasattr(model, "layers") else "transformer.h")[0].register_forward_hook(
        lambda *unused: calls.append(1)
    )
    with monkeypatch.context() as context:
        if whole:
            context.setattr(chain, "_MOST_KEPT", 0)
        if teacher is not None:
            refit(model, data, teacher, progress=False)
        quantize(model, data, bits=3, group_size=8, progress=False)
    return model.state_dict(), len(calls)


@pytest.mark.parametrize("kind", ["chain", "argument", "memory", "between", "in place", "left behind"])
def test_the_bits_are_those_of_whole_passes(kind, monkeypatch):
    model, teacher = Model(kind), Model(kind)
    data = [{"x": torch.randn(4, 6, 8), "attention_mask": (torch.rand(4, 6) > 0.3).long()} for _ in range(8)]
    one, fewer = solved(model, data, teacher, monkeypatch, whole=False)
    other, more = solved(model, data, teacher, monkeypatch, whole=True)
    assert all(torch.equal(one[name], other[name]) for name in other)
    # Two solves, each of ten groups of layers: whole passes but for those of later blocks.
    assert fewer < 0.6 * more if kind == "chain" else fewer >= more - 2


def test_batches_in_another_order_each_time_keep_their_masks():
    data = [{"x": torch.randn(4, 6, 8), "attention_mask": (torch.rand(4, 6) > p).long()} for p in (0.1, 0.5, 0.9)]
    model = Model()
    loader = DataLoader(data, batch_size=None, shuffle=True)
    report = refit(model, loader, Model(), progress=False)
    assert {layer.rows for layer in report.layers} == {sum(int(batch["attention_mask"].sum()) for batch in data)}
    assert all(layer.error <= layer.error_before for layer in report.layers)


def test_models_of_transformers_keep_no_cache_meanwhile(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=3, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": torch.randint(20, (2, 12))} for _ in range(6)]
    one, fewer = solved(model, data, None, monkeypatch, whole=False)
    other, more = solved(model, data, None, monkeypatch, whole=True)
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert fewer < 0.7 * more
    assert config.use_cache
