"""Finds handwritten digits on noisy canvases: the heads of a detector solved for, then the whole network, against Adam.

    python examples/object_detection.py [--quick]

scikit-learn's digits are scaled and placed on canvases of 48 x 48 pixels, two to five on each; the digits of the
held-out canvases are other images than those to train on. The detector is fully convolutional: a body gives 64 features
for each of 12 x 12 cells, a class head says which digit a cell is near the middle of, or none, and a box head says
where that digit's box is.

1. A body that has learnt to name the digits near each cell, and nothing of boxes, is kept as it is.
2. Its heads: boxes are linear least squares, solved in one pass; classes are a softmax head, by quasi-Newton steps.
   Adam gets the same features, the best of several rates, and ever longer schedules until its loss ends within a
   thousandth of the solved head's. Told is when either was first within a hundredth and a thousandth of the lowest.
3. The whole network, from these heads, by onestep.fit and by Adam for the same seconds.

The score is mAP at an overlap (intersection over union) of a half, on held-out canvases.

Writes examples/output/object_detection.png: canvases with the boxes found, and the loss against seconds.
"""

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from canvases import BACKGROUND, Canvases, detect, load, mean_average_precision, overlaps
from common import Run, adam, draw_runs, print_table, rows_of_step, save, solved
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import onestep

BATCH = 32


class Heads(nn.Module):
    """Features (…, 64) → (…, 11 + 4): scores of the digits and of none, and a box."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Linear(64, BACKGROUND + 1), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.classes(x), self.boxes(x)], -1)


class Detector(nn.Module):
    """Canvases (n, 1, 48, 48) → (n, cells, 15)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = ((1, 16, 5, 2), (16, 32, 3, 2), (32, 64, 3, 1), (64, 64, 3, 1))
        layers = [(nn.Conv2d(a, b, k, stride=s, padding=k // 2), nn.ReLU()) for a, b, k, s in sizes]
        self.body = nn.Sequential(*(part for layer in layers for part in layer))
        self.heads = Heads()

    def features(self, pixels: Tensor) -> Tensor:
        """(n, cells, 64)."""
        return self.body(pixels).flatten(2).transpose(1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.heads(self.features(pixels))


def entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the cells of the classes' cross-entropy."""
    return F.cross_entropy(outputs[..., : BACKGROUND + 1].flatten(0, 1), targets[..., 0].long().flatten())


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Means over the cells: the classes' cross-entropy, and squared errors of the boxes where there is a digit."""
    wrong = (outputs[..., BACKGROUND + 1 :] - targets[..., 1:]).square().mean(-1)
    return entropy(outputs, targets) + (wrong * (targets[..., 0] != BACKGROUND)).mean()


@dataclass
class Head:
    """A linear head's problem: features (n, 64), targets, their mean loss, and onestep's method for it."""

    name: str
    method: str
    make: Callable[[], nn.Linear]
    rows: Tensor
    targets: Tensor
    loss: str
    decay: float = 0.0

    def objective(self, head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
        """½ decay ‖head‖² included, without which classes that planes separate have no best head."""
        mean = F.cross_entropy if self.loss == "cross_entropy" else F.mse_loss
        penalty = sum(p.square().sum() for p in head.parameters())
        return mean(head(rows), targets) + 0.5 * self.decay * penalty

    def value(self, head: nn.Module) -> float:
        """Over all rows."""
        with torch.no_grad():
            return float(self.objective(head, self.rows, self.targets))

    def solve(self) -> Run:
        """By onestep.fit."""
        model = self.make()
        run, callback, finish = solved(f"{self.name}: solved, {self.method}", model, lambda: self.value(model))
        options = {"method": self.method, "weight_decay": self.decay, "tol": 1e-2, "progress": False}
        onestep.fit(model, (self.rows, self.targets), self.loss, callback=callback, **options)
        finish()
        return run

    def by_adam(self, goal: float, rates: tuple[float, ...], budgets: tuple[float, ...]) -> list[Run]:
        """Adam's runs of ever longer schedules up to one that ends at the goal; the longest at the best rate alone.

        A rate that is not among the two best of a schedule is not tried with a longer one.
        """

        def step_loss(head: nn.Module, step: int) -> Tensor:
            rows = torch.randint(len(self.rows), (1024,), generator=torch.Generator().manual_seed(step))
            return self.objective(head, self.rows[rows], self.targets[rows])

        runs: list[Run] = []
        for seconds in budgets:
            tried = []
            for rate in rates[:1] if runs and seconds == budgets[-1] else rates:
                tried.append(adam(self.make, step_loss, self.value, rates=(rate,), seconds=seconds, every=100))
                tried[-1].method = f"{self.name}: Adam ({rate:g}), {seconds:g} s"
            order = sorted(range(len(tried)), key=lambda i: tried[i].last)
            rates = tuple(rates[i] for i in order[:2])
            runs += [tried[i] for i in order]
            if tried[order[0]].last <= goal:
                break
        return runs


def heads_of(features: Tensor, targets: Tensor) -> tuple[Head, Head]:
    """The problems of the class head, on all cells, and of the box head, on those near a digit."""
    labels, near = targets[..., 0].long(), targets[..., 0] != BACKGROUND

    def make(outputs: int) -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(features.shape[-1], outputs)

    cells = (features.flatten(0, 1), labels.flatten())
    return (
        Head("classes", "quasi_newton", partial(make, BACKGROUND + 1), *cells, "cross_entropy", 1e-4),
        Head("boxes", "closed_form", partial(make, 4), features[near], targets[near][:, 1:], "mse", 1e-3),
    )


def first_at(runs: list[Run], goal: float) -> float:
    """The seconds until any of the runs was there."""
    return min((s for run in runs if (s := run.seconds_to(goal)) is not None), default=math.inf)


def compare_heads(detector: Detector, train: Canvases, held: Canvases, quick: bool) -> None:
    """Prints what either way takes to be within 1 % and within 0.1 % of the lowest loss; leaves the solved heads."""
    with torch.no_grad():
        features = detector.features(train.pixels)
    budgets, rates = ((0.1,), (1e-2,)) if quick else ((1.0, 2.0, 4.0, 8.0, 16.0), (3e-2, 1e-1, 3e-1))
    print(f"{len(features):,} canvases of {features.shape[1]} cells; heads on a body that knows nothing of boxes:")
    print(f"{'':<40}{'loss':>9}{'seconds':>9}{'to within 1 %':>20}{'to within 0.1 %':>20}")
    models, totals = [], torch.zeros(2, 2)
    for problem in heads_of(features, train.targets):
        ours = problem.solve()
        theirs = problem.by_adam(1.001 * ours.last, rates, budgets)
        best = min(theirs, key=lambda run: run.last)
        goals = [part * min(ours.last, best.last) for part in (1.01, 1.001)]
        rows = [(run, [first_at(runs, goal) for goal in goals]) for run, runs in ((ours, [ours]), (best, theirs))]
        for run, soon in sorted(rows, key=lambda row: row[1][1]):
            told = [f"{s:.3f} s" if s < math.inf else "never" for s in soon]
            print(f"{run.method:<40}{run.last:>9.4f}{run.seconds[-1]:>9.3f}{told[0]:>20}{told[1]:>20}")
        totals += torch.tensor([soon for _, soon in rows]).clamp_max(budgets[-1])
        models.append((best.model, ours.model))
    few, many = (totals[1] / totals[0]).tolist()
    print(f"both heads: solved {few:.1f} times sooner than by Adam to within 1 %, {many:.1f} times to within 0.1 %")
    print(f"(never counts as {budgets[-1]:g} s)")
    for name, pair in zip(("Adam", "solving"), zip(*models, strict=True), strict=True):
        detector.heads.classes, detector.heads.boxes = pair
        score = mean_average_precision(detect(detector, held.pixels), held)
        print(f"held-out mAP with the heads by {name}: {score:.3f}")


def whole(
    start: Detector, train: Canvases, held: Canvases, seconds: float, rates: tuple[float, ...], every: int
) -> list[Run]:
    """The network from ``start`` on, by either method for so many seconds; told is the held-out loss."""

    def value(model: nn.Module) -> float:
        with torch.no_grad():
            return float(loss(model(held.pixels), held.targets))

    def step_loss(model: nn.Module, step: int) -> Tensor:
        rows = rows_of_step(len(train.pixels), BATCH, step)
        return loss(model(train.pixels[rows]), train.targets[rows])

    model = copy.deepcopy(start)
    run, callback, finish = solved("onestep.fit", model, lambda: value(model), every=every)
    options = {"batch_size": BATCH, "max_seconds": seconds, "progress": False, "callback": callback}
    onestep.fit(model, (train.pixels, train.targets), loss, method="polar", **options)
    finish()
    return [run, adam(lambda: copy.deepcopy(start), step_loss, value, rates=rates, seconds=seconds, every=every)]


def draw_canvas(axes: Axes, canvases: Canvases, model: nn.Module, index: int) -> None:
    """A canvas with the boxes that are surer than a half: green where they are right."""
    axes.imshow(canvases.pixels[index, 0].numpy(), cmap="gray_r", vmin=-0.3, vmax=1.2)
    ((boxes, digits, sureness),) = detect(model, canvases.pixels[index : index + 1])
    for box, digit in zip(boxes[sureness > 0.5], digits[sureness > 0.5].tolist(), strict=True):
        true = overlaps(box[None], canvases.boxes[index])[0] >= 0.5
        color = "#27864e" if digit in canvases.digits[index][true] else "#c0392b"
        x, y, width, height = torch.cat([box[:2] - 0.5, box[2:] - box[:2]]).tolist()
        axes.add_patch(Rectangle((x, y), width, height, fill=False, color=color, linewidth=1.5))
        axes.text(x + 1, y + 1, str(digit), color=color, fontsize=11, va="top")
    axes.set_axis_off()


def draw(runs: list[Run], best: nn.Module, held: Canvases) -> None:
    figure = plt.figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1))
    for index, axes in enumerate(left.subplots(2, 5).flat):
        draw_canvas(axes, held, best, index)
    draw_runs(right.subplots(), runs, title="Whole network: held-out loss")
    save(figure, "object_detection.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds in all")
    quick = parser.parse_args().quick
    train, held = load(40, 10) if quick else load(800, 200)
    detector = Detector()
    options = {"batch_size": BATCH, "max_steps": 10 if quick else 100, "progress": False}
    onestep.fit(detector, (train.pixels, train.targets), entropy, method="polar", **options)
    compare_heads(detector, train, held, quick)
    runs = whole(detector, train, held, *((0.3, (3e-3,), 5) if quick else (6.0, (1e-3, 2e-3, 4e-3), 10)))
    print("\nwhole network, from the solved heads:")
    print_table("held-out loss", runs, ".4f")
    for run in sorted(runs, key=lambda run: run.last):
        print(f"{run.method}: held-out mAP {mean_average_precision(detect(run.model, held.pixels), held):.3f}")
    draw(runs, min(runs, key=lambda run: run.last).model, held)


if __name__ == "__main__":
    main()
