"""``layerwise.load``: what ``save`` wrote, in a model that was built anew."""

import copy

import pytest
import torch
from torch import nn

from onestep.layerwise import load, prune, quantize, refit, replace_blocks, save

pytest.importorskip("safetensors")
TOKENS = 40


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def language_model(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": TOKENS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    configuration = {
        "gpt2": lambda: transformers.GPT2Config(**sizes, n_positions=32, n_embd=32, n_layer=4, n_head=4),
        "llama": lambda: transformers.LlamaConfig(**sizes, **llama, num_hidden_layers=4),
        "mixtral": lambda: transformers.MixtralConfig(**sizes, **llama, num_hidden_layers=3, num_local_experts=4),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(configuration).eval()


BATCH = {"input_ids": torch.randint(3, TOKENS, (4, 16)), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "mixtral": "model.layers"}


@torch.no_grad()
def logits(model):
    return model(**BATCH).logits


def generated(model):
    return model.generate(BATCH["input_ids"][:1, :5], max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("kind", BLOCKS)
def test_codes_become_the_weights_that_they_are(kind, bits, tmp_path):
    """Of tied heads, Conv1D and stacked experts, too."""
    model = language_model(kind)
    layers = ["*", "lm_head"] if kind == "gpt2" else "*"
    report = quantize(model, [BATCH], bits=bits, group_size=16, layers=layers, progress=False)
    save(model, tmp_path / "codes", report.quantized)
    fresh = language_model(kind)
    assert not torch.equal(logits(fresh), logits(model))
    assert load(fresh, tmp_path / "codes") is fresh
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(fresh), logits(model)) and torch.equal(generated(fresh), generated(model))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_maps_take_the_place_of_blocks(kind, packed, tmp_path):
    teacher = language_model(kind)
    model, where = copy.deepcopy(teacher), BLOCKS[kind]
    replace_blocks(model, [BATCH], [f"{where}.1", f"{where}.2"], progress=False)
    quantized = None
    if packed:
        quantized = quantize(model, [BATCH], bits=4, group_size=16, layers=f"{where}.*", progress=False).quantized
    save(model, tmp_path / "short", quantized)
    fresh = load(language_model(kind), tmp_path / "short")
    assert len(fresh.get_submodule(where)) == len(teacher.get_submodule(where)) - 1
    assert torch.equal(logits(fresh), logits(model)) and torch.equal(generated(fresh), generated(model))
    # A second time, into the model that has the maps already.
    assert torch.equal(logits(load(fresh, tmp_path / "short")), logits(model))
    if kind != "mixtral":
        # Its layers are matched with the teacher's as those of the model that was saved.
        found, wanted = (refit(each, [BATCH], teacher, progress=False) for each in (fresh, model))
        assert found == wanted and f"{where}.1.map" in [layer.name for layer in found.layers]


def test_blocks_that_were_replaced_twice(tmp_path):
    teacher = nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)], nn.Linear(6, 2))
    model, X = copy.deepcopy(teacher), torch.randn(60, 6)
    replace_blocks(model, X, ["1", "2"], progress=False)
    replace_blocks(model, X, ["3", "4"], progress=False)
    save(model, tmp_path / "short")
    fresh = load(nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)], nn.Linear(6, 2)), tmp_path / "short")
    assert len(fresh) == 5 and torch.equal(fresh(X), model(X))


def test_what_is_refused_leaves_the_model_as_it_was(tmp_path):
    model, X = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)]), torch.randn(60, 6)
    replace_blocks(model, X, ["1", "2"], progress=False)
    save(model, tmp_path / "short")
    save(nn.Linear(6, 6), tmp_path / "other")
    (tmp_path / "text").write_text("no tensors")
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "tensors")
    wider = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5))
    for fresh, name, message in (
        (
            nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)]),
            "short",
            "of which there were 4 before .* has 5: build",
        ),
        (nn.Linear(6, 6), "short", "of which there were 4 before some were replaced; the model has 0"),
        (wider, "short", r"'2.bias' has shape \(6,\); expected \(5,\)"),
        (nn.Sequential(nn.Linear(6, 6)), "other", "of another model: it has no '0.weight'"),
        (nn.Linear(6, 6, bias=False), "other", "it has 'bias', which the model has not"),
        (nn.Linear(6, 6), "text", "is no file of layerwise.save, or damaged"),
        (nn.Linear(6, 6), "tensors", r"is no file of layerwise.save: read it with model.load_state_dict"),
    ):
        before = {name: value.clone() for name, value in fresh.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load(fresh, tmp_path / name)
        after = fresh.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    with pytest.raises(IsADirectoryError, match=r"a folder; expected a file of layerwise\.save"):
        load(nn.Linear(6, 6), tmp_path)
    with pytest.raises(FileNotFoundError):
        load(nn.Linear(6, 6), tmp_path / "none")
    with pytest.raises(TypeError, match=r"model is str; expected torch\.nn\.Module"):
        load("model", tmp_path / "other")


def test_other_dtypes(tmp_path):
    """The model has its own, to which the weights are rounded."""
    model = nn.Sequential(nn.Linear(7, 5)).bfloat16()
    report = quantize(model, torch.randn(30, 7).bfloat16(), bits=4, group_size=3, progress=False)
    save(model, tmp_path / "codes", report.quantized)
    fresh = load(nn.Sequential(nn.Linear(7, 5)).bfloat16(), tmp_path / "codes")
    assert torch.equal(fresh[0].weight, model[0].weight) and fresh[0].weight.dtype == torch.bfloat16


def test_zeros_stay(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4))
    prune(model, torch.randn(50, 8), (2, 4), progress=False)
    save(model, tmp_path / "sparse")
    assert torch.equal(load(nn.Sequential(nn.Linear(8, 4)), tmp_path / "sparse")[0].weight, model[0].weight)


class Tied(nn.Module):
    def __init__(self, *, tied):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_two_weights_are_not_read_into_one_parameter(tmp_path):
    apart, tied = Tied(tied=False), Tied(tied=True)
    save(apart, tmp_path / "apart")
    before = tied.head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'embedding.weight' and 'head.weight', which are one parameter of the model"):
        load(tied, tmp_path / "apart")
    assert torch.equal(tied.head.weight, before)
    # Two names of the same numbers are one weight.
    with torch.no_grad():
        apart.head.weight.copy_(apart.embedding.weight)
    save(apart, tmp_path / "alike")
    assert torch.equal(load(tied, tmp_path / "alike").head.weight, apart.head.weight)
