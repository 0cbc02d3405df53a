"""Linear heads under cross-entropy and Poisson losses, fitted through the GLM kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

import onestep
from onestep.evaluation.data import Chunk
from onestep.evaluation.losses import as_loss
from onestep.evaluation.parameters import ParameterVector
from onestep.training import facts
from onestep.training.methods import quasi_newton
from onestep.training.objective import DataObjective
from onestep.training.structures import glm_head
from onestep.training.structures.affine_head import Head, find_head
from onestep.training.structures.base import Mismatch
from onestep.training.structures.glm_head import HeadObjective

HEADS = {
    "linear": (lambda: nn.Linear(6, 4), (30, 5), "cross_entropy"),
    "without a bias": (lambda: nn.Linear(6, 4, bias=False), (30, 5), "cross_entropy"),
    "sequences": (lambda: nn.Linear(6, 4), (10, 3, 5), "cross_entropy"),
    "convolution": (lambda: nn.Conv2d(6, 4, 1), (8, 5, 2, 3), "cross_entropy"),
    "poisson": (lambda: nn.Linear(6, 1), (30, 5), "poisson"),
    "poisson, two outputs": (lambda: nn.Linear(6, 2), (30, 5), "poisson"),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor, str]:
    """A frozen body with a head, its data, and the loss."""
    torch.manual_seed(0)
    make, shape, loss = HEADS[name]
    head = make()
    body = nn.Conv2d(5, 6, 1) if isinstance(head, nn.Conv2d) else nn.Linear(5, 6)
    model = nn.Sequential(body.requires_grad_(False), nn.Tanh(), head).double()
    inputs = torch.randn(shape, dtype=torch.float64)
    outputs = model(inputs)
    if loss == "poisson":
        return model, inputs, torch.poisson(outputs.exp()).detach(), loss
    target = torch.randint(4, (*shape[:-1],) if len(shape) < 4 else (shape[0], *shape[2:]))
    target.view(-1)[::7] = -100
    return model, inputs, target, loss


def objectives(name: str) -> tuple[ParameterVector, DataObjective, HeadObjective]:
    model, inputs, target, loss = problem(name)
    parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
    chunk = Chunk(inputs, target)
    parts = [chunk.rows(slice(0, 5)), chunk.rows(slice(5, None))]
    head = find_head(model, parameters, chunk)
    assert isinstance(head, Head), head
    arguments = model, as_loss(loss), lambda: parts, lambda: parts
    return parameters, DataObjective(*arguments, fixed=True), HeadObjective(*arguments, fixed=True, head=head)


@pytest.mark.parametrize("name", HEADS)
def test_products_are_those_of_the_model(name: str) -> None:
    parameters, general, head = objectives(name)
    v = torch.randn(len(parameters), dtype=torch.float64)
    for hessian in (False, True):
        expected = general.curvature(parameters, hessian=hessian)(v)
        torch.testing.assert_close(head.curvature(parameters, hessian=hessian)(v), expected, rtol=1e-10, atol=1e-12)


def twice(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _layer, _args, outputs: 2 * outputs)


def patched(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda inputs: 2 * forward(inputs)  # type: ignore[method-assign]


CHANGES = {
    "forward hook": twice,
    "patched forward": patched,
    "spectral norm": torch.nn.utils.spectral_norm,
    "parametrized": torch.nn.utils.parametrizations.spectral_norm,
    "pruned": lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", amount=2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_a_changed_layer_is_fitted_as_it_is(name: str, change: str) -> None:
    """Hooks, patches and parametrizations make it another function of its parameters: no kernel of ours is meant."""
    model, inputs, target, loss = problem(name)
    CHANGES[change](model[2])
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert isinstance(find_head(model, ParameterVector(trained), Chunk(inputs, target)), Mismatch)
    options = {"method": "newton_cg", "weight_decay": 1e-3, "max_steps": 2, "progress": False}
    result = onestep.fit(model, (inputs, target), loss, **options)
    value = as_loss(loss).sum(model(inputs), target) / as_loss(loss).elements(target, len(inputs))
    assert result.loss < result.initial_loss
    assert result.loss == pytest.approx((value + 5e-4 * sum(p.square().sum() for p in trained)).item(), rel=1e-10)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("largest", [1024, 8])
def test_preconditioner_is_the_inverse_of_hessian_or_blocks(
    monkeypatch: pytest.MonkeyPatch, name: str, largest: int
) -> None:
    monkeypatch.setattr(glm_head, "_LARGEST_FACTOR", largest)
    parameters, general, head = objectives(name)
    damping = 0.1
    p = len(parameters)
    product = general.curvature(parameters, hessian=True)
    H = torch.stack([product(row) for row in torch.eye(p, dtype=torch.float64)])
    if p > largest:
        # Which output a parameter belongs to: rows of the weight, then the bias.
        weight = parameters.tensors[0]
        owner = torch.arange(len(weight)).repeat_interleave(weight[0].numel())
        owner = torch.cat((owner, torch.arange(p - len(owner))))
        H = H * (owner[:, None] == owner)
    precondition = head.preconditioner(parameters)
    assert precondition is not None
    v = torch.randn(p, dtype=torch.float64)
    expected = torch.linalg.solve(H + damping * torch.eye(p, dtype=torch.float64), v)
    torch.testing.assert_close(precondition(damping)(v), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("method", ["newton_cg", "gauss_newton"])
def test_fit_reaches_the_minimum(name: str, method: str) -> None:
    model, inputs, target, loss = problem(name)
    result = onestep.fit(model, (inputs, target), loss, method=method, weight_decay=1e-3, tol=1e-9, progress=False)
    assert result.converged
    value = as_loss(loss).sum(model(inputs), target) / as_loss(loss).elements(target, len(inputs))
    trained = [p for p in model.parameters() if p.requires_grad]
    penalty = 5e-4 * sum(p.square().sum() for p in trained)
    slopes = torch.autograd.grad(value + penalty, trained)
    assert max(slope.abs().max().item() for slope in slopes) < 1e-7


def test_planning_looks_for_the_head_once(monkeypatch):
    """quasi_newton asks for it, and declines; the objective of newton_cg asks again."""
    looked = []
    monkeypatch.setattr(facts, "find_head", lambda *args: looked.append(1) or find_head(*args))
    torch.manual_seed(0)
    body, head = nn.Linear(3, 100).requires_grad_(False), nn.Linear(100, 60)
    model = nn.Sequential(body, nn.Tanh(), head)
    monkeypatch.setattr(quasi_newton, "unsuitable", lambda *args: Mismatch("as the test wants it"))
    data = torch.randn(40, 3), torch.randint(60, (40,))
    result = onestep.fit(model, data, "cross_entropy", max_steps=2, progress=False)
    assert result.method == "newton_cg"
    assert "not quasi_newton: as the test wants it" in result.reasons
    assert len(looked) == 1
