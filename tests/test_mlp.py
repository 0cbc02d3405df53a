"""Perceptrons: the ``mlp`` ops against torch's autograd, which modules fit takes through them, and their bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.library import opcheck

import onestep
from onestep.evaluation.data import Chunk
from onestep.evaluation.losses import LOSSES
from onestep.evaluation.parameters import ParameterVector
from onestep.ops.mlp import ACTIVATIONS
from onestep.optim import LevenbergMarquardt, levenberg_marquardt
from onestep.training.objective import DataObjective
from onestep.training.structures import perceptron
from onestep.training.structures.base import Mismatch
from onestep.training.structures.perceptron import PerceptronObjective, find_perceptron

MSE = LOSSES["mse"]
LAYERS = {"identity": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network(widths: list[int], activations: list[str], *, bias: bool = True, dtype: torch.dtype) -> nn.Sequential:
    layers: list[nn.Module] = []
    for (inputs, outputs), activation in zip(itertools.pairwise(widths), activations, strict=True):
        layers += [nn.Linear(inputs, outputs, bias=bias, dtype=dtype), LAYERS[activation]()]
    return nn.Sequential(*layers)


def arguments(model: nn.Sequential) -> tuple[Tensor, list[int], list[int], list[bool]]:
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    names = {kind: name for name, kind in LAYERS.items()}
    codes = [ACTIVATIONS[names[type(layer)]] for layer in model if not isinstance(layer, nn.Linear)]
    widths = [linear[0].in_features, *(layer.out_features for layer in linear)]
    parameters = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return parameters, widths, codes, [layer.bias is not None for layer in linear]


NETWORKS: list[tuple[list[int], list[str]]] = [
    ([3, 1], ["identity"]),
    ([10, 64, 1], ["relu", "identity"]),
    ([4, 9, 7, 3], ["tanh", "sigmoid", "identity"]),
    ([2, 5, 2], ["relu", "tanh"]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("widths", "activations"), NETWORKS)
@pytest.mark.parametrize("n", [0, 1, 77, 1500])
def test_against_autograd(n: int, widths: list[int], activations: list[str], bias: bool, dtype: torch.dtype) -> None:
    model = network(widths, activations, bias=bias, dtype=dtype)
    X = torch.randn(widths[0], n, dtype=dtype).mT
    y = torch.randn(n, 2 * widths[-1], dtype=dtype)[:, ::2]
    vector, *shape = arguments(model)
    loss, gradient = torch.ops.onestep.mlp_gradient(X, y, vector, *shape, True)
    only_loss, nothing = torch.ops.onestep.mlp_gradient(X, y, vector, *shape, False)
    # The oracle is torch in float64: relu's side must not depend on rounding.
    exact = network(widths, activations, bias=bias, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    expected = (exact(X.double()) - y.double()).square().sum()
    slopes = torch.autograd.grad(expected, list(exact.parameters()))
    expected_gradient = torch.cat([slope.reshape(-1) for slope in slopes])
    scale = TOLERANCE[dtype]
    assert loss.dtype == torch.float64
    assert torch.equal(loss, only_loss) and nothing.numel() == 0
    torch.testing.assert_close(loss, expected.detach(), rtol=scale, atol=scale)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=scale, atol=scale * (1 + n))

    rows = X[:40]
    jacobian = torch.ops.onestep.mlp_jacobian(rows, vector, *shape, 0.5)
    values = {name: p.detach() for name, p in exact.named_parameters()}
    parts = jacrev(lambda v: functional_call(exact, v, (rows.double(),)))(values)
    expected_jacobian = 0.5 * torch.cat([parts[name].flatten(2) for name in values], dim=-1)
    torch.testing.assert_close(jacobian.double(), expected_jacobian, rtol=scale, atol=scale)

    v = torch.randn_like(vector)
    J = expected_jacobian.reshape(-1, len(v)) * 2
    product = torch.ops.onestep.mlp_product(rows, vector, v, *shape)
    torch.testing.assert_close(product.double(), 2 * J.mT @ (J @ v.double()), rtol=scale, atol=scale * (1 + n))
    diagonal = torch.ops.onestep.mlp_product(rows, vector, None, *shape)
    torch.testing.assert_close(diagonal.double(), 2 * J.square().sum(0), rtol=scale, atol=scale * (1 + n))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    model = network([10, 64, 1], ["relu", "identity"], dtype=torch.float32)
    X, y = torch.randn(5000, 10), torch.randn(5000, 1)
    vector, *shape = arguments(model)

    def all_results() -> list[Tensor]:
        gradient = torch.ops.onestep.mlp_gradient(X, y, vector, *shape, True)
        products = [torch.ops.onestep.mlp_product(X, vector, v, *shape) for v in (vector, None)]
        return [*gradient, *products, torch.ops.onestep.mlp_jacobian(X[:500], vector, *shape, 1.0)]

    before, expected = torch.get_num_threads(), all_results()
    try:
        torch.set_num_threads(threads)
        for result, first in zip(all_results(), expected, strict=True):
            assert torch.equal(result, first)
    finally:
        torch.set_num_threads(before)


def test_ops_as_torch_sees_them() -> None:
    model = network([3, 4, 2], ["tanh", "identity"], dtype=torch.float64)
    X, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    vector, *shape = arguments(model)
    opcheck(torch.ops.onestep.mlp_gradient.default, (X, y, vector, *shape, True))
    opcheck(torch.ops.onestep.mlp_jacobian.default, (X, vector, *shape, 1.0))
    for v in (vector, None):
        opcheck(torch.ops.onestep.mlp_product.default, (X, vector, v, *shape))
    batched = torch.func.vmap(lambda v: torch.ops.onestep.mlp_gradient(X, y, v, *shape, True)[1])
    torch.testing.assert_close(
        batched(torch.stack([vector, 2 * vector]))[1],
        torch.ops.onestep.mlp_gradient(X, y, 2 * vector, *shape, True)[1],
    )
    with pytest.raises(NotImplementedError, match="mlp_gradient has no derivative"):
        torch.ops.onestep.mlp_gradient(X, y, vector.requires_grad_(), *shape, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": torch.randn(6, 4)}, r"X has shape \(6, 4\); expected \(n, 3\)"),
        ({"X": torch.randn(6, 3).half()}, "X has dtype torch.float16"),
        ({"y": torch.randn(6, 1)}, r"y has shape \(6, 1\); expected \(6, 2\)"),
        ({"y": torch.randn(6, 2).double()}, "y has dtype torch.float64"),
        ({"parameters": torch.randn(25)}, r"parameters has shape \(25,\); expected \(26,\)"),
        ({"widths": [3, 0, 2]}, "widths=.*expected numbers of 1 or more"),
        ({"activations": [1, 7]}, "activations=.*expected codes"),
        ({"biased": [True]}, "biased have 3, 2 and 1 elements"),
        ({"activations": [], "widths": [3], "biased": []}, "from 1 to 32 layers"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = {"X": torch.randn(6, 3), "y": torch.randn(6, 2), "parameters": torch.randn(26)}
    good |= {"widths": [3, 4, 2], "activations": [1, 0], "biased": [True, True], "wants_gradient": True}
    torch.ops.onestep.mlp_gradient(**good)
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.onestep.mlp_gradient(**(good | change))
    with pytest.raises(ValueError, match=r"v has shape \(3,\); expected \(26,\)"):
        torch.ops.onestep.mlp_product(good["X"], good["parameters"], torch.ones(3), [3, 4, 2], [1, 0], [True, True])


# ----------------------------------------------------------------------------------------------------------------- fit


def chunk_of(n: int = 50, inputs: int = 3, outputs: int = 2) -> Chunk:
    return Chunk(torch.randn(n, inputs), torch.randn(n, outputs))


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    model = network([3, 4, 2], ["relu", "identity"], dtype=torch.float32)
    model[0].register_forward_hook(lambda _layer, _args, output: 2 * output)
    return model


def parametrized() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), layer)


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(3, 2))


def test_which_modules_are_perceptrons() -> None:
    plain = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Dropout(), nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)
    )
    found = find_perceptron(plain, MSE, chunk_of())
    assert not isinstance(found, Mismatch), found
    assert found.widths == [3, 4, 4, 2]
    assert found.activations == [ACTIVATIONS[name] for name in ("relu", "tanh", "identity")]
    assert not isinstance(find_perceptron(nn.Linear(3, 2), MSE, chunk_of()), Mismatch)
    others = [
        nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)),
        nn.Sequential(nn.ReLU(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 2)),
        Doubled(nn.Linear(3, 2)),
        hooked(),
        parametrized(),
        shared(),
        plain.double(),
        nn.Sequential(),
    ]
    for model in others:
        assert isinstance(find_perceptron(model, MSE, chunk_of()), Mismatch), model
    layer = nn.Linear(3, 2)
    assert find_perceptron(layer, LOSSES["poisson"], chunk_of()) == Mismatch("the loss is 'poisson', not 'mse'")
    assert isinstance(find_perceptron(layer, MSE, Chunk((torch.randn(5, 3),), torch.randn(5, 2))), Mismatch)
    assert isinstance(find_perceptron(layer, MSE, Chunk(torch.randn(5, 4, 3), torch.randn(5, 4, 2))), Mismatch)


@pytest.mark.parametrize("frozen", ["", "0.weight", "2.bias", "0.bias"])
def test_objective_is_the_one_by_torch(frozen: str) -> None:
    """Value, gradient and Jacobian in the parameters that are trained, targets (n,) too."""
    model = network([3, 4, 1], ["tanh", "identity"], dtype=torch.float64)
    if frozen:
        model.get_parameter(frozen).requires_grad_(False)
    chunk = Chunk(torch.randn(50, 3, dtype=torch.float64), torch.randn(50, dtype=torch.float64))
    found = find_perceptron(model, MSE, chunk)
    assert not isinstance(found, Mismatch), found
    # An order that is not the module's.
    parameters = ParameterVector([p for p in reversed(list(model.parameters())) if p.requires_grad])
    sources: Any = (model, MSE, lambda: [chunk], lambda: [chunk])
    ours, torchs = PerceptronObjective(*sources, fixed=True, network=found), DataObjective(*sources, fixed=True)
    for mine, theirs in zip(ours.gradient(parameters), torchs.gradient(parameters), strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=1e-12, atol=1e-12)
    assert ours.value(parameters) == pytest.approx(torchs.value(parameters), rel=1e-12)
    torch.testing.assert_close(ours.gauss_newton_matrix(parameters), torchs.gauss_newton_matrix(parameters))
    for hessian in (False, True):
        v = torch.randn(len(parameters), dtype=torch.float64)
        product = ours.curvature(parameters, hessian=hessian)(v)
        torch.testing.assert_close(product, torchs.curvature(parameters, hessian=hessian)(v))


@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_on_a_sample_solve_its_system(by_kernels: bool, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conjugate gradients on products end where the factored matrix does; the inverse of an earlier one helps them."""
    monkeypatch.setattr(levenberg_marquardt, "_TOLERANCE", 1e-12)
    model = network([3, 8, 2], ["tanh", "identity"], dtype=torch.float64)
    X, y = torch.randn(101, 3, dtype=torch.float64), torch.randn(101, 2, dtype=torch.float64)
    chunks = [Chunk(X[:60], y[:60], 0), Chunk(X[60:], y[60:], 1)]
    found = find_perceptron(model, MSE, chunks[0])
    assert not isinstance(found, Mismatch), found
    sources: Any = (model, MSE, lambda: chunks, lambda: chunks)
    options: dict[str, Any] = {"fixed": True, "pieces": 2}

    def objective(*, sampled: bool) -> DataObjective:
        if by_kernels:
            return PerceptronObjective(*sources, network=found, sampled=sampled, **options)
        return DataObjective(*sources, sampled=sampled, **options)

    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    reached, products = [], []
    for sampled, most in ((False, 15), (True, 400), (True, 1)):
        # With one product allowed, the matrix of the step itself is inverted.
        monkeypatch.setattr(levenberg_marquardt, "_MOST_PRODUCTS", most)
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
        optimizer = LevenbergMarquardt(parameters, damping=0.5, weight_decay=decay)
        for _ in range(2):
            monkeypatch.setattr(levenberg_marquardt, "_MOST_PRODUCTS", most)
            optimizer.step(objective(sampled=sampled))
            assert optimizer.report is not None and optimizer.report.accepted
            products.append(optimizer.report.cg_iterations)
        reached.append(torch.cat([p.detach().reshape(-1) for p in parameters]))
        assert ("inverse" in optimizer.kept) == (most == 1)
    for other in reached[1:]:
        torch.testing.assert_close(other, reached[0], rtol=1e-7, atol=1e-9)
    assert products[0] == 0 and products[2] > 3


@pytest.mark.parametrize("method", ["levenberg_marquardt", "gauss_newton", "newton_cg", "gradient_descent"])
def test_fit_ends_where_it_does_by_torch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X = torch.randn(200, 3, dtype=torch.float64)
    y = X.sin().sum(1, keepdim=True)
    losses = []
    for by_kernels in (True, False):
        model = network([3, 8, 1], ["tanh", "identity"], dtype=torch.float64)
        torch.manual_seed(1)
        for p in model.parameters():
            nn.init.normal_(p)
        if not by_kernels:
            monkeypatch.setattr(perceptron, "find_perceptron", lambda *args: Mismatch("switched off"))
        result = onestep.fit(model, (X, y), method=method, max_steps=3, progress=False)
        losses.append([record.loss for record in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)


def test_fit_names_the_row_with_nan() -> None:
    X, y = torch.randn(100, 3), torch.randn(100, 1)
    X[17, 1] = torch.nan
    model = network([3, 4, 1], ["relu", "identity"], dtype=torch.float32)
    with pytest.raises(onestep.optim.NonFiniteError, match="first in row 17"):
        onestep.fit(model, (X, y), method="levenberg_marquardt", progress=False)


def test_vmap_of_ops_with_one_result() -> None:
    """One call for each element, stacked: the product's rows are not taken for results."""
    model = network([3, 4, 2], ["tanh", "identity"], dtype=torch.float64)
    X = torch.randn(6, 3, dtype=torch.float64)
    vector, *shape = arguments(model)
    ops = torch.ops.onestep
    V = torch.randn(5, vector.numel(), dtype=torch.float64)
    batched = torch.func.vmap(lambda v: ops.mlp_product(X, vector, v, *shape))(V)
    assert torch.equal(batched, torch.stack([ops.mlp_product(X, vector, v, *shape) for v in V]))
    tables = torch.randn(4, 6, 3, dtype=torch.float64)
    jacobians = torch.func.vmap(lambda x: ops.mlp_jacobian(x, vector, *shape, 1.0), in_dims=2)(tables.movedim(0, 2))
    assert torch.equal(jacobians, torch.stack([ops.mlp_jacobian(x, vector, *shape, 1.0) for x in tables]))


def test_vmap_of_nothing() -> None:
    """No call tells the results' shapes: they are those of one call, none of them."""
    model = network([3, 4, 2], ["tanh", "identity"], dtype=torch.float64)
    vector, *shape = arguments(model)
    ops, X, p = torch.ops.onestep, torch.randn(0, 6, 3, dtype=torch.float64), vector.numel()
    assert torch.func.vmap(lambda x: ops.mlp_product(x, vector, vector, *shape))(X).shape == (0, p)
    assert torch.func.vmap(lambda x: ops.mlp_jacobian(x, vector, *shape, 1.0))(X).shape == (0, 6, 2, p)
    loss, gradient = torch.func.vmap(lambda x: ops.mlp_gradient(x, x[:, :2], vector, *shape, True))(X)
    assert (loss.shape, gradient.shape, loss.dtype) == ((0,), (0, p), torch.float64)
