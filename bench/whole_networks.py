"""Whole networks: what issue 19 must show, in portions that each take less than a minute or two.

    python bench/whole_networks.py kernel                    # polar against Newton-Schulz, seconds and singular values
    python bench/whole_networks.py step [--tokens 4096]      # a step of Adam, Muon and PolarGrad on the character GPT
    python bench/whole_networks.py text --runs runs.txt --results runs.jsonl --seconds 170

`text` trains examples/text_generation.py's GPT of a million parameters on a text (--text; tiny Shakespeare beside the
checkout), once for each line of runs.txt (optimiser, rate or - for its own, second beta, steps, seed), and adds a line
to runs.jsonl for each: the held-out loss at the end. It stops when its seconds are over, and the next call goes on
where it stopped; the exit status is 3 until all runs are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestep.linalg import polar
from onestep.optim import PolarGrad

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
import text_generation as example  # noqa: E402

SHAKESPEARE = HERE.parents[2] / "shared" / "data" / "tinyshakespeare.txt"
HELD_OUT = 256
# How often PolarGrad takes the inputs' Gram matrices.
EVERY = {"polar": 32, "polar-refreshing": 1, "polar-without-gram": None}
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


def muon_in_float32() -> None:
    """torch.optim.Muon iterates in bfloat16, which a CPU without such instructions emulates: ten times as slow."""
    torch.optim._muon._zeropower_via_newtonschulz = lambda grad, coefficients, steps, eps: newton_schulz(
        grad[None], steps
    )[0]


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


def optimizers(name: str, model: nn.Module, rate: float | None, beta: float = 0.95) -> list[torch.optim.Optimizer]:
    """Those of a run; the rate is of Adam, or of hidden matrices; ``beta`` is Adam's second."""
    if name == "adam":
        return [torch.optim.Adam(model.parameters(), lr=rate or 4e-3, betas=(0.9, beta), fused=True)]
    if name == "muon":
        muon_in_float32()
        hidden = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][:-1]
        rest = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
        return [
            torch.optim.Muon(hidden, lr=rate or 0.03, weight_decay=0.0),
            torch.optim.Adam(rest, lr=6e-3, betas=(0.9, beta), fused=True),
        ]
    return [PolarGrad(model, lr=rate or 1e-2, gram_every=EVERY[name])]


def step(text: example.Text, tokens: int, rounds: int, names: list[str]) -> None:
    """Milliseconds of forward, backward and step, in turn; medians, thus of polar's steps between two refreshes."""
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

    found = medians(rounds, *(one(name) for name in names))
    print(
        f"{tokens} tokens: "
        + ", ".join(f"{n} {ms:.1f} ms ({ms / found[0]:.2f})" for n, ms in zip(names, found, strict=True))
    )


@dataclass(frozen=True)
class Training:
    """A run from scratch; the rate is of Adam or of hidden matrices, None for the optimiser's own."""

    optimizer: str
    rate: float | None
    beta: float
    steps: int
    seed: int

    def train(self, text: example.Text, checkpoint: Path | None, seconds: float) -> dict[str, object] | None:
        """The held-out loss at the end; None where the seconds were over before it.

        The schedule is that of fit: 20 steps of warm-up, then in proportion to what is left. A checkpoint takes what
        has been done, and gives it back to the next call.
        """
        model = gpt(text, self.seed)
        own = optimizers(self.optimizer, model, self.rate, self.beta)
        rates = [group["lr"] for optimizer in own for group in optimizer.param_groups]
        generator = torch.Generator().manual_seed(self.seed + 1)
        first, before = 0, 0.0
        if checkpoint is not None and checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            model.load_state_dict(state["model"])
            for optimizer, own_state in zip(own, state["optimizers"], strict=True):
                optimizer.load_state_dict(own_state)
            generator.set_state(state["generator"])
            first, before = state["step"], state["seconds"]
        begin = time.perf_counter()
        for number in range(first, self.steps):
            if checkpoint is not None and time.perf_counter() - begin > seconds:
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in own],
                        "generator": generator.get_state(),
                        "step": number,
                        "seconds": before + time.perf_counter() - begin,
                    },
                    checkpoint,
                )
                return None
            factor = min(1.0, (number + 1) / 20) * (1 - number / self.steps)
            groups = [group for optimizer in own for group in optimizer.param_groups]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor
            rows = torch.randint(len(text.inputs), (example.BATCH,), generator=generator)
            loss = F.cross_entropy(model(text.inputs[rows]).flatten(0, -2), text.targets[rows].flatten())
            for optimizer in own:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in own:
                optimizer.step()
        with torch.no_grad():
            end = F.cross_entropy(model(text.held_inputs).flatten(0, -2), text.held_targets.flatten()).item()
        return asdict(self) | {"loss": round(end, 4), "seconds": round(before + time.perf_counter() - begin, 1)}


def collect(text: example.Text, runs: list[Training], results: Path, seconds: float) -> int:
    """Goes on with the first run that ``results`` has not; 0 when there is none, else 3."""
    end = time.perf_counter() + seconds
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    finished = {tuple(line[name] for name in asdict(runs[0])) for line in done}
    for run in runs:
        if tuple(asdict(run).values()) in finished:
            continue
        left = end - time.perf_counter()
        if left < 5:
            return 3
        name = "-".join(map(str, asdict(run).values()))
        checkpoint = results.with_suffix("") / f"{name}.pt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        found = run.train(text, checkpoint, left)
        if found is None:
            return 3
        checkpoint.unlink(missing_ok=True)
        print(json.dumps(found), flush=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    return 0


def runs_of(path: Path) -> list[Training]:
    """A file of lines: optimiser, rate or - for its own, second beta, steps, seed."""
    runs = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, rate, beta, steps, seed = line.split()
            runs.append(Training(name, None if rate == "-" else float(rate), float(beta), int(steps), int(seed)))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["kernel", "step", "text"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--of", default="adam,muon,polar,polar-refreshing,polar-without-gram", help="step: optimisers")
    parser.add_argument("--large", action="store_true", help="kernel: 8 x (768 x 3072)")
    parser.add_argument("--text", type=Path, default=SHAKESPEARE)
    parser.add_argument("--runs", type=Path, help="text: the runs, one a line")
    parser.add_argument("--results", type=Path, default=Path("runs.jsonl"), help="text: what has been run")
    parser.add_argument("--seconds", type=float, default=170.0, help="text: stop after so many")
    arguments = parser.parse_args()
    if arguments.what == "kernel":
        kernel(arguments.rounds, arguments.large)
        return
    text = text_of(arguments.text)
    if arguments.what == "step":
        step(text, arguments.tokens, arguments.rounds, arguments.of.split(","))
    elif arguments.runs is None:
        parser.error("text needs --runs")
    else:
        sys.exit(collect(text, runs_of(arguments.runs), arguments.results, arguments.seconds))


if __name__ == "__main__":
    main()
