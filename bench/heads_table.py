"""LogisticRegression over n x d x k against scikit-learn, torch.optim.LBFGS and Adam, in portions of a minute or two.

    python bench/heads_table.py [--seconds 170]     # goes on where the last call stopped; exit status 3 until done
    python bench/heads_table.py --most 1e8          # only cells of at most so many n x d x k
    python bench/heads_table.py --write             # the table of what is there

27 cells, C = 1, float32, labels drawn from a softmax. Ours stops at the objective that scikit-learn's lbfgs reaches at
its default tolerance, as does torch.optim.LBFGS. Adam stops within 0.5 % of the minimum. All minimise the same
objective. Each result is a line of --results; the table is bench/results/<machine>/heads_table.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import folder_of, machine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression
from test_speed_multinomial import Case, draw, objective, ours_to, rounds_of
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from onestep import LogisticRegression

C = 1.0
CELLS = list(itertools.product((1_000, 10_000, 100_000), (16, 128, 512), (2, 20, 200)))
MAX_ITER = 2000
# Peers that are not there after so many seconds are given up.
MOST_SECONDS = 30.0
# torch.optim.LBFGS's own loss is in float32.
ROUNDING = 1e-6
# Adam: how near counts as there, and what is tried. Its rate stays, or falls to zero along a cosine in so many steps.
NEAR_OF_ADAM, BATCH = 5e-3, 256
RATES, HORIZONS = (1e-3, 3e-3, 1e-2, 3e-2), (500, 5_000, None)
# Adam's objective is looked at, untimed, after so many steps, then after each so many times the steps before.
FIRST_LOOK, LOOKS = 10, 1.03
# Seconds after each run, for peers with threads that spin for a while.
SETTLE = 0.2
# The smallest of a cell's figures that its goal is for.
LEAST_SECONDS = 0.1


class _ThereError(Exception):
    """Raised inside a closure: the objective is reached, or the seconds are over."""


@dataclass(frozen=True)
class Cell:
    """Rows, columns and classes, and what is to be measured."""

    n: int
    d: int
    k: int
    part: str

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        return draw(Case(self.n, self.d, self.k, C, 0.0, np.float32, 1.0))


class Problem:
    """The mean objective of `objective` in torch, from zeros: one output for two classes."""

    def __init__(self, X: np.ndarray, y: np.ndarray, k: int) -> None:
        self.X, self.n, outputs = torch.from_numpy(X), len(X), 1 if k == 2 else k
        self.y = torch.from_numpy(y).float() if k == 2 else torch.from_numpy(y)
        self.W = torch.zeros(X.shape[1], outputs, requires_grad=True)
        self.b = torch.zeros(outputs, requires_grad=True)

    def loss(self, rows: Any = slice(None)) -> Tensor:
        scores, y = torch.addmm(self.b, self.X[rows], self.W), self.y[rows]
        fit = binary_cross_entropy_with_logits(scores[:, 0], y) if scores.shape[1] == 1 else cross_entropy(scores, y)
        return fit + 0.5 / (C * self.n) * self.W.square().sum()


def timed(work: Callable[[], object]) -> float:
    time.sleep(SETTLE)
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_turn(rounds: int, *compute: Callable[[], object]) -> list[float]:
    """Median seconds of each; a round before the timed ones, where there are several."""
    seconds: list[list[float]] = [[] for _ in compute]
    for number in range(rounds + (rounds > 1)):
        for own, work in zip(seconds, compute, strict=True):
            own.append(timed(work))
            if number == 0 and rounds > 1:
                own.clear()
    return [statistics.median(own) for own in seconds]


def against_sklearn(cell: Cell, _: dict[str, Any]) -> dict[str, Any]:
    """The peer at its default tolerance, and ours stopped at its objective."""
    X, y = cell.draw()
    peer = SklearnLogisticRegression(C=C, max_iter=MAX_ITER)
    rounds = rounds_of(timed(lambda: peer.fit(X, y)), seven=0.2, one=8.0)
    target = objective(peer, X, y, C)
    ours = ours_to(X, y, C, target)
    mine, theirs = in_turn(rounds, lambda: ours.fit(X, y), lambda: peer.fit(X, y))
    return {
        "target": target,
        "tol": float(ours.tol),
        "ours": mine,
        "peer": theirs,
        "rounds": rounds,
        "iterations": int(ours.n_iter_[0]),
        "peer_iterations": int(peer.n_iter_[0]),
        "error": objective(ours, X, y, C) / target - 1,
    }


def lbfgs(X: np.ndarray, y: np.ndarray, k: int, target: float) -> bool:
    """One run of torch.optim.LBFGS from zeros to the target; whether it was reached."""
    problem, reached, begin = Problem(X, y, k), False, time.perf_counter()
    optimizer = torch.optim.LBFGS(
        [problem.W, problem.b],
        max_iter=MAX_ITER,
        max_eval=100 * MAX_ITER,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )

    def closure() -> Tensor:
        nonlocal reached
        optimizer.zero_grad()
        loss = problem.loss()
        reached = loss.item() <= (1 + ROUNDING) * target
        if reached or time.perf_counter() - begin > MOST_SECONDS:
            raise _ThereError
        loss.backward()
        return loss

    try:
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    except _ThereError:
        return reached
    return False


def against_lbfgs(cell: Cell, known: dict[str, Any]) -> dict[str, Any]:
    """torch.optim.LBFGS to scikit-learn's objective, which its first evaluation that is there ends."""
    X, y = cell.draw()
    target = known["scikit-learn"]["target"]
    begin = time.perf_counter()
    reached = lbfgs(X, y, cell.k, target)
    seconds = time.perf_counter() - begin
    if not reached:
        return {"peer": seconds, "reached": False, "over": seconds > MOST_SECONDS}
    ours = LogisticRegression(C=C, tol=known["scikit-learn"]["tol"], max_iter=MAX_ITER)
    rounds = rounds_of(seconds, seven=0.2, one=8.0)
    mine, theirs = in_turn(rounds, lambda: ours.fit(X, y), lambda: lbfgs(X, y, cell.k, target))
    return {"ours": mine, "peer": theirs, "rounds": rounds, "reached": True}


def adam(problem: Problem, rate: float, horizon: int | None, least: float, most: float) -> tuple[float, int] | None:
    """Seconds of steps, and steps, until near the minimum; None where that takes longer than ``most``."""
    optimizer = torch.optim.Adam([problem.W, problem.b], lr=rate)
    falling = None if horizon is None else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, horizon)
    generator = torch.Generator().manual_seed(1)

    def batches() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(problem.n, generator=generator).split(BATCH)[: max(1, problem.n // BATCH)]

    seconds, look, begin = 0.0, FIRST_LOOK, time.perf_counter()
    for step, rows in enumerate(batches(), 1):
        optimizer.zero_grad()
        problem.loss(rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if falling is not None:
            falling.step()
        last = step == horizon
        if step < look and not last:
            continue
        seconds += time.perf_counter() - begin
        with torch.no_grad():
            if problem.loss().item() <= (1 + NEAR_OF_ADAM) * least:
                return seconds, step
        if last or seconds > most:
            return None
        look, begin = max(step + 1, int(step * LOOKS)), time.perf_counter()
    return None


def against_adam(cell: Cell, known: dict[str, Any]) -> dict[str, Any]:
    """The best of all rates and falls, each tried once and given up where another has been faster."""
    X, y = cell.draw()
    least: float = known["scikit-learn"]["target"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        least = min(least, objective(LogisticRegression(C=C, tol=1e-6, max_iter=MAX_ITER).fit(X, y), X, y, C))
    best: dict[str, Any] = {"peer": MOST_SECONDS, "reached": False, "over": True, "least": least}
    for horizon, rate in itertools.product(HORIZONS, RATES):
        found = adam(Problem(X, y, cell.k), rate, horizon, least, best["peer"])
        if found is not None and found[0] < best["peer"]:
            best = {"peer": found[0], "reached": True, "steps": found[1], "rate": rate, "horizon": horizon}
    return best | {"least": least}


PARTS: dict[str, Callable[[Cell, dict[str, Any]], dict[str, Any]]] = {
    "scikit-learn": against_sklearn,
    "L-BFGS": against_lbfgs,
    "Adam": against_adam,
}


def lines_of(path: Path) -> dict[Cell, dict[str, Any]]:
    """What has been measured."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Cell(line["n"], line["d"], line["k"], line["part"]): line for line in lines}


def collect(results: Path, seconds: float, most: float) -> int:
    """Goes on with the first that ``results`` has not; 0 when there is none, else 3."""
    end = time.perf_counter() + seconds
    for n, d, k in sorted((cell for cell in CELLS if np.prod(cell) <= most), key=np.prod):
        for part, measure in PARTS.items():
            cell, done = Cell(n, d, k, part), lines_of(results)
            if cell in done:
                continue
            if time.perf_counter() > end:
                return 3
            known = {other: done[key] for other in PARTS if (key := Cell(n, d, k, other)) in done}
            line = asdict(cell) | measure(cell, known)
            print(json.dumps(line), flush=True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    return 0


def shown(line: dict[str, Any] | None, ours: float | None) -> list[str]:
    """Seconds of a peer, and the ratio to ours."""
    if line is None or ours is None:
        return ["", ""]
    if not line.get("reached", True) and not line["over"]:
        return ["not reached", ""]
    sign = "" if line.get("reached", True) else "> "
    return [f"{sign}{line['peer']:.4g}", f"{sign}{line['peer'] / line.get('ours', ours):.2f}"]


def table(lines: dict[Cell, dict[str, Any]], where: dict[str, Any]) -> str:
    """The table as Markdown, with the cells that are too slow."""
    rows, slow = [], []
    for n, d, k in CELLS:
        first = lines.get(Cell(n, d, k, "scikit-learn"))
        if first is None:
            continue
        ours, cells = first["ours"], [f"{n:,}", str(d), str(k), f"{first['ours']:.4g}"]
        for part in PARTS:
            line = lines.get(Cell(n, d, k, part))
            cells += shown(line, ours)
            if line is not None and line.get("reached", True):
                mine = line.get("ours", ours)
                if max(mine, line["peer"]) >= LEAST_SECONDS and line["peer"] < mine:
                    slow.append(f"{n:,} × {d} × {k} ({part} {line['peer'] / mine:.2f})")
        rows.append([*cells, str(first["rounds"]), f"{first['error']:.0e}"])
    header = ["n", "d", "k", "ours, s", "scikit-learn, s", "ratio", "torch L-BFGS, s", "ratio", "Adam, s", "ratio"]
    header += ["rounds", "objective over scikit-learn's"]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
    below = "; ".join(slow) or "none"
    facts = ", ".join(f"{name} {value}" for name, value in where.items())
    return f"""# LogisticRegression over rows, columns and classes

`python bench/heads_table.py`: {facts}.

C = 1, float32, normal features, labels drawn from a softmax of them. Ours and torch.optim.LBFGS (strong Wolfe,
history 20) stop at the objective that scikit-learn's lbfgs reaches at its default tolerance: ours at the loosest
tolerance of half a decade each that reaches it, torch's at the first evaluation that is there. Adam: until within
{NEAR_OF_ADAM:.1%} of the minimum, batches of {BATCH}, the best of {len(RATES)} rates, each constant or falling to zero
in {" or ".join(f"{steps:,}" for steps in HORIZONS if steps)} steps, each tried once, its looks at the objective not
timed. ">": given up after {MOST_SECONDS:g} s. Seconds are medians of the two in turn; rounds are those beside
scikit-learn. Ratios beside scikit-learn and L-BFGS are to our seconds of the same rounds.

{body}

{len(rows)} of {len(CELLS)} cells. Ratios below 1 with at least {LEAST_SECONDS:g} s on one side: {below}.
"""


def write(results: Path) -> Path:
    """Writes the table of what there is."""
    where = machine()
    folder = folder_of(where)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "heads_table.md"
    path.write_text(table(lines_of(results), where), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=Path("heads_table.jsonl"), help="what has been measured")
    parser.add_argument("--seconds", type=float, default=170.0, help="begin nothing after so many")
    parser.add_argument("--most", type=float, default=np.inf, help="only cells of at most so many n x d x k")
    parser.add_argument("--write", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    status = 0 if arguments.write else collect(arguments.results, arguments.seconds, arguments.most)
    print(f"wrote {write(arguments.results)}")
    sys.exit(status)


if __name__ == "__main__":
    main()
