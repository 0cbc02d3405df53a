"""Heads of a language model, and torch's cross-entropy, for the tests of linear_cross_entropy."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from onestep.ops import _cuda

F64 = torch.float64

# On CUDA the products are torch's: operands are rounded once more there, and bits depend on layout and, in emulation,
# on threads. test_cuda_glm_lmhead_polar.py says what holds instead.
cpu_kernels_only = pytest.mark.skipif(_cuda.EMULATED, reason="holds of the CPU kernels")


def reference(input, weight, target, bias=None, *, reduction="mean", **options):
    """By torch's own ops, with the logits."""
    logits = F.linear(input, weight, bias).reshape(-1, weight.shape[0])
    losses = F.cross_entropy(logits, target.reshape(-1), reduction=reduction, **options)
    return losses.reshape(target.shape) if reduction == "none" else losses


def head(*rows, d=6, v=11, bias=True, dtype=F64, ignored=2):
    """input (…,d), weight (v,d), target (…), bias (v,), a few of the targets ignored."""
    input, weight = torch.randn(*rows, d, dtype=dtype), torch.randn(v, d, dtype=dtype) / d**0.5
    target = torch.randint(v, rows)
    target.view(-1)[1 : 1 + ignored] = -100
    return input, weight, target, torch.randn(v, dtype=dtype) if bias else None


def derivatives(function, input, weight, target, bias, **options):
    """Loss, gradient, and Hessian-vector product by double backward."""
    leaves = [value.detach().clone().requires_grad_() for value in (input, weight, bias) if value is not None]
    loss = function(leaves[0], leaves[1], target, *leaves[2:], **options)
    total = (loss * torch.linspace(0.5, 1.5, loss.numel()).to(loss.dtype).reshape(loss.shape)).sum()
    gradient = torch.autograd.grad(total, leaves, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(leaf.shape, generator=generator, dtype=F64).to(leaf.dtype) for leaf in leaves]
    return loss.detach(), *(g.detach() for g in gradient), *torch.autograd.grad(gradient, leaves, direction)


OPTIONS = [
    {"reduction": reduction, "label_smoothing": smoothing}
    for reduction, smoothing in product(("mean", "sum", "none"), (0.0, 0.1, 1.0))
]

# Rows, features and classes around the edges of tiles, panels, blocks and chunks.
SIZES = [(1, 1, 2), (5, 3, 7), (25, 24, 49), (23, 257, 130), (500, 5, 33), (40, 7, 2100)]
