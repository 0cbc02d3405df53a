"""``onestep.layerwise`` with a teacher: which layer belongs to which, and what is refused before a change."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onestep.layerwise import LayerStatistics, merge, prune, quantize, refit, replace_blocks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Block(nn.Module):
    """Linear in its input where ``bent`` is False."""

    def __init__(self, width, bent=True):
        super().__init__()
        self.up, self.down, self.bent = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), bent

    def forward(self, x, shift=None):
        inner = self.up(x)
        return x + 0.5 * self.down(F.gelu(inner) if self.bent else inner)


class Model(nn.Module):
    def __init__(self, width=8, straight=(1, 2), count=5):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, index not in straight) for index in range(count))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, shift=None)
        return self.head(x)


DATA = [torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(1)) for _ in range(3)]


def damaged(model):
    with torch.no_grad():
        for block in list(model.blocks)[2:]:
            block.down.weight += 0.3 * torch.randn_like(block.down.weight)
    return model


def test_refit_after_replace_blocks_finds_the_layers_as_they_were_called():
    teacher = Model()
    model = copy.deepcopy(teacher)
    replace_blocks(model, DATA, ["blocks.1", "blocks.2"], ridge=0.0, progress=False)
    damaged(model)
    report = refit(copy.deepcopy(model), DATA, teacher, ridge=0.0, progress=False)
    # The blocks that were replaced are linear: what is given to the layers after them is what the teacher's are given.
    assert all(layer.error < 1e-9 for layer in report.layers), str(report)
    assert report["blocks.2.down"].error_before > 1e-2
    refit(model, DATA, teacher, ridge=0.0, progress=False)
    torch.testing.assert_close(model.blocks[2].down.weight, teacher.blocks[3].down.weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(DATA[0]), teacher(DATA[0]), rtol=1e-3, atol=1e-3)


def test_a_map_is_solved_towards_what_its_blocks_returned():
    teacher = Model(straight=())
    model = copy.deepcopy(teacher)
    replace_blocks(model, DATA, ["blocks.1", "blocks.2"], steps=0, progress=False)
    assert type(model.blocks[1].map) is nn.Linear
    with torch.no_grad():
        model.blocks[1].map.weight += 0.1 * torch.randn(8, 8)
    refit(model, DATA, teacher, layers="blocks.1.map", ridge=0.0, progress=False)
    inputs = torch.cat([teacher.blocks[0](x) for x in DATA]).detach().reshape(-1, 8).double()
    with torch.no_grad():
        wanted = torch.cat([teacher.blocks[2](teacher.blocks[1](teacher.blocks[0](x))) for x in DATA]).reshape(-1, 8)
    bordered = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    expected = torch.linalg.lstsq(bordered, wanted.double()).solution[:8].mT
    torch.testing.assert_close(model.blocks[1].map.weight.double(), expected, rtol=1e-4, atol=1e-4)


def test_blocks_that_are_replaced_twice_and_teachers_that_were_replaced():
    first = Model(straight=(1, 2, 3))
    once = copy.deepcopy(first)
    replace_blocks(once, DATA, ["blocks.1", "blocks.2"], ridge=0.0, progress=False)
    twice = copy.deepcopy(once)
    replace_blocks(twice, DATA, ["blocks.1", "blocks.2"], ridge=0.0, progress=False)
    for teacher in (first, once):
        model = damaged(copy.deepcopy(twice))
        refit(model, DATA, teacher, ridge=0.0, progress=False)
        torch.testing.assert_close(model.blocks[2].down.weight, first.blocks[4].down.weight, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"'blocks\.1\.up' is in block 1 of 'blocks' as it was, which the teacher has"):
        refit(copy.deepcopy(first), DATA, once, progress=False)


def test_blocks_that_were_removed_without_a_record_need_names():
    teacher = Model()
    model = copy.deepcopy(teacher)
    del model.blocks[1:3]
    before = copy.deepcopy(model.state_dict())
    for call in (refit, quantize, prune):
        with pytest.raises(ValueError, match=r"'blocks' has 3 blocks in the model and 5 in the teacher.*pass names="):
            call(model, DATA, teacher=teacher, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    names = {"blocks.0": "blocks.0", "blocks.1": "blocks.3", "blocks.2": "blocks.4"}
    report = refit(model, DATA, teacher, names=names, progress=False)
    assert report["blocks.1.up"].error < report["blocks.1.up"].error_before
    rows = torch.cat([model.blocks[0](x) for x in DATA]).reshape(-1, 8).detach()
    with torch.no_grad():
        wanted = torch.cat([teacher.blocks[3].up(part) for part in _inputs_of_block_3(teacher)]).reshape(-1, 16)
    lost = (model.blocks[1].up(rows) - wanted).square().sum() / wanted.square().sum()
    assert abs(report["blocks.1.up"].error / lost.item() - 1) < 1e-3
    with pytest.raises(ValueError, match=r"names has 'blocks\.9'"):
        refit(model, DATA, teacher, names={**names, "blocks.9": "blocks.1"}, progress=False)
    with pytest.raises(ValueError, match=r"layer 'blocks\.1\.up' has no counterpart"):
        refit(model, DATA, teacher, names={**names, "blocks.1": None}, progress=False)
    with pytest.raises(ValueError, match=r"matches 'blocks\.1\.up', which is 'blocks\.7\.up' there"):
        refit(model, DATA, teacher, names={**names, "blocks.1": "blocks.7"}, progress=False)
    with pytest.raises(TypeError, match="names is list"):
        refit(model, DATA, teacher, names=["blocks.0"], progress=False)
    with pytest.raises(TypeError, match=r"names\['blocks'\] is 3"):
        quantize(model, DATA, teacher=teacher, names={"blocks": 3}, progress=False)
    # Without a counterpart a layer is rounded towards its own outputs.
    teacher = Model(straight=())
    model = copy.deepcopy(teacher)
    del model.blocks[1:3]
    report = quantize(model, DATA, bits=8, teacher=teacher, names={**names, "blocks.1": None}, progress=False)
    assert report["blocks.1.up"].error < 1e-3 < report["blocks.2.up"].error


def _inputs_of_block_3(teacher):
    for x in DATA:
        yield teacher.blocks[2](teacher.blocks[1](teacher.blocks[0](x)))


def test_a_model_is_its_own_teacher_with_the_bits_of_a_copy():
    data = [{"x": x} for x in DATA]
    for call in (quantize, prune):
        one, other = Model(straight=()), Model(straight=())
        other.load_state_dict(one.state_dict())
        report = call(one, data, teacher=True, progress=False)
        expected = call(other, data, teacher=copy.deepcopy(other), progress=False)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
        assert [layer.error for layer in report.layers] == [layer.error for layer in expected.layers]
    # In one pass over the data it has nothing to teach.
    one.load_state_dict(Model(straight=()).state_dict())
    other.load_state_dict(one.state_dict())
    quantize(one, data, teacher=True, sequential=False, progress=False)
    quantize(other, data, teacher=None, sequential=False, progress=False)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


class Tied(nn.Module):
    """One layer in two blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.blocks[2].up = self.blocks[0].up

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("teacher", [None, True])
def test_a_layer_of_two_blocks_is_solved_with_the_inputs_of_both(teacher):
    model = Tied()
    inputs = []
    with torch.no_grad():
        for x in DATA:
            first = model.blocks[0](x)
            inputs += [x, model.blocks[1](first)]
    rows = torch.cat(inputs).reshape(-1, 8)
    old = model.blocks[0].up.weight.detach().clone()
    report = quantize(model, DATA, 3, teacher=teacher, progress=False)
    assert report["blocks.0.up"].rows == len(rows) == 2 * report["blocks.1.up"].rows
    change = old - model.blocks[0].up.weight.detach()
    if teacher is None:
        lost = (rows @ change.mT).square().sum() / (rows @ old.mT).square().sum()
        assert abs(report["blocks.0.up"].error / lost.item() - 1) < 1e-3


def test_two_layers_with_one_weight_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="layers '0' and '2' share one weight"):
        quantize(model, DATA, layers=["0", "2"], progress=False)
    with pytest.raises(ValueError, match="layers '0' and '2' share one weight"):
        merge([model, copy.deepcopy(model)], [DATA, DATA], layers=["0", "2"], progress=False)


class Mixture(nn.Module):
    def __init__(self, width=8, experts=4):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Block(width) for _ in range(experts))

    def forward(self, x):
        x = self.first(x)
        rows = x.reshape(-1, x.shape[-1])
        chosen = self.router(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            out[chosen == index] = expert(rows[chosen == index])
        return out.view_as(x)


def test_a_mixture_with_a_teacher_is_refused_before_anything_is_changed():
    teacher = Mixture()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.first.weight += 0.02 * torch.randn(8, 8)
        model.first.weight[0] = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'experts\.0\.\w+' is given .*rows.*[Ll]eave"):
        refit(model, DATA, teacher, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = refit(model, DATA, teacher, layers=["*", "!experts.*"], progress=False)
    assert report["first"].error < report["first"].error_before
    # Equal at first: only what the layers become sends rows elsewhere.
    model = copy.deepcopy(teacher)
    with pytest.raises(ValueError, match=r"given rows that other layers choose"):
        refit(model, DATA, teacher, progress=False)
    # Where a teacher is not needed, experts are solved without it.
    report = quantize(model, DATA, 2, teacher=teacher, progress=False)
    assert {layer.name for layer in report.layers} >= {"first", "experts.0.up"}
    assert report["experts.0.up"].error < report["experts.0.up"].error_before


# ------------------------------------------------------------------------------------------------- values not finite


def with_nan(model, name, value=torch.nan):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


@pytest.mark.parametrize("name", ["blocks.3.up.weight", "blocks.3.up.bias"])
def test_a_teacher_of_nan_is_refused_before_anything_is_changed(name):
    model, teacher = Model(), with_nan(Model(), name)
    before = copy.deepcopy(model.state_dict())
    for call in (refit, quantize, prune):
        with pytest.raises(ValueError, match=r"of the teacher's layer 'blocks\.3\.up' holds NaN"):
            call(model, DATA, teacher=teacher, progress=False)
    with pytest.raises(ValueError, match=r"of the layer 'blocks\.3\.up' holds NaN"):
        refit(with_nan(Model(), name), DATA, model, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"the teacher's outputs for layer 'blocks\.3\.(up|down)' hold NaN"):
        LayerStatistics(model, "blocks.3.*", teacher=teacher).update(DATA[0])


def test_merging_what_is_not_finite_is_refused():
    for name, message in (("head.weight", "models[1]'s layer 'head'"), ("scale", "'scale' of models[1]")):
        models = [Model(), Model()]
        for model in models:
            model.register_parameter("scale", nn.Parameter(torch.ones(2)))
        with_nan(models[1], name, torch.inf)
        with pytest.raises(ValueError, match=r"holds NaN or infinity") as caught:
            merge(models, [DATA, DATA], progress=False)
        assert message in str(caught.value)
