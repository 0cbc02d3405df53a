"""Losses that are weighted otherwise than by rows, losses recognised by what they are, and the order of arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import name_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import onestep
from onestep.curvature import FisherOperator, GaussNewtonOperator, HessianOperator, Laplace
from onestep.evaluation.losses import as_loss

ROWS, CLASSES = 30, 3
WEIGHT = torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64)


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(ROWS, 2, dtype=torch.float64, generator=generator)
    # The first rows hold other classes than the last.
    y = (torch.rand(ROWS, generator=generator) * 1.5 + torch.arange(ROWS) / ROWS).long().clamp_max(CLASSES - 1)
    y[::7] = 1
    return X, y


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, CLASSES, dtype=torch.float64)


def log_scores(loss: Any) -> nn.Module:
    return nn.Sequential(model(), nn.LogSoftmax(1)) if "nll" in str(loss).lower() else model()


WEIGHTED: list[Any] = [
    nn.CrossEntropyLoss(weight=WEIGHT),
    nn.CrossEntropyLoss(ignore_index=1),
    nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2, label_smoothing=0.1),
    partial(F.cross_entropy, weight=WEIGHT),
    partial(F.cross_entropy, label_smoothing=0.2),
    nn.NLLLoss(weight=WEIGHT),
    partial(F.nll_loss, weight=WEIGHT),
]


@pytest.mark.parametrize("loss", WEIGHTED, ids=name_of)
def test_class_weights_and_ignored_classes(loss: Any) -> None:
    """Loss, gradient and products are those of torch's loss over all rows at once, however they are cut."""
    X, y = data()
    net = log_scores(loss)
    point = {name: p.detach() for name, p in net.named_parameters()}
    sizes = [p.numel() for p in point.values()]

    def whole(vector: Tensor) -> Tensor:
        parts = zip(point.items(), vector.split(sizes), strict=True)
        return loss(functional_call(net, {name: part.view_as(p) for (name, p), part in parts}, (X,)), y)

    vector = torch.cat([p.flatten() for p in point.values()])
    H = torch.autograd.functional.hessian(whole, vector)
    for chunk_size in (1, 4, ROWS):
        op = HessianOperator(net, (X, y), loss, chunk_size=chunk_size, progress=False)
        torch.testing.assert_close(op @ torch.eye(len(vector), dtype=torch.float64), H)
        value, gradient = op.loss_and_gradient()
        assert value == pytest.approx(whole(vector).item())
        torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(whole, vector))


@pytest.mark.parametrize(
    ("loss", "method"),
    [
        (WEIGHTED[2], "levenberg_marquardt"),
        pytest.param(WEIGHTED[2], "gauss_newton", marks=pytest.mark.long),
        (WEIGHTED[2], "newton_cg"),
        (WEIGHTED[3], "levenberg_marquardt"),
    ],
    ids=name_of,
)
def test_fit_reaches_the_minimum_of_a_weighted_loss(loss: Any, method: str) -> None:
    X, y = data()
    fitted = onestep.fit(model(), (X, y), loss, method=method, chunk_size=7, weight_decay=1e-3, progress=False)
    reference = model()
    optimizer = torch.optim.LBFGS(reference.parameters(), max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-15)

    def penalised() -> Tensor:
        penalty = sum(p.square().sum() for p in reference.parameters())
        return loss(reference(X), y) + 0.5e-3 * penalty

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = penalised()
        value.backward()
        return value

    optimizer.step(closure)
    assert fitted.converged and fitted.loss == pytest.approx(penalised().item(), rel=1e-8)


def balanced(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target, weight=WEIGHT)


COUPLED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "class weights": balanced,
    "ignored": lambda z, y: F.cross_entropy(z, y, ignore_index=1),
    "a sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "a root": lambda z, y: F.cross_entropy(z, y).sqrt(),
    "rows that depend on each other": lambda z, y: F.cross_entropy(z - z.mean(0), y),
}


@pytest.mark.parametrize("name", COUPLED)
def test_other_losses_that_are_no_mean_over_rows_are_refused(name: str) -> None:
    X, y = data()
    for make in (
        lambda: HessianOperator(model(), (X, y), COUPLED[name], progress=False),
        lambda: onestep.fit(model(), (X, y), COUPLED[name], method="newton_cg", progress=False),
    ):
        with pytest.raises(ValueError, match=r"expected a mean over rows.*nn\.CrossEntropyLoss\(weight="):
            make()


def ignored_later() -> tuple[Tensor, Tensor]:
    """Labels of the later rows are ignored; the first chunk has none."""
    X, y = data()
    y[ROWS // 2 :: 3] = -100
    return X, y


def by_class() -> tuple[Tensor, Tensor]:
    """Each chunk has one class alone."""
    X, y = data()
    return X, y.sort().values


LATE: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[Tensor, Tensor], int | None]] = {
    "a chunk without labels that count": (
        lambda z, y: F.cross_entropy(z, y),
        (data()[0], torch.where(torch.arange(ROWS) < 20, data()[1], -100)),
        10,
    ),
    "ignored in later batches": (lambda z, y: F.cross_entropy(z, y), ignored_later(), None),
    "class weights": (balanced, data(), 10),
    "class weights, one class a chunk": (balanced, by_class(), 1),
    "a sum": (COUPLED["a sum"], data(), 10),
}


@pytest.mark.parametrize("method", ["newton_cg", "levenberg_marquardt", "polar"])
@pytest.mark.parametrize("name", LATE)
def test_losses_that_are_no_mean_over_later_chunks_are_refused(name: str, method: str) -> None:
    """The model gives the same for all rows, which has one mean under all weights."""
    loss, (X, y), chunk_size = LATE[name]
    net = model()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    rows: Any = (X, y) if chunk_size else DataLoader(TensorDataset(X, y), batch_size=10)
    with pytest.raises(ValueError, match="expected a mean over rows"):
        onestep.fit(net, rows, loss, method=method, batch_size=ROWS, chunk_size=chunk_size or 10, progress=False)
    if method == "newton_cg":
        with pytest.raises(ValueError, match="expected a mean over rows"):
            onestep.fit(net, rows, loss, method=method, chunk_size=chunk_size or 10, progress=False)
        with pytest.raises(ValueError, match="expected a mean over rows"):
            HessianOperator(net, rows, loss, chunk_size=chunk_size or 10, progress=False)


def test_means_over_rows_are_not_refused() -> None:
    X, y = data()
    for scale in (1e-12, 1.0, 1e12):
        op = GaussNewtonOperator(
            model().float(), (X.float(), y), lambda z, y, scale=scale: scale * F.cross_entropy(z, y), progress=False
        )
        assert (op @ torch.ones(op.shape[0])).isfinite().all()


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (nn.MSELoss(), "mse"),
        (F.mse_loss, "mse"),
        (nn.CrossEntropyLoss(), "cross_entropy"),
        (F.cross_entropy, "cross_entropy"),
        (partial(F.cross_entropy), "cross_entropy"),
        (nn.PoissonNLLLoss(), "poisson"),
        (nn.BCEWithLogitsLoss(), "bce"),
        (F.binary_cross_entropy_with_logits, "bce"),
        (nn.PoissonNLLLoss(full=True), "function"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(1)), "function"),
        (partial(F.mse_loss, weight=None), "function"),
        (nn.L1Loss(), "function"),
    ],
    ids=name_of,
)
def test_torchs_losses_are_known_by_what_they_are(loss: Any, name: str) -> None:
    assert as_loss(loss).name == name


def test_reductions_other_than_mean_are_refused() -> None:
    for loss in (nn.MSELoss(reduction="sum"), partial(F.cross_entropy, reduction="sum")):
        with pytest.raises(ValueError, match="reduction='sum'; expected reduction='mean'"):
            as_loss(loss)


def test_bce() -> None:
    X, y = data()
    target = (y == 1).double()[:, None]
    net = nn.Linear(2, 1, dtype=torch.float64)
    p = (X @ net.weight.mT + net.bias).sigmoid().detach()
    Z = torch.cat([X, torch.ones(ROWS, 1, dtype=torch.float64)], 1)
    H = Z.mT @ (p * (1 - p) * Z) / ROWS
    for kind in (HessianOperator, GaussNewtonOperator, FisherOperator):
        op = kind(net, (X, target), "bce", progress=False)
        torch.testing.assert_close(op @ torch.eye(3, dtype=torch.float64), H)
    drawn = FisherOperator(net, (X, target), "bce", mc_samples=4000, progress=False)
    torch.testing.assert_close(drawn @ torch.eye(3, dtype=torch.float64), H, rtol=0, atol=0.02)
    result = onestep.fit(net, (X, target), nn.BCEWithLogitsLoss(), progress=False)
    residual = (X @ net.weight.mT + net.bias).sigmoid().detach() - target
    assert result.converged and (Z.mT @ residual).norm() < 1e-5


def test_probabilities_as_targets() -> None:
    X, y = data()
    soft = 0.9 * F.one_hot(y, CLASSES).double() + 0.1 / CLASSES
    results = [
        onestep.fit(model(), (X, target), loss, weight_decay=1e-3, method=method, progress=False).loss
        for method in ("newton_cg", "levenberg_marquardt")
        for target, loss in ((soft, nn.CrossEntropyLoss()), (y, nn.CrossEntropyLoss(label_smoothing=0.1)))
    ]
    assert results == pytest.approx([results[0]] * 4, rel=1e-9)


def test_the_old_order_of_arguments_is_deprecated() -> None:
    X, y = data()
    v = torch.ones(9, dtype=torch.float64)
    expected = HessianOperator(model(), (X, y), "cross_entropy", progress=False) @ v
    for loss in ("cross_entropy", nn.CrossEntropyLoss(), F.cross_entropy):
        with pytest.warns(DeprecationWarning, match=r"\(model, data, loss\)") as caught:
            op = HessianOperator(model(), loss, (X, y), progress=False)
        assert caught[0].filename == __file__
        torch.testing.assert_close(op @ v, expected)
    with pytest.warns(DeprecationWarning) as caught:
        FisherOperator(model(), "cross_entropy", (X, y), progress=False)
    assert caught[0].filename == __file__ and len(caught) == 1
    with pytest.warns(DeprecationWarning, match=r"\(model, data, loss\)") as caught:
        old = Laplace(model(), "cross_entropy", (X, y))
    assert caught[0].filename == __file__ and len(caught) == 1
    torch.testing.assert_close(old.covariance(), Laplace(model(), (X, y), "cross_entropy").covariance())


@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_class_that_the_outputs_do_not_have_is_named(loss: Any) -> None:
    rows = DataLoader(TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])), batch_size=2)
    with pytest.raises(ValueError, match="target holds a class that the outputs, of 2 classes, do not have: Target 2"):
        onestep.fit(nn.Linear(3, 2), rows, loss, progress=False)
    with pytest.raises(ValueError, match="target holds a class that the outputs, of 2 classes"):
        HessianOperator(nn.Linear(3, 2), rows, loss) @ torch.ones(8)


def test_a_function_of_outputs_that_are_flattened_is_the_mean_it_says() -> None:
    """Language models often return (rows · tokens, classes): the loss is no multiple of the function's value."""

    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x)).flatten(0, 1)

    torch.manual_seed(0)
    model, x, y = Flattened(), torch.randint(7, (6, 4)), torch.randint(7, (6, 4))

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target.flatten())

    value = loss(model(x), y).item()
    for chunk_size in (None, 4):
        operator = GaussNewtonOperator(model, (x, y), loss, chunk_size=chunk_size)
        assert float(operator.loss_and_gradient()[0]) == pytest.approx(value, rel=1e-5)
    result = onestep.fit(model, (x, y), loss, method="gauss_newton", max_steps=1, progress=False)
    assert result.initial_loss == pytest.approx(value, rel=1e-5)

    def of_some(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target.flatten(), ignore_index=0)

    with pytest.raises(ValueError, match="expected a mean over rows"):
        GaussNewtonOperator(model, (x, y), of_some).loss_and_gradient()


def test_targets_of_any_integer_type() -> None:
    """int32 classes and booleans are what numpy and comparisons give."""
    X, y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2

    def value(target: Tensor, loss: str, outputs: int) -> float:
        torch.manual_seed(0)
        rows = DataLoader(TensorDataset(X, target), batch_size=6)
        return float(GaussNewtonOperator(nn.Linear(3, outputs), rows, loss).loss_and_gradient()[0])

    assert value(y.int(), "cross_entropy", 2) == value(y, "cross_entropy", 2)
    assert value(y.bool(), "mse", 1) == value(y.float(), "mse", 1)


def test_data_that_the_model_fails_on_is_described() -> None:
    X, y = data()
    with pytest.raises(RuntimeError, match=r"inputs \(8, 1\) torch.float64, target \(8,\) torch.int64: mat1 and mat2"):
        onestep.fit(model(), (X[:, :1], y), "cross_entropy", method="newton_cg", progress=False)


@pytest.mark.parametrize("loss", ["mse", lambda outputs, target: (outputs - target).mean()])
def test_complex_targets_are_refused(loss: Any) -> None:
    data = torch.randn(6, 2), torch.randn(6, 1, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"complex64; expected (a real number|real numbers)"):
        onestep.fit(nn.Linear(2, 1), data, loss, progress=False)
    with pytest.raises(TypeError, match=r"complex64; expected (a real number|real numbers)"):
        HessianOperator(nn.Linear(2, 1), data, loss)
