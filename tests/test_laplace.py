"""onestep.curvature.Laplace against matrices, evidences and Jacobians made another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils import parameters_to_vector

import onestep
from onestep.curvature import GaussNewtonOperator, Laplace

# What the summed loss is multiplied by to be -log p.
NOISE = 0.3
SCALES = {"mse": 0.5 / NOISE, "cross_entropy": 1.0, "poisson": 1.0, "bce": 1.0}
PRIOR = 0.7


def problem(loss: str, *, layers: int = 2, n: int = 23, k: int = 3) -> tuple[nn.Module, Any]:
    """A small model in float64 and rows; with cross-entropy one row is ignored."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        body = [nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5)] if layers == 2 else []
        model = nn.Sequential(*body, nn.Linear(5 if body else 4, k)).double()
    y: Tensor
    if loss == "cross_entropy":
        y = torch.randint(k, (n,), generator=generator)
        y[3] = -100
    elif loss == "mse":
        y = torch.randn(n, k, generator=generator, dtype=torch.float64)
    else:
        y = torch.randint(2 if loss == "bce" else 5, (n, k), generator=generator).double()
    return model, (X, y)


def options(loss: str) -> dict[str, Any]:
    return {"prior_precision": PRIOR, "noise_variance": NOISE if loss == "mse" else None}


def dense(model: nn.Module, data: Any, loss: str) -> Tensor:
    """The posterior precision of all parameters, from products with the Gauss-Newton matrix."""
    G = GaussNewtonOperator(model, data, loss, reduction="sum")
    p = G.shape[0]
    return SCALES[loss] * (G @ torch.eye(p, dtype=torch.float64)) + PRIOR * torch.eye(p, dtype=torch.float64)


@pytest.mark.parametrize("loss", SCALES)
def test_exact_and_its_parts(loss: str) -> None:
    """Exact matrices of all parameters and of the last layer, in torch's order; blocks and diagonals are parts."""
    model, data = problem(loss)
    P = dense(model, data, loss)
    posterior = Laplace(model, data, loss, parameters="all", chunk_size=7, **options(loss))
    torch.testing.assert_close(posterior.covariance(), P.inverse())
    head = P[-18:, -18:]
    for chunk_size in (None, 5):
        last = Laplace(model, data, loss, chunk_size=chunk_size, **options(loss))
        assert last.names == ["3.weight", "3.bias"]
        torch.testing.assert_close(last.covariance(), head.inverse())
    diagonal = Laplace(model, data, loss, parameters="all", structure="diagonal", **options(loss))
    torch.testing.assert_close(diagonal.standard_deviations(), P.diagonal().rsqrt())
    diagonal = Laplace(model, data, loss, structure="diagonal", **options(loss))
    torch.testing.assert_close(diagonal.standard_deviations(), head.diagonal().rsqrt())
    block = Laplace(model, data, loss, parameters="all", structure="block", **options(loss))
    owner = torch.tensor([0] * 25 + [1] * 10 + [2] * 18)
    kept = torch.where(owner[:, None] == owner, P, 0.0)
    torch.testing.assert_close(block.covariance(), kept.inverse())
    block = Laplace(model, data, loss, structure="block", **options(loss))
    owner = torch.cat([torch.arange(3).repeat_interleave(5), torch.arange(3)])
    torch.testing.assert_close(block.covariance(), torch.where(owner[:, None] == owner, head, 0.0).inverse())


@pytest.mark.parametrize("loss", ["cross_entropy", "poisson"])
def test_kronecker(loss: str) -> None:
    """Of one row a layer's block is a Kronecker product; of many it is E[xxᵀ] ⊗ Σ ggᵀ."""
    model, (X, y) = problem(loss)
    one = X[:1], y[:1]
    P = dense(model, one, loss)
    posterior = Laplace(model, one, loss, parameters="all", structure="kronecker", **options(loss))
    inverse = posterior.covariance()
    for place in (slice(0, 25), slice(35, 53)):
        torch.testing.assert_close(inverse[place, place], P[place, place].inverse())
    torch.testing.assert_close(inverse.diagonal()[25:35], 1 / P.diagonal()[25:35])
    # All rows: the last layer by both ways, and by the formula.
    both = [
        Laplace(model, (X, y), loss, parameters=which, structure="kronecker", chunk_size=6, **options(loss))
        for which in ("last_layer", "all")
    ]
    whole = both[1].covariance()[-18:, -18:]
    counted = (y != -100) if loss == "cross_entropy" else torch.ones(len(X), dtype=torch.bool)
    with torch.no_grad():
        phi = model[:3](X)  # type: ignore[index]
        phi = torch.cat([phi, torch.ones(len(X), 1, dtype=torch.float64)], 1)
        f = model(X)[counted]
        p = f.softmax(1) if loss == "cross_entropy" else f.exp()
        outer = p.T @ p if loss == "cross_entropy" else 0
        G = torch.diag(p.sum(0)) - outer
    if loss == "poisson":
        torch.testing.assert_close(both[0].covariance(), whole)
    P = torch.kron(G, phi[counted].T @ phi[counted] / counted.sum())
    order = torch.cat([torch.arange(18).view(3, 6)[:, :5].flatten(), torch.arange(18).view(3, 6)[:, 5]])
    P = P[order][:, order] + PRIOR * torch.eye(18)
    torch.testing.assert_close(both[0].covariance(), P.inverse())


@pytest.mark.parametrize("structure", ["exact", "block", "kronecker", "diagonal"])
@pytest.mark.parametrize("which", ["last_layer", "all"])
def test_predictions_solves_and_samples(which: Any, structure: Any) -> None:
    model, data = problem("cross_entropy")
    posterior = Laplace(model, data, "cross_entropy", parameters=which, structure=structure, prior_precision=PRIOR)
    inverse, p = posterior.covariance(), len(posterior.mean)
    points = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    values = dict(model.named_parameters())
    J = jacrev(lambda some: functional_call(model, {**values, **some}, points))({n: values[n] for n in posterior.names})
    flat = torch.cat([J[name].reshape(4, 3, -1) for name in posterior.names], -1).detach()
    expected = flat @ inverse @ flat.mT
    prediction = posterior.predict(points, joint=True)
    torch.testing.assert_close(prediction.mean, model(points).detach())
    torch.testing.assert_close(prediction.covariance, expected)
    alone = posterior.predict(points)
    assert alone.covariance is None and alone.probabilities is not None
    variance = expected.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(alone.variance, variance)
    kappa = (1 + torch.pi / 8 * variance).rsqrt()
    torch.testing.assert_close(alone.probabilities, (kappa * model(points).detach()).softmax(1))
    b = torch.randn(p, 3, dtype=torch.float64)
    torch.testing.assert_close(posterior.solve(b), inverse @ b)
    half = posterior._posterior.color(torch.eye(p, dtype=torch.float64))
    torch.testing.assert_close(half @ half.mT, inverse)
    drawn = posterior.sample(2, generator=torch.Generator().manual_seed(0))
    again = posterior.sample(2, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (2, p) and torch.equal(drawn, again)
    torch.testing.assert_close(posterior.standard_deviations(), inverse.diagonal().sqrt())


def test_evidence_of_linear_regression() -> None:
    """Exact there: log N(y; 0, noise I + ΦΦᵀ/τ); the tuned values are where it is greatest."""
    model, (X, y) = problem("mse", layers=1, k=1)
    tau = 2.0
    onestep.fit(model, (X, y), "mse", weight_decay=2 * NOISE * tau / len(X), progress=False)
    posterior = Laplace(model, (X, y), "mse", prior_precision=tau, noise_variance=NOISE)
    phi = torch.cat([X, torch.ones(len(X), 1, dtype=torch.float64)], 1)

    def evidence(prior: float, noise: float) -> float:
        covariance = noise * torch.eye(len(X), dtype=torch.float64) + phi @ phi.mT / prior
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(X), dtype=torch.float64), covariance)
        return float(normal.log_prob(y[:, 0]))

    assert posterior.log_marginal_likelihood() == pytest.approx(evidence(tau, NOISE), rel=1e-10)
    # Fit and tune in turn until nothing moves: the greatest evidence of all.
    for _ in range(60):
        decay = 2 * posterior.noise_variance * posterior.prior_precision / len(X)  # type: ignore[operator]
        onestep.fit(model, (X, y), "mse", weight_decay=decay, progress=False)
        posterior = Laplace(model, (X, y), "mse").tune()
    at = posterior.prior_precision, posterior.noise_variance
    best = evidence(*at)  # type: ignore[arg-type]
    assert posterior.log_marginal_likelihood() == pytest.approx(best, rel=1e-8)
    for factor in (0.98, 1.02):
        assert evidence(at[0] * factor, at[1]) < best  # type: ignore[arg-type]
        assert evidence(at[0], at[1] * factor) < best  # type: ignore[operator]


def test_evidence_of_counts() -> None:
    """With log y!: the likelihood is that of torch.distributions."""
    model, (X, y) = problem("poisson", layers=1)
    posterior = Laplace(model, (X, y), "poisson", prior_precision=PRIOR)
    theta = parameters_to_vector(model.parameters()).detach()
    P = dense(model, (X, y), "poisson")
    likelihood = torch.distributions.Poisson(model(X).detach().exp()).log_prob(y).sum()
    prior = 0.5 * len(theta) * torch.tensor(PRIOR).double().log() - 0.5 * PRIOR * theta.square().sum()
    expected = likelihood + prior - 0.5 * P.logdet()
    assert posterior.log_marginal_likelihood() == pytest.approx(expected.item(), rel=1e-7)


def test_frozen_body_float32_and_loss_first() -> None:
    """A frozen body does not matter to the last layer, rows may be float32, and the loss may come before the data."""
    model, (X, y) = problem("cross_entropy")
    expected = Laplace(model, (X, y), "cross_entropy").standard_deviations()
    single = model.float()
    for parameter in single.parameters():
        parameter.requires_grad_(False)
    posterior = Laplace(single, (X.float(), y), "cross_entropy", parameters="last_layer")
    torch.testing.assert_close(posterior.standard_deviations(), expected, rtol=1e-5, atol=0)
    assert posterior.predict(X.float()).variance.dtype == torch.float32


def test_refusals() -> None:
    model, data = problem("mse")
    with pytest.raises(ValueError, match=r"parameters='some'; expected 'last_layer' or 'all'"):
        Laplace(model, data, "mse", parameters="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="structure='full'; expected one of 'exact'"):
        Laplace(model, data, "mse", structure="full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the distribution behind the loss"):
        Laplace(model, data, lambda f, y: (f - y).abs().mean())
    with pytest.raises(ValueError, match=r"no nn\.Linear layer ends the model"):
        Laplace(nn.Sequential(model, nn.Tanh()), data, "mse")
    with pytest.raises(ValueError, match=r"prior_precision=-1; expected a finite number >= 0"):
        Laplace(model, data, "mse", prior_precision=-1)
    with pytest.raises(ValueError, match=r"noise_variance=1.0 with loss 'poisson'"):
        Laplace(*problem("poisson"), "poisson", noise_variance=1.0)
    flat = Laplace(*problem("cross_entropy"), "cross_entropy", prior_precision=0.0)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite: the data leaves"):
        flat.covariance()  # a common shift of all classes' scores changes nothing
    with pytest.raises(ValueError, match=r"b has shape \(3,\); expected \(18,\) or \(18, k\)"):
        flat.solve(torch.ones(3))
    with pytest.raises(ValueError, match=r"expected a finite number > 0"):
        flat.log_marginal_likelihood()
