"""Whether `fit` without a setting is within a tenth of the seconds of its own best settings (issue 19).

    python bench/fit_defaults.py digits perceptron text [--seeds 5] [--results defaults.jsonl] [--milliseconds 8,11,14]

Each other setting, a batch of half or twice the rows and a rate of 0.5 to 2 times fit's own, has nine tenths of the
seconds of fit's own: as many steps as these allow by its milliseconds a step. Where the median of its losses at the end
is lower still, fit's own settings are not within a tenth of it. Losses are held-out ones, in eval mode, but for the
perceptron: its own rows'. A line is added to the results for each setting; one that is there already is not run again.
Seconds a step are measured first, in turn; where other work shares the machine, give those of a quiet one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_networks import SHAKESPEARE, gpt, text_of

import onestep
from onestep.training.methods import polar

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import image_classification as images
from race import Problem

HOUSES = SHAKESPEARE.with_name("california_housing.csv")
PART = 0.9
# Factors of the batch and of the rate; the first is fit's own.
SETTINGS = [(1.0, 1.0), (1.0, 0.5), (1.0, 0.7), (1.0, 1.4), (1.0, 2.0), (0.5, 1.0), (2.0, 1.0), (0.5, 0.7), (2.0, 1.4)]
own_rate = polar._rate


class Houses(Problem):
    """Values of Californian districts, under "mse"."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)


class Task(NamedTuple):
    """What is fitted, the name of its loss, and fit's steps; the batch is that of fit without a setting."""

    problem: Problem
    loss: str
    steps: int


def digits() -> Task:
    """The convolutional network of examples/image_classification.py, 60 steps, before its losses are noise."""
    return Task(images.load(), "cross_entropy", 60)


def perceptron() -> Task:
    """8-64-64-1; its own rows are the held-out ones."""
    table = np.genfromtxt(HOUSES, delimiter=",", skip_header=1, usecols=range(9))
    table = table[np.isfinite(table).all(1)]
    table = torch.tensor((table - table.mean(0)) / table.std(0), dtype=torch.float32)

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    X, y = (part.contiguous() for part in table.split([8, 1], 1))
    return Task(Houses(network, X, y, X, y, 2048), "mse", 400)


def text() -> Task:
    """The character GPT of a million parameters, 140 steps: what Adam has after 400."""
    data = text_of(SHAKESPEARE)
    rows = data.inputs, data.targets, data.held_inputs, data.held_targets
    return Task(Problem(lambda seed: gpt(data, seed), *rows, 16), "cross_entropy", 140)


TASKS = {"digits": digits, "perceptron": perceptron, "text": text}


def fit(task: Task, batch: float, rate: float, steps: int, seed: int) -> tuple[float, float]:
    """The loss at the end, and the seconds."""
    polar._rate = lambda model: rate * own_rate(model)
    problem = task.problem
    model = problem.network(seed)
    size = None if batch == 1.0 else round(batch * problem.batch)
    rows = problem.inputs, problem.targets
    begin = time.perf_counter()
    found = onestep.fit(model, rows, task.loss, max_steps=steps, batch_size=size, seed=seed, progress=False)
    seconds = time.perf_counter() - begin
    if found.method != "polar":
        raise RuntimeError(f"fit took method {found.method!r}; expected 'polar'")
    return problem.held_out(model), seconds


def milliseconds(task: Task) -> dict[float, float]:
    """Of a step by the factor of the batch, in turn, shortest of five."""
    least = {0.5: float("inf"), 1.0: float("inf"), 2.0: float("inf")}
    for _ in range(5):
        for batch in least:
            few, many = (fit(task, batch, 1.0, steps, 0)[1] for steps in (32, 64))
            least[batch] = min(least[batch], 1e3 * (many - few) / 32)
    return least


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("defaults.jsonl"))
    parser.add_argument("--milliseconds", help="a step at half the batch, the batch, and twice the batch")
    arguments = parser.parse_args()
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    done = {(line["task"], line["batch"], line["rate"]) for line in map(json.loads, lines)}
    for name in arguments.tasks:
        task = TASKS[name]()
        given = [float(part) for part in (arguments.milliseconds or "").split(",") if part]
        ms = dict(zip((0.5, 1.0, 2.0), given, strict=True)) if given else milliseconds(task)
        for batch, rate in SETTINGS:
            if (name, batch, rate) in done:
                continue
            part = 1.0 if batch == rate == 1.0 else PART
            steps = round(part * task.steps * ms[1.0] / ms[batch])
            losses = [fit(task, batch, rate, steps, seed)[0] for seed in range(arguments.seeds)]
            line = {"task": name, "batch": batch, "rate": rate, "steps": steps, "ms": round(ms[batch], 2)}
            line |= {"median": round(statistics.median(losses), 5), "losses": [round(loss, 5) for loss in losses]}
            print(json.dumps(line), flush=True)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
