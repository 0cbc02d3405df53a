"""What the examples share: a tuned baseline, tables with the winner first, and pictures in one style."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

# The first optimiser of a process, whichever it is, imports this for some seconds, which are not its own.
import torch._dynamo
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

OUTPUT = Path(__file__).resolve().parent / "output"
# So much of Adam's seconds its rate grows.
WARM_UP = 0.05
COLORS = ("#c8553d", "#2a6f97", "#7f8c8d", "#6a994e")
PEER_COLORS = {"Adam": COLORS[0], "Muon": "#8a7aa8"}


@dataclass
class Run:
    """What one method reached: what is told of it after each of so many seconds, the lower the better."""

    method: str
    model: nn.Module
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def note(self, seconds: float, value: float) -> None:
        self.seconds.append(seconds)
        self.values.append(value)

    @property
    def last(self) -> float:
        return self.values[-1]

    def seconds_to(self, value: float) -> float | None:
        """When the value was first that low."""
        return next((s for s, v in zip(self.seconds, self.values, strict=True) if v <= value), None)


def adam(
    make_model: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, int], Tensor],
    value_of: Callable[[nn.Module], float],
    *,
    rates: Sequence[float],
    seconds: float,
    every: int = 50,
) -> Run:
    """Adam for so many seconds at each rate, which warms up and falls to zero along a cosine; the run that ends lowest.

    Args:
        loss_of: (model, number of the step) → the loss of that step's rows.
        value_of: what is told of a model. The clock stands still meanwhile.
        every: so many steps between two values.
    """
    runs = []
    for rate in rates:
        model = make_model()
        run = Run(f"Adam, best of {len(rates)} rates ({rate:g})", model)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
        spent, step = 0.0, 0
        run.note(0.0, value_of(model))
        while spent < seconds:
            began = time.perf_counter()
            for _ in range(every):
                part = (spent + time.perf_counter() - began) / seconds
                if part >= 1.0:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (part + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * part))
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
                step += 1
            spent += time.perf_counter() - began
            run.note(spent, value_of(model))
        runs.append(run)
    if len(runs) > 1:
        ends = ", ".join(f"{run.last:.4g} at {rate:g}" for run, rate in zip(runs, rates, strict=True))
        print(f"Adam for {seconds:g} s at each rate: {ends}", flush=True)
    return min(runs, key=lambda run: run.last)


def solved(
    method: str, model: nn.Module, value_of: Callable[[], float], *, every: int = 1
) -> tuple[Run, Callable[[object], None], Callable[[], None]]:
    """A run of ``onestep.fit``, its callback, and what is to be called after the fit.

    The callback keeps the weights of one of ``every`` steps; told is of them after the fit, so that no second of the
    fit goes into it, as none of Adam's does.
    """
    run, kept, step = Run(method, model), [], 0
    run.note(0.0, value_of())
    began = time.perf_counter()

    def keep() -> None:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        kept.append((time.perf_counter() - began, weights))

    def callback(_record: object) -> None:
        nonlocal step
        step += 1
        if step % every == 0:
            keep()

    def finish() -> None:
        keep()
        for seconds, weights in kept:
            model.load_state_dict(weights)
            run.note(seconds, value_of())

    return run, callback, finish


def rows_of_step(count: int, batch: int, step: int) -> Tensor:
    """The indices of a step's rows of ``count``, in an order drawn anew for each pass."""
    steps = max(1, count // batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(step // steps))
    return order[step % steps * batch :][:batch]


def print_table(what: str, runs: Sequence[Run], form: str = ".2e") -> None:
    """The winner first: what was reached, in how many seconds, and how soon the others' best."""
    ordered = sorted(runs, key=lambda run: run.last)
    print(f"{what:<44}{'last':>12}{'seconds':>10}{'seconds to the worst of them':>30}")
    for run in ordered:
        soon = run.seconds_to(ordered[-1].last)
        print(f"{run.method:<44}{run.last:>12{form}}{run.seconds[-1]:>10.1f}{soon:>30.1f}")


def styled(axes: Axes, *, title: str = "", xlabel: str = "", ylabel: str = "", log: bool = False) -> Axes:
    """Without a box, with a faint grid."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    if log:
        axes.set_yscale("log")
    return axes


def draw_runs(axes: Axes, runs: Sequence[Run], **style: object) -> None:
    """What each run reached against seconds, in a colour that is the same in all pictures."""
    own = itertools.cycle(COLORS[1:])
    for run in sorted(runs, key=lambda run: run.last):
        peer = run.method.partition(",")[0]
        axes.plot(run.seconds, run.values, color=PEER_COLORS.get(peer) or next(own), label=run.method)
    styled(axes, xlabel="seconds", log=True, **style)  # type: ignore[arg-type]
    axes.legend(frameon=False)


def save(figure: Figure, name: str) -> None:
    """Writes examples/output/<name> and says so."""
    OUTPUT.mkdir(exist_ok=True)
    path = OUTPUT / name
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"picture: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
