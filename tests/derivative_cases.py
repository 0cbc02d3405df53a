"""Leaves, references and gradients for the tests of derivatives."""

import torch
import torch.utils.checkpoint

from onestep.linalg import (
    solve_normal_ex,
)

F64 = torch.float64


def composite(X, Y, weight=None, ridge=None):
    """solve_normal by torch's own ops; ``ridge`` is (…,d)."""
    rows = X if weight is None else X * weight.unsqueeze(-1)
    A = rows.mT @ X
    if ridge is not None:
        A = A + torch.diag_embed(ridge)
    return torch.cholesky_solve(rows.mT @ Y, torch.linalg.cholesky(A))


def spd(*shape, dtype=F64):
    root = torch.randn(*shape, shape[-1], dtype=dtype)
    return root @ root.mT + shape[-1] * torch.eye(shape[-1], dtype=dtype)


def leaf(*shape):
    return torch.randn(shape, dtype=F64).requires_grad_()


def positive_leaf(*shape):
    return (torch.rand(shape, dtype=F64) + 0.5).requires_grad_()


def leaves(values, dtype=F64):
    """Fresh leaves that require grad, None where there is nothing."""
    return [None if value is None else value.detach().to(dtype).clone().requires_grad_() for value in values]


def gradients(output, inputs, cotangent, create_graph=False):
    """The gradients of every given input that takes part, in order."""
    given = [value for value in inputs if value is not None]
    return torch.autograd.grad(output, given, cotangent, create_graph=create_graph)


def ex_solution(*args, **kwargs):
    return solve_normal_ex(*args, **kwargs).solution


def rows(n, d, k, batch=()):
    return (
        torch.randn(*batch, n, d, dtype=F64),
        torch.randn(*batch, n, k, dtype=F64),
        torch.rand(*batch, n, dtype=F64) + 0.1,
        torch.rand(*batch, d, dtype=F64) + 0.1,
    )
