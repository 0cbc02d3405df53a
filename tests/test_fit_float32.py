"""onestep.fit in float32: converged=True holds of the loss computed in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nist import FILIP_X, FILIP_Y
from sklearn.datasets import load_iris
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import onestep
from onestep.curvature import Laplace
from onestep.optim.decrement import newton_decrement

# At a minimum the loss can be lowered by 1.2e-6 of itself; half a rounding of each parameter changes it about as much.
_CLOSE = 5e-6


def pairs(seed: int, k: int, n: int, loss: str) -> tuple[Tensor, Tensor]:
    """Rows [B, B + 1e-5 N], whose targets depend on B, and noise."""
    generator = torch.Generator().manual_seed(seed)
    B, N = torch.randn(n, k, generator=generator), torch.randn(n, k, generator=generator)
    score = B @ torch.randn(k, 1, generator=generator) * 0.5
    noise = torch.randn(n, 1, generator=generator)
    y = score + 0.5 * noise if loss == "mse" else (torch.rand(n, 1, generator=generator) < score.sigmoid()).float()
    return torch.cat([B, B + 1e-5 * N], 1), y


def minimum(X: Tensor, y: Tensor, loss: str) -> float:
    """By QR in float64: least squares, or Newton's method on orthonormal columns."""
    Q = torch.linalg.qr(torch.cat([X, X.new_ones(len(X), 1)], 1).double()).Q
    y = y.double()
    if loss == "mse":
        return mse_loss(Q @ (Q.mT @ y), y).item()
    w = Q.new_zeros(Q.shape[1], 1)
    for _ in range(30):
        p = (Q @ w).sigmoid()
        w = w - torch.linalg.solve(Q.mT @ (Q * p * (1 - p)), Q.mT @ (p - y))
    return binary_cross_entropy_with_logits(Q @ w, y).item()


def in_double(model: nn.Module, X: Tensor, y: Tensor, loss: str) -> float:
    """The loss of a model's parameters, computed in float64."""
    with torch.no_grad():
        outputs = copy.deepcopy(model).double()(X.double())
    measure = mse_loss if loss == "mse" else binary_cross_entropy_with_logits
    return measure(outputs, y.double()).item()


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("method", ["newton_cg", "gauss_newton"])
def test_pairs_of_nearly_equal_columns(method: str, loss: str) -> None:
    """Of the gradient along their differences float32 has no digit, though up to 2 % of the loss hang on it."""
    converged = 0
    for seed in range(3):
        for k in (1, 4):
            X, y = pairs(seed, k, 200, loss)
            torch.manual_seed(seed)
            model = nn.Linear(2 * k, 1)
            result = onestep.fit(model, (X, y), loss, method=method, max_steps=60, progress=False)
            least, reached = minimum(X, y, loss), in_double(model, X, y, loss)
            assert least * (1 - 1e-9) <= reached
            assert reached <= (1 + _CLOSE) * least or not result.converged, (seed, k, reached / least - 1, result)
            # What is not a minimum is not far from one, either.
            assert reached <= (1 + 1e-3) * least, (seed, k, reached / least - 1, result)
            converged += result.converged
    # It is known of some.
    assert converged >= 2


@pytest.mark.parametrize(("method", "loss"), [("newton_cg", "mse"), ("gauss_newton", "mse"), ("gauss_newton", "bce")])
def test_pairs_among_more_parameters_than_a_matrix_is_formed_of(method: str, loss: str) -> None:
    X, y = pairs(0, 70, 1000, loss)
    torch.manual_seed(0)
    model = nn.Linear(140, 1)
    result = onestep.fit(model, (X, y), loss, method=method, max_steps=60, progress=False)
    reached = in_double(model, X, y, loss) / minimum(X, y, loss) - 1
    assert reached <= _CLOSE or not result.converged, (reached, result)


@pytest.mark.parametrize("d", [5, 200])
def test_a_minimum_that_float32_can_tell_stays_one(d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1000, d, generator=generator)
    y = (torch.rand(1000, 1, generator=generator) < (X[:, :1]).sigmoid()).float()
    model = nn.Linear(d, 1)
    result = onestep.fit(model, (X, y), "bce", method="newton_cg", progress=False)
    assert result.converged, result
    assert in_double(model, X, y, "bce") <= (1 + _CLOSE) * minimum(X, y, "bce")


class Narrow(nn.Module):
    """A linear layer that runs in float32 whatever it is given."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.layer.weight.float(), self.layer.bias.float())


@pytest.mark.parametrize("method", ["newton_cg", "gauss_newton"])
def test_what_cannot_be_known_is_said(method: str) -> None:
    X, y = pairs(0, 2, 200, "bce")
    torch.manual_seed(0)
    result = onestep.fit(Narrow(4), (X, y), "bce", method=method, progress=False)
    assert not result.converged
    assert "does not run in float64 (its outputs are torch.float32 there)" in result.reason, result
    # Where no direction is lost in rounding, float32 tells enough.
    result = onestep.fit(Narrow(2), (X[:, :2], y), "bce", method=method, progress=False)
    assert result.converged, result


def test_the_users_model_is_left_as_it_is() -> None:
    X, y = pairs(1, 2, 200, "mse")
    model = nn.Linear(4, 1)
    kept = dict(model.named_parameters())
    onestep.fit(model, (X, y), "mse", method="gauss_newton", progress=False)
    assert all(parameter is kept[name] and parameter.dtype == torch.float32 for name, parameter in kept.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("least", "certain"), [(1e-2, True), (1e-7, False)])
def test_a_decrement_is_certain_if_no_eigenvalue_is_rounding(least: float, certain: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    A = (Q * torch.tensor([1.0, 1, 1, 1, 1, least], dtype=torch.float64)) @ Q.mT
    g = Q[:, 0] * 1e-4

    def found(dtype: torch.dtype) -> Any:
        return newton_decrement(A.to(dtype).mv, g.to(dtype), None, 1.0)

    assert found(torch.float32).certain is certain
    assert found(torch.float64).certain
    assert found(torch.float64).value == pytest.approx(0.5e-8)
    assert found(torch.float64).step == pytest.approx(-torch.linalg.solve(A, g), rel=1e-6)


def test_a_last_step_that_was_large_does_not_say_that_the_loss_falls_for_ever() -> None:
    """After it no step lowers the loss, which is no second and third step that moves the outputs."""
    for seed in range(19, 24):
        X, y = pairs(seed, 2, 200, "bce")
        torch.manual_seed(seed)
        result = onestep.fit(Narrow(2), (X[:, :2], y), "bce", method="newton_cg", progress=False)
        assert result.converged, (seed, result)


class Autocast(nn.Module):
    """A network under autocast, whose outputs are bfloat16."""

    def __init__(self, outputs: int, *, hidden: bool, enabled: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs)] if hidden else [nn.Linear(3, outputs)]
        self.layers, self.enabled = nn.Sequential(*layers), enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.layers(x)


def _noisy(loss: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(200, 3, generator=generator)
    score = X.sum(1, keepdim=True).sin() + 0.3 * torch.randn(200, 1, generator=generator)
    return X, score if loss == "mse" else (score[:, 0] > 0).long() if loss == "cross_entropy" else (score > 0).float()


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce", "poisson"])
def test_outputs_of_16_bits_are_widened(loss: str) -> None:
    """By every method and operator alike: Levenberg-Marquardt and Laplace had no eigenvalues of bfloat16."""
    X, y = _noisy(loss)
    k = 2 if loss == "cross_entropy" else 1
    reached = []
    for method, enabled in (("levenberg_marquardt", True), ("auto", True), ("levenberg_marquardt", False)):
        model = Autocast(k, hidden=True, enabled=enabled)
        assert (model(X).dtype == torch.bfloat16) is enabled
        result = onestep.fit(model, (X, y), loss, method=method, weight_decay=1e-2, max_steps=8, progress=False)
        assert result.method == "levenberg_marquardt"
        reached.append(result.loss)
    # The outputs' rounding is 4e-3 of them.
    assert max(reached[:2]) <= 1.03 * reached[2], reached
    found = []
    for enabled in (True, False):
        model = Autocast(k, hidden=True, enabled=enabled)
        posterior = Laplace(model, (X, y), loss, parameters="all", prior_precision=1.0)
        assert posterior.covariance().dtype == torch.float64
        found.append(torch.linalg.inv(posterior.covariance()))
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("method", ["levenberg_marquardt", "newton_cg", "gauss_newton", "gradient_descent"])
def test_a_minimum_of_outputs_of_16_bits(method: str, loss: str) -> None:
    X, y = _noisy(loss)
    model = Autocast(1, hidden=False)
    result = onestep.fit(model, (X, y), loss, method=method, progress=False)
    # Of float64 autocast makes no less.
    reached = in_double(model, X, y, loss) / minimum(X, y, loss) - 1
    assert reached <= (_CLOSE if result.converged else 1e-2), (reached, result)


@pytest.mark.parametrize("method", ["newton_cg", "gauss_newton", "levenberg_marquardt", "auto"])
def test_a_separable_class_is_named_in_float32(method: str) -> None:
    """One class of iris can be told from the others by a plane: every method says so, as in float64."""
    iris = load_iris()
    X, y = torch.tensor(iris.data, dtype=torch.float32), torch.tensor(iris.target)
    for seed in range(3):
        torch.manual_seed(seed)
        result = onestep.fit(nn.Linear(4, 3), (X, y), "cross_entropy", method=method, progress=False)
        assert not result.converged
        assert "planes separate" in result.reason and "has no minimum" in result.reason, (seed, result)


def year_and_income(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    year = torch.randint(1950, 2020, (200,), generator=generator).double()
    income = (3e5 + 1e5 * torch.randn(200, generator=generator)).double()
    chance = torch.sigmoid(0.05 * (year - 1985) + 1e-5 * (income - 3e5))
    y = (torch.rand(200, generator=generator, dtype=torch.float64) < chance).long()
    return torch.stack([year, income], 1), y


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["gauss_newton", "newton_cg"])
def test_large_parameters_that_cancel_do_not_say_that_the_loss_falls_for_ever(method: str, seed: int) -> None:
    """A slope that both classes share grows by rounding alone; it then costs the digits that tell of the minimum."""
    X, y = year_and_income(seed)
    scaled = (X - X.mean(0)) / X.std(0)
    exact = nn.Linear(2, 2, dtype=torch.float64)
    least = onestep.fit(exact, (scaled, y), "cross_entropy", method="newton_cg", progress=False).loss
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    result = onestep.fit(model, (X.float(), y), "cross_entropy", method=method, progress=False)
    assert "for ever" not in result.reason
    own = cross_entropy(copy.deepcopy(model).double()(X.float().double()), y).item()
    assert own < (1 + (1e-4 if result.converged else 1e-2)) * least
    if method == "gauss_newton":
        assert result.converged


@pytest.mark.parametrize("seed", range(3))
def test_rounding_that_moves_the_loss_by_its_own_size_is_no_minimum(seed: int) -> None:
    """NIST Filip in float32, from 0.84 and 1e-3 too, where rounding the parameters changes the loss by as much."""
    x = torch.tensor(FILIP_X, dtype=torch.float64)
    X, y = (x[:, None] ** torch.arange(11)).float(), torch.tensor(FILIP_Y)[:, None]
    Q = torch.linalg.qr(X.double() / X.double().norm(dim=0)).Q
    least = mse_loss(Q @ (Q.mT @ y.double()), y.double()).item()
    torch.manual_seed(seed)
    model = nn.Linear(11, 1, bias=False)
    result = onestep.fit(model, (X, y), method="levenberg_marquardt", progress=False, max_steps=200)
    own = (X.double() @ model.weight.double().mT - y.double()).square().mean().item()
    assert not result.converged or own < 1.01 * least


@pytest.mark.parametrize(
    ("method", "loss", "dtype"),
    [
        ("newton_cg", "cross_entropy", torch.float32),
        ("newton_cg", "cross_entropy", torch.float64),
        ("newton_cg", "bce", torch.float32),
        ("gauss_newton", "cross_entropy", torch.float32),
        ("levenberg_marquardt", "cross_entropy", torch.float32),
        ("levenberg_marquardt", "cross_entropy", torch.float64),
    ],
)
def test_years_and_incomes_from_torchs_own_initialisation(method: str, loss: str, dtype: torch.dtype) -> None:
    """Its loss is up to 1e5: the fit starts from zeros, and slopes that classes share do not grow by rounding."""
    for seed in (2, 3, 5, 8):
        X, y = year_and_income(seed)
        scaled = (X - X.mean(0)) / X.std(0)
        exact = nn.Linear(2, 2, dtype=torch.float64)
        least = onestep.fit(exact, (scaled, y), "cross_entropy", method="newton_cg", progress=False).loss
        torch.manual_seed(seed)
        model = nn.Linear(2, 2 if loss == "cross_entropy" else 1, dtype=dtype)
        target = y if loss == "cross_entropy" else y[:, None].to(dtype)
        result = onestep.fit(model, (X.to(dtype), target), loss, method=method, progress=False, max_steps=30)
        assert result.converged, (seed, result)
        assert "from zeros, since the loss is" in result.choice
        if (method, loss) == ("newton_cg", "cross_entropy"):
            # With a preconditioner that minds the columns' scales: 13 to 23, else 30 to 60.
            assert sum(record.cg_iterations for record in result.history) <= 25
        scores = copy.deepcopy(model).double()(X.to(dtype).double())
        own = cross_entropy(scores if loss == "cross_entropy" else torch.cat((-scores / 2, scores / 2), 1), y).item()
        assert own == pytest.approx(least, rel=1e-5 if dtype == torch.float32 else 1e-10), (seed, result)


def test_a_start_that_is_not_far_above_zeros_is_kept() -> None:
    X, y = year_and_income(0)
    scaled = ((X - X.mean(0)) / X.std(0)).float()
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    start = model.weight.detach().clone()
    result = onestep.fit(model, (scaled, y), "cross_entropy", method="newton_cg", progress=False, max_steps=1)
    assert "zeros" not in result.choice
    # A slope that both classes share stays as it was.
    assert torch.allclose(model.weight.detach().sum(0), start.sum(0), atol=1e-6)
    # With weight decay it has a best value, 0.
    result = onestep.fit(model, (scaled, y), "cross_entropy", method="newton_cg", weight_decay=0.1, progress=False)
    assert result.converged
    assert model.weight.detach().sum(0).abs().max() < 1e-4


def test_a_model_that_refuses_zeros_is_fitted_from_its_own_start() -> None:
    class Checked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not bool(self.weight.any()):
                raise ValueError("weight is zero")
            return super().forward(x)

    X, y = year_and_income(0)
    torch.manual_seed(0)
    model = Checked(2, 2, dtype=torch.float64)
    result = onestep.fit(model, (X, y), "cross_entropy", method="newton_cg", progress=False, max_steps=3)
    assert "zeros" not in result.choice
    assert result.loss < result.initial_loss
