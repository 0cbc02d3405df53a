"""GLM Hessian products and gradients on a GPU, against the same in torch's own ops.

    python bench/gpu/glm.py [--out FOLDER] [--quick]

Goal: the logistic Hessian product of 4,000,000 × 256 at 80 % of the copy bandwidth measured beside it.

After timing, loss, gradient and products of all rows are compared with float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Report, interleaved, relative_error, require, top_kernels
from torch import Tensor

from onestep.curvature import glm


def torch_product(X: Tensor, W: Tensor, family: str) -> Callable[[Tensor], Tensor]:
    """XᵀC(XV) by torch, with the curvature computed beforehand."""
    if family == "softmax":
        P = (X @ W).softmax(-1)

        def product(V: Tensor) -> Tensor:
            z = X @ V
            return X.mT @ (P * (z - (P * z).sum(-1, keepdim=True)))

    else:
        p = (X @ W).sigmoid()
        C = p * (1 - p)

        def product(V: Tensor) -> Tensor:
            z = X @ V
            return X.mT @ ((C[:, None] if z.dim() > C.dim() else C) * z)

    return product


CASES = (
    # family, n, d, k (0: a vector), right-hand sides, dtype of X
    ("logistic", 4_000_000, 256, 0, 0, torch.float32),
    ("logistic", 4_000_000, 256, 0, 0, torch.bfloat16),
    ("logistic", 16_000_000, 32, 0, 0, torch.float32),
    ("logistic", 8_000_000, 128, 0, 0, torch.float32),
    ("logistic", 1_000_000, 1000, 0, 0, torch.float32),
    ("logistic", 2_000_000, 256, 0, 0, torch.float64),
    ("logistic", 4_000_000, 256, 0, 4, torch.float32),
    ("logistic", 4_000_000, 256, 0, 8, torch.float32),
    ("softmax", 4_000_000, 256, 10, 0, torch.float32),
    ("softmax", 4_000_000, 64, 3, 0, torch.float32),
    ("softmax", 1_000_000, 256, 100, 0, torch.float32),
)


def loss_and_gradient(X: Tensor, y: Tensor, W: Tensor, family: str) -> tuple[float, Tensor]:
    """The loss as a sum over rows, and its gradient, by torch in the operands' dtype."""
    with torch.enable_grad():
        W = W.detach().requires_grad_()
        eta = X @ W
        if family == "softmax":
            loss = torch.nn.functional.cross_entropy(eta, y, reduction="sum")
        else:
            loss = (torch.nn.functional.softplus(eta) - y.to(eta.dtype) * eta).sum()
        (grad,) = torch.autograd.grad(loss, W)
    return loss.item(), grad


def exact(X: Tensor, y: Tensor, W: Tensor, V: Tensor, family: str, rows: int = 1 << 17) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and products in float64, summed over chunks of rows; ``V`` may hold several directions."""
    loss, grad, products = 0.0, torch.zeros_like(W, dtype=torch.float64), torch.zeros_like(V, dtype=torch.float64)
    directions = V.double() if V.dim() > W.dim() else V.double()[None]
    for few, labels in zip(X.split(rows), y.split(rows), strict=True):
        part = loss_and_gradient(few.double(), labels, W.double(), family)
        loss, grad = loss + part[0], grad + part[1]
        product = torch_product(few.double(), W.double(), family)
        products += torch.stack([product(direction) for direction in directions]).reshape(V.shape)
    return loss, grad, products


def run(report: Report, case: tuple[str, int, int, int, int, torch.dtype], scale: int) -> None:
    family, n, d, k, m, dtype = case
    n //= scale
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator("cuda").manual_seed(n + d)
    X = torch.empty(n, d, device="cuda", dtype=dtype).normal_(generator=generator)
    shape = (d, k) if k else (d,)
    W = torch.randn(shape, device="cuda", dtype=compute, generator=generator) / d**0.5
    V = torch.randn((m, *shape) if m else shape, device="cuda", dtype=compute, generator=generator)
    if family == "softmax":
        y = torch.randint(k, (n,), device="cuda", generator=generator)
    else:
        y = (torch.rand(n, device="cuda", generator=generator) < 0.5).to(compute)
    point = glm(X, y, W, family)
    peer = torch_product(X, W, family) if dtype == compute else None
    calls: dict[str, Callable[[], object]] = {
        "onestep": lambda: point.hvp(V),
        "point": lambda: glm(X, y, W, family),
    }
    if peer is not None:
        directions = V.movedim(0, -1) if m else V
        calls["torch"] = lambda: peer(directions)
    errors: dict[str, float] = {}

    def check(results: dict[str, Any]) -> None:
        loss, grad, products = exact(X, y, W, V, family)
        their_loss, their_grad = loss_and_gradient(X.to(compute), y, W, family)
        errors["loss"] = abs(results["point"].loss.item() / loss - 1)
        errors["grad"] = relative_error(results["point"].grad, grad)
        errors["product"] = relative_error(results["onestep"], products)
        if peer is not None:
            theirs = results["torch"].movedim(-1, 0) if m else results["torch"]
            errors["torch"] = relative_error(theirs, products)
        require("the loss", errors["loss"], abs(their_loss / loss - 1), compute)
        require("the gradient", errors["grad"], relative_error(their_grad, grad), compute)
        require("the Hessian product", errors["product"], errors.get("torch", 0.0), compute)

    times = interleaved(calls, check=check)
    values = {
        "ms": times["onestep"],
        "share_of_copy": report.bandwidth_share(X.nbytes + n * max(k, 1) * compute.itemsize, times["onestep"]),
        "point_ms": times["point"],
        "point_share_of_copy": report.bandwidth_share(X.nbytes, times["point"]),
        "error": max(errors["loss"], errors["grad"], errors["product"]),
    }
    if peer is not None:
        values |= {"torch_ms": times["torch"], "ratio": times["torch"] / times["onestep"]}
    if max(k, m) > 1:
        values |= top_kernels(lambda: point.hvp(V), 4)
    sides = f", {m} right-hand sides" if m else ""
    report.row(f"{family} {n} x {d}{f' x {k}' if k else ''}{sides} {str(dtype).removeprefix('torch.')}", **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    options = parser.parse_args()
    report = Report("glm", options.out)
    with torch.no_grad():
        for case in CASES:
            report.run(run, case, 10 if options.quick else 1)
    report.end()


if __name__ == "__main__":
    main()
