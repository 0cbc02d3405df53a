"""The language-model head on a GPU: Gauss-Newton and Hessian products, gradients, against compositions with the logits.

    python bench/gpu/lmhead.py [--out FOLDER] [--quick] [--tune]

Goal: N 16,384, D 2,048, V 50,304 in bf16: both products without an N × V array and no slower than the composition.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import Report, added_bytes, interleaved, relative_error, top_kernels
from torch import Tensor

from onestep.functional.lmhead import linear_cross_entropy, linear_cross_entropy_ggnvp, linear_cross_entropy_hvp

Pair = tuple[Tensor, Tensor]


def composition(H: Tensor, W: Tensor, y: Tensor, dH: Tensor, dW: Tensor, gauss_newton: bool) -> Pair:
    """The product as one writes it by hand in torch: all logits, in the operands' dtype, float32 within softmax."""
    z = H @ W.mT
    dz = torch.addmm(dH @ W.mT, H, dW.mT)
    P = z.softmax(-1, dtype=torch.float32)
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


def in_double(H: Tensor, W: Tensor, y: Tensor, dH: Tensor, dW: Tensor, gauss_newton: bool) -> Pair:
    """The product in float64."""
    return composition(*(t.double() for t in (H, W)), y, *(t.double() for t in (dH, dW)), gauss_newton)


def operands(n: int, d: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(n + classes)
    H = torch.randn(n, d, device="cuda").to(dtype)
    W = (torch.randn(classes, d, device="cuda") / d**0.5).to(dtype)
    y = torch.randint(classes, (n,), device="cuda")
    dH = (torch.randn(n, d, device="cuda") * 0.1).to(dtype)
    dW = (torch.randn(classes, d, device="cuda") * 0.1 / d**0.5).to(dtype)
    return H, W, y, dH, dW


def check(dtype: torch.dtype) -> dict[str, float]:
    """Errors of both products against float64, ours and the composition's, at a size that float64 can afford."""
    H, W, y, dH, dW = operands(1024, 512, 8192, dtype)
    errors = {}
    for name, gauss_newton in (("ggn", True), ("hvp", False)):
        exact = in_double(H, W, y, dH, dW, gauss_newton)
        product = linear_cross_entropy_ggnvp if gauss_newton else linear_cross_entropy_hvp
        ours = product(H, W, y, (dH, dW, None))
        theirs = composition(H, W, y, dH, dW, gauss_newton)
        errors[f"{name}_error"] = max(relative_error(a, b) for a, b in zip(ours[:2], exact, strict=True))
        errors[f"{name}_composition_error"] = max(relative_error(a, b) for a, b in zip(theirs, exact, strict=True))
    return errors


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
    times = interleaved(calls, rounds=5)
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
        **check(dtype),
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

    times = interleaved({"ours": ours, "torch": theirs}, rounds=5)
    report.row(
        f"gradient {n} x {d} x {classes} {str(dtype).removeprefix('torch.')}",
        ms=times["ours"],
        ratio=times["torch"] / times["ours"],
        share_of_gemm=report.gemm_share(6 * n * d * classes, times["ours"]),
        added_bytes=added_bytes(ours),
        torch_added_bytes=added_bytes(theirs),
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
        run(report, rows, 2048, 50304, torch.bfloat16)
        torch.cuda.empty_cache()
        run_gradient(report, rows, 2048, 50304, torch.bfloat16)
        torch.cuda.empty_cache()
        if options.tune:
            tune(report, rows, 2048, 50304, torch.bfloat16)
            torch.cuda.empty_cache()
        run(report, 2048, 768, 50257, torch.float16)
        run(report, 2048, 768, 50257, torch.float32)


if __name__ == "__main__":
    main()
