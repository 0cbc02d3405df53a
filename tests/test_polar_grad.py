"""onestep.optim.PolarGrad: the step, what it takes for a hidden matrix, inputs' Grams, checkpoints, processes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from pathlib import Path

import pytest
import torch
from processes import Child, finish_all
from torch import Tensor, nn
from torch.autograd import forward_ad

import onestep
from onestep.optim import NonFiniteError, PolarGrad


def svd_factor(M: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(M, full_matrices=False)
    return U @ V


def exact(params: object, **options: object) -> PolarGrad:
    """With so many iterations that the factor is exact."""
    return PolarGrad(params, iterations=5, lower=1e-4, **options)  # type: ignore[arg-type]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def backward(model: nn.Module, seed: int) -> None:
    X = torch.randn(32, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model.zero_grad()
    (model(X) - X[:, :2].sin()).square().mean().backward()


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_step_is_the_formula(nesterov: bool) -> None:
    torch.manual_seed(0)
    # A matrix, a fused projection of three 4 x 4 blocks, and a convolution's kernel.
    parameters = [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((6, 9), (12, 4), (5, 3, 2, 2))]
    expected = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(p) for p in expected]
    optimizer = exact(parameters, lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.3)
    for _ in range(3):
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            buffers[i] = 0.8 * buffers[i] + 0.2 * p.grad
            M = 0.2 * p.grad + 0.8 * buffers[i] if nesterov else buffers[i]
            parts = [M.flatten(1)] if i != 1 else list(M.split(4))
            step = torch.cat([0.2 * max(part.shape) ** 0.5 * svd_factor(part) for part in parts])
            expected[i] = (1 - 0.1 * 0.3) * expected[i] - 0.1 * step.view(p.shape)
        optimizer.step()
    for p, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-8, atol=1e-8)


def test_the_rest_is_adam() -> None:
    ours, theirs = network(), network()
    optimizer = PolarGrad(ours, lr=0.0, adam_lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))
    rest = [theirs[0].bias, theirs[2].bias, theirs[4].bias]
    adam = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.0}, {"params": [theirs[4].weight], "weight_decay": 0.1}],
        lr=0.02,
        betas=(0.8, 0.9),
    )
    for seed in range(3):
        for model, stepping in ((ours, optimizer), (theirs, adam)):
            backward(model, seed)
            stepping.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


class Words(nn.Module):
    """Embeddings, positions, fused attention, a convolution, norms, and a head that is tied to the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(11, 6), nn.Parameter(torch.zeros(4, 6))
        self.qkv, self.norm = nn.Linear(6, 18), nn.LayerNorm(6)
        self.mix, self.gate = nn.Conv1d(6, 6, 3), nn.Linear(6, 1)
        self.own = nn.Parameter(torch.zeros(6, 5))
        self.head = nn.Linear(6, 11)
        self.head.weight = self.words.weight


def test_loaded_states_bring_their_blocks() -> None:
    model = nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 1))
    models = model, copy.deepcopy(model)
    optimizers = [
        PolarGrad(m, gram_every=None, blocks={"0.weight": count}) for m, count in zip(models, (3, 1), strict=True)
    ]
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    gradient = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    for m, optimizer in zip(models, optimizers, strict=True):
        m[0].weight.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def hidden(optimizer: PolarGrad) -> dict[str, tuple[int, int, int, bool]]:
    """The names of the matrices that are polar, with rows, columns and blocks."""
    return {
        name: tuple(cut)
        for group in optimizer.param_groups
        if group["polar"]
        for name, cut in zip(group["param_names"], group["layouts"], strict=True)
    }


def test_hidden_matrices_are_told_apart() -> None:
    expected = {"qkv.weight": (6, 6, 3, False), "mix.weight": (6, 18, 1, False), "own": (6, 5, 1, False)}
    model = Words()
    assert hidden(PolarGrad(model)) == expected
    assert hidden(PolarGrad(model, blocks={"qkv.weight": 1}))["qkv.weight"] == (18, 6, 1, False)
    names = hidden(PolarGrad(model.named_parameters()))
    assert set(names) == {"qkv.weight", "mix.weight", "own"} | {"words.weight"}  # the name does not say embedding
    groups = [
        {"params": [("a", nn.Parameter(torch.ones(4, 4)))], "polar": False, "adam_lr": 0.5},
        {"params": [("head", nn.Parameter(torch.ones(4, 4)))], "polar": True, "lr": 0.25},
    ]
    adam, polar = PolarGrad(groups).param_groups
    assert (adam["polar"], adam["lr"], polar["polar"], polar["lr"]) == (False, 0.5, True, 0.25)


def test_transformers_models() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = PolarGrad(model)
    assert hidden(optimizer) == {
        "transformer.h.0.attn.c_attn.weight": (8, 8, 3, True),
        "transformer.h.0.attn.c_proj.weight": (8, 8, 1, True),
        "transformer.h.0.mlp.c_fc.weight": (8, 32, 1, True),
        "transformer.h.0.mlp.c_proj.weight": (32, 8, 1, True),
    }
    fused = model.transformer.h[0].attn.c_attn.weight
    before = fused.detach().clone()
    ids = torch.arange(16).view(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    # Each of the three blocks of columns moved by a multiple of an orthogonal matrix.
    for block in ((fused.detach() - before) / (0.01 * 0.2 * 8**0.5)).chunk(3, 1):
        assert torch.linalg.svdvals(block).max() == pytest.approx(1, abs=0.01)


def test_inputs_precondition_and_hooks_come_and_go() -> None:
    model = network()
    optimizer = exact(model, gram_every=3, gram_damping=0.1, momentum=0.0, nesterov=False)
    first = model[0]
    hooks = []
    for seed in range(5):
        hooks.append(len(first._forward_pre_hooks))
        before = first.weight.detach().clone()
        backward(model, seed)
        if seed in (0, 3):
            X = torch.randn(32, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            with torch.no_grad():
                model(1e3 * X)  # held-out data does not count
            gram = X.mT @ X / 32
            inverse = torch.linalg.inv(gram + 0.1 * gram.diagonal().mean() * torch.eye(5))
        expected = -0.01 * 0.2 * 12**0.5 * svd_factor(first.weight.grad @ inverse)
        optimizer.step()
        torch.testing.assert_close(first.weight.detach() - before, expected, rtol=1e-6, atol=1e-9)
    assert hooks == [1, 0, 0, 1, 0]
    assert not model[4]._forward_pre_hooks, "the head is Adam's"


@pytest.mark.parametrize("saved_after", [3, 4])
def test_state_dict_resumes_with_the_same_bits(saved_after: int) -> None:
    """Also where the next step takes its inputs' Gram anew."""
    runs = []
    for interrupted in (False, True):
        model = network()
        optimizer = PolarGrad(model, gram_every=4)
        for seed in range(7):
            if interrupted and seed == saved_after:
                file = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict()), file)
                file.seek(0)
                states = torch.load(file, weights_only=True)
                model = network()
                model.load_state_dict(states[0])
                optimizer = PolarGrad(model, lr=7.0, gram_every=4)
                optimizer.load_state_dict(states[1])
            backward(model, seed)
            optimizer.step()
        runs.append(model)
    for p, q in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_copies_go_on_alike() -> None:
    model = network()
    optimizer = PolarGrad(model, gram_every=2)
    backward(model, 0)
    optimizer.step()
    model_too, optimizer_too = copy.deepcopy((model, optimizer))
    for one, stepping in ((model, optimizer), (model_too, optimizer_too)):
        backward(one, 1)
        stepping.step()
    for p, q in zip(model.parameters(), model_too.parameters(), strict=True):
        assert torch.equal(p, q)


def test_schedulers_and_grad_scaler() -> None:
    model, plain = network().float(), network().float()
    optimizer, plainly = PolarGrad(model, gram_every=None), PolarGrad(plain, gram_every=None)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in (optimizer, plainly)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad(), plainly.zero_grad()
        scaler.scale(model(X).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        plain(X).square().mean().backward()
        plainly.step()
        for scheduler in schedulers:
            scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2 / 8, 5e-3 / 8]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    # An overflow is skipped.
    before = model[0].weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(model(X).square().mean() * torch.inf).backward()
    scaler.step(optimizer)
    assert torch.equal(model[0].weight, before)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = network()
    optimizer = PolarGrad(model)
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    backward(model, 1)
    model[2].weight.grad[3, 4] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the gradient of '2.weight' holds NaN"):
        optimizer.step()
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


def test_half_precision_parameters() -> None:
    model = network().bfloat16()
    optimizer = PolarGrad(model)
    X = torch.randn(16, 5).bfloat16()
    first = model(X).float().square().mean()
    for _ in range(20):
        optimizer.zero_grad()
        model(X).float().square().mean().backward()
        optimizer.step()
    assert model(X).float().square().mean() < 0.5 * first
    assert model[0].weight.dtype == torch.bfloat16


def fitted_network() -> nn.Module:
    """By every process of torch.distributed together, which share each batch's rows and the solves."""
    model = network()
    X = torch.randn(90, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    onestep.fit(model, (X, X[:, :2].sin()), method="polar", max_steps=12, batch_size=30, chunk_size=10, progress=False)
    return model


DISTRIBUTED = """
import sys
import torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_polar_grad import fitted_network, network
from onestep.optim import PolarGrad

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=2)
wrapped = torch.nn.parallel.DistributedDataParallel(network())
optimizer = PolarGrad(wrapped, gram_every=2)
assert optimizer._process_group is not None
X = torch.randn(4, 32, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
for rows in X:
    mine = rows[rank::2]
    optimizer.zero_grad()
    (wrapped(mine) - mine[:, :2].sin()).square().mean().backward()
    optimizer.step()
fitted = fitted_network()
torch.save((wrapped.module.state_dict(), fitted.state_dict()), {out!r} + str(rank))
"""


def test_two_processes_solve_together(tmp_path: Path) -> None:
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    script = DISTRIBUTED.format(tests=str(Path(__file__).parent), store=store, out=out)
    for process in finish_all([Child(script, rank) for rank in range(2)]):
        assert process.returncode == 0, process.errors
    model = network()
    optimizer = PolarGrad(model, gram_every=2)
    for rows in torch.randn(4, 32, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        optimizer.zero_grad()
        (model(rows) - rows[:, :2].sin()).square().mean().backward()
        optimizer.step()
    first, second = (torch.load(out + str(rank), weights_only=True) for rank in range(2))
    for ours, theirs, alone in zip(first, second, (model, fitted_network()), strict=True):
        for name, value in alone.state_dict().items():
            assert torch.equal(ours[name], theirs[name])
            torch.testing.assert_close(ours[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PolarGrad([]), ValueError, "params is empty"),
        (lambda: PolarGrad(torch.ones(2, 2)), TypeError, "params is a tensor"),
        (lambda: PolarGrad(network().requires_grad_(False)), ValueError, "without a parameter"),
        (lambda: PolarGrad([torch.ones(2, 2, dtype=torch.complex64)]), TypeError, "complex64"),
        (lambda: PolarGrad(network(), lr=-1.0), ValueError, r"lr=-1\.0; expected"),
        (lambda: PolarGrad(network(), momentum=1.0), ValueError, r"momentum=1\.0"),
        (lambda: PolarGrad(network(), gram_every=0), ValueError, "gram_every=0"),
        (
            lambda: PolarGrad([{"params": [torch.ones(3)], "damping": 1.0}]),
            ValueError,
            "damping is given in a param group",
        ),
        (lambda: PolarGrad(network(), blocks={"nothing": 3}), ValueError, "blocks names 'nothing'"),
        (lambda: PolarGrad(network(), blocks={"0.weight": 5}), ValueError, r"blocks=5 .* \(12, 5\)"),
        (
            lambda: PolarGrad([{"params": [torch.ones(3)], "polar": True}]),
            ValueError,
            r"shape \(3,\); expected matrices",
        ),
    ],
)
def test_bad_input(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = PolarGrad([("table", table.weight)])
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="'table' has a sparse gradient"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_a_model_may_be_used_between_two_steps() -> None:
    """Copied, saved, exported, transformed: the inputs that the next step takes are those of training alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x, values = torch.randn(8, 4), dict(net.named_parameters())
    optimizer = PolarGrad(net, gram_every=1)
    grams = optimizer._grams
    assert grams is not None
    net(x).sum().backward()
    expected = {identity: gram.clone() for identity, gram in grams._sums.items()}
    assert len(expected) == 1 and all(torch.equal(gram, x.T @ x) for gram in expected.values())
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    torch.export.export(net, (x,))
    torch.jit.trace(net, x)
    torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).sum())(values)
    torch.func.vmap(lambda v: torch.func.functional_call(net, values, (v,)))(torch.randn(3, 2, 4))
    with forward_ad.dual_level():
        net(forward_ad.make_dual(x, x))
    for other in copies:
        other(x)
    assert grams._counts == dict.fromkeys(expected, 8)
    assert all(torch.equal(gram, expected[identity]) for identity, gram in grams._sums.items())
    optimizer.step()
    assert sum(len(module._forward_pre_hooks) for module in net.modules()) == 1
    del optimizer, grams
    gc.collect()
    assert not any(module._forward_pre_hooks for module in net.modules())
