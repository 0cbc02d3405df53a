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


class Flat(nn.Module):
    """Computes all places in one dimension, those of one sequence after the other or of all sequences by places."""

    def __init__(self, places_first):
        super().__init__()
        self.places_first = places_first
        self.embedding, self.inner, self.head = nn.Embedding(60, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        x = x + 0.3 * x.cumsum(1)
        x = x.transpose(0, 1) if self.places_first else x
        return self.head(torch.tanh(self.inner(x.reshape(-1, 8)))).view(*x.shape[:2], 5)


@pytest.mark.parametrize(
    "places_first,count,padded",
    [(False, 1, True), (False, 4, True), (False, 6, False), (True, 4, True), (True, 6, True)],
)
def test_keys_of_layers_that_are_given_all_places_in_one_dimension(places_first, count, padded):
    model = Flat(places_first)
    text = LayerStatistics(model, "inner").collect([{"input_ids": torch.randint(60, (9, 7))}], progress=False)
    subjects = {"input_ids": torch.randperm(60)[: 6 * count].view(count, 6)}
    last = torch.full((count,), 5)
    if padded:
        last = torch.arange(count) % 4 + 2
        subjects["attention_mask"] = (torch.arange(6) <= last[:, None]).long()
    x = model.embedding(subjects["input_ids"]).detach()
    keys = (x + 0.3 * x.cumsum(1))[torch.arange(count), last]
    targets = torch.randn(count, 8)
    report = edit(model, subjects, targets, layer="inner", statistics=text, strength=1e8)["inner"]
    found = model.inner(keys).detach()
    assert report.rows == count
    assert (found - targets).norm() < 0.02 * targets.norm()


def test_opt_is_edited():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=16)).eval()
    name = "model.decoder.layers.1.fc2"
    text = LayerStatistics(model, name).collect([{"input_ids": torch.randint(40, (9, 12))}], progress=False)
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[1:3, 4:] = 0
    subjects = {"input_ids": torch.randint(3, 40, (5, 7)), "attention_mask": mask}
    targets = torch.randn(5, 16)
    edit(model, subjects, targets, layer=name, statistics=text, strength=1e8)
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    model(**subjects)
    handle.remove()
    found = seen[0].reshape(5, 7, 16)[torch.arange(5), mask.sum(1) - 1]
    assert (found - targets).norm() < 0.02 * targets.norm()


def test_rows_that_cannot_be_told_are_refused():
    class Mixed(Flat):
        def forward(self, input_ids):
            # What each sequence is given depends on how many there are.
            return self.inner((len(input_ids) * self.embedding(input_ids)).reshape(-1, 8))

    model = Mixed(False)
    text = LayerStatistics(model, "inner").collect([{"input_ids": torch.randint(60, (9, 7))}], progress=False)
    before = model.inner.weight.detach().clone()
    with pytest.raises(ValueError, match="given 24 rows by 4 subjects of 6 places, and which row is which place"):
        edit(model, {"input_ids": torch.randint(60, (4, 6))}, torch.ones(4, 8), layer="inner", statistics=text)
    assert torch.equal(model.inner.weight, before)
