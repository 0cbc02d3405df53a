"""Fits a small convolutional network to handwritten digits by Gauss-Newton, and compares it with tuned Adam.

    python examples/image_classification.py [--quick]

The data are scikit-learn's digits: 1,797 grey images of 8 x 8 pixels in ten classes, of which a fifth is held out. The
network has two convolutions and a linear layer. Both methods start from the same weights and minimise the same loss,
cross entropy plus a little weight decay, so that there is a minimum to reach. onestep.fit takes Gauss-Newton steps,
each solved for by conjugate gradients with the gradient over all images and the curvature over a sample of them. Adam
goes over small batches with a learning rate that falls to zero along a cosine; of several initial rates the table shows
the one that ended with the lowest training loss.

Writes examples/output/digits.png: training loss against seconds, and the held-out digits that the Gauss-Newton network
is least sure of.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import onestep

HERE = Path(__file__).resolve().parent
# Short paths where it runs from the repository, for they are shown.
HERE = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
PICTURE = HERE / "output" / "digits.png"
WEIGHT_DECAY = 1e-3
ADAM_BATCH = 32
# Images a step over which curvature is taken, and products of a solve.
CURVATURE_BATCH, CG_ITERATIONS = 256, 3
# The loss that counts as close to Adam's last, relative to it.
NEAR = 1.05


@dataclass(frozen=True)
class Effort:
    """How much to run."""

    rates: tuple[float, ...]
    epochs: int
    steps: int


FULL = Effort(rates=(3e-3, 1e-2, 3e-2), epochs=120, steps=200)
QUICK = Effort(rates=(3e-3, 1e-2), epochs=5, steps=40)


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) with values from 0 to 1 and their classes (n,), to fit on and held out."""

    X: Tensor
    y: Tensor
    X_held: Tensor
    y_held: Tensor


@dataclass
class Fit:
    """A fitted network, and the training loss after each step or epoch (first: before any) with the seconds it took."""

    method: str
    model: nn.Module
    steps: int
    passes: float
    losses: list[float]
    seconds: list[float]

    def seconds_to(self, loss: float) -> float | None:
        """When the training loss was first that low."""
        return next((s for s, reached in zip(self.seconds, self.losses, strict=True) if reached <= loss), None)


def load() -> Digits:
    """The digits, of which a fifth of each class is held out."""
    images, classes = load_digits(return_X_y=True)
    X = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(classes)
    train, held = train_test_split(range(len(y)), test_size=0.2, random_state=0, stratify=classes)
    return Digits(X[train], y[train], X[held], y[held])


def network() -> nn.Sequential:
    """The network, always with the same first weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


def training_loss(model: nn.Module, digits: Digits) -> float:
    """What both methods minimise: mean cross entropy + ½ weight decay ‖θ‖²."""
    with torch.no_grad():
        penalty = 0.5 * WEIGHT_DECAY * sum(p.square().sum() for p in model.parameters())
        return float(nn.functional.cross_entropy(model(digits.X), digits.y) + penalty)


def probabilities(model: nn.Module, X: Tensor) -> Tensor:
    """The probability of each class (n, 10)."""
    with torch.no_grad():
        return model(X).softmax(1)


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The part of the held-out digits that is recognised."""
    return (probabilities(model, digits.X_held).argmax(1) == digits.y_held).float().mean().item()


def by_adam(digits: Digits, rate: float, epochs: int) -> Fit:
    """Adam over small batches; the clock stands while the training loss is computed for the table."""
    model = network()
    # Its weight_decay adds the gradient of the penalty, as it should for the same minimum.
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(digits.y) // ADAM_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, seconds = [training_loss(model, digits)], [0.0]
    for _ in range(epochs):
        begin = time.perf_counter()
        for batch in torch.randperm(len(digits.y)).split(ADAM_BATCH):
            loss = nn.functional.cross_entropy(model(digits.X[batch]), digits.y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds.append(seconds[-1] + time.perf_counter() - begin)
        losses.append(training_loss(model, digits))
    return Fit(f"Adam, learning rate {rate:g}", model, steps, epochs, losses, seconds)


def by_onestep(digits: Digits, steps: int) -> Fit:
    """onestep.fit by Gauss-Newton; its own preparations count."""
    model = network()
    begin = time.perf_counter()
    result = onestep.fit(
        model,
        (digits.X, digits.y),
        "cross_entropy",
        method="gauss_newton",
        max_steps=steps,
        weight_decay=WEIGHT_DECAY,
        curvature_batch_size=CURVATURE_BATCH,
        cg_iterations=CG_ITERATIONS,
        progress=False,
    )
    preparing = time.perf_counter() - begin - result.history[-1].seconds
    products = sum(record.cg_iterations for record in result.history)
    # The preconditioner of each step is made of one more pass through the rows of curvature.
    passes = len(result.history) + (products + len(result.history)) * CURVATURE_BATCH / len(digits.y)
    losses = [result.initial_loss, *(record.loss for record in result.history)]
    seconds = [0.0, *(preparing + record.seconds for record in result.history)]
    print(f"  Gauss-Newton: {products:,} products with the curvature of {CURVATURE_BATCH} images; {result.reason}")
    return Fit("Gauss-Newton (onestep.fit)", model, len(result.history), passes, losses, seconds)


def tuned_adam(digits: Digits, effort: Effort) -> Fit:
    """Adam with the rate that ends with the lowest training loss."""
    tried = {rate: by_adam(digits, rate, effort.epochs) for rate in effort.rates}
    best = min(tried.values(), key=lambda fit: fit.losses[-1])
    spent = sum(fit.seconds[-1] for fit in tried.values())
    print("  Adam's last training loss: " + ", ".join(f"{f.losses[-1]:.4f} at {rate:g}" for rate, f in tried.items()))
    print(f"  The seconds below are those of its best rate alone; all rates together took {spent:.1f} s")
    return best


def show(adam: Fit, gauss_newton: Fit, digits: Digits) -> None:
    """The table, and who was first."""
    goals = (NEAR * adam.losses[-1], adam.losses[-1])
    heads = ("steps", "passes", *(f"s to loss {goal:.4f}" for goal in goals), "s in all")
    heads = (*heads, "first loss", "last loss", "held-out accuracy")
    widths = (7, 8, 18, 18, 10, 12, 11, 19)
    print(f"\n  {'':<28}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for fit in (adam, gauss_newton):
        reached = [fit.seconds_to(goal) for goal in goals]
        times = ("not reached" if seconds is None else f"{seconds:.2f}" for seconds in reached)
        ends = (f"{fit.losses[0]:.4f}", f"{fit.losses[-1]:.4f}", f"{accuracy(fit.model, digits):.4f}")
        cells = (f"{fit.steps:,}", f"{fit.passes:.0f}", *times, f"{fit.seconds[-1]:.2f}", *ends)
        print(f"  {fit.method:<28}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    print(f"  {goals[1]:.4f} is Adam's last training loss, {goals[0]:.4f} is {NEAR - 1:.0%} above it")
    print("  passes: over the data, forward and back; a Gauss-Newton step counts one, a product its part of the images")
    for goal in goals:
        print(f"  {verdict(adam, gauss_newton, goal)}")


def verdict(adam: Fit, gauss_newton: Fit, goal: float) -> str:
    """Who reached a loss first; Adam always reaches its own."""
    ours, theirs = gauss_newton.seconds_to(goal), adam.seconds_to(goal)
    assert theirs is not None
    if ours is None:
        return f"Adam alone reached a training loss of {goal:.4f}"
    first, factor = ("Gauss-Newton", theirs / ours) if ours < theirs else ("Adam", ours / theirs)
    return f"{first} was first to a training loss of {goal:.4f}, {factor:.1f} times as fast as the other"


def draw(adam: Fit, gauss_newton: Fit, digits: Digits) -> None:
    """The picture."""
    figure = plt.figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    draw_losses(left.subplots(), adam, gauss_newton)
    draw_digits(right, gauss_newton.model, digits)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"\npicture: {PICTURE}")


def draw_losses(ax: Any, adam: Fit, gauss_newton: Fit) -> None:
    """Training loss against seconds."""
    for fit, color in ((adam, "#c8553d"), (gauss_newton, "#2a6f97")):
        ax.plot(fit.seconds, fit.losses, color=color, marker="o", markersize=2.5, linewidth=1.4, label=fit.method)
    ax.axhline(adam.losses[-1], color="0.35", linewidth=1, linestyle=":", label="Adam's last")
    ax.set(yscale="log", xlabel="seconds", ylabel="training loss")
    ax.set_title(f"Cross entropy + ½ · {WEIGHT_DECAY:g} ‖θ‖², from the same first weights", fontsize=11)
    ax.grid(color="0.92", which="both")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)


def draw_digits(figure: Any, model: nn.Module, digits: Digits) -> None:
    """The held-out digits that the network is least sure of, with what it takes them for."""
    sureness, predicted = probabilities(model, digits.X_held).max(1)
    axes = figure.subplots(3, 6).ravel()
    for ax, i in zip(axes, sureness.argsort().tolist(), strict=False):
        guess, truth = int(predicted[i]), int(digits.y_held[i])
        text = f"{guess} ({sureness[i]:.0%})" + ("" if guess == truth else f"\nis {truth}")
        ax.imshow(digits.X_held[i, 0], cmap="gray_r")
        ax.set_title(text, fontsize=10, color="0.2" if guess == truth else "#c8553d")
        ax.set_axis_off()
    score = f"of {len(digits.y_held)} held-out digits {accuracy(model, digits):.1%} are recognised"
    figure.suptitle(f"Gauss-Newton: {score}\nthose it is least sure of, mistakes in red", fontsize=11)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description="Fit a convolutional network to digits by Gauss-Newton and by Adam.")
    parser.add_argument("--quick", action="store_true", help="fewer learning rates, epochs and steps")
    effort = QUICK if parser.parse_args().quick else FULL
    # Several threads on such small batches mostly wait for one another where other programs run as well.
    torch.set_num_threads(1)
    digits = load()
    parameters = sum(p.numel() for p in network().parameters())
    rows = f"{len(digits.y):,} images to fit on, {len(digits.y_held)} held out"
    print(f"Digits: {rows}; {parameters:,} parameters, float32, one thread")
    # What torch imports and sets up at first use counts for nobody.
    by_adam(digits, effort.rates[0], 1)
    onestep.fit(network(), (digits.X, digits.y), "cross_entropy", method="gauss_newton", max_steps=1, progress=False)
    adam = tuned_adam(digits, effort)
    gauss_newton = by_onestep(digits, effort.steps)
    show(adam, gauss_newton, digits)
    draw(adam, gauss_newton, digits)


if __name__ == "__main__":
    main()
