"""Every CUDA kernel once at small sizes, for compute-sanitizer; results are checked by the tests, not here."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import onestep
from onestep import curvature, functional, linalg
from onestep.linalg.damping import unit_cholesky

# racecheck is a hundred times slower than memcheck: one size of each kernel.
QUICK = "racecheck" in sys.argv


def normal() -> None:
    n = 20 if QUICK else 70
    for dtype in (torch.float32, torch.float64):
        for d in (8, 32, 40, 100) if QUICK else (3, 8, 16, 23, 32, 40, 64, 84, 100, 128, 150, 168, 200):
            X = torch.randn(3, n, d, device="cuda", dtype=dtype)
            Y = torch.randn(3, n, 2, device="cuda", dtype=dtype)
            weight = torch.rand(3, n, device="cuda", dtype=dtype)
            A, R = linalg.gram(X, Y, weight=weight)
            linalg.solve_normal_ex(X, Y, ridge=0.5)
            linalg.solve_normal_ex(X, Y, weight=weight, ridge=0.5)
            A = A + torch.eye(d, device="cuda", dtype=dtype)
            L, _ = linalg.cholesky_ex(A)
            linalg.cholesky_solve(R, L)
            linalg.solve_spd_ex(A, R)


def glm() -> None:
    for dtype in (torch.float32, torch.float64):
        for d, k in ((32, 3),) if QUICK else ((5, 1), (32, 3), (100, 10)):
            X = torch.randn(64 if QUICK else 300, d, device="cuda", dtype=dtype)
            y = torch.randint(max(k, 2), (X.shape[0],), device="cuda")
            family = "softmax" if k > 1 else "logistic"
            W = torch.randn(d, k, device="cuda", dtype=dtype) if k > 1 else torch.randn(d, device="cuda", dtype=dtype)
            point = curvature.glm(X, y if k > 1 else y.to(dtype), W, family)
            point.hvp(torch.randn_like(W))
            point.gram()


def lmhead() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        h = torch.randn(40, 32, device="cuda", dtype=dtype, requires_grad=True)
        w = torch.randn(100, 32, device="cuda", dtype=dtype, requires_grad=True)
        loss = functional.linear_cross_entropy(h, w, torch.randint(100, (40,), device="cuda"))
        loss.backward()


def attention() -> None:
    for dtype in (torch.bfloat16,) if QUICK else (torch.float32, torch.bfloat16):
        q, k, v, t = (torch.randn(1, 1, 70, 32, device="cuda", dtype=dtype) for _ in range(4))
        attention_hvp(q, k, v, t)


def attention_hvp(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> None:
    def loss(q: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).float().square().sum()

    torch.func.jvp(torch.func.grad(loss), (q,), (t,))


def compensated() -> None:
    for dtype in (torch.float32, torch.float64):
        for n, d in ((19, 140),) if QUICK else ((19, 140), (5, 300)):
            X = torch.randn(2 * d, d, device="cuda", dtype=dtype)
            W, A = torch.randn(n, d, device="cuda", dtype=dtype), X.mT @ X
            U, R = linalg.inverse_cholesky(A).U, unit_cholesky(A).R
            sweep = torch.ops.onestep.compensated_sweep
            group = torch.arange(d, device="cuda") % 2
            scale, zero = (torch.full((n, 2), value, device="cuda", dtype=dtype) for value in (0.1, 7.0))
            sweep(W, U, None, None, None, 4, False, 20)
            sweep(W, R, None, None, None, 3, True, d, 0.0, 0, 0, True)
            sweep(W, R, scale, zero, group, 4, unit=True)
            sweep(W, U, None, None, None, 0, False, 1, 0.5)
            sweep(W, U, None, None, None, 0, False, 1, 0.0, 2, 4)


FAMILIES: dict[str, Callable[[], None]] = {
    "normal": normal,
    "glm": glm,
    "lmhead": lmhead,
    "attention": attention,
    "compensated": compensated,
}


def main() -> None:
    torch.manual_seed(0)
    print(onestep.__version__, torch.cuda.get_device_name(), *sys.argv[1:])
    for name, family in FAMILIES.items():
        try:
            family()
            torch.cuda.synchronize()
            print(name, "ran")
        except NotImplementedError as error:
            print(f"{name}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
