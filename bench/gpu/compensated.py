"""Layers of language models on a GPU: the inverse's Cholesky factor, quantising and pruning one layer.

    python bench/gpu/compensated.py [--out FOLDER] [--quick]

Peers: torch's chain of cholesky, cholesky_inverse and cholesky, and the published loop of GPTQ in torch's ops, both as
people run them today. No goals were set for a GPU. A row has both times where the device's own can be taken: of a call
that finds the device idle, with what the CPU takes to queue it, and of the device alone (`queued_…`).

After timing, factors are compared with float64, and layers by what they lose, Σ‖(W − Ŵ)x‖², with the loop's: codes
differ by ties. Replays of a CUDA graph must give the same bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measure import Report, WrongResult, added_bytes, interleaved, queued, relative_error, require, top_kernels
from torch import Tensor

import onestep  # noqa: F401  (torch.ops.onestep)

BITS = 4
MOST = 2**BITS - 1


def gram_matrices(batch: int, n: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    """(batch,n,n), well conditioned, or (n,n) of a batch of 0."""
    generator = torch.Generator(device).manual_seed(n)
    X = torch.randn(max(batch, 1), 2 * n, n, device=device, generator=generator).to(dtype)
    A = X.mT @ X / (2 * n)
    A.diagonal(dim1=-2, dim2=-1).mul_(1.01)
    return A if batch else A[0]


def chain(A: Tensor) -> Tensor:
    """What GPTQ's and SparseGPT's code do."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(A)), upper=True)


def rounding_loop(W: Tensor, A: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """GPTQ as published (Frantar et al. 2022): blocks of columns, one column at a time; an asymmetric grid a row.

    Returns the codes and the rounded weights.
    """
    W = W.clone()
    codes = torch.empty_like(W)
    inverse = chain(A)
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    scale = (high - low) / MOST
    zero = (-low / scale).round()
    for start in range(0, W.shape[1], block):
        end = min(start + block, W.shape[1])
        part, factor = W[:, start:end].clone(), inverse[start:end, start:end]
        rounded, errors = torch.zeros_like(part), torch.zeros_like(part)
        for i in range(end - start):
            w = part[:, i]
            code = torch.clamp((w / scale).round() + zero, 0, MOST)
            q = scale * (code - zero)
            codes[:, start + i] = code
            rounded[:, i] = q
            error = (w - q) / factor[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
            errors[:, i] = error
        W[:, start:end] = rounded
        W[:, end:] -= errors.matmul(inverse[start:end, end:])
    return codes, W


def pruning_loop(W: Tensor, A: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """SparseGPT as published (Frantar and Alistarh 2023), half of each block; returns what stays, and the weights."""
    W = W.clone()
    inverse = chain(A)
    kept = torch.ones_like(W)
    for start in range(0, W.shape[1], block):
        end = min(start + block, W.shape[1])
        part, factor = W[:, start:end].clone(), inverse[start:end, start:end]
        scores = (part / factor.diagonal()).square()
        gone = scores <= scores.flatten().sort()[0][scores.numel() // 2 - 1]
        kept[:, start:end] = (~gone).to(W.dtype)
        pruned, errors = torch.zeros_like(part), torch.zeros_like(part)
        for i in range(end - start):
            w = part[:, i]
            q = w.masked_fill(gone[:, i], 0.0)
            pruned[:, i] = q
            error = (w - q) / factor[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
            errors[:, i] = error
        W[:, start:end] = pruned
        W[:, end:] -= errors.matmul(inverse[start:end, end:])
    return kept, W


def undamped(A: Tensor) -> Tensor:
    """A damping of 0 for each matrix, as the ops take it."""
    return A.new_zeros(A.shape[:-2])


def quantized(W: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same by onestep: no status is waited for."""
    R = torch.ops.onestep.unit_cholesky(A, undamped(A))[0]
    swept = torch.ops.onestep.compensated_sweep(W, R, None, None, None, BITS, False, W.shape[1], 0.0, 0, 0, True)
    return swept[1], swept[0]


def pruned(W: Tensor, A: Tensor, keep: int = 0, of: int = 0) -> tuple[Tensor, Tensor]:
    """By onestep: half of each block, or of every ``of`` columns ``keep`` stay."""
    U = torch.ops.onestep.inverse_cholesky(A, undamped(A))[0]
    half = 0.0 if of else 0.5
    swept = torch.ops.onestep.compensated_sweep(W, U, None, None, None, 0, False, 1, half, keep, of)[0]
    return (swept != 0).to(W.dtype), swept


def loss(W: Tensor, swept: Tensor, A: Tensor) -> float:
    """Σ‖(W − Ŵ)x‖² in float64."""
    change = W.double() - swept.double()
    return ((change @ A.double()) * change).sum().item()


def check_layer(what: str, W: Tensor, A: Tensor, results: dict[str, Any], facts: dict[str, float]) -> None:
    """Holds a layer to what the loop loses, and notes how many of the codes, or of what stays, are equal."""
    (ours, swept), (theirs, expected) = results["onestep"], results["torch"]
    facts["loss_ratio"] = loss(W, swept, A) / loss(W, expected, A)
    facts["equal"] = (ours.to(W.dtype) == theirs).float().mean().item()
    if not facts["loss_ratio"] <= 1.01 or not facts["equal"] >= 0.9:
        raise WrongResult(
            f"{what} is wrong: it loses {facts['loss_ratio']:.3f} of what the loop loses, and {facts['equal']:.0%} are "
            "equal; expected at most 1.01, and at least 90%"
        )


def replay(call: Any) -> dict[str, float]:
    """Milliseconds of a CUDA graph of the call, whose replay must give the call's bits."""
    expected, graph = call(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    if not all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True)):
        raise WrongResult("a replay of the CUDA graph gives other bits than the call")
    return {"graph_ms": interleaved({"graph": graph.replay})["graph"]}


def factor(report: Report, batch: int, n: int) -> None:
    A = gram_matrices(batch, n)
    ours = lambda: torch.ops.onestep.inverse_cholesky(A, undamped(A))[0]  # noqa: E731
    errors: dict[str, float] = {}

    def check(results: dict[str, Any]) -> None:
        exact = chain(A.double())
        errors.update({name: relative_error(found, exact) for name, found in results.items()})
        require("inverse_cholesky", errors["onestep"], errors["torch"])

    calls: dict[str, Any] = {"torch": lambda: chain(A), "onestep": ours}
    times = interleaved(calls, 7, check)
    alone = queued(calls, 7)
    report.row(
        f"inverse_cholesky {max(batch, 1)} x {n}² float32",
        onestep_ms=times["onestep"],
        torch_ms=times["torch"],
        ratio=times["torch"] / times["onestep"],
        queued_ms=alone["onestep"],
        queued_torch_ms=alone["torch"],
        queued_ratio=alone["torch"] / alone["onestep"],
        tflops=max(batch, 1) * 2 * n**3 / 3 / times["onestep"] / 1e9,
        error=errors["onestep"],
        torch_error=errors["torch"],
        **replay(lambda: (ours(),)),
    )


def layer(report: Report, rows: int, n: int, what: str) -> None:
    A, W = gram_matrices(0, n), torch.randn(rows, n, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    ours, loop = (quantized, rounding_loop) if what == "quantize" else (pruned, pruning_loop)
    facts: dict[str, float] = {}
    calls: dict[str, Any] = {"torch": lambda: loop(W, A), "onestep": lambda: ours(W, A)}
    times = interleaved(calls, 5, lambda results: check_layer(what, W, A, results, facts))
    report.row(
        f"{what} {rows} x {n} float32",
        onestep_ms=times["onestep"],
        torch_ms=times["torch"],
        ratio=times["torch"] / times["onestep"],
        added_bytes=added_bytes(calls["onestep"]),
        **facts,
        **replay(calls["onestep"]),
        **top_kernels(calls["onestep"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    options = parser.parse_args()
    report = Report("compensated", options.out)
    with torch.no_grad():
        for n in (1024,) if options.quick else (1024, 2048, 4096):
            report.run(factor, 0, n)
        if not options.quick:
            report.run(factor, 64, 128)
            report.run(factor, 64, 512)
        for size in ((1024, 1024),) if options.quick else ((1024, 1024), (4096, 4096), (4096, 11008)):
            report.run(layer, *size, "quantize")
            if size[1] <= 4096:
                report.run(layer, *size, "prune")
    report.end()


if __name__ == "__main__":
    main()
