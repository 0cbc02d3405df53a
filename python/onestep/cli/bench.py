"""`bench`: a self-benchmark of two minutes, against what torch alone would do on the same machine."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.functional import scaled_dot_product_attention as torch_attention

import onestep
from onestep.curvature import glm
from onestep.functional import linear_cross_entropy, scaled_dot_product_attention
from onestep.linalg import gram, solve_normal

from .errors import count, say

LEAST_ROUNDS = 3
SHARES = """\
of GEMM: the operations that the result needs, in a second, as a share of the rate of torch's product above. That is a
yardstick, not a limit: products of other shapes may be faster than that one.
of reading: the bytes that have to be read, likewise."""


@dataclass(frozen=True)
class Case:
    """The same result computed by onestep and by torch's own functions."""

    name: str
    ours: Callable[[], Tensor]
    peer: Callable[[], Tensor]
    # Floating-point operations that the result needs, or bytes that have to be read where memory is the limit.
    flops: float = 0.0
    bytes: float = 0.0
    tolerance: float = 1e-3


def _timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _normal(B: int, n: int, d: int, k: int) -> Case:
    X, Y = torch.randn(B, n, d), torch.randn(B, n, k)
    ridge = 0.1 * torch.eye(d)

    def composed() -> Tensor:
        return torch.cholesky_solve(X.mT @ Y, torch.linalg.cholesky_ex(X.mT @ X + ridge)[0])

    flops = B * (n * d * d + 2 * n * d * k + d**3 / 3 + 2 * d * d * k)
    return Case(f"solve_normal, {B:,} of {n} × {d}", lambda: solve_normal(X, Y, ridge=0.1), composed, flops)


def _gram(n: int, d: int) -> Case:
    X = torch.randn(n, d)
    return Case(f"gram, {n:,} × {d:,}", lambda: gram(X)[0], lambda: X.T @ X, n * d * d)


def _logistic(n: int, d: int) -> Case:
    X, v, w = torch.randn(n, d), torch.randn(d, 1), torch.zeros(d, 1)
    point = glm(X, (torch.rand(n) < 0.5).float(), w, "logistic")
    curvature = torch.full((n, 1), 0.25)
    name = f"logistic Hessian product, {n:,} × {d}"
    return Case(name, lambda: point.hvp(v), lambda: X.T @ (curvature * (X @ v)), bytes=4 * n * d)


def _attention(length: int) -> Case:
    q, k, v, tangent = (torch.randn(1, 8, length, 64) for _ in range(4))

    def product(attention: Callable[..., Tensor]) -> Tensor:
        def loss(query: Tensor) -> Tensor:
            return attention(query, k, v, is_causal=True).square().sum()

        with sdpa_kernel(SDPBackend.MATH):
            result: Tensor = jvp(grad(loss), (q,), (tangent,))[1]
        return result

    return Case(
        f"attention Hessian product, 8 × {length:,} × 64",
        lambda: product(scaled_dot_product_attention),
        lambda: product(torch_attention),
    )


def _lm_head(n: int, d: int, words: int) -> Case:
    H, W = torch.randn(n, d), torch.randn(words, d, requires_grad=True)
    y = torch.randint(words, (n,))

    def composed() -> Tensor:
        return torch.autograd.grad(cross_entropy(H @ W.T, y), W)[0]

    return Case(
        f"LM head gradient, {n:,} × {d} × {words:,}",
        lambda: torch.autograd.grad(linear_cross_entropy(H, W, y), W)[0],
        composed,
        4 * n * d * words,
    )


CASES: list[Callable[[], Case]] = [
    lambda: _normal(20_000, 16, 8, 1),
    lambda: _normal(8_192, 64, 32, 1),
    lambda: _normal(2_048, 128, 64, 8),
    lambda: _normal(128, 1_024, 256, 16),
    lambda: _gram(16_384, 1_024),
    lambda: _logistic(500_000, 64),
    lambda: _attention(1_024),
    lambda: _lm_head(1_024, 512, 16_000),
]


def _check(case: Case, got: Tensor, expected: Tensor) -> None:
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < case.tolerance:
        raise RuntimeError(f"{case.name}: the results differ by {error:.1e} of their norm; please report this")


def _measure(case: Case, seconds: float) -> tuple[float, float]:
    """The medians of onestep and of the peer, run in turn for about so many seconds; results are compared after it."""
    case.peer(), case.ours()
    end = time.perf_counter() + seconds
    times: list[tuple[float, float]] = []
    while len(times) < LEAST_ROUNDS or time.perf_counter() < end:
        own_seconds, got = _timed(case.ours)
        peer_seconds, expected = _timed(case.peer)
        times.append((own_seconds, peer_seconds))
    _check(case, got, expected)
    ours, peer = zip(*times, strict=True)
    return statistics.median(ours), statistics.median(peer)


def _limits() -> tuple[float, float]:
    """GEMM's rate in fp32 (GFLOP/s) and the bandwidth of reading (GB/s), best of eight."""
    A, long = torch.randn(2048, 2048), torch.randn(1 << 26)
    gemm = min(_timed(lambda: A @ A)[0] for _ in range(8))
    read = min(_timed(long.sum)[0] for _ in range(8))
    return 2 * 2048**3 / gemm / 1e9, 4 * long.numel() / read / 1e9


def run(args: argparse.Namespace) -> None:
    """Prints a line for each case as soon as it is measured."""
    facts = onestep.info()
    supported = facts["cpu_targets_supported"]
    assert isinstance(supported, list)
    torch.manual_seed(0)
    gemm, read = _limits()
    print(f"onestep {onestep.__version__}, torch {torch.__version__}, {count(torch.get_num_threads(), 'thread')}")
    print(f"CPU target: {facts['cpu_target']} (this machine supports {', '.join(supported)})")
    print(f"torch's fp32 GEMM, 2048³: {gemm:.0f} GFLOP/s; reading: {read:.1f} GB/s\n")
    print(f"{'fp32, in turn with torch':46}{'onestep':>11}{'torch':>11}{'ratio':>8}   share")
    ratios = []
    # A fifth of the time goes to drawing data and to the first calls.
    seconds = 0.8 * args.seconds / len(CASES)
    for make in CASES:
        case = make()
        ours, peer = _measure(case, seconds)
        ratios.append(peer / ours)
        share = ""
        if case.flops or case.bytes:
            done, rate, what = (case.flops, gemm, "GEMM") if case.flops else (case.bytes, read, "reading")
            share = f"{done / ours / 1e9 / rate:8.0%} of {what}"
        print(f"{case.name:46}{ours * 1e3:8.2f} ms{peer * 1e3:8.2f} ms{ratios[-1]:8.2f}{share}", flush=True)
    print(f"\ngeometric mean of the ratios: {statistics.geometric_mean(ratios):.2f} (above 1, onestep is faster)")
    print(SHARES)
    if facts["cpu_target"] != supported[-1]:
        say("note", f"this machine supports {supported[-1]}; ONESTEP_TARGET chose another target")
