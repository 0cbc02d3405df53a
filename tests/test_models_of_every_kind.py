"""Products with models that torch.func cannot differentiate, or that hold the same module twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.checkpoint import checkpoint

import onestep
from onestep.curvature import GaussNewtonOperator, HessianOperator, hvp
from onestep.optim import GaussNewton, LevenbergMarquardt, NewtonCG

METHODS = ["levenberg_marquardt", "gauss_newton", "newton_cg", "gradient_descent"]
X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """u(x) and one of its derivatives, in one of many forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.last, self.form = nn.Linear(3, 4), nn.Linear(4, 1), form

    def u(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "checkpoint":
            return checkpoint(self.u, x, use_reentrant=False)
        if self.form == "reentrant":
            return checkpoint(self.u, x, use_reentrant=True)
        if self.form == "autograd.grad":
            x = x.detach().requires_grad_()
            u = self.u(x)
            return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :1]
        if self.form == "autograd.grad under enable_grad":
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                u = self.u(x)
                return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :1]
        if self.form == "func.grad":
            return self.u(x) + torch.func.vmap(torch.func.grad(lambda x: self.u(x)[0]))(x)[:, :1]
        along = torch.zeros_like(x) + torch.tensor([1.0, 0.0, 0.0], dtype=x.dtype)
        if self.form == "func.jvp":
            u, slope = torch.func.jvp(self.u, (x,), (along,))
            return u + slope
        if self.form == "jvp of jvp":
            return torch.func.jvp(lambda x: torch.func.jvp(self.u, (x,), (along,))[1], (x,), (along,))[1]
        # The same by formulas: u' and u'' in the first input.
        t, w = self.first(x).tanh(), self.first.weight[:, 0]
        if self.form == "second formula":
            return ((-2 * t * (1 - t.square())) * w.square()) @ self.last.weight.mT
        slope = ((1 - t.square()) * w) @ self.last.weight.mT
        return self.last(t) if self.form == "plain" else self.last(t) + slope


FORMS = {
    "checkpoint": "plain",
    "autograd.grad": "formula",
    "autograd.grad under enable_grad": "formula",
    "func.grad": "formula",
    "func.jvp": "formula",
    "jvp of jvp": "second formula",
}


def network(form: str) -> Net:
    torch.manual_seed(0)
    return Net(form).double()


def dense(model: nn.Module, kind: Any) -> Tensor:
    """The matrix of the mean squared error by torch.func, with the model's own parameters."""
    params = list(model.named_parameters())
    sizes = [p.numel() for _, p in params]

    def outputs(vector: Tensor) -> Tensor:
        parts = zip(params, vector.split(sizes), strict=True)
        return functional_call(model, {name: part.view_as(p) for (name, p), part in parts}, (X,))

    point = torch.cat([p.detach().flatten() for _, p in params])
    if kind is HessianOperator:
        return hessian(lambda v: (outputs(v) - Y).square().mean())(point)
    J = jacrev(outputs)(point).reshape(len(X), -1)
    return 2 / len(X) * J.mT @ J


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_derivatives_inside_the_model(kind: Any, form: str) -> None:
    expected = dense(network(FORMS[form]), kind)
    model = network(form)
    op = kind(model, (X, Y), "mse", progress=False)
    v = torch.randn(op.shape[0], dtype=torch.float64)
    torch.testing.assert_close(op @ v, expected @ v)
    torch.testing.assert_close(op @ torch.eye(op.shape[0], dtype=torch.float64), expected)
    loss, gradient = op.loss_and_gradient()
    assert loss == pytest.approx((network(FORMS[form])(X) - Y).square().mean().item())
    assert gradient.any() and all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "form"),
    [(LevenbergMarquardt, form) for form in FORMS]
    + [(kind, form) for kind in (GaussNewton, NewtonCG) for form in ("checkpoint", "autograd.grad", "jvp of jvp")],
)
def test_optimisers_with_derivatives_inside_the_closure(kind: Any, form: str) -> None:
    """The first step is that of the same network by formulas."""
    points = []
    for model in (network(form), network(FORMS[form])):
        optimizer = kind(model.parameters(), damping=0.1)
        for _ in range(2):
            if kind is NewtonCG:
                optimizer.step(lambda: (model(X) - Y).square().mean())  # noqa: B023
            else:
                optimizer.step(lambda: model(X) - Y)  # noqa: B023
        points.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(points[0], points[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["autograd.grad", "func.grad", "jvp of jvp"])
@pytest.mark.parametrize("method", METHODS)
def test_fit_with_derivatives_inside_the_model(method: str, form: str) -> None:
    results = []
    for model in (network(form), network(FORMS[form])):
        results.append(onestep.fit(model, (X, Y), method=method, max_steps=2, progress=False))
    assert results[0].loss < results[0].initial_loss == pytest.approx(results[1].initial_loss)
    if method in ("levenberg_marquardt", "gradient_descent"):
        # Without a preconditioner that depends on what hooks see.
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpoints_are_refused() -> None:
    model = network("reentrant")
    with pytest.raises(ValueError, match="use_reentrant=False"):
        HessianOperator(model, (X, Y), progress=False)
    named = {name: p.detach() for name, p in model.named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in named.items()}
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        hvp(lambda p: torch.func.functional_call(model, p, (X,)).square().mean(), named, ones)


def test_functions_that_raise_both_ways_say_why() -> None:
    def loss(p: Tensor) -> Tensor:
        raise RuntimeError("not today")

    with pytest.raises(RuntimeError, match="not today"):
        hvp(loss, torch.ones(2), torch.ones(2))


class Autocast(nn.Module):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.enabled = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)), enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.layers(x).float()


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_autocast_around_layer_norm(kind: Any) -> None:
    products = []
    for enabled in (True, False):
        op = kind(Autocast(enabled), (X.float(), Y.float()), progress=False)
        products.append(op @ torch.linspace(-1, 1, op.shape[0]))
    assert (products[0] - products[1]).norm() < 0.05 * products[1].norm()


# ---------------------------------------------------------------------------------------- where parameters are found


def twice() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 1)).double()


class Own(nn.Sequential):
    """A Sequential with a parameter of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 1), nn.Tanh())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale * 0.5


@pytest.mark.parametrize("make", [twice, Own])
@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
def test_modules_that_occur_twice_and_parameters_of_containers(kind: Any, make: Callable[[], nn.Module]) -> None:
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    op = kind(model, (X, Y), "mse", progress=False)
    product = op @ torch.eye(op.shape[0], dtype=torch.float64)
    for name, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter and torch.equal(parameter, before[name])
    assert len(list(model.parameters())) == len(before)

    # Its derivative in each parameter by differences of gradients, for the Hessian.
    if kind is HessianOperator:
        step, columns = 1e-6, []
        for index in range(op.shape[0]):
            slopes = []
            for sign in (1, -1):
                with torch.no_grad():
                    vector = nn.utils.parameters_to_vector(model.parameters())
                    vector[index] += sign * step
                    nn.utils.vector_to_parameters(vector, model.parameters())
                slopes.append(op.loss_and_gradient()[1])
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.copy_(before[name])
            columns.append((slopes[0] - slopes[1]) / (2 * step))
        torch.testing.assert_close(product, torch.stack(columns, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [twice, Own])
@pytest.mark.parametrize("method", METHODS)
def test_such_modules_are_fitted_and_can_be_trained_on(method: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    result = onestep.fit(model, (X, Y), method=method, max_steps=3, progress=False)
    assert result.loss < result.initial_loss
    assert all(type(p) is nn.Parameter for p in model.parameters())
    before = model(X).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(X) - Y).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    optimizer.step()
    assert not torch.equal(model(X), before)


def test_scalar_parameters_in_single_precision() -> None:
    class Scalars(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return (0.5 * self.a + self.b / 3.0) ** 2.0 * x + 1e-3 * self.a

    x, y = X.float(), 2 * X.float()
    expected = None
    for make in (lambda: Scalars().double(), Scalars):
        model = make()
        dtype = model.a.dtype
        op = HessianOperator(model, (x.to(dtype), y.to(dtype)), progress=False)
        product = op @ torch.eye(2, dtype=dtype)
        expected = product if expected is None else expected
        torch.testing.assert_close(product.double(), expected.double(), rtol=1e-5, atol=1e-5)
    for method in METHODS:
        assert onestep.fit(Scalars(), (x, y), method=method, max_steps=5, progress=False).loss < 2


def test_weight_norm() -> None:
    """torch's own kernel raises in forward mode, and is wrong by reverse mode twice."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
    params = {name: p.detach() for name, p in layer.named_parameters()}
    x = X

    def loss(p: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, p, (x,)).square().sum()

    def explicit(p: dict[str, Tensor]) -> Tensor:
        g, v = p["parametrizations.weight.original0"], p["parametrizations.weight.original1"]
        return (x @ (v * (g / v.square().sum(1, keepdim=True).sqrt())).mT + p["bias"]).square().sum()

    expected = hvp(explicit, params, params)
    for name, product in hvp(loss, params, params).items():
        torch.testing.assert_close(product, expected[name])
