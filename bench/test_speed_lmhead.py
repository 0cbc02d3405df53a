"""The language-model head against F.cross_entropy(h @ w.T + b, y), in time and in added memory."""

from __future__ import annotations

import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import agree
from lmhead_memory import WAYS, Head

import onestep

N, D, V = 2048, 768, 32_000
CASE = f"{N} × {D} × {V} fp32"
PRODUCT = 2 * N * D * V  # flops of one of the matrix products that everything here is made of
TORCH_HVP = "torch double backward", "torch jvp of grad"


def error(way: str, exact_way: str, dtype: torch.dtype = torch.float32) -> float:
    """Of a smaller head, relative to the same in double."""
    head = Head.random(256, 64, 2000).to(dtype)
    double = head.to(torch.float64)
    return max(
        float((ours.double() - exact).norm() / exact.norm())
        for ours, exact in zip(WAYS[way](head), WAYS[exact_way](double), strict=True)
    )


@pytest.mark.benchmark(group="LM head")
def test_gradient(compare: Callable[..., float]) -> None:
    head = Head.random(N, D, V)
    compare(
        lambda: WAYS["onestep gradient"](head),
        lambda: WAYS["torch gradient"](head),
        rounds=5,
        case=f"forward + backward, {CASE}",
        goal=1.0,
        flops=3 * PRODUCT,
        error=error("onestep gradient", "torch gradient"),
        peer_error=error("torch gradient", "torch gradient"),
    )


def faster_torch_hvp() -> str:
    """Of torch's two ways, on this machine."""
    small = Head.random(N, D, V // 16)
    return min(TORCH_HVP, key=lambda name: min(timeit.repeat(lambda: WAYS[name](small), number=1, repeat=3)))


# The product alone, in seven matrix products, and through autograd, which computes the gradient as well: ten.
@pytest.mark.benchmark(group="LM head")
@pytest.mark.parametrize(
    ("way", "products", "goal"),
    [("linear_cross_entropy_hvp", 7, 1.5), ("curvature.hvp", 10, None), ("double backward", 10, None)],
)
def test_hvp(compare: Callable[..., float], way: str, products: int, goal: float | None) -> None:
    """Against the faster of torch's two ways on this machine."""
    head = Head.random(N, D, V)
    peer = faster_torch_hvp()
    way = f"onestep {way}"
    compare(
        lambda: WAYS[way](head),
        lambda: WAYS[peer](head),
        rounds=5,
        case=f"HVP by {way.removeprefix('onestep ')}, {CASE}; peer: {peer}",
        goal=goal,
        flops=products * PRODUCT,
        error=error(way, TORCH_HVP[0]),
        peer_error=error(peer, TORCH_HVP[0]),
    )


@pytest.mark.benchmark(group="LM head")
def test_bfloat16_hvp(compare: Callable[..., float]) -> None:
    """Of bfloat16 operands, on AMX tiles, against torch's of fp32 ones."""
    target = onestep.info()["cpu_target"]
    if target != "amx":
        pytest.skip(f"measures AMX tiles; the CPU target is {target}")
    head = Head.random(N, D, V)
    half = head.to(torch.bfloat16)
    peer, way = faster_torch_hvp(), "onestep linear_cross_entropy_hvp"
    compare(
        lambda: WAYS[way](half),
        lambda: WAYS[peer](head),
        rounds=5,
        check=lambda ours, theirs: agree(ours, theirs, 3e-2),
        case=f"HVP by linear_cross_entropy_hvp, {N} × {D} × {V} bf16 on AMX; peer: {peer}, fp32",
        goal=4.0,
        flops=7 * PRODUCT,
        error=error(way, TORCH_HVP[0], torch.bfloat16),
        peer_error=error(peer, TORCH_HVP[0]),
    )


def added(way: str) -> tuple[int, int]:
    """Bytes of peak RSS in a fresh process: in all, and without the results."""
    script = Path(__file__).parent / "lmhead_memory.py"
    arguments = (sys.executable, str(script), way, str(N), str(D), str(V))
    total, results = map(int, subprocess.check_output(arguments, text=True).split())
    return total, total - results


@pytest.mark.benchmark(group="LM head memory")
@pytest.mark.parametrize(
    ("way", "peers"),
    [
        ("onestep gradient", ("torch gradient",)),
        ("onestep linear_cross_entropy_hvp", TORCH_HVP),
        ("onestep curvature.hvp", TORCH_HVP),
        ("onestep double backward", TORCH_HVP),
    ],
)
def test_memory(benchmark: Any, way: str, peers: tuple[str, ...]) -> None:
    """Without the results for the gradient, of which the weight's alone is more than a tenth; all of it for the HVP."""
    column = 1 if way == "onestep gradient" else 0
    bytes_added, peer_bytes = added(way)[column], min(added(peer)[column] for peer in peers)
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        case=f"{way.removeprefix('onestep ')}, {CASE}" + (", results not counted" if column else ""),
        added_mib=bytes_added / 2**20,
        peer_added_mib=peer_bytes / 2**20,
        goal_mib=peer_bytes / 10 / 2**20,
    )
