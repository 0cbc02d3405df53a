"""Loss against seconds: onestep.fit as it comes, Adam and Muon at the best of several rates.

Each optimiser starts from the same first weights, takes steps of as many rows, warms up and then lets its rates fall to
zero. Each looks at held-out rows equally often; that is in the seconds of all.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onestep

# So many times in a run the held-out loss is looked at.
LOOKS = 16
WARM_UP = 20
COLORS = {"Adam": "#c8553d", "Muon": "#8a7aa8", "onestep": "#2a6f97"}  # as in common.py


@dataclass(frozen=True)
class Problem:
    """Rows to train on and held-out ones, for networks that ``network`` makes with the weights of a seed."""

    network: Callable[[int], nn.Module]
    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor
    batch: int

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    def held_out(self, model: nn.Module) -> float:
        """Over the held-out rows, in eval mode."""
        model.eval()
        with torch.no_grad():
            found = self.loss(model, self.held_inputs, self.held_targets).item()
        model.train()
        return found


@dataclass
class Run:
    """A trained network, and the held-out loss along the way."""

    name: str
    model: nn.Module
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def seconds_to(self, goal: float) -> float | None:
        """When the held-out loss was first at ``goal``; None if it never was."""
        return next((s for s, loss in zip(self.seconds, self.losses, strict=True) if loss <= goal), None)

    def steps_to(self, goal: float) -> int | None:
        """After how many steps it was."""
        return next((n for n, loss in zip(self.steps, self.losses, strict=True) if loss <= goal), None)


def adam(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Adam over everything, with the second moments that suit short runs."""
    return [torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)]


def muon(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """torch.optim.Muon over the matrices of linear layers, all that it takes; Adam over the rest and the head.

    It iterates in bfloat16, which CPUs without such instructions emulate: its seconds are several times there what they
    would be in float32 (bench/results/amd-epyc-avx2/whole_networks.md).
    """
    hidden = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][:-1]
    own = {id(weight) for weight in hidden}
    rest = [p for p in model.parameters() if id(p) not in own]
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.0, momentum=0.95),
        torch.optim.Adam(rest, lr=6e-3, betas=(0.9, 0.95), fused=True),
    ]


def by_torch(
    problem: Problem, name: str, make: Callable[[nn.Module], list[torch.optim.Optimizer]], steps: int, seed: int
) -> Run:
    """Mini-batches drawn anew for each pass."""
    model = problem.network(seed).train()
    run = Run(name, model)
    optimizers = make(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(problem.inputs), generator=generator)
    begin, taken = time.perf_counter(), 0
    for step in range(steps):
        if taken + problem.batch > len(order):
            order, taken = torch.randperm(len(order), generator=generator), 0
        rows = order[taken : taken + problem.batch]
        taken += problem.batch
        loss = problem.loss(model, problem.inputs[rows], problem.targets[rows])
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = (
                rate * min(1.0, (step + 1) / min(WARM_UP, steps / 10)) * (1 - step / steps)
            )
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % max(1, steps // LOOKS) == 0 or step + 1 == steps:
            run.losses.append(problem.held_out(model))
            run.steps.append(step + 1)
            run.seconds.append(time.perf_counter() - begin)
    return run


def by_onestep(problem: Problem, steps: int, seed: int) -> Run:
    """onestep.fit with no setting but the length of the run."""
    model = problem.network(seed).train()
    result = onestep.fit(
        model,
        (problem.inputs, problem.targets),
        "cross_entropy",
        max_steps=steps,
        validation=(problem.held_inputs, problem.held_targets),
        validation_every=max(1, steps // LOOKS),
        seed=seed,
        progress=False,
    )
    looks = [record for record in result.history if record.validation_loss is not None]
    return Run(
        f"onestep.fit ({result.method})",
        model,
        [record.step for record in looks],
        [record.seconds for record in looks],
        [record.validation_loss or 0.0 for record in looks],
    )


def tuned(
    problem: Problem,
    name: str,
    make: Callable[[nn.Module, float], list[torch.optim.Optimizer]],
    rates: Sequence[float],
    steps: int,
) -> float:
    """The rate that ends lowest from the first seed's weights."""
    ends = {rate: by_torch(problem, name, lambda m, r=rate: make(m, r), steps, 0).losses[-1] for rate in rates}
    print(f"  {name}: last losses " + ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in ends.items()), flush=True)
    return min(ends, key=lambda rate: ends[rate])


def race(
    problem: Problem, steps: int, seeds: int, rates: dict[str, Sequence[float]], head_start: float = 0.5
) -> dict[str, list[Run]]:
    """Runs of each optimiser by name, one for each seed; ``onestep`` has fewer steps by the factor ``head_start``."""
    print(f"held-out loss at the end of {steps} steps, by rate:")
    makers = {"Adam": adam, "Muon": muon}
    best = {name: tuned(problem, name, makers[name], rates[name], steps) for name in rates}
    runs: dict[str, list[Run]] = {name: [] for name in (*rates, "onestep")}
    for seed in range(seeds):
        # In turn, so that a machine that slows down does so for all.
        for name, rate in best.items():
            run = by_torch(problem, f"{name}, rate {rate:g}", lambda m, n=name, r=rate: makers[n](m, r), steps, seed)
            runs[name].append(run)
        runs["onestep"].append(by_onestep(problem, max(1, int(steps * head_start)), seed))
    return runs


def table(runs: dict[str, list[Run]]) -> None:
    """Prints what each reached, and when onestep was where the others ended."""
    seeds = len(next(iter(runs.values())))
    what = f"median of {seeds} runs" if seeds > 1 else "one run each"
    print(f"\n  {what:<28}{'steps':>7}{'seconds':>9}{'held-out loss':>15}")
    for own in runs.values():
        ends = sorted(run.losses[-1] for run in own)
        spread = f"  ({ends[0]:.3f} to {ends[-1]:.3f})" if seeds > 1 else ""
        seconds = statistics.median(run.seconds[-1] for run in own)
        print(f"  {own[0].name:<28}{own[0].steps[-1]:>7}{seconds:>9.1f}{statistics.median(ends):>15.4f}{spread}")
    for name, own in runs.items():
        if name == "onestep":
            continue
        pairs = list(zip(own, runs["onestep"], strict=True))
        ratios = [(ours.seconds_to(run.losses[-1]), ours.steps_to(run.losses[-1]), run) for run, ours in pairs]
        reached = [(s / run.seconds[-1], n / run.steps[-1]) for s, n, run in ratios if s is not None and n is not None]
        if len(reached) < len(pairs):
            print(f"  {name}'s last loss was reached by onestep in {len(reached)} of {len(pairs)} runs")
        else:
            seconds, steps = (statistics.median(column) for column in zip(*reached, strict=True))
            print(
                f"  {name}'s last loss was reached by onestep in {seconds:.2f} of its seconds, {steps:.2f} of its steps"
            )


def draw(runs: dict[str, list[Run]], picture: Path, title: str, ax: Any = None) -> None:
    """Held-out loss against seconds: the median run of each in bold."""
    figure = None
    if ax is None:
        figure, ax = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for name, own in runs.items():
        middle = sorted(own, key=lambda run: run.losses[-1])[len(own) // 2]
        for run in own:
            bold = run is middle
            ax.plot(
                run.seconds,
                run.losses,
                color=COLORS[name],
                alpha=1.0 if bold else 0.25,
                linewidth=1.8 if bold else 0.8,
                label=run.name if bold else None,
            )
    ax.set(xlabel="seconds", ylabel="held-out loss", title=title)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    if figure is not None:
        picture.parent.mkdir(exist_ok=True)
        figure.savefig(picture, dpi=150)
        print(f"\npicture: {picture}")
