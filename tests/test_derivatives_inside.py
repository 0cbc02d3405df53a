"""Models that differentiate inside, in every form that torch has: derivatives are right, or refused, never zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional
from torch.func import functional_call, grad, jacrev, jvp, linearize, vjp, vmap

import onestep
from onestep.curvature import FisherOperator, GaussNewtonOperator, HessianOperator, Laplace, ggnvp, hvp
from onestep.optim import LevenbergMarquardt, NewtonCG

pytestmark = pytest.mark.filterwarnings(
    "ignore:Attempted to insert a get_attr Node:UserWarning"
)  # torch.func.linearize

Form = Callable[[nn.Module, Tensor], Tensor]


def _leaf(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()


def by_grad(net: nn.Module, x: Tensor) -> Tensor:
    x = _leaf(x)
    return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]


def by_grad_unused(net: nn.Module, x: Tensor) -> Tensor:
    x = _leaf(x)
    found = torch.autograd.grad(net(x).sum(), x, create_graph=True, allow_unused=True, materialize_grads=True)
    return found[0]


def by_grad_if_any(net: nn.Module, x: Tensor) -> Tensor:
    x = _leaf(x)
    found = torch.autograd.grad(net(x).sum(), x, create_graph=True, allow_unused=True)[0]
    return net(x) * 0 if found is None else found


def by_functional_jacobian(net: nn.Module, x: Tensor) -> Tensor:
    return functional.jacobian(lambda z: net(z).sum(0), x, create_graph=True).reshape(-1, 1)


def by_functional_vjp(net: nn.Module, x: Tensor) -> Tensor:
    return functional.vjp(lambda z: net(z).sum(), x, create_graph=True)[1]


def by_functional_jvp(net: nn.Module, x: Tensor) -> Tensor:
    return functional.jvp(net, x, torch.ones_like(x), create_graph=True)[1]


def by_func_grad(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(grad(lambda z: net(z).sum()))(x)


def by_func_jvp(net: nn.Module, x: Tensor) -> Tensor:
    return jvp(net, (x,), (torch.ones_like(x),))[1]


def by_func_vjp(net: nn.Module, x: Tensor) -> Tensor:
    return vjp(net, x)[1](torch.ones_like(x))[0]


FORMS = [
    by_grad,
    by_grad_unused,
    by_grad_if_any,
    by_functional_jacobian,
    by_functional_vjp,
    by_functional_jvp,
    by_func_grad,
    by_func_jvp,
    by_func_vjp,
]


class Differentiated(nn.Module):
    """The output of a network, and its derivative in the input."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x), self.form(self.net, x)], 1)


def rows(kind: str) -> tuple[Tensor, Tensor]:
    x = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None]
    y = torch.cat([torch.sin(3 * x), 3 * torch.cos(3 * x)], 1)
    if kind != "plain":
        x = x.requires_grad_()
    return (x * 1 if kind == "computed" else x), y


def matrices(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The Gauss-Newton matrix and the Hessian, of the derivative by formula: net' = W₂ (1 - tanh²) W₁."""
    model = Differentiated(by_grad)
    named = {name: p.detach() for name, p in model.net.named_parameters()}
    flat = torch.cat([p.reshape(-1) for p in named.values()])

    def outputs(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in named.values()])
        W, b, V, c = (part.reshape(p.shape) for part, p in zip(parts, named.values(), strict=True))
        t = (x.detach() @ W.mT + b).tanh()
        return torch.cat([t @ V.mT + c, (1 - t.square()) @ (V.mT * W)], 1)

    J = jacrev(outputs)(flat).reshape(y.numel(), -1)
    H = torch.func.hessian(lambda v: (outputs(v) - y).square().mean())(flat)
    return 2 / y.numel() * J.mT @ J, H


@pytest.mark.parametrize("kind", ["plain", "leaf", "computed"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_operators(form: Form, kind: str) -> None:
    x, y = rows(kind)
    G, H = matrices(x, y)
    one = torch.ones(len(G), dtype=torch.float64)
    for operator, A in ((GaussNewtonOperator, G), (FisherOperator, G), (HessianOperator, H)):
        found = operator(Differentiated(form), (x, y), progress=False)
        torch.testing.assert_close(found @ torch.eye(len(A), dtype=torch.float64), A)
        # One vector goes another way than several.
        torch.testing.assert_close(found @ one, A.sum(1))
        torch.testing.assert_close(found.diagonal().value, A.diagonal())


@pytest.mark.parametrize("kind", ["plain", "leaf"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_products_of_functions_and_steps_by_closures(form: Form, kind: str) -> None:
    x, y = rows(kind)
    G, H = matrices(x, y)
    model = Differentiated(form)
    named = {name: p.detach() for name, p in model.named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in named.items()}

    def flat(parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts.values()])

    def of(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (x,))

    torch.testing.assert_close(flat(ggnvp(of, lambda z: (z - y).square().mean(), named, ones)), G.sum(1))
    torch.testing.assert_close(flat(hvp(lambda p: (of(p) - y).square().mean(), named, ones)), H.sum(1))
    gradient = torch.autograd.grad((model(x) - y).square().mean(), list(model.parameters()))
    start, g = flat(named), torch.cat([part.reshape(-1) for part in gradient])
    # A step with so much damping is -(G + damping diag G)⁻¹g, of which the matrix shows.
    optimizer = LevenbergMarquardt(model.parameters(), damping=10.0)
    optimizer.step(lambda: model(x) - y)
    step = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - start
    # The damped diagonal is at least g²/2 loss.
    floor = g.square() / (2 * optimizer.report.loss)
    expected = -torch.linalg.solve(G + 10 * torch.diag(torch.maximum(G.diagonal(), floor)), g)
    torch.testing.assert_close(step, expected)


@pytest.mark.parametrize("method", ["levenberg_marquardt", "gauss_newton", "newton_cg"])
@pytest.mark.parametrize("form", [by_grad_unused, by_functional_jacobian], ids=lambda form: form.__name__)
def test_fit_of_rows_that_require_gradients(form: Form, method: str) -> None:
    """The same fit, step by step, as of the form that always worked."""
    losses = []
    for own in (form, by_grad):
        x, y = rows("leaf")
        result = onestep.fit(Differentiated(own), (x, y), method=method, max_steps=6, progress=False)
        losses.append([record.loss for record in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_the_same_of_laplace() -> None:
    x, y = rows("leaf")
    G, _ = matrices(x, y)
    posterior = Laplace(
        Differentiated(by_functional_jacobian), (x, y), parameters="all", structure="exact", noise_variance=1.0
    )
    P = y.numel() * G / 2 + posterior.prior_precision * torch.eye(len(G), dtype=torch.float64)
    torch.testing.assert_close(posterior.covariance(), torch.linalg.inv(P))


# ------------------------------------------------------------------------------------------------ without a gradient


class Cut(nn.Module):
    """A network whose outputs carry no gradient of its parameters."""

    def __init__(self, how: str, net: nn.Module) -> None:
        super().__init__()
        self.how, self.net = how, net

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return self.net(x).detach()
        if self.how == "no_grad":
            with torch.no_grad():
                return self.net(x)
        if self.how == "numpy":
            return torch.from_numpy(self.net(x).detach().numpy())
        return linearize(self.net, x)[1](torch.ones_like(x))


CUTS = ["detach", "no_grad", "numpy", "linearize"]
METHODS = ["auto", "levenberg_marquardt", "gauss_newton", "newton_cg", "gradient_descent", "polar"]


def _data() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0, 1, 12)[:, None]
    return x, torch.sin(3 * x)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", CUTS)
def test_fit_names_outputs_without_a_gradient(how: str, method: str) -> None:
    model = Cut(how, _net())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the loss carries no gradient of any trained parameter .*torch\.no_grad"):
        onestep.fit(model, _data(), method=method, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("operator", [GaussNewtonOperator, HessianOperator, FisherOperator, Laplace])
def test_operators_name_outputs_without_a_gradient(operator: Any, how: str) -> None:
    with pytest.raises(ValueError, match="model: the loss carries no gradient of any trained parameter"):
        operator(Cut(how, _net()), _data(), "mse", **({"parameters": "all"} if operator is Laplace else {}))


def test_a_closed_form_needs_no_gradient() -> None:
    """Outputs that are affine in the parameters are solved for by what they are."""
    X = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    y = X @ torch.tensor([[1.0], [2.0], [3.0]]) + 4
    model = nn.Linear(3, 1)
    result = onestep.fit(Cut("detach", model), (X, y), progress=False)
    assert result.method == "closed_form" and result.converged
    assert torch.cat([model.weight[0], model.bias]).tolist() == pytest.approx([1, 2, 3, 4], abs=1e-5)


@pytest.mark.parametrize("optimizer", [NewtonCG, LevenbergMarquardt])
def test_closures_without_a_gradient(optimizer: Any) -> None:
    x, y = _data()
    for how in CUTS:
        model = Cut(how, _net())
        steps = optimizer(model.parameters())
        with pytest.raises(RuntimeError, match="does not depend on the parameters"):
            steps.step(lambda model=model: (model(x) - y).square().mean() if optimizer is NewtonCG else model(x) - y)


def test_an_output_that_is_constant_has_a_row_of_zeros() -> None:
    """Row by row on torch's own graph, as where a model differentiates inside."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            z = x.detach().requires_grad_()
            slope = torch.autograd.grad(self.net(z).sum(), z, create_graph=True)[0]
            return torch.stack([slope[:, 0], x[:, 0]], 1)

    x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    model = Half()
    result = onestep.fit(model, (x, torch.cat([2 * x + 1, x], 1)), method="levenberg_marquardt", progress=False)
    assert model.net.weight.item() == pytest.approx(2.0), result
