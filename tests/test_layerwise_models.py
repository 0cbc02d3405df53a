"""``onestep.layerwise`` on models as others write them (stacked experts, tied weights, bfloat16) and bad arguments."""

import copy
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from onestep.layerwise import LayerStatistics, edit, merge, prune, quantize, refit, replace_blocks, save

transformers = pytest.importorskip("transformers")

EXPERTS = 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mixture(kind):
    """A language model with stacked experts, of which each token goes to one."""
    common = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 1,
    }
    if kind == "mixtral":
        config = transformers.MixtralConfig(**common, num_local_experts=EXPERTS)
    elif kind == "qwen":
        config = transformers.Qwen2MoeConfig(
            **common, num_experts=EXPERTS, moe_intermediate_size=24, shared_expert_intermediate_size=8
        )
    else:
        config = transformers.GptOssConfig(**common, num_local_experts=EXPERTS, head_dim=8)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rows_of_experts(model, layer, batches):
    """What each expert of a block is given: the hidden states that its router sends there."""
    experts = model.model.layers[layer].mlp.experts
    rows = [[] for _ in range(EXPERTS)]

    def hook(module, args):
        hidden, chosen, _ = args
        for expert in range(EXPERTS):
            rows[expert].append(hidden.reshape(-1, hidden.shape[-1])[(chosen == expert).any(-1)])

    handle = experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return [torch.cat(part) for part in rows]


@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
def test_stacked_experts_are_layers(kind, tmp_path):
    model = mixture(kind)
    data = [{"input_ids": torch.randint(20, (1, 12))} for _ in range(2)]
    before = copy.deepcopy(model)
    statistics = LayerStatistics(model, "*.experts.*").collect(data, progress=False)
    assert len(statistics.names) == 2 * 2 * EXPERTS
    rows = rows_of_experts(model, 1, data)
    # Some saw fewer tokens than they have features, or none.
    assert 0 < min(len(part) for part in rows if len(part)) < 16
    experts = model.model.layers[1].mlp.experts
    for expert, x in enumerate(rows):
        sums = statistics[f"model.layers.1.mlp.experts.gate_up_proj.{expert}"]
        assert sums.count == len(x)
        torch.testing.assert_close(sums.gram, x.mT @ x)
        gate, up = (x @ experts.gate_up_proj[expert].detach().mT).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        sums = statistics[f"model.layers.1.mlp.experts.down_proj.{expert}"]
        torch.testing.assert_close(sums.gram, inner.mT @ inner)

    report = quantize(model, data, bits=4, group_size=8, layers="*.layers.*", progress=False)
    assert "forward" not in vars(experts)
    reached = [layer for layer in report.layers if ".experts." in layer.name and layer.rows]
    assert any(layer.rows < layer.features for layer in reached)
    assert sum(layer.error for layer in reached) < 0.9 * sum(layer.error_before for layer in reached)
    for expert, x in enumerate(rows_of_experts(model, 1, data)):
        name = f"model.layers.1.mlp.experts.down_proj.{expert}"
        assert torch.equal(experts.down_proj[expert], report.quantized[name].dequantize())
        if len(x):
            # The error that is told is on what the expert gets in the quantised model.
            old = before.model.layers[1].mlp.experts.gate_up_proj[expert]
            new = experts.gate_up_proj[expert]
            told = report[f"model.layers.1.mlp.experts.gate_up_proj.{expert}"].error
            lost = (x @ (old - new).mT).square().sum() / (x @ old.mT).square().sum()
            assert abs(told / lost.item() - 1) < 1e-3
    assert all(parameter.isfinite().all() for parameter in model.parameters())

    save(model, tmp_path / "packed.safetensors", report.quantized)
    with safe_open(tmp_path / "packed.safetensors", "pt") as file:
        name = "model.layers.0.mlp.experts.down_proj.2"
        assert "model.layers.0.mlp.experts.down_proj" not in file.keys()  # noqa: SIM118 (safe_open is no mapping)
        assert json.loads(file.metadata()["onestep"])[name]["bits"] == 4
        assert torch.equal(file.get_tensor(f"{name}.scale"), report.quantized[name].scale)
    one = {name: report.quantized[name]}
    with pytest.raises(ValueError, match=f"names 1 experts of .*; expected all {EXPERTS}"):
        save(model, tmp_path / "packed.safetensors", one)


def test_stacked_experts_have_no_teacher_where_it_is_not_needed():
    """The two models send them other rows."""
    model = mixture("mixtral")
    data = [{"input_ids": torch.randint(20, (2, 12))} for _ in range(3)]
    taught = copy.deepcopy(model)
    report = quantize(taught, data, bits=2, teacher=copy.deepcopy(model), progress=False)
    assert any(".experts." in layer.name for layer in report.layers)
    assert all(parameter.isfinite().all() for parameter in taught.parameters())


def test_stacked_experts_are_refitted_and_edits_of_them_refused():
    teacher = mixture("mixtral")
    model = copy.deepcopy(teacher)
    data = [{"input_ids": torch.randint(20, (4, 30))}]
    layers = ["*.layers.1.mlp.experts.*"]
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj += 0.05 * torch.randn(EXPERTS, 16, 24)
    report = refit(model, data, teacher, layers=layers, progress=False)
    assert sum(layer.error for layer in report.layers) < 0.05 * sum(layer.error_before for layer in report.layers)
    name = "model.layers.1.mlp.experts.down_proj.0"
    statistics = LayerStatistics(model, name)
    with pytest.raises(NotImplementedError, match="one of stacked experts"):
        edit(model, data[0], torch.zeros(4, 16), layer=name, statistics=statistics)


def test_experts_that_are_stored_in_another_way_are_refused():
    model, data = mixture("gpt_oss"), [{"input_ids": torch.randint(20, (1, 12))}]
    with pytest.raises(NotImplementedError, match=r"GptOssExperts\) are stored transposed.*leave them out"):
        quantize(model, data, progress=False)
    quantize(model, data, layers=["*.self_attn.*", "!*.experts.*"], progress=False)

    class Einsum(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            return torch.einsum("nd,ekd->nk", x, self.down_proj)

    with pytest.raises(NotImplementedError, match="Einsum does not multiply by one expert's weight at a time"):
        quantize(nn.Sequential(Einsum()), [torch.randn(6, 5)], progress=False)


# --------------------------------------------------------------------------------------------------------- other models


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, codes):
        return self.head(self.middle(self.embedding(codes)))


def test_a_tied_head_is_solved_only_by_its_full_name():
    model, codes = Tied(), torch.randint(0, 11, (4, 16))
    before = model.embedding.weight.detach().clone()
    assert [layer.name for layer in quantize(model, [codes], progress=False).layers] == ["middle"]
    assert torch.equal(model.embedding.weight, before)
    with pytest.raises(ValueError, match="must be named in full"):
        quantize(model, [codes], layers="*head", progress=False)
    quantize(model, [codes], layers="head", progress=False)
    assert model.head.weight is model.embedding.weight
    assert not torch.equal(model.embedding.weight, before)


def unpacked(path):
    """Every weight of a packed file, under all its names, read without onestep."""
    state = {}
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["onestep"])
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            state[name] = file.get_tensor(name)
    for name, one in about.items():
        start = name + "." if name else ""
        codes, scale, zero, group = (state.pop(start + part) for part in ("codes", "scale", "zero", "group"))
        if one["bits"] <= 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, : len(group)]
        weight = scale[:, group] * (codes - zero[:, group])
        weight = weight.mT if one.get("transposed") else weight
        state |= dict.fromkeys([start + "weight", *one.get("tied", [])], weight)
    return state


@pytest.mark.parametrize("kind", ["tied", "twice", "bare", "gpt2"])
def test_packed_files_of_tied_layers_bare_ones_and_conv1d(kind, tmp_path):
    batch = torch.randn(30, 8)
    options = {}
    if kind == "tied":
        model, batch, options = Tied(), torch.randint(0, 11, (4, 16)), {"layers": ["middle", "head"]}
    elif kind == "twice":
        shared = nn.Linear(8, 8)
        model = nn.Sequential(shared, nn.ReLU(), shared)
    elif kind == "bare":
        model = nn.Linear(8, 3)
    else:
        config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2)
        model, batch = transformers.GPT2LMHeadModel(config).eval(), torch.randint(20, (4, 12))
    before = copy.deepcopy(model)
    report = quantize(model, [batch], progress=False, **options)
    path = tmp_path / "packed.safetensors"
    save(model, path, report.quantized)
    with safe_open(path, "pt") as file:
        assert not [name for name in report.quantized if f"{name}.weight".lstrip(".") in file.keys()]  # noqa: SIM118
    # Biases that are tied are written once, as all that is dense; transformers ties its own names again.
    before.load_state_dict(unpacked(path), strict=kind in ("tied", "bare"))
    expected = dict(model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in before.named_parameters())
    save(model, path)
    safetensors.torch.load_model(before, path)
    assert all(torch.equal(value, expected[name]) for name, value in before.named_parameters())


def perceptron(dtype=torch.float32):
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).to(dtype)


def test_half_precision_models_keep_their_dtype():
    model, x = perceptron(torch.bfloat16), torch.randn(60, 12).bfloat16()
    report = quantize(model, [x], bits=4, group_size=8, progress=False)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, report.quantized["0"].dequantize().bfloat16())
    assert all(layer.error < layer.error_before for layer in report.layers)
    # Rows of 16 bits are summed as they are.
    sums = LayerStatistics(model, "0").update(x)["0"]
    assert torch.equal(sums.gram, LayerStatistics(perceptron(), "0").update(x.float())["0"].gram)
    torch.testing.assert_close(sums.total, x.float().sum(0))


@pytest.mark.parametrize("act_order", [False, True])
def test_groups_that_do_not_divide_the_features(act_order):
    model = perceptron()
    report = quantize(model, [torch.randn(60, 12)], 3, 7, act_order=act_order, progress=False)
    quantized = report.quantized["0"]
    assert quantized.group.tolist() == [0] * 7 + [1] * 5
    assert torch.equal(quantized.dequantize(), model[0].weight)
    assert report["0"].error < report["0"].error_before


def test_a_layer_that_is_called_twice_sees_the_rows_of_both_calls():
    shared, y = nn.Linear(8, 8), torch.randn(40, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    inner = torch.relu(shared(y)).detach()
    torch.testing.assert_close(LayerStatistics(model).update(y)["0"].gram, y.mT @ y + inner.mT @ inner)
    assert quantize(model, [y], progress=False)["0"].rows == 80


# ------------------------------------------------------------------------------------------------------------ bad input

X = torch.randn(20, 12)
WEIGHT_NORM = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 3)))
EDITED = LayerStatistics(perceptron(), "2").update(X)


def edited(**arguments):
    subjects = arguments.pop("subjects", X[:2])
    return edit(
        arguments.pop("model", None) or perceptron(),
        subjects,
        **{"layer": "2", "statistics": EDITED, "targets": torch.zeros(2, 5), **arguments},
    )


REFUSED = {
    "a pattern without a layer": (lambda: quantize(perceptron(), [X], layers=["0", "nine"]), ValueError, "'nine'"),
    "no pattern": (lambda: quantize(perceptron(), [X], layers=[]), TypeError, "expected a pattern"),
    "a number as pattern": (lambda: quantize(perceptron(), [X], layers=3), TypeError, "expected a pattern"),
    "no model": (lambda: prune(3, [X]), TypeError, "model is int"),
    "another device": (lambda: quantize(perceptron().to("meta"), [X]), NotImplementedError, "is on meta"),
    "a computed weight": (lambda: quantize(WEIGHT_NORM, [X]), NotImplementedError, "computed from other parameters"),
    "text": (lambda: LayerStatistics(perceptron()).collect("ab"), TypeError, "data is str"),
    "a true group": (lambda: quantize(perceptron(), [X], group_size=True), ValueError, "group_size is True"),
    "0 of 0": (lambda: prune(perceptron(), [X], (0, 0)), ValueError, r"sparsity is \(0, 0\)"),
    "a teacher of another shape": (
        lambda: refit(perceptron(), [X], nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))),
        ValueError,
        "'2' of the teacher has 6 outputs; expected 5",
    ),
    "a teacher without the layer": (
        lambda: refit(perceptron(), [X], nn.Sequential(nn.Linear(12, 16))),
        ValueError,
        "has 3 blocks in the model and 1 in the teacher",
    ),
    "no such container": (lambda: replace_blocks(perceptron(), [X], ["no.1"]), ValueError, "has no module 'no'"),
    "blocks without rows": (
        lambda: replace_blocks(nn.Sequential(nn.Linear(12, 12), nn.ReLU()), [X[:0]], ["0"], progress=False),
        ValueError,
        "no row of data reached the block",
    ),
    "merging without data": (lambda: merge([perceptron(), perceptron()], [[X], []]), ValueError, r"data\[1\] has no"),
    "every 0": (lambda: LayerStatistics(perceptron()).collect([X], every=0), ValueError, "every is 0"),
    "sums of another dtype": (
        lambda: LayerStatistics(perceptron()).merge(LayerStatistics(perceptron(), dtype=torch.float64)),
        ValueError,
        "torch.float64 sums; expected torch.float32",
    ),
    "targets that are none": (lambda: edited(targets=[1, 2]), TypeError, "targets is list"),
    "a weight of NaN": (
        lambda: edited(
            model=nn.Sequential(*perceptron()[:2], nn.Linear(16, 5).apply(lambda m: m.weight.data.fill_(torch.nan)))
        ),
        ValueError,
        "the weight of the layer '2' holds NaN",
    ),
    "targets of NaN": (lambda: edited(targets=torch.full((2, 5), torch.nan)), ValueError, "targets hold NaN"),
    "a strength without end": (lambda: edited(strength=float("inf")), ValueError, "strength is inf"),
    "no teacher": (lambda: refit(perceptron(), [X], None), TypeError, "teacher is NoneType"),
    "blocks by number": (lambda: replace_blocks(perceptron(), [X], [1, 2]), TypeError, r"blocks is \[1, 2\]"),
    "flags in words": (lambda: quantize(perceptron(), [X], symmetric="yes"), TypeError, "symmetric is 'yes'"),
    "act_order None": (lambda: quantize(perceptron(), [X], act_order=None), TypeError, "act_order is None"),
    "a bar of 1": (lambda: prune(perceptron(), [X], progress=1), TypeError, "progress is 1; expected True or False"),
    "zeros by name": (lambda: refit(perceptron(), [X], perceptron(), keep_zeros="no"), TypeError, "keep_zeros is 'no'"),
    "a ridge in words": (lambda: refit(perceptron(), [X], perceptron(), ridge="a"), TypeError, "ridge is 'a'"),
    "no ridge": (lambda: replace_blocks(perceptron(), [X], ["0"], ridge=None), TypeError, "ridge is None"),
    "sums of integers": (
        lambda: merge([perceptron()] * 2, [X, X], dtype=torch.int32),
        TypeError,
        "dtype is torch.int32",
    ),
    "nothing to merge": (lambda: merge(None, [X]), TypeError, "models is NoneType"),
    "too much shrinkage": (lambda: merge([perceptron()] * 2, [X, X], shrinkage=2), ValueError, "shrinkage is 2"),
    "no batch": (lambda: quantize(perceptron(), [None]), TypeError, "the model does not take a batch|is called with"),
    "an unknown strength": (lambda: edited(strength=None), TypeError, "strength is None"),
    "one subject's row": (lambda: edited(subjects=X[0]), ValueError, r"subjects have shape \(16,\)"),
    "a number as folder": (lambda: LayerStatistics(perceptron(), folder=5), TypeError, "folder is 5"),
    "a number as file": (
        lambda: LayerStatistics(perceptron()).collect([X], checkpoint=5),
        TypeError,
        "checkpoint is 5",
    ),
    "to a number": (lambda: save(perceptron(), 5), TypeError, "path is 5"),
    "codes that are none": (lambda: save(perceptron(), "never", {"0": 5}), TypeError, r"quantized\['0'\] is int"),
    "targets of no teacher": (lambda: EDITED.targets("2"), KeyError, "there is no teacher"),
    "a text for a batch": (lambda: quantize(perceptron(), ["ab"]), TypeError, r"does not take a batch \(str\)"),
    "no layer": (lambda: edited(layer=None), TypeError, "layer is None; expected the full name"),
    "a folder that is not there": (
        lambda: LayerStatistics(perceptron()).collect([X], checkpoint="/no/such/file"),
        FileNotFoundError,
        "checkpoint is '/no/such/file'",
    ),
    "saved to nothing": (lambda: LayerStatistics(perceptron()).save(None), TypeError, "path is None"),
    "no statistics": (lambda: edited(statistics=None), TypeError, "statistics is NoneType"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_a_file_of_other_sizes_is_refused(tmp_path):
    LayerStatistics(perceptron()).update(X).save(tmp_path / "sums.pt")
    wider = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))
    with pytest.raises(ValueError, match="16 features of the layer '2'; expected 20"):
        LayerStatistics(wider).load(tmp_path / "sums.pt")


def test_a_damaged_file_is_refused(tmp_path):
    LayerStatistics(perceptron()).update(X).save(tmp_path / "sums.pt")
    for damaged in (b"", b"junk", (tmp_path / "sums.pt").read_bytes()[:500]):
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.pt is no file"):
            LayerStatistics(perceptron()).load(tmp_path / "damaged.pt")
    torch.save(perceptron().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt is no file"):
        LayerStatistics(perceptron()).load(tmp_path / "weights.pt")


def test_a_subject_without_a_place_is_refused():
    class Masked(nn.Sequential):
        def forward(self, x, attention_mask):
            return super().forward(x)

    model, x = Masked(nn.Linear(4, 2)), torch.randn(2, 3, 4)
    batch = {"x": x, "attention_mask": torch.tensor([[0, 1, 0], [0, 0, 0]])}
    statistics = LayerStatistics(model).update(batch)
    with pytest.raises(ValueError, match="subject 1 is padding alone"):
        edit(model, batch, torch.zeros(2, 2), layer="0", statistics=statistics)


@pytest.mark.parametrize("call", [quantize, lambda model, data, **options: prune(model, data, (2, 16), **options)])
def test_what_is_refused_has_changed_nothing(call):
    model = perceptron()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"holds NaN or infinity|expected a multiple of 16"):
        call(model, [X], progress=False)
    assert torch.equal(model[0].weight, before)
