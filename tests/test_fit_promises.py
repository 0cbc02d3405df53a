"""onestep.fit: what it says of its result is true, and a checkpoint is taken for its own problem only."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from more_garbow_hillstrom import PROBLEMS, Problem
from sklearn.datasets import load_iris
from test_fit import network, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import onestep
from onestep.curvature import HessianOperator
from onestep.optim import LevenbergMarquardt, levenberg_marquardt
from onestep.training import Record


def years(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows [year, N(0,1)], and classes drawn from a logistic model of them."""
    year = torch.randint(1950, 2020, (200, 1), generator=generator).double()
    X = torch.cat([year, torch.randn(200, 1, generator=generator, dtype=torch.float64)], 1)
    chance = (0.05 * (X[:, 0] - 1985) + X[:, 1]).sigmoid()
    return X, (torch.rand(200, generator=generator, dtype=torch.float64) < chance).long()


def logistic_minimum(X: Tensor, y: Tensor) -> float:
    """By Newton's method on standardised columns."""
    A = torch.cat([(X - X.mean(0)) / X.std(0), X.new_ones(len(X), 1)], 1)
    w = A.new_zeros(A.shape[1])
    for _ in range(20):
        p = (A @ w).sigmoid()
        w = w - torch.linalg.solve(A.mT @ (A * (p * (1 - p))[:, None]), A.mT @ (p - y))
    return nn.functional.binary_cross_entropy_with_logits(A @ w, y.double()).item()


@pytest.mark.parametrize(
    ("method", "dtype", "seed"),
    [
        ("levenberg_marquardt", torch.float64, 0),
        ("levenberg_marquardt", torch.float64, 1),
        ("levenberg_marquardt", torch.float32, 2),
        ("auto", torch.float64, 3),
        ("gauss_newton", torch.float64, 4),
        ("newton_cg", torch.float64, 5),
    ],
)
def test_every_method_leaves_a_saturated_start(method: str, dtype: torch.dtype, seed: int) -> None:
    """p(1 - p) is 1e-207 there, 0 in float32: damping that is relative to it alone is none."""
    X, y = years(torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    head = nn.Linear(2, 2, dtype=dtype)
    assert cross_entropy(head(X.to(dtype)), y) > 20
    result = onestep.fit(head, (X.to(dtype), y), "cross_entropy", method=method, progress=False)
    minimum = logistic_minimum(X, y)
    # Scores of float32 features near 2000 are off by 1e-4.
    assert result.loss == pytest.approx(minimum, rel=1e-9 if dtype == torch.float64 else 1e-3)
    assert result.converged or dtype == torch.float32


@pytest.mark.parametrize("seed", range(2))
def test_levenberg_marquardt_leaves_a_saturated_start_of_a_network(seed: int) -> None:
    """torch's LBFGS and Adam come to 0.61."""
    X, y = years(torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    assert cross_entropy(model(X), y) > 15
    result = onestep.fit(model, (X, y), "cross_entropy", method="levenberg_marquardt", max_steps=25, progress=False)
    assert result.loss < 0.5


def test_curvature_of_least_squares_is_no_less_than_what_stands_in_for_it() -> None:
    """∂ⱼ² / 2 loss ≤ Aⱼⱼ, with equality for one parameter whose residuals are its column: the step is Newton's."""
    x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    LevenbergMarquardt([x], damping=0.5).step(lambda: x * torch.ones(4, dtype=torch.float64))
    assert x.item() == pytest.approx(1.0, rel=1e-12)


def no_step(*_: Any) -> None:
    """What a method proposes that cannot move."""


def small_classifier() -> nn.Module:
    """A network for which "auto" takes Levenberg-Marquardt."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_a_method_that_cannot_move_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levenberg_marquardt._FactoredModel, "propose", no_step)
    X, y = years(torch.Generator().manual_seed(0))
    model = small_classifier()
    result = onestep.fit(model, ((X - X.mean(0)) / X.std(0), y), "cross_entropy", max_steps=20, progress=False)
    assert result.method == "gauss_newton"
    assert "levenberg_marquardt could not move" in result.choice
    assert [record.step for record in result.history] == list(range(1, len(result.history) + 1))
    assert result.loss < logistic_minimum(X, y)


def test_a_fit_that_changed_its_method_resumes_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levenberg_marquardt._FactoredModel, "propose", no_step)
    X, y = years(torch.Generator().manual_seed(0))

    def run(name: str, *ends: int) -> list[Tensor]:
        model = small_classifier()
        for steps in ends:
            options: dict[str, Any] = {"max_steps": steps, "checkpoint": tmp_path / name, "progress": False}
            result = onestep.fit(model, ((X - X.mean(0)) / X.std(0), y), "cross_entropy", **options)
        assert result.method == "gauss_newton"
        return [p.detach().clone() for p in model.parameters()]

    assert all(map(torch.equal, run("straight", 8), run("stopped", 5, 8)))


def other_loss(outputs: Tensor, target: Tensor) -> Tensor:
    return smooth_l1_loss(outputs, target)


X, Y = table(300)
MOVED = Y.clone()
MOVED[200:] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": (X, -Y)}, "other target"),
        ({"data": (X, MOVED)}, "other target"),
        ({"data": (X[:200], Y[:200])}, r"rows=200, the checkpoint's is 300"),
        ({"data": (X + 1, Y)}, "other inputs"),
        ({"loss": other_loss}, r"loss='test_fit_promises.other_loss \w+', the checkpoint's is 'mse'"),
        ({"weight_decay": 0.1}, r"weight_decay=0.1, the checkpoint's is 0.0"),
        ({"batch_size": 50}, "batch_size=50"),
        ({"seed": 3}, "seed=3"),
    ],
    ids=["target", "later target", "rows", "inputs", "loss", "decay", "batches", "seed"],
)
def test_a_checkpoint_of_another_problem_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "state.pt"
    model = network()
    options: dict[str, Any] = {"data": (X, Y), "loss": "mse", "max_steps": 2, "checkpoint": path, "progress": False}
    onestep.fit(model, **options)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"checkpoint .* is of another problem: .*{message}"):
        onestep.fit(model, **options | change)
    assert all(map(torch.equal, model.parameters(), before))
    # Nothing differs but when to stop.
    assert len(onestep.fit(model, **options | {"max_steps": 4, "tol": 1e-3}).history) == 4


@pytest.mark.parametrize("batches", [{"method": "polar"}, {"method": "gauss_newton", "batch_size": 100}])
def test_a_checkpoint_of_batches_knows_lambdas_weights_and_model(tmp_path: Path, batches: dict[str, Any]) -> None:
    """The loss of all rows, which tells in other fits, is not known there."""
    path, y = tmp_path / "state.pt", (Y[:, 0] > 0).long()
    first, second = (nn.CrossEntropyLoss(weight=torch.tensor(weights)) for weights in ([1.0, 2.0], [2.0, 1.0]))

    def fit(loss: Any, activation: nn.Module) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(X.shape[1], 4), activation, nn.Linear(4, 2))
        options: dict[str, Any] = {"max_steps": 2, "checkpoint": path, "progress": False}
        return len(onestep.fit(model, (X.float(), y), loss, **batches, **options).history)

    for loss, other in ((first, second), (lambda z, y: cross_entropy(z, y), lambda z, y: 2 * cross_entropy(z, y))):
        path.unlink(missing_ok=True)
        assert fit(loss, nn.Tanh()) == fit(loss, nn.Tanh()) == 2
        with pytest.raises(ValueError, match="is of another problem: loss="):
            fit(other, nn.Tanh())
    with pytest.raises(ValueError, match="is of another problem: other model"):
        fit(loss, nn.ReLU())


def test_a_checkpoint_knows_its_loss_where_hashes_do_not_tell(tmp_path: Path) -> None:
    """What an object holds that a function uses is not looked at, nor one target among 300,000."""
    options: dict[str, Any] = {"max_steps": 2, "checkpoint": tmp_path / "state.pt", "progress": False}
    model, factor = network(), SimpleNamespace(value=1.0)
    onestep.fit(model, (X, Y), lambda z, y: factor.value * smooth_l1_loss(z, y), **options)
    factor.value = 2.0
    with pytest.raises(ValueError, match="at its parameters the loss was"):
        onestep.fit(model, (X, Y), lambda z, y: factor.value * smooth_l1_loss(z, y), **options)


def test_a_checkpoint_knows_the_batches_that_it_had_read(tmp_path: Path) -> None:
    """The fingerprint has the first batch of a loader, and mini-batches no loss of all rows."""
    batches = [(X[i : i + 50].float(), Y[i : i + 50].float()) for i in range(0, 250, 50)]
    options: dict[str, Any] = {"checkpoint": tmp_path / "state.pt", "progress": False, "batch_size": 50}

    def fit(data: list[Any], steps: int) -> int:
        model = network().float()
        loader = DataLoader(data, batch_size=None)
        return len(onestep.fit(model, loader, method="polar", max_steps=steps, **options).history)

    assert fit(batches, 3) == 3
    changed = [*batches[:2], (batches[2][0], batches[2][1] + 1), *batches[3:]]
    with pytest.raises(ValueError, match="is of another problem: the batches that it had read of this pass are others"):
        fit(changed, 4)
    with pytest.raises(ValueError, match="data has 2 batches in pass 1, of which the checkpoint has used 3"):
        fit(batches[:2], 4)
    # What had not been read yet may have changed.
    assert fit([*batches[:4], changed[2]], 4) == 4


def test_batches_in_an_order_of_their_own_resume(tmp_path: Path) -> None:
    """numpy or Python draw the order: two passes differ, and hashes would refuse what is the same data."""

    class Reversing(DataLoader[Any]):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            batches = list(super().__iter__())
            return iter(batches if self.passes % 2 else batches[::-1])

    loader = Reversing(TensorDataset(X, Y), batch_size=50)
    options: dict[str, Any] = {"checkpoint": tmp_path / "state.pt", "progress": False}
    model = network()
    onestep.fit(model, loader, max_steps=2, **options)
    assert len(onestep.fit(model, loader, max_steps=4, **options).history) == 4


@pytest.mark.parametrize("kind", ["sample", "mini-batches", "mini-batches of a loader"])
def test_a_checkpoint_holds_no_inverse_and_resumes_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Levenberg-Marquardt on a sample keeps an earlier step's inverse (p,p): it is formed again, where it was."""
    # So few that the inverse is needed, and so many that it serves some steps.
    monkeypatch.setattr(levenberg_marquardt, "_MOST_PRODUCTS", 7)

    def run(name: str, *ends: int) -> tuple[Tensor, list[int]]:
        model, formed = network(), []
        for steps in ends:
            data = (X, Y) if "loader" not in kind else DataLoader(TensorDataset(X, Y), batch_size=25, shuffle=True)
            options: dict[str, Any] = {"max_steps": steps, "checkpoint": tmp_path / name, "tol": 0.0, "damping": 1e-2}
            size = {} if kind == "sample" else {"batch_size": 100}
            options |= {"method": "levenberg_marquardt", "curvature_batch_size": 60, "progress": False}
            onestep.fit(model, data, **options, **size)
            state = torch.load(tmp_path / name, weights_only=True)
            formed.append(steps - 1 - state["run"]["formed"]["step"])
            p = sum(parameter.numel() for parameter in model.parameters())
            assert p * p not in [leaf.numel() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), formed

    straight, _ = run("straight", 9)
    ages = []
    for stop in (4, 6):
        reached, (age, _) = run(f"stopped at {stop}", stop, 9)
        assert torch.equal(reached, straight)
        ages.append(age)
    # Of an earlier step than the last one, at least once.
    assert max(ages) > 0


def test_a_checkpoint_of_before_brings_its_inverse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levenberg_marquardt, "_MOST_PRODUCTS", 7)
    path = tmp_path / "state.pt"
    options: dict[str, Any] = {"checkpoint": path, "curvature_batch_size": 60, "damping": 1e-2, "progress": False}
    options |= {"method": "levenberg_marquardt", "tol": 0.0}
    model = network()
    onestep.fit(model, (X, Y), max_steps=3, **options)
    state = torch.load(path, weights_only=True)
    run = state["run"]
    assert run.pop("formed") and run["kept"]
    run["kept"] = {"inverse": torch.eye(43, dtype=torch.float64)}
    torch.save(state, path)
    assert onestep.fit(model, (X, Y), max_steps=6, **options).steps == 6


class Underflowing(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.rate * x).exp()


@pytest.mark.parametrize("method", ["gauss_newton", "newton_cg", "gradient_descent"])
def test_a_plateau_without_a_gradient_is_not_convergence(method: str) -> None:
    """exp(-1000 x) is zero for x ≥ 1, and so is its derivative."""
    x = torch.linspace(1, 2, 10, dtype=torch.float64)
    result = onestep.fit(Underflowing(-1000.0), (x, (-x).exp()), method=method, progress=False)
    assert not result.converged
    assert "the same all around" in result.reason
    near = onestep.fit(Underflowing(-1.0), (x, (-x).exp()), method=method, progress=False)
    assert near.converged
    assert near.steps == len(near.history) == 1


@pytest.mark.parametrize("method", ["gauss_newton", "newton_cg"])
@pytest.mark.parametrize("width", [3, 200])
def test_a_feature_that_is_always_zero_does_not_prevent_convergence(method: str, width: int) -> None:
    """Its weight has no influence here, and has it nowhere: unlike a parameter that a plateau has made useless."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    X = torch.cat([X, X.new_zeros(60, width)], 1)
    y = (X[:, 0] + torch.randn(60, generator=generator, dtype=torch.float64) > 0).long()
    head = nn.Linear(3 + width, 2).double()
    result = onestep.fit(head, (X, y), "cross_entropy", method=method, progress=False)
    assert result.converged, result


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.functional.mse_loss])
def test_losses_of_torch_are_those_of_the_same_name(loss: Any) -> None:
    head = nn.Linear(5, 1).double()
    assert onestep.fit(head, (X, Y), loss, progress=False).method == "closed_form"


def test_binary_cross_entropy_is_logistic_regression() -> None:
    features, classes = years(torch.Generator().manual_seed(0))
    head = nn.Linear(2, 1).double()
    features = (features - features.mean(0)) / features.std(0)
    result = onestep.fit(head, (features, classes), "bce", progress=False)
    assert result.converged
    assert result.loss == pytest.approx(logistic_minimum(features, classes), rel=1e-9)
    # More parameters than a matrix is formed for.
    wide = nn.Linear(3000, 1)
    rows = torch.randn(20, 3000, generator=torch.Generator().manual_seed(0))
    result = onestep.fit(wide, (rows, classes[:20]), "bce", max_steps=2, progress=False)
    assert result.method == "newton_cg"
    assert result.loss < 0.5 * result.initial_loss


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_weighted_classes_have_their_minimum_whatever_the_chunks(chunk_size: int | None) -> None:
    classes = (X[:, 0] > 0.5).long() + (X[:, 1] > 0).long() * (X[:, 2] > 0).long()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]).double())
    head = nn.Linear(5, 3).double()
    options: dict[str, Any] = {"weight_decay": 1e-2, "chunk_size": chunk_size, "progress": False}
    result = onestep.fit(head, (X, classes), loss, **options)
    value = loss(head(X), classes) + 5e-3 * sum(p.square().sum() for p in head.parameters())
    assert result.converged
    assert result.loss == pytest.approx(value.item(), rel=1e-9)
    assert max(part.abs().max() for part in torch.autograd.grad(value, list(head.parameters()))) < 1e-6


def test_a_loss_that_is_no_mean_over_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="mean"):
        onestep.fit(network(), (X, Y), lambda z, y: (z - y).square().sum().sqrt(), progress=False)


class Residuals(nn.Module):
    """A problem whose outputs are its residuals."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(problem.start, dtype=torch.float64))
        self.residuals = problem.residuals

    def forward(self, _: Tensor) -> Tensor:
        return self.residuals(self.x).unsqueeze(0)


def sum_of_squares(problem: Problem, method: str, steps: int) -> tuple[float, bool]:
    model = Residuals(problem)
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    target = torch.zeros_like(model(zeros))
    result = onestep.fit(model, (zeros, target.detach()), method=method, max_steps=steps, progress=False)
    return result.loss * target.numel(), result.converged


# A minimum all the same: the slopes are 1.6e-11 there, and the Hessian's least eigenvalue is 0.063.
LOCAL = {("newton_cg", "trigonometric"): (2.795056121879e-5,)}
FEW = ("helical-valley", "bard", "box", "biggs-exp6", "linear-rank-1-10")


@pytest.mark.parametrize("method", ["levenberg_marquardt", "gauss_newton", "newton_cg", "gradient_descent"])
def test_no_method_claims_a_minimum_that_is_none(method: str) -> None:
    """Of the problems of Moré, Garbow and Hillstrom. ONESTEP_ALL_PROBLEMS=1 takes all, for minutes."""
    every = "ONESTEP_ALL_PROBLEMS" in os.environ
    cheap = method == "gradient_descent"
    few = FEW if method == "levenberg_marquardt" else FEW[:3]
    problems = [problem for problem in PROBLEMS if every or cheap or problem.name in few]
    claimed = 0
    for problem in problems:
        squares, converged = sum_of_squares(problem, method, 60 if every else 8 if cheap else 12)
        minima = problem.minima + LOCAL.get((method, problem.name), ())
        right = any(abs(squares - minimum) <= max(1e-6 * minimum, 1e-12) for minimum in minima)
        assert right or not converged, (problem.name, squares)
        claimed += converged
    assert claimed >= (3 if method == "levenberg_marquardt" else 0)


def test_a_fit_ends_when_its_caller_says_so_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    seen: list[Record] = []

    def callback(record: Record) -> bool:
        seen.append(record)
        return record.step == 3

    model = network()
    options: dict[str, Any] = {"checkpoint": tmp_path / "state.pt", "progress": False}
    result = onestep.fit(model, (X, Y), callback=callback, **options)
    assert seen == result.history
    assert (result.steps, result.converged, result.reason) == (3, False, "the callback asked for the end")
    result = onestep.fit(model, (X, Y), max_seconds=1e-9, **options)
    assert (result.steps, result.reason, result.interrupted) == (4, "max_seconds=1e-09 reached", False)
    with pytest.raises(ValueError, match="max_seconds=0"):
        onestep.fit(model, (X, Y), max_seconds=0, progress=False)
    with pytest.raises(TypeError, match="callback is int"):
        onestep.fit(model, (X, Y), callback=3, progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "batch",
    [(torch.ones(2, 1), torch.tensor(1.5)), (torch.tensor(1.0), torch.ones(1))],
    ids=["target", "inputs"],
)
def test_a_batch_without_rows(batch: tuple[Tensor, Tensor]) -> None:
    model = nn.Linear(1, 1)
    for call in (onestep.fit, HessianOperator):
        with pytest.raises(ValueError, match=r"a tensor of shape \(\), which has no rows; expected inputs and targets"):
            call(model, [batch], "mse")


def test_a_checkpoint_knows_frozen_parameters_and_goes_on_for_a_smaller_tol(tmp_path: Path) -> None:
    def body(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(X.shape[1], 4), nn.Tanh(), nn.Linear(4, 1)).to(X.dtype)
        model[0].requires_grad_(False)
        return model

    options: dict[str, Any] = {"method": "gauss_newton", "checkpoint": tmp_path / "state.pt", "progress": False}
    loose = onestep.fit(body(0), (X, Y), tol=0.5, **options)
    tight = onestep.fit(body(0), (X, Y), tol=1e-8, **options)
    assert loose.converged
    assert len(tight.history) > len(loose.history)
    assert tight.converged
    model = body(1)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="is of another problem: other frozen parameters"):
        onestep.fit(model, (X, Y), tol=1e-8, **options)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("method", ["auto", "gauss_newton", "newton_cg", "gradient_descent"])
@pytest.mark.parametrize("start", [0.2, 0.9])
def test_a_model_that_refuses_the_parameters_of_a_trial(method: str, start: float) -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.tensor([start], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            if not 0 < self.s < 1:
                raise ValueError("s out of range")
            return self.s.log() * x

    x = torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None]
    model = Checked()
    result = onestep.fit(model, (x, -1.2 * x), method=method, max_steps=200, progress=False)
    assert result.loss < 1e-10
    assert model.s.item() == pytest.approx(0.3011942, rel=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_a_head_over_saturated_features_in_float32(seed: int) -> None:
    """Columns of tanh that hardly vary: weights of 1e10, whose scores are rounding, came out, and losses of 1e13."""
    data, classes = (torch.as_tensor(part) for part in load_iris(return_X_y=True))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3))
    nn.init.normal_(model[0].weight)
    model[0].requires_grad_(False)
    before = cross_entropy(model(data.float()), classes).item()
    result = onestep.fit(model, (data.float(), classes), "cross_entropy", progress=False)
    losses = [before, *(record.loss for record in result.history)]
    assert all(after <= earlier * (1 + 1e-6) for earlier, after in itertools.pairwise(losses))
    assert result.loss < 1e-3
    assert cross_entropy(model(data.float()), classes).item() == pytest.approx(result.loss, rel=1e-2, abs=1e-7)


def test_whole_numbers_as_inputs_say_what_to_pass() -> None:
    X = torch.arange(12).reshape(6, 2)
    for data in ((X.numpy(), X[:, :1].float().numpy()), (X, X[:, :1].float())):
        with pytest.raises(RuntimeError, match=r"Integers stay integers.*X\.astype\('float32'\), or X\.float\(\)"):
            onestep.fit(nn.Linear(2, 1), data, progress=False)
