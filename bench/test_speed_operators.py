"""Curvature operators against curvlinops': the same products, one vector at a time and in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import agree
from torch import Tensor, nn

from onestep.curvature import GaussNewtonOperator, HessianOperator

curvlinops = pytest.importorskip("curvlinops", reason="needs the peer: pip install curvlinops-for-pytorch")

PEERS = {HessianOperator: "HessianLinearOperator", GaussNewtonOperator: "GGNLinearOperator"}


class Block(nn.Module):
    """Attention written out, since the peer has no derivative of the fused one, and RMS norm.

    With nn.LayerNorm the peer's Hessian products are off by 0.9 % under torch 2.13, against double backward in float64.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """Next-token scores (n,C,T), classes second as nn.CrossEntropyLoss has them, from tokens (n,T)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(65, 64)
        self.body = nn.Sequential(Block(64, 4), Block(64, 4))
        self.head = nn.Linear(64, 65)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens))).mT


def mlp() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10))
    generator = torch.Generator().manual_seed(0)
    sizes = (512, 512, 512, 300)
    return model, [
        (torch.randn(n, 784, generator=generator), torch.randint(10, (n,), generator=generator)) for n in sizes
    ]


def transformer() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(65, (2, n, 32), generator=generator) for n in (32, 32, 20)]
    return Transformer(), [(inputs, target) for inputs, target in batches]


@pytest.mark.benchmark(group="operators")
@pytest.mark.parametrize("vectors", [1, 8])
@pytest.mark.parametrize("problem", [mlp, transformer])
@pytest.mark.parametrize("operator", PEERS)
def test_product(compare: Callable[..., float], operator: Any, problem: Any, vectors: int) -> None:
    torch.manual_seed(0)
    model, data = problem()
    ours = operator(model, data, "cross_entropy", progress=False)
    peer = getattr(curvlinops, PEERS[operator])(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, check_deterministic=False
    )
    v = torch.randn(ours.shape[0], vectors, generator=torch.Generator().manual_seed(0)).squeeze(1)
    compare(
        lambda: ours @ v,
        lambda: peer @ v,
        case=f"{operator.__name__} of {ours.shape[0]:,}, {problem.__name__}, {vectors} at once; peer: curvlinops",
        check=lambda found, expected: agree(found, expected, 1e-5),
        goal=1.0,
    )
