"""The ways to a derivative of a language-model head, and the peak RSS that one of them adds.

Run in a fresh process: WAY N D V prints the bytes added by results and temporaries together, then the results' own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from agreement import agree
from ridge_memory import status
from torch import Tensor
from torch.func import grad, jvp

import onestep
from onestep.functional import linear_cross_entropy, linear_cross_entropy_hvp


class Head(NamedTuple):
    """Input (N,D), weight (V,D), bias (V,), a direction in each, and targets."""

    operands: tuple[Tensor, Tensor, Tensor]
    direction: tuple[Tensor, Tensor, Tensor]
    target: Tensor

    @classmethod
    def random(cls, n: int, d: int, v: int) -> Head:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        direction = normal(n, d), normal(v, d), normal(v)
        target = torch.randint(v, (n,), generator=generator)
        return cls((normal(n, d), normal(v, d).div_(d**0.5), normal(v)), direction, target)

    def to(self, dtype: torch.dtype) -> Head:
        operands, direction = ((h.to(dtype), w.to(dtype), b.to(dtype)) for h, w, b in self[:2])
        return Head(operands, direction, self.target)


Loss = Callable[[Head], Callable[..., Tensor]]


def torch_loss(head: Head) -> Callable[..., Tensor]:
    def loss(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.cross_entropy(h @ w.T if b is None else h @ w.T + b, head.target)

    return loss


def onestep_loss(head: Head) -> Callable[..., Tensor]:
    return lambda h, w, b=None: linear_cross_entropy(h, w, head.target, b)


def leaves(head: Head) -> list[Tensor]:
    return [operand.detach().requires_grad_() for operand in head.operands]


def gradient(of: Loss, head: Head) -> Sequence[Tensor]:
    """Forward and backward, in input and weight."""
    h, w, _ = leaves(head)
    of(head)(h, w).backward()
    assert h.grad is not None and w.grad is not None
    return h.grad, w.grad


def double_backward(of: Loss, head: Head) -> Sequence[Tensor]:
    operands = leaves(head)
    gradients = torch.autograd.grad(of(head)(*operands), operands, create_graph=True)
    return torch.autograd.grad(gradients, operands, head.direction)


def jvp_of_grad(of: Loss, head: Head) -> Sequence[Tensor]:
    products: Sequence[Tensor] = jvp(grad(of(head), (0, 1, 2)), head.operands, head.direction)[1]
    return products


def curvature_hvp(head: Head) -> Sequence[Tensor]:
    names = ("h", "w", "b")
    of = onestep_loss(head)
    parameters, direction = (dict(zip(names, values, strict=True)) for values in (head.operands, head.direction))
    return list(onestep.curvature.hvp(lambda p: of(*p.values()), parameters, direction).values())


def functional_hvp(head: Head) -> Sequence[Tensor]:
    h, w, b = head.operands
    products = linear_cross_entropy_hvp(h, w, head.target, head.direction, b)
    return [product for product in products if product is not None]


WAYS: dict[str, Callable[[Head], Sequence[Tensor]]] = {
    "torch gradient": lambda head: gradient(torch_loss, head),
    "torch double backward": lambda head: double_backward(torch_loss, head),
    "torch jvp of grad": lambda head: jvp_of_grad(torch_loss, head),
    "onestep gradient": lambda head: gradient(onestep_loss, head),
    "onestep double backward": lambda head: double_backward(onestep_loss, head),
    "onestep curvature.hvp": curvature_hvp,
    "onestep linear_cross_entropy_hvp": functional_hvp,
}


def check(name: str, results: Sequence[Tensor], head: Head, rows: int = 64) -> None:
    """The input's first rows against float64: each depends on its own row, on the weight and on the bias alone."""
    few = Head(
        (head.operands[0][:rows], *head.operands[1:]),
        (head.direction[0][:rows], *head.direction[1:]),
        head.target[:rows],
    )
    exact = WAYS["torch gradient" if "gradient" in name else "torch jvp of grad"](few.to(torch.float64))[0]
    agree(results[0][:rows], exact * min(rows, len(head.target)) / len(head.target))  # of a mean over all rows


def main() -> None:
    way = WAYS[sys.argv[1]]
    torch.set_num_threads(2)
    way(Head.random(16, 8, 64))  # loads what is loaded on first use
    head = Head.random(*map(int, sys.argv[2:5]))
    before = status("VmRSS")
    results = way(head)
    print(max(0, status("VmHWM") - before), sum(4 * result.numel() for result in results))
    check(sys.argv[1], results, head)


if __name__ == "__main__":
    main()
