"""Prints the bytes of peak RSS that a Hessian-vector product through attention adds; run in a fresh process.

Usage: WAY LENGTH, with WAY onestep, or on torch's math backend double_backward or jvp_of_grad. B 1, H 8, D 64, fp32,
causal.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from agreement import agree
from ridge_memory import status
from torch import Tensor, func
from torch.nn.attention import SDPBackend, sdpa_kernel

from onestep.functional import scaled_dot_product_attention


def products(way: str, operands: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Any:
    """Hv of the sum of the squared outputs."""
    attention: Any = scaled_dot_product_attention if way == "onestep" else F.scaled_dot_product_attention

    def loss(*operands: Tensor) -> Tensor:
        total: Tensor = attention(*operands, is_causal=True).square().sum()
        return total

    with sdpa_kernel(SDPBackend.MATH):
        if way == "double_backward":
            operands = tuple(x.requires_grad_() for x in operands)
            gradients = torch.autograd.grad(loss(*operands), operands, create_graph=True)
            return torch.autograd.grad(gradients, operands, v)
        return func.jvp(func.grad(loss, (0, 1, 2)), operands, v)[1]


def check(results: Any, operands: tuple[Tensor, ...], v: tuple[Tensor, ...], rows: int = 64) -> None:
    """The products of the last rows against float64: only the last queries see the last keys, so no more is needed."""
    length = operands[0].shape[-2]
    rows = min(rows, length)
    seen = torch.arange(length) <= torch.arange(length - rows, length)[:, None]

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ value).square().sum()

    def needed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        query, key, value = (x.detach().double() for x in tensors)
        return query[..., -rows:, :], key, value

    expected = func.jvp(func.grad(loss, (0, 1, 2)), needed(operands), needed(v))[1]
    agree([found[..., -rows:, :] for found in results], [exact[..., -rows:, :] for exact in expected])


def main() -> None:
    way, length = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(2)
    draw = [tuple(torch.randn(1, 8, size, 64) for _ in range(6)) for size in (16, length)]
    products(way, draw[0][:3], draw[0][3:])  # loads what is loaded on first use
    before = status("VmRSS")
    results = products(way, draw[1][:3], draw[1][3:])
    print(max(0, status("VmHWM") - before))
    check(results, draw[1][:3], draw[1][3:])


if __name__ == "__main__":
    main()
