"""Trains a byte-level GPT on the Python standard library's own sources: onestep.fit against tuned Adam and Muon.

    python examples/code_generation.py [--quick] [--steps N]

The sources are those of the Python that runs this; every eighth file is held out whole. All runs start from the same
weights; Adam and torch.optim.Muon run at each of several learning rates, onestep.fit has no setting but its number of
steps, half of Adam's. Muon has three steps for ten of Adam's, which take it more seconds than Adam has: it iterates in
bfloat16, which CPUs without such instructions emulate. Told are the bits that a held-out byte costs, and the share of
lines written by each network that Python's own parser takes for Python: of held-out files it takes some two thirds, for
lines of texts and of brackets that span several lines are no Python by themselves.

Writes examples/output/code_generation.png: bits per byte against seconds, and what the best network writes.
"""

import argparse
import ast
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import Run, draw_runs, print_table, save
from race import Problem, adam, by_onestep, by_torch, muon
from text_generation import Block
from torch import Tensor, nn

CONTEXT = 128
# As many bytes a step as onestep.fit takes by itself, 1,024.
BATCH = 8


@dataclass(frozen=True)
class Effort:
    """How much to run; the rates are those that each optimiser is tried with."""

    width: int
    layers: int
    steps: int
    adam: tuple[float, ...]
    muon: tuple[float, ...]
    samples: int
    length: int
    held_out: int


FULL = Effort(128, 3, 200, (1e-3, 2e-3, 4e-3), (0.02, 0.04), 8, 160, 48)
QUICK = Effort(48, 1, 16, (4e-3,), (0.03,), 4, 40, 16)


class GPT(nn.Module):
    """Bytes (n, T), T up to CONTEXT → scores of the next one (n, T, 256)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Scores."""
        return self.head(self.norm(self.blocks(self.byte(codes) + self.place.weight[: codes.shape[1]])))


def sources() -> tuple[bytes, bytes]:
    """Those to train on and the held-out ones: the modules and packages at the top of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = (
        "asyncio",
        "collections",
        "concurrent",
        "email",
        "http",
        "importlib",
        "json",
        "logging",
        "multiprocessing",
    )
    paths = sorted(path for folder in (root, *(root / name for name in folders)) for path in folder.glob("*.py"))
    if len(paths) < 16:
        raise SystemExit(f"{root} holds {len(paths)} Python files; expected the standard library's sources")
    return (
        b"\n".join(path.read_bytes() for i, path in enumerate(paths) if i % 8),
        b"\n".join(path.read_bytes() for path in paths[::8]),
    )


def sequences(text: bytes) -> tuple[Tensor, Tensor]:
    """Sequences of CONTEXT bytes (n, CONTEXT), and each byte's next one."""
    codes = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
    n = (len(codes) - 1) // CONTEXT
    inputs, targets = (codes[i : i + n * CONTEXT].view(n, CONTEXT) for i in (0, 1))
    return inputs, targets


def write(model: nn.Module, samples: int, length: int) -> list[str]:
    """Texts that begin with a line's end, drawn byte by byte at a temperature of 0.7."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.full((samples, 1), ord("\n"))
    with torch.no_grad():
        for _ in range(length):
            chances = (model(codes[:, -CONTEXT:])[:, -1] / 0.7).softmax(-1)
            codes = torch.cat([codes, torch.multinomial(chances, 1, generator=generator)], 1)
    return [bytes(row).decode("utf-8", "replace") for row in codes[:, 1:].tolist()]


def is_python(line: str) -> bool:
    """Whether a line by itself parses: dedented, with a body where it opens a block."""
    line = line.strip()
    openings = {"else": "if 0: pass\n", "elif": "if 0: pass\n", "except": "try: pass\n", "finally": "try: pass\n"}
    word = line.rstrip(":").split(" ")[0]
    try:
        ast.parse(openings.get(word, "") + line + (" pass" if line.endswith(":") else ""))
    except (SyntaxError, ValueError):
        return False
    return True


def share_of_python(texts: list[str]) -> float:
    """Of the lines that are whole (between two ends of lines), neither empty nor comments."""
    lines = [line for text in texts for line in text.split("\n")[:-1]]
    kept = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    return sum(map(is_python, kept)) / max(1, len(kept))


def in_bits(run: object) -> Run:
    """A run of race.py, told in bits."""
    found = Run(run.name, run.model)  # type: ignore[attr-defined]
    for seconds, loss in zip(run.seconds, run.losses, strict=True):  # type: ignore[attr-defined]
        found.note(seconds, loss / math.log(2))
    return found


def race(problem: Problem, effort: Effort, steps: int) -> list[Run]:
    """The best run of each optimiser, the lowest first."""
    runs = []
    for name, make, rates, n in (
        ("Adam", adam, effort.adam, steps),
        ("Muon", muon, effort.muon, max(1, steps * 3 // 10)),
    ):
        label = f"{name}, best of {len(rates)} rates"
        tried = [by_torch(problem, f"{label} ({rate:g})", lambda m, f=make, r=rate: f(m, r), n, 0) for rate in rates]
        runs.append(in_bits(min(tried, key=lambda run: run.losses[-1])))
    runs.append(in_bits(by_onestep(problem, steps // 2, 0)))
    return sorted(runs, key=lambda run: run.last)


def draw(runs: list[Run], texts: list[str]) -> None:
    """The picture: as much of the texts as there is room for."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    draw_runs(left, runs, title="Python's standard library: bits per held-out byte")
    # Networks also write characters that no font has, and dollars, which would begin a formula.
    lines = [line[:72] for text in texts for line in text.split("\n")]
    shown = "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines[:32])
    style = {"family": "monospace", "fontsize": 8, "va": "top", "clip_on": True, "parse_math": False}
    right.text(0, 1, shown, transform=right.transAxes, **style)
    right.set_title(f"{runs[0].method} writes")
    right.set_axis_off()
    save(figure, "code_generation.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer steps")
    parser.add_argument("--steps", type=int, help="of Adam")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    train, held = sources()

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return GPT(effort.width, effort.layers)

    held_inputs, held_targets = sequences(held)
    some = torch.randperm(len(held_inputs), generator=torch.Generator().manual_seed(0))[: effort.held_out]
    problem = Problem(network, *sequences(train), held_inputs[some], held_targets[some], BATCH)
    steps = arguments.steps or effort.steps
    print(
        f"GPT of {sum(p.numel() for p in network(0).parameters()):,} parameters, {len(train):,} bytes to train on, "
        f"{steps} steps of {BATCH} x {CONTEXT} for Adam, {steps * 3 // 10} for Muon, {steps // 2} for onestep.fit"
    )
    runs = race(problem, effort, steps)
    print_table("bits per held-out byte", runs, ".3f")
    texts = {run.method: write(run.model.eval(), effort.samples, effort.length) for run in runs}
    for method, own in texts.items():
        print(f"{method}: {share_of_python(own):.0%} of the lines it writes parse")
    print(f"held-out files: {share_of_python([held.decode('utf-8', 'replace')]):.0%} of the lines parse")
    text = max(texts[runs[0].method], key=lambda text: share_of_python([text]))
    print(f"\n{runs[0].method} writes, for example:\n{text}")
    ours, adam_run = (next(run for run in runs if run.method.startswith(name)) for name in ("onestep", "Adam"))
    soon = ours.seconds_to(adam_run.last)
    told = f"in {soon / adam_run.seconds[-1]:.2f} of its seconds" if soon else "never"
    print(f"Adam's last bits per byte were reached by onestep.fit {told}")
    draw(runs, texts[runs[0].method])


if __name__ == "__main__":
    main()
