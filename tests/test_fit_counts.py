"""fit of counts on columns as they come, at which torch's own initialisation has a loss beyond any number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import PoissonRegressor
from torch import Tensor, nn

import onestep
from onestep.optim import NonFiniteError


@pytest.fixture(scope="module")
def counts() -> tuple[Tensor, Tensor, float]:
    """[year, income], counts, and the least loss, by scikit-learn on standardised columns."""
    draw = np.random.default_rng(0)
    X = np.stack([draw.integers(1950, 2020, 200), 3e4 + 1e4 * draw.normal(size=200)], 1)
    Z = (X - X.mean(0)) / X.std(0)
    y = draw.poisson(np.exp(0.5 * Z[:, 0] - 0.2 * Z[:, 1]))
    right = PoissonRegressor(alpha=0.0, solver="newton-cholesky", tol=1e-12).fit(Z, y)
    scores = Z @ right.coef_ + right.intercept_
    return torch.tensor(X), torch.tensor(y)[:, None], (np.exp(scores) - y * scores).mean()


@pytest.mark.parametrize("method", ["auto", "levenberg_marquardt", "newton_cg", "gauss_newton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_model_of_counts(counts: tuple[Tensor, Tensor, float], method: str, dtype: torch.dtype) -> None:
    X, y, least = counts
    model = nn.Linear(2, 1, dtype=dtype)
    nn.init.constant_(model.weight, 0.5)
    assert not (model(X.to(dtype)).exp() - y * model(X.to(dtype))).mean().isfinite()
    result = onestep.fit(model, (X.to(dtype), y.to(dtype)), "poisson", method=method, progress=False)
    assert result.converged
    assert "from zeros, since the loss overflows" in result.choice
    scores = X @ model.weight.detach().double().mT + model.bias.detach().double()
    assert (scores.exp() - y * scores).mean().item() == pytest.approx(least, rel=1e-6)


def test_networks_and_faulty_data_are_refused_and_left(counts: tuple[Tensor, Tensor, float]) -> None:
    """A network has no such place to start from, and NaN is not the start's fault."""
    X, y, _ = counts
    torch.manual_seed(1)
    faulty = X.clone()
    faulty[3, 0] = torch.nan
    network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    for model, inputs, said in (
        (network, X, "the loss is inf although its data is finite; scale the inputs, start from smaller parameters"),
        (nn.Linear(2, 1).double(), faulty, "its inputs hold NaN or infinity, first in row 3"),
    ):
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(NonFiniteError, match=said):
            onestep.fit(model, (inputs, y.double()), "poisson", progress=False)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
