"""onestep.fit: methods, data, stopping, resuming."""

from __future__ import annotations

import itertools
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Child
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import onestep
from onestep.optim import NonFiniteError
from onestep.training import loop

METHODS = ["levenberg_marquardt", "gauss_newton", "newton_cg", "gradient_descent"]


def table(n: int = 300, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 5, generator=generator, dtype=dtype)
    y = (X[:, :1] * X[:, 1:2]).tanh() + 0.1 * torch.randn(n, 1, generator=generator, dtype=dtype)
    return X, y


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Counted(Dataset[tuple[Tensor, Tensor]]):
    """Counts how often each row is read."""

    def __init__(self, X: Tensor, y: Tensor) -> None:
        self.X, self.y, self.reads = X, y, torch.zeros(len(X), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        self.reads[row] += 1
        return self.X[row], self.y[row]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_linear_model_is_exact_in_one_pass(kind: str, dtype: torch.dtype, bound: float) -> None:
    X, _ = table(1000, dtype)
    Y = torch.cat([X[:, :1] - 2 * X[:, 1:2] + 3, X[:, 2:3].sin()], 1)
    data = Counted(X, Y)
    model = nn.Linear(5, 2).to(dtype)
    source: Any = data if kind == "dataset" else DataLoader(data, batch_size=64, shuffle=True)
    result = onestep.fit(model, source, progress=False)
    assert (result.method, len(result.history), result.converged) == ("closed_form", 1, True)
    assert bool((data.reads == 1).all())
    gradient = torch.autograd.grad(mse_loss(model(X), Y), list(model.parameters()))
    zero = nn.Linear(5, 2).to(dtype)
    nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    first = torch.autograd.grad(mse_loss(zero(X), Y), list(zero.parameters()))
    norm = [torch.cat([part.reshape(-1) for part in parts]).norm() for parts in (gradient, first)]
    assert norm[0] <= bound * norm[1]
    assert result.loss == pytest.approx(mse_loss(model(X), Y).item(), rel=1e-4)


def test_heads_on_frozen_bodies_are_solved() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    body[0].requires_grad_(False)
    images, maps = torch.randn(10, 3, 6, 6), torch.randn(10, 2, 6, 6)
    frozen = body[0].weight.clone()
    assert onestep.fit(body, (images, maps), progress=False).method == "closed_form"
    gradient = torch.autograd.grad(mse_loss(body(images), maps), [body[2].weight, body[2].bias])
    assert max(part.abs().max().item() for part in gradient) < 1e-6
    assert torch.equal(frozen, body[0].weight)


def test_weight_decay_is_that_penalty() -> None:
    X, y = table()
    model = nn.Linear(5, 1).double()
    onestep.fit(model, (X, y), weight_decay=0.3, progress=False)
    loss = mse_loss(model(X), y) + 0.15 * sum(p.square().sum() for p in model.parameters())
    assert all(part.abs().max() < 1e-12 for part in torch.autograd.grad(loss, list(model.parameters())))


def test_a_network_is_not_taken_for_affine() -> None:
    X, y = table()
    assert onestep.fit(network(), (X, y), max_steps=1, progress=False).method == "levenberg_marquardt"
    with pytest.raises(ValueError, match="affine"):
        onestep.fit(network(), (X, y), method="closed_form", progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_at_every_step(method: str) -> None:
    X, y = table()
    model = network()
    result = onestep.fit(model, (X, y), method=method, max_steps=12, progress=False)
    losses = [result.initial_loss, *(record.loss for record in result.history)]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert result.loss == pytest.approx(mse_loss(model(X), y).item(), rel=1e-12)
    assert result.loss < (0.9 if method == "gradient_descent" else 0.5) * result.initial_loss


@pytest.mark.parametrize("method", ["levenberg_marquardt", "newton_cg", "gauss_newton"])
def test_logistic_regression_converges_to_the_minimum(method: str) -> None:
    X, _ = table()
    classes = (X[:, 0] + 0.5 * X[:, 1].sin() > 0.3).long() + (X[:, 2] > 1).long()
    model = nn.Linear(5, 3).double()
    result = onestep.fit(model, (X, classes), "cross_entropy", method=method, weight_decay=1e-2, progress=False)
    loss = cross_entropy(model(X), classes) + 0.5e-2 * sum(p.square().sum() for p in model.parameters())
    assert result.converged, result
    assert max(part.abs().max().item() for part in torch.autograd.grad(loss, list(model.parameters()))) < 1e-5


@pytest.mark.parametrize("chunk_size", [1, 7, 300])
def test_chunks_do_not_change_the_result(chunk_size: int) -> None:
    X, y = table(100)
    whole, parts = network(), network()
    onestep.fit(whole, (X, y), max_steps=5, progress=False)
    loader = DataLoader(TensorDataset(X, y), batch_size=11, shuffle=True)
    onestep.fit(parts, loader, max_steps=5, chunk_size=chunk_size, progress=False)
    torch.testing.assert_close(values(parts), values(whole), rtol=1e-9, atol=1e-9)


def test_poisson_and_callable_losses_agree() -> None:
    X, _ = table()
    counts = torch.poisson((0.5 * X[:, :1]).exp(), generator=torch.Generator().manual_seed(0))
    named, given = nn.Linear(5, 1).double(), nn.Linear(5, 1).double()
    given.load_state_dict(named.state_dict())
    onestep.fit(named, (X, counts), "poisson", progress=False)
    onestep.fit(given, (X, counts), lambda z, t: (z.exp() - t * z).mean(), progress=False)
    torch.testing.assert_close(values(named), values(given), rtol=1e-6, atol=1e-8)


def test_mini_batches_and_small_curvature_batches() -> None:
    X, y = table(2000)
    model = network()
    before = mse_loss(model(X), y).item()
    result = onestep.fit(
        model, (X, y), method="gauss_newton", batch_size=200, curvature_batch_size=50, max_steps=30, progress=False
    )
    assert len(result.history) == 30
    assert mse_loss(model(X), y).item() < 0.5 * before


def test_non_finite_data_names_step_and_batch_and_keeps_the_parameters() -> None:
    X, y = table()
    X[250, 2] = torch.nan
    model = network()
    start = values(model)
    with pytest.raises(NonFiniteError, match=r"step 1, batch 2: its inputs hold NaN or infinity, first in row 50"):
        onestep.fit(model, (X, y), chunk_size=100, progress=False)
    assert torch.equal(values(model), start)


def test_interrupt_returns_what_was_reached() -> None:
    X, y = table()

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = network(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 60:
                raise KeyboardInterrupt
            return self.inner(x)

    model = Interrupted()
    result = onestep.fit(model, (X, y), method="gauss_newton", progress=False)
    assert (result.reason, result.converged) == ("interrupted", False)
    assert mse_loss(model(X), y).item() == pytest.approx(result.loss, rel=1e-12)


def test_interrupt_between_a_step_and_its_record_takes_the_step_back(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = table()
    record, calls = loop.record_step, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        record(*arguments)

    monkeypatch.setattr(loop, "record_step", interrupted)
    model = network()
    result = onestep.fit(model, (X, y), method="gauss_newton", progress=False)
    assert (result.reason, len(result.history)) == ("interrupted", 2)
    assert mse_loss(model(X), y).item() == pytest.approx(result.loss, rel=1e-12)


# A job that a shell starts in the background inherits "ignore" for SIGINT: the child asks for Python's handler.
# The loss takes its time, lest the fit end before it is interrupted.
INTERRUPTED = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
import onestep
from test_fit import network, table
X, y = table(2000)
model = network()
before = torch.nn.functional.mse_loss(model(X), y).item()
def loss(outputs, target):
    time.sleep(0.02)
    return torch.nn.functional.mse_loss(outputs, target)
options = dict(method="gauss_newton", batch_size=500, max_steps=10**6, progress=False, checkpoint={checkpoint!r})
result = onestep.fit(model, (X, y), loss, **options)
after = torch.nn.functional.mse_loss(model(X), y).item()
print(result.reason, result.converged, after < before)
"""


def test_ctrl_c_returns_what_was_reached(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    script = INTERRUPTED.format(tests=str(Path(__file__).parent), checkpoint=str(path))
    child = Child(script)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.running:
        if path.exists() and torch.load(path, weights_only=True)["progress"]["step"] >= 5:
            break
        time.sleep(0.02)
    child.send(signal.SIGINT)
    done = child.finish(60)
    assert done.returncode == 0, done.errors
    assert done.output == "interrupted False True\n"
    assert torch.load(path, weights_only=True)["progress"]["step"] >= 5


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import onestep
from test_fit import network, table
X, y = table(500)
model = network()
options = dict(max_steps=20, tol=0.0, progress=False, checkpoint={checkpoint!r}, method={method!r}, **{options!r})
onestep.fit(model, (X, y), **options)
torch.save(model.state_dict(), {out!r})
"""


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("levenberg_marquardt", {"curvature_batch_size": 100}),
        ("gauss_newton", {"batch_size": 128, "cg_iterations": 5}),
    ],
)
def test_killed_and_resumed_run_ends_with_the_same_bits(tmp_path: Path, method: str, options: dict[str, int]) -> None:
    def start(checkpoint: str, out: str) -> Child:
        names = {"checkpoint": str(tmp_path / checkpoint), "out": str(tmp_path / out)}
        script = SCRIPT.format(tests=str(Path(__file__).parent), method=method, options=options, **names)
        return Child(script)

    assert start("straight.pt", "straight.out").finish(120).returncode == 0
    killed = start("killed.pt", "killed.out")
    wanted = random.Random(method).randint(2, 12)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (tmp_path / "killed.pt").exists():
            state = torch.load(tmp_path / "killed.pt", weights_only=True)
            if state["progress"]["step"] >= wanted:
                break
        time.sleep(0.002)
    killed.send(signal.SIGKILL)
    assert killed.finish(60).returncode == -signal.SIGKILL
    assert start("killed.pt", "killed.out").finish(120).returncode == 0
    straight, resumed = (torch.load(tmp_path / name) for name in ("straight.out", "killed.out"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


class Opened(DataLoader[Any]):
    """Counts the passes that are begun."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return super().__iter__()


@pytest.mark.parametrize("replacement", [True, False])
def test_mini_batches_of_a_loader_with_a_generator_resume_with_the_same_bits(tmp_path: Path, replacement: bool) -> None:
    X, y = table(200)

    def run(name: str, *ends: int) -> Tensor:
        model = network()
        for steps in ends:
            sampler = RandomSampler(X, replacement=replacement, generator=torch.Generator())
            loader = Opened(TensorDataset(X, y), batch_size=25, sampler=sampler)
            options = {"batch_size": 50, "max_steps": steps, "checkpoint": tmp_path / name}
            onestep.fit(model, loader, method="gauss_newton", progress=False, **options)
            # Two to look at the data first; after that, each step takes 100 rows of 200.
            assert loader.passes <= 2 + steps // 2 + steps % 2
        return values(model)

    straight = run("straight", 8)
    for stop in (3, 4):
        assert torch.equal(run(f"stopped at {stop}", stop, 8), straight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "sgd"}, ValueError, "method='sgd'"),
        ({"max_steps": 0}, ValueError, "max_steps=0"),
        ({"batch_size": 2.5}, TypeError, "batch_size is float"),
        ({"tol": -1.0}, ValueError, "tol=-1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay=-1.0"),
        ({"loss": "hinge"}, ValueError, "loss='hinge'"),
        ({"loss": torch.zeros(3)}, TypeError, r"loss is Tensor; .*one argument, \(inputs, target\)"),
        (
            {"loss": lambda outputs, target: outputs - target},
            TypeError,
            r"a tensor of shape \(\d+, 1\); expected a scalar",
        ),
        ({"loss": "bce"}, ValueError, "target holds .*; expected numbers from 0 to 1"),
        ({"loss": "poisson"}, ValueError, "target holds -.*; expected counts of 0 or more"),
        ({"validation": 0.1}, TypeError, "validation: data is float"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        onestep.fit(network(), table(), progress=False, **arguments)


def test_data_that_does_not_fit_is_named() -> None:
    X, y = table()
    with pytest.raises(ValueError, match="as many inputs as targets"):
        onestep.fit(network(), (X, y[:-1]), progress=False)
    with pytest.raises(ValueError, match=r"outputs have shape \(\d+, 1\), the target \(\d+, 2\)"):
        onestep.fit(network(), (X, torch.cat([y, y], 1)), progress=False)
    with pytest.raises(TypeError, match=r"several inputs are a tuple \(\(a, b\), target\)"):
        onestep.fit(network(), (X, X, y), progress=False)
    with pytest.raises(TypeError, match=r"layout torch\.sparse_coo"):
        onestep.fit(network(), (X.to_sparse(), y), progress=False)
    with pytest.raises(TypeError, match="data is Tensor"):
        onestep.fit(network(), X, progress=False)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("widths", [(0, 1), (0, 4, 1), (3, 0), (3, 4, 0)])
@pytest.mark.parametrize("method", ["auto", "gauss_newton"])
def test_rows_without_a_number_are_told_of_data(widths: tuple[int, ...], method: str) -> None:
    """Not of the widths and d of a kernel."""
    layers = [m for pair in itertools.pairwise(widths) for m in (nn.Linear(*pair), nn.ReLU())][:-1]
    X, y = torch.ones(20, widths[0]), torch.ones(20, widths[-1])
    name = "inputs" if widths[0] == 0 else "targets"
    with pytest.raises(ValueError, match=rf"data: the {name} of n rows have shape \(n, 0\); expected a number or more"):
        onestep.fit(nn.Sequential(*layers), (X, y), method=method, progress=False)
    if widths[-1] == 0:
        with pytest.raises(ValueError, match=r"outputs have shape \(\d+, 0\): no score for a class; expected one"):
            onestep.fit(nn.Sequential(*layers), (X, torch.zeros(20).long()), "cross_entropy", progress=False)


def test_rows_without_a_number_are_fitted_where_they_are_only_counted() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.value.expand(len(x), 1)

    model, y = Constant(), torch.arange(20, dtype=torch.float64)[:, None]
    onestep.fit(model, (y[:, :0], y), progress=False)
    assert model.value.item() == pytest.approx(9.5)


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    result = onestep.fit(network(), table(), max_steps=3, progress=False)
    result.plot(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
