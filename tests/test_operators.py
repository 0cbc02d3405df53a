"""HessianOperator, GaussNewtonOperator and FisherOperator: products and estimates against dense matrices in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_cases import CLASSES, MODELS, OPERATORS, ROWS, Setting, functional_mse
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from onestep.curvature import FisherOperator, GaussNewtonOperator, HessianOperator

LOSSES = ["mse", "cross_entropy", "poisson"]


# ------------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", OPERATORS)
def test_products_are_those_of_the_dense_matrix(kind: Any, name: str) -> None:
    setting = Setting(name)
    A, op = setting.dense(kind), setting.operator(kind)
    assert op.shape == (setting.p, setting.p)
    assert A.abs().max() > 1e-3
    torch.testing.assert_close(op @ setting.V, A @ setting.V, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(op @ setting.V[:, 0], A @ setting.V[:, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", OPERATORS)
def test_every_loss_and_reduction(kind: Any, loss: str, reduction: str) -> None:
    setting = Setting("mlp", loss, reduction)
    A, op = setting.dense(kind), setting.operator(kind)
    torch.testing.assert_close(op @ setting.V, A @ setting.V, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize("function", [functional_mse, lambda z, y: (z - y).square().mean()])
def test_a_function_as_loss_is_a_mean_over_its_rows(kind: Any, function: Any) -> None:
    setting = Setting("mlp", "mse")
    A = setting.dense(kind)
    op = kind(setting.model, setting.batches(4, 4, 3), function, progress=False)
    torch.testing.assert_close(op @ setting.V, A @ setting.V, rtol=1e-9, atol=1e-12)
    total = kind(setting.model, setting.batches(4, 4, 3), function, reduction="sum", progress=False)
    torch.testing.assert_close(total @ setting.V, ROWS * A @ setting.V, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", OPERATORS)
def test_how_the_rows_are_batched_does_not_matter(kind: Any) -> None:
    setting = Setting()
    expected = setting.dense(kind) @ setting.V
    rows = TensorDataset(setting.inputs, setting.target)
    for data in (
        (setting.inputs, setting.target),
        [setting.inputs, setting.target],
        rows,
        DataLoader(rows, batch_size=4),
        DataLoader(rows, batch_size=4, shuffle=True),
        setting.batches(1, 9, 1),
        [((x,), y) for x, y in setting.batches(5, 6)],
        [({"input": x}, y) for x, y in setting.batches(5, 6)],
    ):
        for chunk_size in (None, 2):
            op = setting.operator(kind, data, chunk_size=chunk_size)
            torch.testing.assert_close(op @ setting.V, expected, rtol=1e-9, atol=1e-12)


def test_sequences_of_class_scores() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4)).double()
    tokens = torch.randint(5, (6, 7), generator=torch.Generator().manual_seed(0))
    target = torch.randint(4, (6, 7), generator=torch.Generator().manual_seed(1))
    target[2, 3:] = -100
    point = {name: p.detach() for name, p in model.named_parameters()}

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in point.values()])
        values = {name: part.reshape(p.shape) for (name, p), part in zip(point.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, values, (tokens,)).mT, target)

    vector = torch.cat([p.reshape(-1) for p in point.values()])
    H = jacrev(jacrev(loss))(vector)
    op = HessianOperator(model, list(zip(tokens.split(4), target.split(4), strict=True)), "cross_entropy")
    torch.testing.assert_close(op @ torch.eye(len(vector)).double(), H, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "encoder", "lstm"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_a_block_is_its_columns_and_its_dict(kind: Any, name: str) -> None:
    setting = Setting(name)
    op = setting.operator(kind)
    block = op @ setting.V
    columns = torch.stack([op @ column for column in setting.V.mT], 1)
    torch.testing.assert_close(block, columns, rtol=1e-11, atol=1e-14)
    sizes = [p.numel() for p in setting.point.values()]

    def named(V: Tensor) -> dict[str, Tensor]:
        parts = zip(setting.point.items(), V.split(sizes), strict=True)
        return {name: part.reshape(*p.shape, *V.shape[1:]) for (name, p), part in parts}

    for V in (setting.V, setting.V[:, 0], setting.V[:, :1]):
        v = named(V)
        product = op @ dict(reversed(v.items()))
        assert {name: part.shape for name, part in product.items()} == {name: part.shape for name, part in v.items()}
        expected = named(op @ V)
        assert all(torch.equal(product[name], expected[name]) for name in v)


def test_vectors_of_a_block_may_be_more_than_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting()
    op = setting.operator(GaussNewtonOperator)
    expected = op @ setting.V
    monkeypatch.setattr(op._passes, "affordable_rows", 8)
    torch.testing.assert_close(op @ setting.V, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", OPERATORS)
def test_one_pass_serves_a_whole_block(kind: Any) -> None:
    setting = Setting()
    passes = []

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            passes.append(1)
            return iter(setting.batches(4, 7))

    op = setting.operator(kind, Batches())
    passes.clear()
    op @ setting.V
    assert len(passes) == 1


def test_scalars_and_single_precision() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    x = torch.tensor([1.0, 2.0, 3.0])
    op = GaussNewtonOperator(Scaled(), (x, x))
    assert (op.shape, op.dtype, op.device) == ((1, 1), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(op @ torch.ones(1), torch.tensor([2 * 14 / 3]))
    torch.testing.assert_close((op @ {"scale": torch.tensor(1.0)})["scale"], torch.tensor(2 * 14 / 3))
    assert (op @ torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("name", MODELS)
def test_symmetric_and_semi_definite(name: str) -> None:
    for kind in OPERATORS:
        op = Setting(name).operator(kind)
        A = op @ torch.eye(op.shape[0], dtype=torch.float64)
        torch.testing.assert_close(A, A.mT, rtol=1e-10, atol=1e-13)
        least = torch.linalg.eigvalsh(A)[0]
        assert least < -1e-4 if kind is HessianOperator and name == "mlp" else True
        assert least > -1e-12 or kind is HessianOperator


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_same_bits_every_time(kind: Any) -> None:
    setting = Setting("encoder")
    op = setting.operator(kind)
    first = op @ setting.V
    torch.randn(3)
    assert torch.equal(op @ setting.V, first)
    assert torch.equal(setting.operator(kind) @ setting.V, first)


def test_products_follow_the_parameters() -> None:
    setting = Setting()
    op = setting.operator(HessianOperator)
    before = op @ setting.V
    with torch.no_grad():
        for p in setting.model.parameters():
            p.mul_(1.5)
    assert not torch.allclose(op @ setting.V, before)
    setting.point = {name: p.detach() for name, p in setting.model.named_parameters()}
    torch.testing.assert_close(op @ setting.V, setting.dense(HessianOperator) @ setting.V, rtol=1e-9, atol=1e-12)


def test_the_gradient_belongs_to_the_same_loss() -> None:
    for reduction, name in itertools.product(["mean", "sum"], ["mlp", "frozen"]):
        setting = Setting(name, reduction=reduction)
        loss, gradient = setting.operator(HessianOperator).loss_and_gradient()
        elements = setting.elements if reduction == "mean" else 1
        expected = setting.summed_loss(setting.outputs(setting.vector())) / elements
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        slope = jacrev(lambda v, s=setting: s.summed_loss(s.outputs(v)))(setting.vector()) / elements
        torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-13)


# --------------------------------------------------------------------------------------------------------------- Fisher


@pytest.mark.parametrize(
    "loss", [pytest.param(loss, marks=() if loss == "mse" else pytest.mark.long) for loss in LOSSES]
)
def test_draws_from_the_model_average_to_the_fisher_matrix(loss: str) -> None:
    setting = Setting("mlp", loss)
    F_true = setting.dense(FisherOperator)
    few = torch.stack([setting.operator(FisherOperator, mc_samples=25, seed=seed) @ setting.V for seed in range(40)])
    error = (few.mean(0) - F_true @ setting.V).abs() / (few.std(0) / len(few) ** 0.5)
    assert error.max() < 4.5
    many = setting.operator(FisherOperator, mc_samples=2000) @ setting.V
    torch.testing.assert_close(many, F_true @ setting.V, rtol=0.2, atol=0.1 * (F_true @ setting.V).abs().max().item())
    op = setting.operator(FisherOperator, mc_samples=1)
    A = op @ torch.eye(setting.p, dtype=torch.float64)
    assert torch.equal(op @ setting.V, op @ setting.V)
    torch.testing.assert_close(op @ setting.V, A @ setting.V)
    assert torch.linalg.matrix_rank(A) <= ROWS


@pytest.mark.parametrize("loss", LOSSES)
def test_the_empirical_fisher_matrix_is_made_of_each_rows_gradient(loss: str) -> None:
    setting = Setting("mlp", loss)

    one = Setting("mlp", loss)

    def row_loss(vector: Tensor, row: int) -> Tensor:
        one.target = setting.target[row : row + 1]
        return one.summed_loss(setting.outputs(vector)[row : row + 1])

    slopes = torch.stack([jacrev(row_loss)(setting.vector(), row) for row in range(ROWS)])
    expected = slopes.mT @ slopes / setting.elements
    op = setting.operator(FisherOperator, kind="empirical")
    torch.testing.assert_close(op @ setting.V, expected @ setting.V, rtol=1e-9, atol=1e-12)
    if loss == "mse":
        function = FisherOperator(setting.model, setting.batches(4, 7), functional_mse, kind="empirical")
        # ℓ of a row is a mean over its outputs here, and the sum goes over rows.
        torch.testing.assert_close(function @ setting.V, expected @ setting.V / CLASSES, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ estimates


@pytest.mark.parametrize("kind", OPERATORS)
def test_estimates_lie_within_their_standard_errors(kind: Any) -> None:
    setting = Setting()
    A, op = setting.dense(kind), setting.operator(kind)
    trace = op.trace(400)
    assert trace.samples == 400
    assert abs(trace.value - A.trace()) < 4 * trace.standard_error
    # Var zᵀAz = 2(‖A‖² - ‖diag A‖²) for signs z.
    spread = (2 * (A.square().sum() - A.diagonal().square().sum())).sqrt()
    assert trace.standard_error.item() == pytest.approx(spread.item() / 20, rel=0.25)
    diagonal = op.diagonal(400)
    assert ((diagonal.value - A.diagonal()).abs() < 4.5 * diagonal.standard_error + 1e-14).all()
    if kind is HessianOperator:
        spread = (A.square().sum(1) - A.diagonal().square()).sqrt()
        torch.testing.assert_close(diagonal.standard_error, spread / 20, rtol=0.3, atol=1e-12)
    else:
        # Of squares: never negative, and no further off than √2 of the element itself.
        assert (diagonal.value >= 0).all()
        assert (diagonal.standard_error <= 1.3 * 2**0.5 * A.diagonal() / 20 + 1e-14).all()


def test_estimates_are_unbiased() -> None:
    setting = Setting()
    A, op = setting.dense(GaussNewtonOperator), setting.operator(GaussNewtonOperator)
    generator = torch.Generator().manual_seed(3)
    traces = torch.stack([op.trace(2, generator=generator).value for _ in range(50)])
    assert len(set(traces.tolist())) == 50
    assert abs(traces.mean() - A.trace()) < 4 * traces.std() / 50**0.5
    # Two samples of a diagonal matrix leave no error.
    assert op.trace(2).standard_error > 0


def test_estimates_do_not_depend_on_how_samples_are_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting()
    op = setting.operator(HessianOperator)
    trace, diagonal = op.trace(10), op.diagonal(10)
    assert torch.equal(op.trace(10).value, trace.value)
    monkeypatch.setattr("onestep.curvature._estimates._BLOCK_ELEMENTS", 3 * setting.p)
    for ours, whole in ((op.trace(10), trace), (op.diagonal(10), diagonal)):
        torch.testing.assert_close(ours.value, whole.value, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(ours.standard_error, whole.standard_error, rtol=1e-9, atol=1e-13)
