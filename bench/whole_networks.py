"""Whole networks: what issue 19 must show, in portions that each take less than a minute or two.

    python bench/whole_networks.py kernel                    # polar against Newton-Schulz, seconds and singular values
    python bench/whole_networks.py step [--tokens 4096]      # a step of Adam, Muon and PolarGrad on the character GPT
    python bench/whole_networks.py text adam --rate 4e-3 --steps 400 --seed 0
    python bench/whole_networks.py text polar --steps 150 --seed 0

`text` trains examples/text_generation.py's GPT of a million parameters on a text (--text; tiny Shakespeare beside the
checkout) and prints one line: held-out loss at the end, steps, their seconds. --append FILE adds it there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestep.linalg import polar
from onestep.optim import PolarGrad

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
import text_generation as example  # noqa: E402

SHAKESPEARE = HERE.parents[1] / "shared" / "data" / "tinyshakespeare.txt"
HELD_OUT = 256
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def newton_schulz(M: Tensor, iterations: int = 5) -> Tensor:
    """As in torch.optim.Muon, in the matrix's dtype."""
    a, b, c = NEWTON_SCHULZ
    tall = M.shape[-2] > M.shape[-1]
    X = M.mT if tall else M
    X = X / torch.linalg.matrix_norm(X, keepdim=True)
    for _ in range(iterations):
        A = torch.bmm(X, X.mT)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def medians(rounds: int, *compute: Callable[[], object]) -> list[float]:
    """Milliseconds of each, in turn."""
    seconds: list[list[float]] = [[] for _ in compute]
    for number in range(rounds + 1):
        for own, work in zip(seconds, compute, strict=True):
            begin = time.perf_counter()
            work()
            if number:
                own.append(time.perf_counter() - begin)
    return [1e3 * statistics.median(own) for own in seconds]


def kernel(rounds: int, large: bool) -> None:
    """polar and Newton-Schulz on the issue's shapes."""
    shapes = [(8, 768, 3072)] if large else [(24, 144, 576), (16, 144, 144)]
    for shape in shapes:
        M = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        ours, theirs = medians(rounds, lambda M=M: polar(M), lambda M=M: newton_schulz(M))
        spread = [torch.linalg.svdvals(found[0].double()) for found in (polar(M[:1]), newton_schulz(M[:1]))]
        text = ", ".join(f"[{s.min():.4f}, {s.max():.4f}]" for s in spread)
        print(
            f"{shape}: polar {ours:.1f} ms, Newton-Schulz {theirs:.1f} ms, ratio {theirs / ours:.2f}; values in {text}"
        )


def text_of(path: Path) -> example.Text:
    return example.read_text(path, HELD_OUT)


def gpt(text: example.Text, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return example.GPT(len(text.alphabet), 144, 4)


def optimizers(name: str, model: nn.Module, rate: float | None) -> list[torch.optim.Optimizer]:
    """Those of a run; the rate is of Adam, or of hidden matrices."""
    if name == "adam":
        return [torch.optim.Adam(model.parameters(), lr=rate or 4e-3, betas=(0.9, 0.95), fused=True)]
    if name == "muon":
        hidden = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][:-1]
        rest = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
        return [
            torch.optim.Muon(hidden, lr=rate or 0.03, weight_decay=0.0),
            torch.optim.Adam(rest, lr=6e-3, betas=(0.9, 0.95), fused=True),
        ]
    return [PolarGrad(model, lr=rate or 1e-2, gram_every=None if name == "polar-without-gram" else 32)]


def step(text: example.Text, tokens: int, rounds: int) -> None:
    """Milliseconds of forward, backward and step, in turn."""
    batch = tokens // example.CONTEXT
    x, y = text.inputs[:batch], text.targets[:batch]

    def one(name: str) -> Callable[[], object]:
        model = gpt(text, 0)
        own = optimizers(name, model, None)

        def work() -> None:
            loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            for optimizer in own:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in own:
                optimizer.step()

        return work

    names = ("adam", "muon", "polar", "polar-without-gram")
    found = medians(rounds, *(one(name) for name in names))
    print(
        f"{tokens} tokens: "
        + ", ".join(f"{n} {ms:.1f} ms ({ms / found[0]:.2f})" for n, ms in zip(names, found, strict=True))
    )


def train(text: example.Text, name: str, rate: float | None, steps: int, seed: int) -> dict[str, object]:
    """One run from scratch with the schedule that fit has; seconds are those of its steps."""
    model = gpt(text, seed)
    own = optimizers(name, model, rate)
    groups = [(group, group["lr"]) for optimizer in own for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed + 1)
    begin = time.perf_counter()
    for number in range(steps):
        factor = min(1.0, (number + 1) / 20) * (1 - number / steps)
        for group, base in groups:
            group["lr"] = base * factor
        rows = torch.randint(len(text.inputs), (example.BATCH,), generator=generator)
        loss = F.cross_entropy(model(text.inputs[rows]).flatten(0, -2), text.targets[rows].flatten())
        for optimizer in own:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in own:
            optimizer.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        end = F.cross_entropy(model(text.held_inputs).flatten(0, -2), text.held_targets.flatten()).item()
    return {
        "optimizer": name,
        "rate": rate,
        "steps": steps,
        "seed": seed,
        "loss": round(end, 4),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["kernel", "step", "text"])
    parser.add_argument(
        "optimizer", nargs="?", choices=["adam", "muon", "polar", "polar-without-gram"], default="polar"
    )
    parser.add_argument("--rate", type=float)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large", action="store_true", help="kernel: 8 x (768 x 3072)")
    parser.add_argument("--text", type=Path, default=SHAKESPEARE)
    parser.add_argument("--append", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "kernel":
        kernel(arguments.rounds, arguments.large)
        return
    text = text_of(arguments.text)
    if arguments.what == "step":
        step(text, arguments.tokens, arguments.rounds)
        return
    line = json.dumps(train(text, arguments.optimizer, arguments.rate, arguments.steps, arguments.seed))
    print(line)
    if arguments.append:
        with arguments.append.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
