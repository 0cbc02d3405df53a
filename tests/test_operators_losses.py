"""Operators of losses that read the model's parameters beside its outputs, as a penalty does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestep.curvature import FisherOperator, GaussNewtonOperator, HessianOperator


def by_autograd(model: nn.Module, X: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The Hessian by reverse mode twice."""
    own = list(model.parameters())
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(X), y), own, create_graph=True)])
    rows = [torch.autograd.grad(s, own, retain_graph=True, materialize_grads=True) for s in slope]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return torch.randn(17, 3, dtype=torch.float64), torch.randn(17, 2, dtype=torch.float64)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("penalty", ["a weight", "all parameters", "compiled"])
def test_hessian_has_the_penalty(
    model: nn.Sequential, data: tuple[Tensor, Tensor], penalty: str, chunk_size: int | None
) -> None:
    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        chosen = [model[2].weight] if penalty == "a weight" else list(model.parameters())
        return F.mse_loss(outputs, target) + 0.1 * sum((p**4).sum() for p in chosen)

    called = torch.compile(model, backend="eager") if penalty == "compiled" else model
    H = HessianOperator(called, data, loss, chunk_size=chunk_size)
    found = H @ torch.eye(H.shape[1], dtype=torch.float64)
    torch.testing.assert_close(found, by_autograd(model, *data, loss), rtol=1e-12, atol=1e-14)


def test_gauss_newton_and_fisher_refuse_a_penalty(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(outputs, target) + 0.1 * model[2].weight.square().sum()

    with pytest.raises(ValueError, match=r"beside the outputs, of which GaussNewtonOperator has no part.*damping="):
        GaussNewtonOperator(model, data, loss)
    with pytest.raises(ValueError, match="of which FisherOperator has no part"):
        FisherOperator(model, data, loss, kind="empirical")


def test_parameters_that_the_loss_holds_are_refused(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    held = list(model.parameters())

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(outputs, target) + 0.1 * sum(p.square().sum() for p in held)

    with pytest.raises(ValueError, match="loss holds parameters of the model itself"):
        HessianOperator(model, data, loss)


def test_parameters_of_the_loss_alone_are_none_of_the_model(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    """A learned variance, which the operator's matrix is not about."""
    scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(outputs, target) * scale.exp() - scale

    for kind in (HessianOperator, GaussNewtonOperator):
        op = kind(model, data, loss)
        assert (op @ torch.ones(op.shape[1], dtype=torch.float64)).isfinite().all()
