"""Shows the curvature that a small GPT's loss has on real text: its Hessian's top eigenvalues, and its whole spectrum.

    python examples/curvature_of_a_transformer.py [text.txt] [--quick]

The text is that of the Python documentation topics which CPython ships (pydoc_data), or a file. The Hessian is never
formed: ``onestep.curvature.HessianOperator`` takes its products, with attention at O(T) memory. The eigenvalues at both
ends come from Lanczos' method (scipy's eigsh over ``to_scipy()``), the density of all of them from Lanczos quadrature
of random vectors (Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38, 2017; Ghorbani, Krishnan and Xiao, ICML 2019),
as the model is drawn and after a short training.

Prints a table; writes examples/output/curvature_of_a_transformer.png.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh
from text_generation import GPT, Text, read_text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from onestep.curvature import HessianOperator

PICTURE = Path(__file__).resolve().parent / "output" / "curvature_of_a_transformer.png"
# Sequences of a step of Adam.
BATCH = 16

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Effort:
    """How much to run."""

    width: int
    layers: int
    sequences: int
    training: tuple[int, ...]
    eigenvalues: int
    lanczos_steps: int
    probes: int


FULL = Effort(64, 2, 32, (0, 40, 160), 8, 48, 2)
QUICK = Effort(16, 1, 8, (0, 20), 3, 16, 1)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues at both ends, and nodes and weights of the density of all."""

    steps: int
    loss: float
    top: NDArray[np.float64]
    bottom: NDArray[np.float64]
    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]
    seconds: float


def mean_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a batch of sequences."""
    return cross_entropy(scores.flatten(0, -2), targets.flatten())


def quadrature(matrix: LinearOperator, steps: int, start: Vector) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss quadrature of the spectral density seen from one vector: Lanczos with full reorthogonalisation."""
    basis = [start / np.linalg.norm(start)]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(steps):
        w = matrix @ basis[-1]
        diagonal.append(float(w @ basis[-1]))
        for _ in range(2):
            for q in basis:
                w = w - (w @ q) * q
        beside.append(float(np.linalg.norm(w)))
        if beside[-1] < 1e-6 * abs(diagonal[0]):
            break
        basis.append(w / beside[-1])
    nodes, vectors = eigh_tridiagonal(diagonal, beside[: len(diagonal) - 1])
    return nodes, vectors[0] ** 2


def spectrum(model: GPT, text: Text, effort: Effort, steps: int) -> Spectrum:
    """The Hessian of the loss over the first sequences."""
    x, y = text.inputs[: effort.sequences], text.targets[: effort.sequences]
    begin = time.perf_counter()
    matrix = HessianOperator(model, (x, y), mean_loss, progress=False).to_scipy()
    random = np.random.default_rng(0)
    p = matrix.shape[0]
    start = random.standard_normal(p).astype(np.float32)
    ends = eigsh(matrix, 2 * effort.eigenvalues, which="BE", v0=start, tol=1e-3, return_eigenvectors=False)
    ends = np.sort(ends)
    probes = [random.standard_normal(p).astype(np.float32) for _ in range(effort.probes)]
    rules = [quadrature(matrix, effort.lanczos_steps, probe) for probe in probes]
    return Spectrum(
        steps,
        mean_loss(model(x).detach(), y).item(),
        ends[: -effort.eigenvalues - 1 : -1],
        ends[: effort.eigenvalues],
        np.concatenate([nodes for nodes, _ in rules]),
        np.concatenate([weights for _, weights in rules]) / effort.probes,
        time.perf_counter() - begin,
    )


def train(model: nn.Module, text: Text, steps: int) -> None:
    """Adam with a short warm-up and a rate that falls to zero."""
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        rows = torch.randint(len(text.inputs), (BATCH,), generator=generator)
        optimizer.zero_grad()
        mean_loss(model(text.inputs[rows]), text.targets[rows]).backward()
        optimizer.step()


def draw(spectra: list[Spectrum]) -> None:
    """The density, smoothed by a Gaussian, on a logarithmic scale, with the eigenvalues at both ends."""
    low = min(s.bottom[0] for s in spectra)
    high = max(s.top[0] for s in spectra)
    margin = 0.08 * (high - low)
    grid = np.linspace(low - margin, high + margin, 1500)
    sigma = 0.01 * (high - low)
    floor = 1e-7
    figure, axes = plt.subplots(len(spectra), 1, figsize=(9, 2.5 * len(spectra)), layout="constrained", sharex=True)
    for ax, s in zip(axes, spectra, strict=True):
        bells = np.exp(-(((grid[:, None] - s.nodes) / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi))
        density = bells @ s.weights
        ax.semilogy(grid, density, color="#2a6f97")
        ax.plot(s.top, np.full_like(s.top, 1.5 * floor), "|", color="#c8553d", markersize=11, label="largest")
        ax.plot(s.bottom, np.full_like(s.bottom, 1.5 * floor), "|", color="#6a994e", markersize=11, label="smallest")
        ax.set(ylim=(floor, 5 * density.max()), ylabel="density")
        ax.set_title(f"after {s.steps} steps of Adam: loss {s.loss:.3f}")
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9, title="eigenvalues")
    axes[-1].set_xlabel("eigenvalue of the Hessian")
    figure.savefig(PICTURE, dpi=150, bbox_inches="tight", pad_inches=0.2)
    print(f"\npicture: {PICTURE}")


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description="The Hessian spectrum of a character GPT, before and after training.")
    parser.add_argument(
        "text", nargs="?", type=Path, help="a UTF-8 text file; the Python documentation topics if absent"
    )
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer products")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    PICTURE.parent.mkdir(exist_ok=True)
    text = read_text(arguments.text, held_out=32)
    torch.manual_seed(0)
    model = GPT(len(text.alphabet), effort.width, effort.layers)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters; Hessian over {text.inputs[: effort.sequences].numel():,} characters")
    print(f"{'steps':>6}{'loss':>8}{'seconds':>9}  largest, smallest eigenvalues")
    spectra = []
    done = 0
    for steps in effort.training:
        if steps > done:
            train(model, text, steps - done)
        done = steps
        spectra.append(spectrum(model, text, effort, steps))
        s = spectra[-1]
        shown = " ".join(f"{value:.3g}" for value in s.top[:4]), " ".join(f"{value:.3g}" for value in s.bottom[:4])
        print(f"{steps:>6}{s.loss:>8.3f}{s.seconds:>9.1f}  {shown[0]}, {shown[1]}", flush=True)
    draw(spectra)


if __name__ == "__main__":
    main()
