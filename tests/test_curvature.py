"""hvp and ggnvp against dense matrices, and through attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import cross_entropy

from onestep.curvature import ggnvp, hvp


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0, 0])


def test_products_are_those_of_the_dense_matrices(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, classes = problem
    params = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in params.values()]
    flat = torch.cat([p.reshape(-1) for p in params.values()])

    def unflatten(vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split(sizes)
        return {name: part.reshape(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}

    def outputs(vector: Tensor) -> Tensor:
        return functional_call(model, unflatten(vector), (x,))

    def loss(z: Tensor) -> Tensor:
        return cross_entropy(z, classes)

    v = torch.randn_like(flat)
    dense = hessian(lambda p: loss(outputs(p)))(flat)
    torch.testing.assert_close(hvp(lambda p: loss(outputs(p)), flat, v), dense @ v)
    named = hvp(lambda p: loss(functional_call(model, p, (x,))), params, unflatten(v))
    torch.testing.assert_close(torch.cat([part.reshape(-1) for part in named.values()]), dense @ v)
    J = jacrev(outputs)(flat).reshape(-1, len(flat))
    z = outputs(flat)
    H = hessian(loss)(z).reshape(z.numel(), z.numel())
    torch.testing.assert_close(ggnvp(outputs, loss, flat, v), J.mT @ (H @ (J @ v)))


def test_products_go_through_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    u, v = ({name: torch.randn_like(p) for name, p in params.items()} for _ in range(2))

    def loss(p: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, p, (x,)).pow(3).mean()

    def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return sum((a[name] * b[name]).sum() for name in a)

    torch.testing.assert_close(dot(u, hvp(loss, params, v)), dot(v, hvp(loss, params, u)))
    step = 1e-5
    moved = [torch.func.grad(loss)({n: p + s * v[n] for n, p in params.items()}) for s in (step, -step)]
    finite = {name: (moved[0][name] - moved[1][name]) / (2 * step) for name in params}
    torch.testing.assert_close(dot(u, hvp(loss, params, v)), dot(u, finite), rtol=1e-6, atol=1e-8)


def test_tangents_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"v has shape \(3,\)"):
        hvp(lambda p: p.square().sum(), torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="different names: b"):
        hvp(lambda p: p["a"].sum(), {"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected a scalar"):
        hvp(lambda p: p.square(), torch.zeros(2), torch.zeros(2))
