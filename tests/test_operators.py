"""HessianOperator, GaussNewtonOperator and FisherOperator against dense matrices in float64."""

from __future__ import annotations

import builtins
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import Child, finish_all
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from onestep.curvature import FisherOperator, GaussNewtonOperator, HessianOperator
from onestep.optim import NonFiniteError

OPERATORS = [HessianOperator, GaussNewtonOperator, FisherOperator]
ROWS, CLASSES = 11, 3


class Attention(nn.Module):
    """A block of F.scaled_dot_product_attention with a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + mixed).mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer, which holds nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(4, 2, 5, 0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Tied(nn.Module):
    """The same weight at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, CLASSES)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Recurrent(nn.Module):
    """nn.LSTM, which torch.func.vmap cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    model[0].weight.requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), (4,)),
    "attention": (Attention, (5, 4)),
    "encoder": (Encoder, (4, 4)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES)
        ),
        (2, 6, 6),
    ),
    "tied": (Tied, (3,)),
    "lstm": (Recurrent, (4, 3)),
    "frozen": (frozen, (4,)),
}
LOSSES = ["mse", "cross_entropy", "poisson"]


def functional_mse(outputs: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(outputs, target)


class Setting:
    """A model in float64, its data, and the matrices by their definitions."""

    def __init__(self, name: str = "mlp", loss: str = "cross_entropy", reduction: str = "mean") -> None:
        make, shape = MODELS[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = make().double()
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64)
        self.target = {
            "cross_entropy": torch.tensor([0, 1, 2, -100, 1, 0, 2, 2, 0, 1, -100]),
            "mse": torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64),
            "poisson": torch.randint(5, (ROWS, CLASSES), generator=generator).double(),
        }[loss]
        self.loss, self.reduction = loss, reduction
        self.elements = int((self.target != -100).sum())
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.point = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        self.p = sum(p.numel() for p in self.point.values())
        self.V = torch.randn(self.p, 3, generator=generator, dtype=torch.float64)

    def batches(self, *sizes: int) -> list[tuple[Tensor, Tensor]]:
        """The rows in batches of these sizes."""
        return list(zip(self.inputs.split(sizes), self.target.split(sizes), strict=True))

    def operator(self, kind: Any, data: Any = None, /, **options: Any) -> Any:
        data = self.batches(4, 4, 3) if data is None else data
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*eval mode", UserWarning)
            return kind(self.model, data, self.loss, reduction=self.reduction, progress=False, **options)

    def outputs(self, vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in self.point.values()])
        values = {name: part.reshape(p.shape) for (name, p), part in zip(self.point.items(), parts, strict=True)}
        return functional_call(self.model, values, (self.inputs,))

    def summed_loss(self, outputs: Tensor) -> Tensor:
        """As torch has it."""
        if self.loss == "mse":
            return (outputs - self.target).square().sum()
        if self.loss == "poisson":
            return (outputs.exp() - self.target * outputs).sum()
        return F.cross_entropy(outputs, self.target, ignore_index=-100, reduction="sum")

    def vector(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.point.values()])

    def dense(self, kind: Any) -> Tensor:
        """The whole matrix."""
        modes = self.model.training
        self.model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                matrix = self._dense(kind)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
            self.model.train(modes)
        return matrix / self.elements if self.reduction == "mean" else matrix

    def _dense(self, kind: Any) -> Tensor:
        vector = self.vector()
        if kind is HessianOperator:
            # Row by row, since vmap over the backward pass of layer_norm's backward pass is wrong in torch 2.13.
            return torch.autograd.functional.hessian(lambda v: self.summed_loss(self.outputs(v)), vector)
        J = jacrev(self.outputs)(vector).reshape(-1, self.p)
        z = self.outputs(vector).detach()
        if kind is GaussNewtonOperator:
            H = hessian(lambda flat: self.summed_loss(flat.reshape(z.shape)))(z.reshape(-1))
            return J.mT @ H @ J
        return J.mT @ self._expected_outer_products(z) @ J

    def _expected_outer_products(self, z: Tensor) -> Tensor:
        """E of (∂ℓ/∂z)(∂ℓ/∂z)ᵀ under the model's distribution, summed over y for classes, known moments elsewhere."""
        if self.loss == "mse":
            return 4 * 0.5 * torch.eye(z.numel(), dtype=z.dtype)
        if self.loss == "poisson":
            return torch.diag(z.exp().reshape(-1))
        blocks = []
        for row, target in zip(torch.softmax(z, 1), self.target, strict=True):
            slopes = row - torch.eye(CLASSES, dtype=z.dtype)
            blocks.append((row[:, None, None] * slopes[:, :, None] * slopes[:, None, :]).sum(0) * (target != -100))
        return torch.block_diag(*blocks)


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


@pytest.mark.parametrize("loss", LOSSES)
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


# ---------------------------------------------------------------------------------------------------------------- solve


@pytest.mark.parametrize("preconditioner", [None, "diagonal", "function"])
def test_solve_is_the_dense_solve(preconditioner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestep.curvature._solve.MOST_DENSE", 0)
    setting = Setting("encoder")
    A, op = setting.dense(GaussNewtonOperator), setting.operator(GaussNewtonOperator)
    damped = A + 0.05 * torch.eye(setting.p, dtype=A.dtype)
    if preconditioner == "function":
        L = torch.linalg.cholesky(damped)
        preconditioner = lambda r: torch.cholesky_solve(r.reshape(len(r), -1), L).reshape(r.shape)  # noqa: E731
    for b in (setting.V[:, 0], setting.V * torch.tensor([1.0, 0.0, 1e-6])):
        x, report = op.solve(b, 0.05, tolerance=1e-10, preconditioner=preconditioner)
        assert x.shape == b.shape
        torch.testing.assert_close(x, torch.linalg.solve(damped, b), rtol=1e-6, atol=1e-8 * b.abs().max().item())
        residual = (b - damped @ x).norm(dim=0) / b.norm(dim=0).clamp_min(1e-300)
        assert report.relative_residual == pytest.approx(residual.max().item(), rel=1e-3)
        assert report.converged and not report.negative_curvature
        assert 0 < report.iterations <= (2 if callable(preconditioner) else 150)
        assert report.method == "conjugate_gradients"


def test_solve_of_nothing_is_nothing() -> None:
    setting = Setting()
    x, report = setting.operator(GaussNewtonOperator).solve(torch.zeros(setting.p).double(), 0.1)
    assert not x.any()
    assert (report.converged, report.iterations, report.relative_residual) == (True, 0, 0.0)


def test_solve_takes_and_gives_dicts() -> None:
    setting = Setting()
    op = setting.operator(GaussNewtonOperator)
    b = {name: torch.ones_like(p) for name, p in setting.point.items()}
    x, _ = op.solve(b, 0.1)
    flat, _ = op.solve(torch.ones(setting.p).double(), 0.1)
    assert torch.equal(torch.cat([x[name].reshape(-1) for name in setting.names]), flat)


def test_solve_reports_what_it_did_not_reach() -> None:
    setting = Setting()
    A, op = setting.dense(GaussNewtonOperator), setting.operator(GaussNewtonOperator)
    b = setting.V[:, 0]
    with pytest.warns(UserWarning, match="1 of 1 right-hand sides ended above tolerance") as caught:
        x, report = op.solve(b, 1e-3, tolerance=1e-12, max_iterations=2)
    assert caught[0].filename == __file__
    assert (report.converged, report.iterations) == (False, 2)
    residual = b - A @ x - 1e-3 * x
    assert report.relative_residual == pytest.approx((residual.norm() / b.norm()).item(), rel=1e-6)
    # Less than rounding allows.
    single = setting.model.float()
    op = GaussNewtonOperator(single, (setting.inputs.float(), setting.target), "cross_entropy", progress=False)
    with pytest.warns(UserWarning, match="above tolerance"):
        x, report = op.solve(b.float(), 1e-3, tolerance=1e-12)
    assert not report.converged and report.relative_residual < 1e-3 and report.iterations < 250


@pytest.mark.parametrize("dense", [True, False])
def test_indefinite_systems_raise_or_are_solved_by_minres(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr("onestep.curvature._solve.MOST_DENSE", 0)
    setting = Setting()
    op, H = setting.operator(HessianOperator), setting.dense(HessianOperator)
    least = torch.linalg.eigvalsh(H)[0].item()
    assert least < -0.01
    # An eigenvalue of -0.0005, as close to 0 as in issue 15.16.
    damping = -least - 0.0005
    with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite.*indefinite='minres'"):
        op.solve(setting.V, damping)
    x, report = op.solve(setting.V, damping, tolerance=1e-9, indefinite="minres")
    expected = torch.linalg.solve(H + damping * torch.eye(setting.p, dtype=H.dtype), setting.V)
    assert report.converged and report.negative_curvature and len(report.relative_residuals) == 3
    assert report.method == ("dense" if dense else "minres")
    assert (x - expected).norm() < 1e-4 * expected.norm()
    x, report = op.solve(setting.V[:, 0], 2.0)
    assert report.converged and not report.negative_curvature


def test_solve_reports_each_right_hand_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestep.curvature._solve.MOST_DENSE", 0)
    setting = Setting()
    A, op = setting.dense(GaussNewtonOperator), setting.operator(GaussNewtonOperator)
    easy = torch.linalg.eigh(A).eigenvectors[:, -1]
    with pytest.warns(UserWarning, match="1 of 2 right-hand sides"):
        _, report = op.solve(torch.stack([easy, setting.V[:, 0]], 1), 1e-3, max_iterations=2)
    assert report.relative_residuals[0] < 1e-5 < report.relative_residuals[1] == report.relative_residual
    assert report.negative_curvatures == (False, False) and not report.converged


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e20])
def test_solve_does_not_depend_on_the_size_of_the_right_hand_side(
    size: float, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 15.9: in float32, b of 1e-25 or 1e20 gave x = 0, converged."""
    if not dense:
        monkeypatch.setattr("onestep.curvature._solve.MOST_DENSE", 0)
    setting = Setting()
    A, b = setting.dense(GaussNewtonOperator), setting.V[:, 0]
    op = GaussNewtonOperator(
        setting.model.float(), (setting.inputs.float(), setting.target), "cross_entropy", progress=False
    )
    x, report = op.solve(b.float() * size, 0.1)
    expected = torch.linalg.solve(A + 0.1 * torch.eye(setting.p, dtype=A.dtype), b)
    assert report.converged and (x.double() / size - expected).norm() < 1e-4 * expected.norm()


def test_blocks_in_the_form_of_vmap_are_refused_with_the_right_shape() -> None:
    setting = Setting()
    op = setting.operator(GaussNewtonOperator)
    first = {name: torch.ones(20, *p.shape, dtype=p.dtype) for name, p in setting.point.items()}
    with pytest.raises(ValueError, match=r"has shape \(20, .*expected \(.*20\).*movedim\(0, -1\)"):
        op @ first
    last = {name: part.movedim(0, -1) for name, part in first.items()}
    assert (op @ last)[setting.names[0]].shape == last[setting.names[0]].shape


def test_small_matrices_have_an_exact_diagonal_and_trace() -> None:
    setting = Setting()
    A, op = setting.dense(GaussNewtonOperator), setting.operator(GaussNewtonOperator)
    diagonal, trace = op.diagonal(), op.trace()
    torch.testing.assert_close(diagonal.value, A.diagonal(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trace.value, A.trace(), rtol=1e-9, atol=1e-12)
    assert (diagonal.value >= 0).all() and not diagonal.standard_error.any() and trace.samples == 0


def bent(outputs: Tensor, target: Tensor) -> Tensor:
    """Not convex in the outputs."""
    return (outputs.sin() * (target + 1.0).unsqueeze(1)).mean()


@pytest.mark.parametrize(
    ("kind", "loss", "options"),
    [
        (GaussNewtonOperator, "cross_entropy", {}),
        (GaussNewtonOperator, "poisson", {}),
        (FisherOperator, "mse", {"mc_samples": 2}),
        (FisherOperator, "cross_entropy", {"kind": "empirical"}),
        (GaussNewtonOperator, bent, {"chunk_size": 2}),
    ],
)
def test_diagonals_of_larger_matrices_are_exact_by_rows(
    monkeypatch: pytest.MonkeyPatch, kind: Any, loss: Any, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("onestep.curvature._operator.MOST_DENSE", 0)
    setting = Setting("mlp", loss if isinstance(loss, str) else "cross_entropy")
    setting.loss = loss
    op = setting.operator(kind, **options)
    diagonal = op.diagonal()
    expected = (op @ torch.eye(setting.p, dtype=torch.float64)).diagonal()
    torch.testing.assert_close(diagonal.value, expected, rtol=1e-9, atol=1e-14)
    assert diagonal.samples == 0 and not diagonal.standard_error.any()
    assert bool((diagonal.value < 0).any()) == (loss is bent)
    # Where the outputs of a row are many, rows are not cheap.
    monkeypatch.setattr("onestep.curvature.operators._MOST_OUTPUTS", CLASSES - 1)
    estimate = op.diagonal()
    assert estimate.samples == 64
    if loss is not bent:
        assert (estimate.value >= 0).all()
        assert ((estimate.value - expected).abs() <= 5 * estimate.standard_error + 1e-14).all()


def test_a_newton_step_lowers_the_loss() -> None:
    setting = Setting()
    op = setting.operator(GaussNewtonOperator)
    before, gradient = op.loss_and_gradient()
    step, _ = op.solve(-gradient, 1e-2)
    torch.nn.utils.vector_to_parameters(setting.vector() + step, setting.model.parameters())
    assert op.loss_and_gradient()[0] < before


# ---------------------------------------------------------------------------------------------------------------- scipy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy_finds_the_eigenvalues(dtype: torch.dtype) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    setting = Setting()
    values = torch.linalg.eigvalsh(setting.dense(HessianOperator))
    setting.model.to(dtype)
    op = HessianOperator(setting.model, (setting.inputs.to(dtype), setting.target), "cross_entropy", progress=False)
    found = linalg.eigsh(op.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    assert found.dtype == (torch.empty(0, dtype=dtype).numpy().dtype)
    torch.testing.assert_close(torch.tensor(sorted(found)).double(), values[-3:], rtol=1e-4, atol=1e-5)
    matrix = op.to_scipy() @ setting.V.to(dtype).numpy()
    torch.testing.assert_close(torch.tensor(matrix), op @ setting.V.to(dtype))


def test_without_scipy_an_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
        return real(name, *args, **kwargs)

    op = Setting().operator(HessianOperator)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"needs scipy.*pip install scipy"):
        op.to_scipy()


# --------------------------------------------------------------------------------------------------- modes and progress


def test_the_model_is_in_eval_mode_and_put_back() -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop, self.modes = nn.Linear(4, CLASSES), nn.Dropout(0.5), set()

        def forward(self, x: Tensor) -> Tensor:
            self.modes.add((self.training, self.drop.training))
            return self.drop(self.layer(x))

    model = Watching().double()
    model.layer.eval()
    setting = Setting()
    with pytest.warns(UserWarning, match="HessianOperator evaluates the model in eval mode: Dropout") as caught:
        op = HessianOperator(model, setting.batches(5, 6), "cross_entropy")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="FisherOperator evaluates") as caught:
        FisherOperator(model, setting.batches(5, 6), "cross_entropy")
    assert caught[0].filename == __file__
    op @ torch.ones(op.shape[0]).double()
    op.loss_and_gradient()
    assert model.modes == {(False, False)}
    assert (model.training, model.drop.training, model.layer.training) == (True, True, False)
    model.forward = lambda x: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        op @ torch.ones(op.shape[0]).double()
    assert (model.training, model.drop.training, model.layer.training) == (True, True, False)


def test_no_gradients_and_no_settings_are_left_behind() -> None:
    setting = Setting("attention")
    op = setting.operator(HessianOperator)
    op @ setting.V
    op.loss_and_gradient()
    assert all(p.grad is None and p.requires_grad for p in setting.model.parameters())
    assert torch.is_grad_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_a_long_pass_shows_a_bar_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm.auto")
    bars = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.options, self.count, self.closed = options, 0, False
            bars.append(self)

        def set_postfix(self, *args: Any, **kwargs: Any) -> None:
            pass

        def update(self, steps: int) -> None:
            self.count += steps

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    setting = Setting()
    loader = DataLoader(TensorDataset(setting.inputs, setting.target), batch_size=4)
    op = GaussNewtonOperator(setting.model, loader, "cross_entropy")
    op @ setting.V
    (bar,) = bars
    assert bar.options["total"] == bar.count == ROWS and bar.closed
    assert bar.options["delay"] > 0 and not bar.options["leave"] and bar.options["desc"] == "GaussNewtonOperator @ 3"
    setting.operator(HessianOperator) @ setting.V
    assert len(bars) == 1


def test_without_tqdm_a_warning_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    setting = Setting()
    with pytest.warns(UserWarning, match=r"needs tqdm.*pip install 'onestep\[fit\]'"):
        op = HessianOperator(setting.model, (setting.inputs, setting.target), "cross_entropy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op @ setting.V


# --------------------------------------------------------------------------------------------------------------- errors


class Shuffling:
    """The rows in another order each time."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.random = setting, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(ROWS, generator=self.random)
        return iter([(self.setting.inputs[rows], self.setting.target[rows]) for rows in order.split(4)])


class Shrinking(Shuffling):
    """Fewer batches each time."""

    def __iter__(self) -> Iterator[Any]:
        self.batches = getattr(self, "batches", self.setting.batches(2, 2, 2, 2, 2, 1))[:-1]
        return iter(self.batches)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))


@pytest.mark.parametrize("case", [Shuffling, Shrinking, Noisy])
def test_data_or_a_model_that_changes_is_refused(case: Any) -> None:
    setting = Setting()
    data: Any = setting.batches(4, 7) if case is Noisy else case(setting)
    model = Noisy().double() if case is Noisy else setting.model
    with pytest.raises(ValueError, match=r"data: .*shuffle=False"):
        HessianOperator(model, data, "cross_entropy")
    HessianOperator(model, data, "cross_entropy", check_deterministic=False)


def test_a_pass_that_drops_other_rows_each_time_is_refused() -> None:
    setting = Setting()
    loader = DataLoader(TensorDataset(setting.inputs, setting.target), batch_size=4, shuffle=True, drop_last=True)
    with pytest.raises(ValueError, match="drop_last=True and shuffle=True"):
        HessianOperator(setting.model, loader, "cross_entropy")


def test_data_that_is_not_finite_is_named() -> None:
    setting = Setting()
    setting.inputs[6, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="batch 1: its inputs hold NaN or infinity, first in row 2 of 4"):
        setting.operator(HessianOperator)
    for kind in OPERATORS:
        op = setting.operator(kind, check_deterministic=False)
        for V in (setting.V, setting.V[:, 0]):
            with pytest.raises(NonFiniteError, match="batch 1: its inputs hold NaN or infinity, first in row 2 of 4"):
                op @ V


def test_a_product_that_is_not_finite_is_named() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sqrt()

    x = torch.tensor([[1.0], [2.0], [0.0], [3.0]], dtype=torch.float64)
    op = HessianOperator(Root(), list(zip(x.split(1), x.split(1), strict=True)))
    with pytest.raises(NonFiniteError, match="batch 2: the product is NaN or infinite although its data is finite"):
        op @ torch.ones(1, dtype=torch.float64)


def test_targets_that_are_all_ignored_leave_nothing() -> None:
    setting = Setting()
    setting.target[:] = -100
    with pytest.raises(ValueError, match="every target of the data is ignored"):
        setting.operator(HessianOperator) @ setting.V


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": "mlp"}, TypeError, "model is str"),
        ({"loss": "hinge"}, ValueError, "loss='hinge'; expected one of .*'mse', 'cross_entropy', 'poisson', 'bce'"),
        ({"loss": "model"}, ValueError, "loss='model'; expected one of 'mse'"),
        ({"loss": 3}, TypeError, "loss is int"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, ValueError, "CrossEntropyLoss with reduction='sum'"),
        ({"data": 3}, TypeError, "data is int"),
        ({"data": []}, ValueError, "data holds no batches"),
        (
            {"data": (torch.zeros(0, 3), torch.tensor(1.0))},
            ValueError,
            r"data holds a tensor of shape \(\), which has no",
        ),
        ({"data": (torch.zeros(4, 3), torch.zeros(5, 1))}, ValueError, r"data holds tensors of \[4, 5\] rows"),
        ({"reduction": "none"}, ValueError, "reduction='none'; expected 'mean' or 'sum'"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0; expected at least 1"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size is float; expected an integer"),
        ({"kind": "exact"}, ValueError, "kind='exact'; expected 'true' or 'empirical'"),
        ({"mc_samples": 0}, ValueError, "mc_samples=0; expected at least 1"),
        ({"mc_samples": 2, "kind": "empirical"}, ValueError, "mc_samples=2 with kind='empirical'"),
        ({"loss": functional_mse}, ValueError, "kind='true' needs the distribution behind the loss"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    setting = Setting()
    arguments = {"model": setting.model, "loss": "cross_entropy", "data": setting.batches(4, 7)} | changed
    with pytest.raises(error, match=message):
        FisherOperator(**arguments)


def test_parameters_must_be_trainable() -> None:
    setting = Setting()
    setting.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter has requires_grad=True"):
        setting.operator(HessianOperator)


def test_vectors_that_do_not_fit_are_named() -> None:
    setting = Setting()
    op, p = setting.operator(HessianOperator), setting.p
    for v, error, message in [
        (torch.zeros(p + 1).double(), ValueError, rf"v has shape \({p + 1},\); expected \({p},\) or \({p}, k\)"),
        (torch.zeros(1, 1, p).double(), ValueError, r"v has shape \(1, 1, "),
        (torch.zeros(p), ValueError, "v is torch.float32 on cpu; expected torch.float64 on cpu"),
        (torch.full((p,), torch.nan).double(), ValueError, "v holds NaN or infinity"),
        ([1.0] * p, TypeError, "v is list; expected a tensor or a dict of tensors"),
        ({"a": torch.zeros(1)}, ValueError, "different names: 0.bias, 0.weight, 2.bias, 2.weight, a"),
    ]:
        with pytest.raises(error, match=message):
            op @ v
    named = {name: torch.zeros_like(value) for name, value in setting.point.items()}
    for changed, error, message in [
        ({"0.bias": torch.zeros(6).double()}, ValueError, r"v\['0.bias'\] has shape \(6,\); expected \(5,\) or"),
        ({"0.bias": torch.zeros(5)}, ValueError, r"v\['0.bias'\] is torch.float32"),
        ({"0.bias": 1.0}, TypeError, r"v\['0.bias'\] is float"),
        ({"0.weight": torch.zeros(5, 4, 2).double()}, ValueError, r"'0.bias'\] has shape \(5,\); expected \(5, 2\)"),
    ]:
        with pytest.raises(error, match=message):
            op @ (named | changed)


def test_bad_arguments_of_methods_are_named() -> None:
    setting = Setting()
    op, b = setting.operator(GaussNewtonOperator), setting.V[:, 0]
    for options, error, message in [
        ({"damping": -1.0}, ValueError, "damping=-1.0; expected a finite number >= 0"),
        ({"damping": float("nan")}, ValueError, "damping=nan"),
        ({"tolerance": 0.0}, ValueError, "tolerance=0.0; expected a number between 0 and 1"),
        ({"max_iterations": 0}, ValueError, "max_iterations=0; expected at least 1"),
        ({"max_iterations": 1.5}, TypeError, "max_iterations is float"),
        (
            {"preconditioner": "jacobi"},
            TypeError,
            "preconditioner is 'jacobi'; expected None, 'diagonal'",
        ),
        ({"preconditioner": lambda r: r[:2]}, ValueError, r"preconditioner returned shape \(2,\)"),
        ({"preconditioner": lambda r: -r}, ValueError, "preconditioner .* expected positive definite"),
    ]:
        with pytest.raises(error, match=message):
            op.solve(b, **({"damping": 0.1} | options))
    with pytest.raises(ValueError, match=r"b has shape \(2,\)"):
        op.solve(torch.zeros(2).double(), 0.1)
    for method in (op.trace, op.diagonal):
        with pytest.raises(ValueError, match="samples=1; expected at least 2"):
            method(1)
        with pytest.raises(TypeError, match="samples is float"):
            method(2.0)
        with pytest.raises(TypeError, match=r"generator is int; expected a torch\.Generator"):
            method(2, generator=3)


# ------------------------------------------------------------------------------------------------------------ processes

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
sys.path.insert(0, {tests!r})
from test_operators import OPERATORS, Setting
from onestep.optim import NonFiniteError

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=2)
setting, results = Setting(), []
# One row more than two processes share evenly would be repeated by the sampler.
setting.inputs, setting.target = setting.inputs[:10], setting.target[:10]
rows = TensorDataset(setting.inputs, setting.target)
sharded = DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows, shuffle=False))
for kind in OPERATORS:
    for data in ((setting.inputs, setting.target), [part for part in DataLoader(rows, batch_size=3)], sharded):
        op = setting.operator(kind, data)
        results.append(op @ setting.V)
    results.append(op.solve(setting.V, 1.0, tolerance=1e-12)[0])
    results += [op.trace(8).value, op.loss_and_gradient()[1]]
try:
    op @ (setting.V + rank)
except ValueError as error:
    results.append(str(error))
setting.inputs[9, 0] = torch.nan
try:
    setting.operator(kind, (setting.inputs, setting.target))
except NonFiniteError as error:
    results.append(str(error))
torch.save(results, {out!r} + str(rank))
"""


def test_two_processes_multiply_as_one_does(tmp_path: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), store=str(tmp_path / "store"), out=str(tmp_path / "out"))
    for process in finish_all([Child(script, rank) for rank in range(2)]):
        assert process.returncode == 0, process.errors
    first, second = (torch.load(tmp_path / f"out{rank}") for rank in range(2))
    *first, unequal, nan_seen = first
    *second, unequal_there, nan_there = second
    assert unequal == unequal_there == "v differs between processes; expected the same vectors in all"
    assert "process 1 of 2 failed" in nan_seen and "its inputs hold NaN" in nan_there
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    setting = Setting()
    setting.inputs, setting.target = setting.inputs[:10], setting.target[:10]
    expected = []
    for kind in OPERATORS:
        op = setting.operator(kind, (setting.inputs, setting.target))
        expected += [op @ setting.V] * 3
        expected.append(op.solve(setting.V, 1.0, tolerance=1e-12)[0])
        expected += [op.trace(8).value, op.loss_and_gradient()[1]]
    for ours, alone in zip(first, expected, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-11)


def test_thread_counts_agree(restore_threads: None) -> None:
    setting = Setting()
    op = setting.operator(HessianOperator)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(op @ setting.V)
    assert torch.equal(*results)
