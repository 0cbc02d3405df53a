"""Activation checkpoints (torch.utils.checkpoint): a backward pass computes their part of a model anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ops import SAMPLES, Make, elsewhere_samples, samples_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from onestep.curvature import ggnvp, hvp
from onestep.functional import scaled_dot_product_attention


def gradients(function: Callable[..., Any], inputs: tuple[Any, ...], *, checkpointed: bool) -> list[Tensor]:
    """Of a scalar of the differentiable results; and of a scalar of these gradients, where they have a graph."""
    torch.manual_seed(1)

    def scalar(*inputs: Any) -> Tensor:
        results = function(*inputs)
        results = (results,) if isinstance(results, Tensor) else results
        return sum(
            (r.square().sum() + r.sum() for r in results if isinstance(r, Tensor) and r.requires_grad),
            torch.zeros((), dtype=torch.float64),
        )

    leaves = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.requires_grad]
    value = checkpoint(scalar, *inputs, use_reentrant=False) if checkpointed else scalar(*inputs)
    first = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
    moving = sum((g.square().sum() for g in first if g.requires_grad), torch.zeros((), dtype=torch.float64))
    if not moving.requires_grad:
        return list(first)
    return [*first, *torch.autograd.grad(moving, leaves, materialize_grads=True)]


def assert_same(function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    expected = gradients(function, inputs, checkpointed=False)
    found = gradients(function, inputs, checkpointed=True)
    assert len(expected) == len(found) and all(map(torch.equal, found, expected))


# Perceptrons, polar factors and the factors behind compensated sweeps have no derivatives.
DIFFERENTIABLE = [(name, label) for name, label in SAMPLES if name != "moments"]
DIFFERENTIABLE += [
    (name, None) for name in ("apply_segments_inverse", "solve_normal_segments_ex", "solve_normal_segments")
]


@pytest.mark.parametrize(("name", "label"), DIFFERENTIABLE, ids=str)
def test_ops(name: str, label: str | None) -> None:
    """Their backward reads what was saved once: a checkpoint gives each tensor once a pass."""
    make = Make(torch.float64, requires_grad=True)
    inputs = elsewhere_samples(make)[name] if label is None else samples_of(name, make)[label]
    if not any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs):
        pytest.skip("nothing to differentiate by")
    assert_same(getattr(torch.ops.onestep, name), inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked: bool) -> None:
    q, k, v = (torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.randn(5, 5, dtype=torch.float64, requires_grad=True) if masked else None

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, is_causal=not masked)

    assert_same(attention, (q, k, v, mask))


class Encoder(nn.Module):
    """A transformer. Products with its curvature take onestep's attention in the place of torch's."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5, dtype=torch.float64)

    def forward(self, x: Tensor, checkpointed: bool) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False) if checkpointed else self.body(x)).mean(1)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_products_of_a_transformer(kind: str, recorded: bool) -> None:
    """A checkpoint's second run finds the kernels of the first one."""
    model, x, y = Encoder(), torch.randn(3, 4, 8, dtype=torch.float64), torch.randint(5, (3,))
    point = {name: value.detach() for name, value in model.named_parameters()}
    v = {name: torch.randn_like(value) for name, value in point.items()}

    def product(checkpointed: bool) -> dict[str, Tensor]:
        def outputs(values: dict[str, Tensor]) -> Tensor:
            return functional_call(model, values, (x, checkpointed))

        if kind == "hessian":
            return hvp(lambda values: F.cross_entropy(outputs(values), y), point, v)
        return ggnvp(outputs, lambda z: F.cross_entropy(z, y), point, v)

    with torch.set_grad_enabled(recorded):
        found, expected = product(True), product(False)
    for name in point:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11)
