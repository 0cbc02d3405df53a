"""Trains a convolutional network on handwritten digits with onestep.fit, against Adam and Muon at their best rates.

    python examples/image_classification.py [--quick] [--seeds N]

The data are scikit-learn's digits: 1,797 grey images of 8 x 8 pixels in ten classes, of which a fifth is held out. Adam
and torch.optim.Muon run at the best of several learning rates; onestep.fit has no setting but its number of steps, the
same as theirs. Convolutions are matrices to onestep.fit; Muon takes those of linear layers alone.

Prints held-out losses, the share of digits that are recognised, and how long onestep.fit took to where the others
ended. Writes examples/output/digits.png: loss against seconds, and the held-out digits that its network is least sure
of.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from race import Problem, Run, draw, race, table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
# Short paths where it runs from the repository, for they are shown.
HERE = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
PICTURE = HERE / "output" / "digits.png"
# As many as onestep.fit takes here.
BATCH = 179


@dataclass(frozen=True)
class Effort:
    """How much to run; the rates are those that each optimiser is tried with."""

    steps: int
    seeds: int
    adam: Sequence[float]
    muon: Sequence[float]


FULL = Effort(300, 5, (1e-3, 3e-3, 1e-2, 3e-2), (0.01, 0.03, 0.1))
QUICK = Effort(60, 1, (3e-3, 1e-2), (0.03,))


def network(seed: int) -> nn.Module:
    """Two convolutions and two linear layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def load() -> Problem:
    """Pixels from 0 to 1; a fifth of each class is held out."""
    X, y = load_digits(return_X_y=True)
    parts = train_test_split(X / 16.0, y, test_size=0.2, stratify=y, random_state=0)
    X, X_held = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    y, y_held = (torch.tensor(part) for part in parts[2:])
    return Problem(network, X, y, X_held, y_held, BATCH)


def probabilities(model: nn.Module, X: Tensor) -> Tensor:
    """Of each class."""
    with torch.no_grad():
        return model.eval()(X).softmax(-1)


def accuracy(model: nn.Module, problem: Problem) -> float:
    """The share of held-out digits that are recognised."""
    return (probabilities(model, problem.held_inputs).argmax(1) == problem.held_targets).double().mean().item()


def draw_all(runs: dict[str, list[Run]], problem: Problem) -> None:
    """The picture."""
    figure = plt.figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    ax = left.subplots()
    draw(runs, PICTURE, "Digits: held-out cross entropy, from the same first weights", ax)
    ax.set_yscale("log")
    draw_digits(right, runs["onestep"][0].model, problem)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"\npicture: {PICTURE}")


def draw_digits(figure: Any, model: nn.Module, problem: Problem) -> None:
    """The held-out digits that the network is least sure of, with what it takes them for."""
    sureness, predicted = probabilities(model, problem.held_inputs).max(1)
    axes = figure.subplots(3, 6).ravel()
    for ax, i in zip(axes, sureness.argsort().tolist(), strict=False):
        guess, truth = int(predicted[i]), int(problem.held_targets[i])
        text = f"{guess} ({sureness[i]:.0%})" + ("" if guess == truth else f"\nis {truth}")
        ax.imshow(problem.held_inputs[i, 0], cmap="gray_r")
        ax.set_title(text, fontsize=10, color="0.2" if guess == truth else "#c8553d")
        ax.set_axis_off()
    count = len(problem.held_targets)
    figure.suptitle(
        f"onestep.fit: of {count} held-out digits {accuracy(model, problem):.1%} are recognised\n"
        "those it is least sure of, mistakes in red",
        fontsize=11,
    )


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description="Fit a convolutional network to digits: onestep.fit, Adam and Muon.")
    parser.add_argument("--quick", action="store_true", help="fewer rates and steps, one run each")
    parser.add_argument("--seeds", type=int, help="runs of each, from other first weights")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    # Several threads on such small batches mostly wait for one another where other programs run as well.
    torch.set_num_threads(1)
    problem = load()
    parameters = sum(p.numel() for p in network(0).parameters())
    rows = f"{len(problem.targets):,} images to fit on, {len(problem.held_targets)} held out"
    print(f"Digits: {rows}; {parameters:,} parameters, float32, one thread")
    rates = {"Adam": effort.adam, "Muon": effort.muon}
    runs = race(problem, effort.steps, arguments.seeds or effort.seeds, rates, head_start=1.0)
    table(runs)
    for own in runs.values():
        print(f"  {own[0].name}: {accuracy(own[0].model, problem):.1%} of held-out digits right")
    draw_all(runs, problem)


if __name__ == "__main__":
    main()
