"""The language-model head on a GPU: Gauss-Newton and Hessian products, gradients, against compositions with the logits.

    python bench/gpu/lmhead.py [--out FOLDER] [--quick] [--tune]

Goal: N 16,384, D 2,048, V 50,304 in bf16: both products without an N × V array and no slower than the composition.

After timing, products and gradients are compared with float64: within twice the error of torch in the operands'
dtype.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measure import Report, added_bytes, interleaved, largest_error, require, top_kernels
from torch import Tensor

from onestep.functional.lmhead import linear_cross_entropy, linear_cross_entropy_ggnvp, linear_cross_entropy_hvp

Pair = tuple[Tensor, Tensor]


def composition(H: Tensor, W: Tensor, y: Tensor, dH: Tensor, dW: Tensor, gauss_newton: bool) -> Pair:
    """The product as written by hand in torch: all logits, in the operands' dtype, softmax in float32 at least."""
    z = H @ W.mT
    dz = torch.addmm(dH @ W.mT, H, dW.mT)
    P = z.softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))
    mean = (P * dz).sum(-1, keepdim=True)
    main = (P * (dz - mean) / len(y)).to(H.dtype)
    if gauss_newton:
        return main @ W, main.mT @ H
    P[torch.arange(len(y), device=y.device), y] -= 1
    cross = (P / len(y)).to(H.dtype)
    return torch.addmm(main @ W, cross, dW), torch.addmm(main.mT @ H, cross.mT, dH)


def by_autograd(H: Tensor, W: Tensor, y: Tensor, dH: Tensor, dW: Tensor) -> Pair:
    """The Hessian product as most users get it: the gradient of ⟨gradient, vector⟩."""
    with torch.enable_grad():
        h, w = H.detach().requires_grad_(), W.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy((h @ w.mT).float(), y)
        grads = torch.autograd.grad(loss, (h, w), create_graph=True)
        along = (grads[0] * dH).sum() + (grads[1] * dW).sum()
        return torch.autograd.grad(along, (h, w))


def in_double(H: Tensor, W: Tensor, y: Tensor, dH: Tensor, dW: Tensor, gauss_newton: bool, rows: int = 1024) -> Pair:
    """The product in float64, over chunks of rows: float64 logits of all rows would not fit."""
    weight, direction = W.double(), dW.double()
    of_H, of_W = [], torch.zeros_like(weight)
    for h, labels, dh in zip(H.split(rows), y.split(rows), dH.split(rows), strict=True):
        # The composition is of a mean over its rows.
        part = composition(h.double(), weight, labels, dh.double(), direction, gauss_newton)
        of_H.append(part[0] * (len(h) / len(H)))
        of_W += part[1] * (len(h) / len(H))
    return torch.cat(of_H), of_W


def gradient_in_double(H: Tensor, W: Tensor, y: Tensor, rows: int = 1024) -> Pair:
    """The gradient of the mean loss in float64, over chunks of rows."""
    weight = W.detach().double().requires_grad_()
    of_H, of_W = [], torch.zeros_like(weight)
    for few, labels in zip(H.detach().split(rows), y.split(rows), strict=True):
        with torch.enable_grad():
            h = few.double().requires_grad_()
            loss = torch.nn.functional.cross_entropy(h @ weight.mT, labels, reduction="sum") / len(H)
            part = torch.autograd.grad(loss, (h, weight))
        of_H.append(part[0])
        of_W += part[1]
    return torch.cat(of_H), of_W


def operands(n: int, d: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(n + classes)
    H = torch.randn(n, d, device="cuda").to(dtype)
    W = (torch.randn(classes, d, device="cuda") / d**0.5).to(dtype)
    y = torch.randint(classes, (n,), device="cuda")
    dH = (torch.randn(n, d, device="cuda") * 0.1).to(dtype)
    dW = (torch.randn(classes, d, device="cuda") * 0.1 / d**0.5).to(dtype)
    return H, W, y, dH, dW


def check_products(
    problem: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], results: dict[str, Any], errors: dict[str, float]
) -> None:
    """Holds both products to float64, within twice the error of the composition in the operands' dtype."""
    for name, gauss_newton in (("ggn", True), ("hvp", False)):
        expected = in_double(*problem, gauss_newton)
        errors[f"{name}_error"] = largest_error(results[name][:2], expected)
        errors[f"{name}_composition_error"] = largest_error(results[f"{name}_composition"], expected)
        require(f"the product {name}", errors[f"{name}_error"], errors[f"{name}_composition_error"])


def run(report: Report, n: int, d: int, classes: int, dtype: torch.dtype) -> None:
    H, W, y, dH, dW = operands(n, d, classes, dtype)
    vector = (dH, dW, None)
    calls = {
        "ggn": lambda: linear_cross_entropy_ggnvp(H, W, y, vector),
        "ggn_composition": lambda: composition(H, W, y, dH, dW, True),
        "hvp": lambda: linear_cross_entropy_hvp(H, W, y, vector),
        "hvp_composition": lambda: composition(H, W, y, dH, dW, False),
        "hvp_autograd": lambda: by_autograd(H, W, y, dH, dW),
    }
    errors: dict[str, float] = {}
    times = interleaved(calls, 5, lambda results: check_products((H, W, y, dH, dW), results, errors))
    flops = 2 * n * d * classes
    memory = {f"{name}_added_bytes": added_bytes(call) for name, call in calls.items()}
    report.row(
        f"products {n} x {d} x {classes} {str(dtype).removeprefix('torch.')}",
        ggn_ms=times["ggn"],
        ggn_ratio=times["ggn_composition"] / times["ggn"],
        ggn_share_of_gemm=report.gemm_share(5 * flops, times["ggn"]),
        hvp_ms=times["hvp"],
        hvp_ratio=times["hvp_composition"] / times["hvp"],
        hvp_autograd_ratio=times["hvp_autograd"] / times["hvp"],
        hvp_share_of_gemm=report.gemm_share(7 * flops, times["hvp"]),
        **memory,
        **top_kernels(calls["ggn"], 10),
        **errors,
    )


def run_gradient(report: Report, n: int, d: int, classes: int, dtype: torch.dtype) -> None:
    H, W, y, _, _ = operands(n, d, classes, dtype)

    def ours() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            h, w = H.detach().requires_grad_(), W.detach().requires_grad_()
            return torch.autograd.grad(linear_cross_entropy(h, w, y), (h, w))

    def theirs() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            h, w = H.detach().requires_grad_(), W.detach().requires_grad_()
            return torch.autograd.grad(torch.nn.functional.cross_entropy((h @ w.mT).float(), y), (h, w))

    errors: dict[str, float] = {}

    def check(results: dict[str, Any]) -> None:
        expected = gradient_in_double(H, W, y)
        errors["error"] = largest_error(results["ours"], expected)
        errors["torch_error"] = largest_error(results["torch"], expected)
        require("the gradient", errors["error"], errors["torch_error"])

    times = interleaved({"ours": ours, "torch": theirs}, 5, check)
    report.row(
        f"gradient {n} x {d} x {classes} {str(dtype).removeprefix('torch.')}",
        ms=times["ours"],
        ratio=times["torch"] / times["ours"],
        share_of_gemm=report.gemm_share(6 * n * d * classes, times["ours"]),
        added_bytes=added_bytes(ours),
        torch_added_bytes=added_bytes(theirs),
        **errors,
    )


def tune(report: Report, n: int, d: int, classes: int, dtype: torch.dtype) -> None:
    """The products' times for other sizes of chunks of rows and blocks of classes than the kernel's."""
    from onestep.ops import _products
    from onestep.ops.lmhead import cuda

    H, W, y, dH, dW = operands(n, d, classes, dtype)
    before = cuda._CHUNK_BYTES, cuda._BLOCK_BYTES
    values: dict[str, float] = {"adds_to_float32": float(_products._adds_to_float32())}
    for chunk in (1 << 29, 1 << 30, 1 << 31):
        for block in (32 << 20, 128 << 20, 1 << 40):
            cuda._CHUNK_BYTES, cuda._BLOCK_BYTES = chunk, block
            times = interleaved(
                {
                    "ggn": lambda: linear_cross_entropy_ggnvp(H, W, y, (dH, dW, None)),
                    "hvp": lambda: linear_cross_entropy_hvp(H, W, y, (dH, dW, None)),
                },
                rounds=3,
            )
            name = f"{chunk >> 20} MiB by {min(block, chunk) >> 20} MiB"
            values |= {f"{name} ggn_ms": times["ggn"], f"{name} hvp_ms": times["hvp"]}
    cuda._CHUNK_BYTES, cuda._BLOCK_BYTES = before
    report.row("sizes of chunks and blocks", **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows")
    parser.add_argument("--tune", action="store_true", help="other sizes of chunks and blocks, too")
    options = parser.parse_args()
    report = Report("lmhead", options.out)
    rows = 4096 if options.quick else 16384
    with torch.no_grad():
        report.run(run, rows, 2048, 50304, torch.bfloat16)
        report.run(run_gradient, rows, 2048, 50304, torch.bfloat16)
        if options.tune:
            report.run(tune, rows, 2048, 50304, torch.bfloat16)
        report.run(run, 2048, 768, 50257, torch.float16)
        report.run(run, 2048, 768, 50257, torch.float32)
    report.end()


if __name__ == "__main__":
    main()
