"""FitResult.covariance against NIST's certified standard deviations, statsmodels and Laplace."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from test_refine import dataset
from torch import Tensor, nn

import onestep
from onestep.curvature import Laplace


class Certified(NamedTuple):
    """A problem of NIST's Statistical Reference Datasets, with its second start."""

    model: Callable[[Tensor, Tensor], Tensor]
    x: list[float]
    y: list[float]
    start: list[float]
    minimum: list[float]
    deviations: list[float]


NIST = {
    "Misra1a": Certified(
        lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
        [77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0],
        [10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78],
        [250.0, 5e-4],
        [2.3894212918e02, 5.5015643181e-04],
        [2.7070075241e00, 7.2668688436e-06],
    ),
    "BoxBOD": Certified(
        lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
        [1, 2, 3, 5, 7, 10],
        [109, 149, 149, 191, 213, 224],
        [100.0, 0.75],
        [2.1380940889e02, 5.4723748542e-01],
        [1.2354515176e01, 1.0455993237e-01],
    ),
    "DanWood": Certified(
        lambda b, x: b[0] * x ** b[1],
        [1.309, 1.471, 1.490, 1.565, 1.611, 1.680],
        [2.138, 3.421, 3.597, 4.340, 4.882, 5.660],
        [0.7, 4.0],
        [7.6886226176e-01, 3.8604055871e00],
        [1.8281973860e-02, 5.1726610913e-02],
    ),
    "Rat42": Certified(
        lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)),
        [9, 14, 21, 28, 42, 57, 63, 70, 79],
        [8.930, 10.800, 18.590, 22.330, 39.350, 56.110, 61.730, 64.620, 67.080],
        [75.0, 2.5, 0.07],
        [7.2462237576e01, 2.6180768402e00, 6.7359200066e-02],
        [1.7340283401e00, 8.8295217536e-02, 3.4465663377e-03],
    ),
    "MGH09": Certified(
        lambda b, x: b[0] * (x**2 + b[1] * x) / (x**2 + b[2] * x + b[3]),
        [4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625],
        [0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246],
        [0.25, 0.39, 0.415, 0.39],
        [1.9280693458e-01, 1.9128232873e-01, 1.2305650693e-01, 1.3606233068e-01],
        [1.1435312227e-02, 1.9633220911e-01, 8.0842031232e-02, 9.0025542308e-02],
    ),
}
LONGLEY_DEVIATIONS = [890420.383607373, 84.9149257747669, 0.334910077722432e-01, 0.488399681651699,
                      0.214274163161675, 0.226073200069370, 455.478499142212]  # fmt: skip


class Curve(nn.Module):
    def __init__(self, problem: Certified) -> None:
        super().__init__()
        self.model, self.b = problem.model, nn.Parameter(torch.tensor(problem.start, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.b, x)


@pytest.mark.parametrize("name", NIST)
def test_nist_certified_standard_deviations(name: str) -> None:
    """To six digits, as the fit has more than six."""
    problem = NIST[name]
    data = torch.tensor(problem.x, dtype=torch.float64), torch.tensor(problem.y, dtype=torch.float64)
    model = Curve(problem)
    result = onestep.fit(model, data, "mse", tol=1e-8, max_steps=200, progress=False)
    torch.testing.assert_close(model.b.detach(), torch.tensor(problem.minimum).double(), rtol=1e-7, atol=0)
    found = result.covariance().diagonal().sqrt()
    expected = torch.tensor(problem.deviations, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_longley() -> None:
    """Its condition of 5e9, squared, would leave fp64 no digit."""
    X, y = dataset("Longley")
    head = nn.Linear(6, 1).double()
    found = onestep.fit(head, (X[:, 1:], y), progress=False).covariance().diagonal().sqrt()
    expected = torch.tensor(LONGLEY_DEVIATIONS, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([found[-1:], found[:-1]]), expected, rtol=1e-6, atol=0)


def rows(columns: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(80, columns, generator=generator, dtype=torch.float64)
    return X, (X.sum(1) + torch.randn(80, generator=generator, dtype=torch.float64)).clamp(-3, 3)


@pytest.mark.parametrize("loss", ["mse", "poisson", "bce", "cross_entropy"])
def test_statsmodels(loss: str) -> None:
    api = pytest.importorskip("statsmodels.api", reason="statsmodels is not installed")
    X, score = rows()
    y = {"mse": score, "poisson": score.clamp_min(0).floor()}.get(loss, (score > 0).double())
    design, families = api.add_constant(X.numpy(), prepend=False), api.families
    family = {"mse": families.Gaussian(), "poisson": families.Poisson()}.get(loss, families.Binomial())
    expected = torch.from_numpy(api.GLM(y.numpy(), design, family=family).fit(tol=1e-14).cov_params())
    if loss == "cross_entropy":
        # Two scores, the first one always zero.
        class Scores(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 1).double()

            def forward(self, x: Tensor) -> Tensor:
                z = self.layer(x)
                return torch.cat([torch.zeros_like(z), z], 1)

        result = onestep.fit(Scores(), (X, y.long()), loss, tol=1e-8, progress=False)
    else:
        result = onestep.fit(nn.Linear(3, 1).double(), (X, y), loss, tol=1e-8, progress=False)
    torch.testing.assert_close(result.covariance(), expected, rtol=1e-6, atol=0)


def test_weight_decay_is_a_prior() -> None:
    X, y = rows()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    result = onestep.fit(model, (X, y[:, None]), "mse", weight_decay=0.1, progress=False)
    found = result.covariance()
    residual = (model(X)[:, 0] - y).square().sum().item()
    # σ² is what makes it the residual variance over the degrees of freedom that are left; then it is Laplace's.
    free = Laplace(model, (X, y[:, None]), "mse", parameters="all", prior_precision=0.1 * 80, noise_variance=0.5)
    left = 80 - (21 - 0.1 * 80 * free.covariance().trace().item())
    torch.testing.assert_close(found, free.covariance() * 2 * residual / left)


def test_refusals() -> None:
    X, y = rows()
    result = onestep.fit(nn.Linear(3, 1).double(), (X, y), progress=False)
    with pytest.raises(ValueError, match="copied or loaded, without the data"):
        pickle.loads(pickle.dumps(result)).covariance()
    some = onestep.fit(nn.Linear(3, 1).double(), (X[:4], y[:4]), progress=False)
    with pytest.raises(ValueError, match="4 residuals and 4 parameters that they determine leave nothing"):
        some.covariance()
    few = onestep.fit(nn.Linear(3, 1).double(), (X[:2], y[:2]), progress=False)
    with pytest.raises(ValueError, match="2 equations for 4 parameters"):
        few.covariance()
    twice = torch.cat([X, X[:, :1]], 1)
    with pytest.raises(torch.linalg.LinAlgError, match=r"singular: the data leaves a direction free .* 'weight'"):
        onestep.fit(nn.Linear(4, 1).double(), (twice, y), progress=False).covariance()

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs[:, 0] - target).square().mean()

    with pytest.raises(ValueError, match="needs the distribution behind the loss, which 'function'"):
        onestep.fit(nn.Linear(3, 1).double(), (X, y), loss, max_steps=2, progress=False).covariance()
