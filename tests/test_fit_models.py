"""onestep.fit on models and data in forms that people use: shared layers, own parameters, checks, torch.func, numpy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_fit import network, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import onestep
from onestep.curvature import GaussNewtonOperator
from onestep.evaluation.data import Chunk, Share, as_source
from onestep.evaluation.losses import LOSSES
from onestep.evaluation.module import chunk_rows
from onestep.training.facts import cut
from onestep.training.structures.glm_head import HeadObjective

METHODS = ["levenberg_marquardt", "gauss_newton", "newton_cg"]


class Recurrent(nn.Module):
    """The same weights as a layer that is used twice, as functions of them."""

    def __init__(self, layer: nn.Linear, last: nn.Linear) -> None:
        super().__init__()
        self.layer, self.last = layer, last

    def forward(self, x: Tensor) -> Tensor:
        def apply(t: Tensor) -> Tensor:
            return nn.functional.linear(t, self.layer.weight, self.layer.bias)

        return self.last(apply(apply(x).tanh()))


def layers() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(5, 5).double(), nn.Linear(5, 1).double()


@pytest.mark.parametrize("method", METHODS)
def test_a_module_may_be_used_twice(method: str) -> None:
    X, y = table(60)
    shared, last = layers()
    twice, plain = nn.Sequential(shared, nn.Tanh(), shared, last), Recurrent(*layers())
    results = [onestep.fit(m, (X, y), method=method, max_steps=3, progress=False) for m in (twice, plain)]
    # K-FAC preconditions conjugate gradients for layers alone, and they end elsewhere.
    if method == "levenberg_marquardt":
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-9)
    assert results[0].history[0].grad_norm == pytest.approx(results[1].history[0].grad_norm, rel=1e-9)
    # The layer holds its parameter, which later training reaches.
    assert type(shared.weight) is nn.Parameter
    assert mse_loss(twice(X), y).item() == pytest.approx(results[0].loss, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_sequential_may_have_a_parameter_of_its_own(method: str) -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    X, y = table(60)
    scaled = Scaled(*network())
    scaled.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    unused = network()
    unused.own = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    for model in (scaled, unused):
        result = onestep.fit(model, (X, y), method=method, max_steps=3, progress=False)
        assert mse_loss(model(X), y).item() == pytest.approx(result.loss, rel=1e-12)
        assert result.loss < result.initial_loss
    assert unused.own.item() == 2


class SecondDerivative(nn.Module):
    """u″ of a small network u, as the residual of an equation needs it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "formula":
            # d²/dx² Σ a tanh(wx + b) = Σ a w² (-2 t (1 - t²))
            t, w = self.net[0](x).tanh(), self.net[0].weight[:, 0]
            return (-2 * t * (1 - t.square()) * w.square()) @ self.net[2].weight.mT
        if self.how == "torch.autograd":
            # As most people write it. Whoever calls this has to record gradients.
            x = x.requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
        if self.how == "hessian":
            return torch.func.vmap(torch.func.hessian(lambda r: self.net(r)[0]))(x)[:, 0]
        one = torch.ones_like(x)
        return torch.func.jvp(lambda r: torch.func.jvp(self.net, (r,), (one,))[1], (x,), (one,))[1]


# Every method: test_models_of_every_kind.py.
@pytest.mark.parametrize("method", ["auto", "newton_cg"])
@pytest.mark.parametrize("how", ["hessian", "jvp of jvp", "torch.autograd"])
def test_models_may_differentiate_themselves(how: str, method: str) -> None:
    x = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None]
    y = -9 * (3 * x).sin()
    fitted, formula = SecondDerivative(how), SecondDerivative("formula")
    options: dict[str, Any] = {"method": method, "max_steps": 3, "cg_iterations": 200, "progress": False}
    result = onestep.fit(fitted, (x, y), **options)
    expected = onestep.fit(formula, (x, y), **options)
    assert result.method == expected.method
    assert result.history[0].grad_norm == pytest.approx(expected.history[0].grad_norm, rel=1e-9)
    # Matrix-free methods have another preconditioner here, and end conjugate gradients elsewhere.
    if method == "auto":
        assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.loss < 0.95 * result.initial_loss


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_require_gradients_do_so_in_the_model(method: str) -> None:
    class Slope(SecondDerivative):
        def forward(self, x: Tensor) -> Tensor:
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]

    x = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None].requires_grad_()
    result = onestep.fit(Slope(""), (x, (3 * x).cos().detach()), method=method, max_steps=10, progress=False)
    assert result.loss < 0.3 * result.initial_loss


class Checkpointed(nn.Module):
    """A network that computes activations anew in the backward pass, or keeps them."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh()).double()
        self.last, self.checkpointed = nn.Linear(8, 3).double(), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return self.last(checkpoint(self.first, x, use_reentrant=False))
        return self.last(self.first(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", [pytest.param("mse", marks=pytest.mark.long), "cross_entropy"])
def test_gradient_checkpointing_changes_nothing(method: str, loss: str) -> None:
    X, y = table(60)
    target = (X[:, 0] > 0).long() + (X[:, 1] > 0).long() if loss == "cross_entropy" else torch.cat([y, y, X[:, :1]], 1)
    losses = []
    for checkpointed in (True, False):
        model = Checkpointed(checkpointed=checkpointed)
        result = onestep.fit(model, (X, target), loss, method=method, max_steps=3, progress=False)
        losses.append([record.loss for record in result.history])
    # Conjugate gradients that end early magnify rounding.
    assert losses[0] == pytest.approx(losses[1], rel=1e-8 if method == "levenberg_marquardt" else 1e-2)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_may_cast_its_activations(method: str) -> None:
    class Cast(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    X, y = table(60, torch.float32)
    model = Cast(checkpointed=False).float()
    result = onestep.fit(model, (X, torch.cat([y, y, y], 1)), method=method, max_steps=5, progress=False)
    assert result.loss < 0.7 * result.initial_loss


def test_rows_of_a_model_that_calls_torch_func_are_measured() -> None:
    x = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None]
    rows = chunk_rows(SecondDerivative("hessian"), LOSSES["mse"], Chunk(x, x))
    # Between what 100 and 4,000 numbers a row take.
    assert 2**28 // (8 * 4000) < rows < 2**28 // (8 * 100)


class Checking(nn.Module):
    """An affine model that refuses a negative scale."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.message = message

    def forward(self, x: Tensor) -> Tensor:
        if self.scale <= 0:
            raise ValueError(self.message) if self.message else ValueError
        return x[:, :1] * self.scale


@pytest.mark.parametrize("message", ["scale must be positive", ""])
def test_a_model_that_checks_its_parameters_is_fitted(message: str) -> None:
    X, _ = table(50)
    model = Checking(message)
    result = onestep.fit(model, (X, 3 * X[:, :1]), progress=False)
    assert model.scale.item() == pytest.approx(3)
    why = f"not closed_form: the model raises at other parameters than its own ({message or 'ValueError'})"
    assert result.reasons[0] == why
    with pytest.raises(ValueError, match="raises at other parameters"):
        onestep.fit(Checking(message), (X, X[:, :1]), method="closed_form", progress=False)


def test_a_model_whose_error_says_nothing_names_its_type() -> None:
    class Batches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 8:
                raise AssertionError
            return self.inner(x)

    with pytest.raises(ValueError, match=r"row by row, which fails here \(AssertionError\)"):
        onestep.fit(Batches(), table(), method="levenberg_marquardt", progress=False)


def test_numpy_arrays_are_data() -> None:
    X, y = table(100)
    expected = network()
    onestep.fit(expected, (X, y), max_steps=3, progress=False)
    backwards = np.ascontiguousarray(X.numpy()[::-1])[::-1]
    backwards.flags.writeable = False
    fitted = network()
    onestep.fit(fitted, (backwards, y.numpy()), max_steps=3, progress=False)
    assert all(map(torch.equal, fitted.parameters(), expected.parameters()))
    # float64 arrays for a float32 model, and classes in an unsigned type.
    head = nn.Linear(5, 2)
    classes = (y.numpy()[:, 0] > 0).astype(np.uint8)
    result = onestep.fit(head, (X.numpy(), classes), "cross_entropy", progress=False)
    target = torch.from_numpy(classes).long()
    assert cross_entropy(head(X.float()), target).item() == pytest.approx(result.loss, rel=1e-6)
    with pytest.raises(TypeError, match="numpy array of dtype <U1"):
        onestep.fit(head, (X.numpy(), np.array(["a"] * 100)), "cross_entropy", progress=False)


def test_data_frames_are_data() -> None:
    pandas = pytest.importorskip("pandas")
    X, y = table(100)
    frame, series = pandas.DataFrame(X.numpy()), pandas.Series(y[:, 0].numpy())
    expected, fitted = network(), network()
    onestep.fit(expected, (X, y), max_steps=3, progress=False)
    onestep.fit(fitted, (frame, series), max_steps=3, progress=False)
    assert all(map(torch.equal, fitted.parameters(), expected.parameters()))
    v = torch.ones(sum(p.numel() for p in fitted.parameters()), dtype=X.dtype)
    products = [
        GaussNewtonOperator(fitted, data, "mse") @ v for data in ((X, y), (X.numpy(), y.numpy()), (frame, series))
    ]
    assert torch.equal(products[1], products[0])
    assert torch.equal(products[2], products[0])
    with pytest.raises(TypeError, match="a DataFrame of dtype object"):
        onestep.fit(fitted, (frame.assign(kind="a"), series), progress=False)


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("newton_cg", "bce"),
        ("gauss_newton", "cross_entropy"),
        ("levenberg_marquardt", "weighted"),
        ("gradient_descent", "cross_entropy"),
        ("closed_form", "cross_entropy"),
        ("auto", "bce"),
    ],
)
def test_separable_classes_are_said_to_be_where_steps_run_out(method: str, loss: str) -> None:
    """A head over a frozen body, in float64, where the loss is far from zero after a few steps."""
    torch.manual_seed(0)
    classes = torch.arange(60) % 2
    X = 6 * nn.functional.one_hot(classes, 4).double() + torch.rand(60, 4).double()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1 if loss == "bce" else 2)).double()
    target, given = classes, loss
    if loss == "bce":
        target = classes[:, None].double()
    elif loss == "weighted":
        given = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]).double())

    def said(rows: Tensor, frozen: bool = True, **options: Any) -> bool:
        net = copy.deepcopy(model)
        for parameter in net[:2].parameters():
            parameter.requires_grad_(not frozen)
        result = onestep.fit(net, (rows, target), given, method=method, max_steps=6, progress=False, **options)
        assert not result.converged
        return "planes separate the classes" in result.reason

    assert said(X)
    # Rows that are the same in both classes, a penalty, and outputs that are not affine.
    assert not said(X[torch.arange(60) // 2 * 2])
    assert not said(X, weight_decay=1e-6)
    assert method == "closed_form" or not said(X, frozen=False)


@pytest.mark.parametrize("method", ["newton_cg", "gauss_newton", "levenberg_marquardt"])
def test_classes_that_a_plane_separates_are_said_to_be(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    X = 4 + torch.rand(150, 4, generator=generator)
    classes = (X[:, 0] > 4.5).long() + (X[:, 0] > 4.8).long()
    torch.manual_seed(1)
    head = nn.Linear(4, 3)
    result = onestep.fit(head, (X, classes), "cross_entropy", method=method, max_steps=300, progress=False)
    assert "planes separate the classes" in result.reason
    assert not result.converged
    assert result.loss < 0.02
    # A penalty makes the minimum finite.
    decayed = onestep.fit(
        head, (X, classes), "cross_entropy", method=method, weight_decay=1e-3, max_steps=300, progress=False
    )
    assert "planes" not in decayed.reason


@pytest.mark.parametrize("method", ["newton_cg", "gauss_newton"])
def test_a_preconditioner_that_cannot_be_factored_is_left_out(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in float32, where p(1 - p) has underflowed: gradients stand in for it."""
    X, y = table(100)
    classes, asked = (y[:, 0] > 0).long(), []

    def singular(damping: float) -> Any:
        asked.append(damping)
        raise torch.linalg.LinAlgError("1 of 1 matrices could not be solved")

    monkeypatch.setattr(HeadObjective, "preconditioner", lambda self, parameters: singular)
    losses = []
    for chosen in (method, "levenberg_marquardt"):
        torch.manual_seed(0)
        options: dict[str, Any] = {"method": chosen, "weight_decay": 1e-2, "progress": False}
        result = onestep.fit(nn.Linear(5, 2).double(), (X, classes), "cross_entropy", **options)
        assert result.converged
        losses.append(result.loss)
    assert asked and losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("kind", ["tensors", "batches"])
def test_rows_are_moved_to_the_device_of_the_model_chunk_by_chunk(kind: str) -> None:
    """The device "meta", which has shapes without values, stands in for a GPU."""
    X, y = table(50)
    source = as_source((X, y) if kind == "tensors" else [(X[:30], y[:30]), (X[30:], y[30:])], 0)
    source.device = torch.device("meta")
    chunks = list(cut(source, Share(), 20).all())
    assert [len(chunk) for chunk in chunks] == ([20, 20, 10] if kind == "tensors" else [20, 10, 20])
    assert all(chunk.inputs.is_meta and chunk.target.is_meta for chunk in chunks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["auto", *METHODS, "gradient_descent"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_models_on_a_gpu_are_fitted_as_on_a_cpu(method: str, loss: str) -> None:
    X, y = table(200)
    target = y if loss == "mse" else (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()
    for make in (network, lambda: nn.Linear(5, 1).double()):
        here = make()
        if loss == "cross_entropy":
            here = nn.Sequential(here, nn.Linear(1, 3).double())
        there = copy.deepcopy(here).cuda()
        options: dict[str, Any] = {"method": method, "max_steps": 3, "weight_decay": 1e-3, "progress": False}
        expected = onestep.fit(here, (X, target), loss, **options)
        result = onestep.fit(there, (X, target), loss, **options)
        assert result.history[0].loss == pytest.approx(expected.history[0].loss, rel=0.05)
        assert result.loss <= result.initial_loss


class Streamed(IterableDataset[Any]):
    """Rows that come one after another, and have no length."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[Any]:
        return zip(*self.tensors, strict=True)


@pytest.mark.parametrize(
    "options", [{"method": "newton_cg"}, {"method": "gauss_newton", "batch_size": 20}], ids=["full", "mini"]
)
def test_loaders_without_a_length(options: dict[str, Any]) -> None:
    """A DataLoader of an IterableDataset has __len__, which raises TypeError."""
    X, y = table(60)
    results = []
    for data in (Streamed(X, y), TensorDataset(X, y)):
        model = network()
        loader: DataLoader[Any] = DataLoader(data, batch_size=20)
        results.append(onestep.fit(model, loader, max_steps=3, progress=False, **options).loss)
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    operator = GaussNewtonOperator(network(), DataLoader(Streamed(X, y), 20), "mse", progress=False)
    vector = torch.ones(operator.shape[1], dtype=X.dtype)
    expected = GaussNewtonOperator(network(), (X, y), "mse", progress=False) @ vector
    assert torch.allclose(operator @ vector, expected, rtol=1e-9)
