"""The preconditioner of linear layers against the Gauss-Newton matrix that it approximates."""

import pytest
import torch
from torch import Tensor, nn

import onestep
from onestep.curvature.conjugate_gradient import conjugate_gradient
from onestep.evaluation.data import Chunk
from onestep.evaluation.losses import as_loss, drawn_slope
from onestep.evaluation.parameters import ParameterVector
from onestep.training import kronecker
from onestep.training.kronecker import Factors, linear_layers
from onestep.training.objective import DataObjective


def objective(module: nn.Module, loss: str, inputs: Tensor, target: Tensor) -> DataObjective:
    chunks = [Chunk(inputs, target)]
    return DataObjective(module, as_loss(loss), lambda: chunks, lambda: chunks, fixed=True)


def rows(n: int, d: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("largest", [2048, 4, 2])
def test_one_linear_layer_under_squared_error_is_inverted_almost_exactly(
    bias: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # JᵀHJ = E[xxᵀ] ⊗ 2I/k there, and only the second factor is estimated; both are nearly diagonal, so that it does not
    # matter which of them are kept as diagonals.
    monkeypatch.setattr(kronecker, "_LARGEST_FACTOR", largest)
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=bias).double()
    problem = objective(layer, "mse", rows(40_000, 5), torch.zeros(40_000, 3, dtype=torch.float64))
    parameters = ParameterVector(list(layer.parameters()))
    v = rows(1, len(parameters))[0]
    precondition = problem.preconditioner(parameters)
    assert precondition is not None
    exact = torch.linalg.solve(problem.gauss_newton_matrix(parameters), v)
    assert (precondition(1e-8)(v) - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("loss", ["mse", "poisson", "cross_entropy"])
def test_drawn_slopes_have_the_hessian_as_covariance(loss: str) -> None:
    outputs = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)
    target = torch.tensor(1) if loss == "cross_entropy" else torch.ones(3, dtype=torch.float64)
    function = as_loss(loss)
    expected = torch.func.hessian(lambda z: function.sum(z[None], target[None]))(outputs)
    many = outputs.expand(200_000, 3)
    slopes = drawn_slope(function, many, target.expand(200_000, *target.shape), torch.Generator().manual_seed(0))
    torch.testing.assert_close(slopes.mT @ slopes / len(slopes), expected, rtol=0.03, atol=0.01)
    assert slopes.mean(0).abs().max() < 0.02


def test_layers_shared_or_frozen_are_found_once_or_not_at_all() -> None:
    shared = nn.Linear(4, 4)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    model = nn.Sequential(shared, frozen, shared, nn.LayerNorm(4))
    parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
    assert {layer: tuple(place) for layer, place in linear_layers(model, parameters).items()} == {shared: (0, 1)}


def test_it_is_symmetric_and_positive_and_saves_conjugate_gradients_iterations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 4)).double()
    inputs = rows(2000, 10) * torch.logspace(-1.5, 1.5, 10, dtype=torch.float64)
    problem = objective(model, "cross_entropy", inputs, torch.arange(2000) % 4)
    parameters = ParameterVector(list(model.parameters()))
    prepared = problem.preconditioner(parameters)
    assert prepared is not None
    precondition = prepared(1e-4)
    u, v = rows(2, len(parameters)).unbind()
    torch.testing.assert_close(u @ precondition(v), v @ precondition(u))
    assert v @ precondition(v) > 0
    product = problem.curvature(parameters, hessian=False)
    plain = conjugate_gradient(lambda w: product(w) + 1e-4 * w, u, tolerance=0.01, max_iterations=300)
    aided = conjugate_gradient(
        lambda w: product(w) + 1e-4 * w, u, precondition=precondition, tolerance=0.01, max_iterations=300
    )
    assert aided.iterations < plain.iterations


@pytest.mark.parametrize(
    "inputs", [torch.ones(50, 600), torch.zeros(50, 600), 1e-3 * torch.arange(600.0).expand(50, 600)]
)
def test_wide_singular_factors_under_the_least_damping_are_inverted(inputs: Tensor) -> None:
    """A Gram matrix in fp32 has eigenvalues under zero of some ε of its trace."""
    torch.manual_seed(0)
    layer = nn.Linear(600, 2)
    factors = Factors(layer, ParameterVector(list(layer.parameters())))
    with factors.collecting():
        outputs = layer(inputs * (1 + 1e-4 * torch.rand(50, 1)))
        factors.add_gradient(torch.autograd.grad(outputs, list(layer.parameters()), torch.randn(50, 2)))
    v = torch.randn(1202)
    image = factors.preconditioner(50, 1e-15)(v)
    assert bool(image.isfinite().all()) and torch.dot(image, v) > 0


def test_mini_batch_steps_are_judged_on_other_rows() -> None:
    inputs = rows(64, 30)
    target = rows(64, 31)[:, 30:]
    model = nn.Linear(30, 1).double()
    result = onestep.fit(model, (inputs, target), method="gauss_newton", batch_size=8, max_steps=30, progress=False)
    # Eight rows can be fitted without error by thirty weights; the loss of others must not fall for it.
    assert result.loss > 0.1 * result.initial_loss
    assert any(not record.accepted or record.damping > 1e-2 for record in result.history)


def test_layers_may_be_called_with_keywords() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model = Keywords()
    inputs, target = rows(20, 3), rows(20, 2)
    v = rows(1, 8)[0]
    steps = []
    for module in (model, model.layer):
        precondition = objective(module, "mse", inputs, target).preconditioner(ParameterVector([*model.parameters()]))
        assert precondition is not None
        steps.append(precondition(1e-3)(v))
    torch.testing.assert_close(*steps, rtol=0, atol=0)
