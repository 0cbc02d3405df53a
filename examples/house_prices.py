"""Fits house prices by a linear model in one step and by a network in a few dozen, and compares both with peers.

    python examples/house_prices.py [--quick]

First the linear model, from the command line: houses, which are synthetic (see make_houses.py), and the diabetes data
that scikit-learn ships. The peers solve the same problem on the same matrix: scikit-learn's Ridge(solver="cholesky"),
and the torch composite one would write by hand.

Then a network of 10 inputs, 64 relu units and 1 output under mean squared error: the houses again, with and without
weight decay, and, where ../shared/data/california_housing.csv is there, the block groups of California's census of
1990. onestep.fit solves for it by Levenberg-Marquardt; the peer is Adam over full batches with the best of several
learning rates. The network is saved, and loaded back by torch alone.

Writes examples/output/house_prices.png, predicted against true values by the linear models, and
examples/output/house_networks.png, the same by the networks, and the loss of both methods against time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import sklearn.linear_model
import torch
from matplotlib.ticker import FuncFormatter
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_diabetes
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split
from torch import nn

import onestep
from onestep.cli import main as cli

HERE = Path(__file__).resolve().parent
# Short paths where it runs from the repository, for they are shown.
HERE = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
OUTPUT = HERE / "output"
PICTURE = OUTPUT / "house_prices.png"
NETWORK_PICTURE = OUTPUT / "house_networks.png"
CALIFORNIA = Path(__file__).resolve().parents[2] / "shared" / "data" / "california_housing.csv"
ALPHA = 1.0
INPUTS, UNITS = 10, 64
# What `python -m onestep fit --model mlp` takes unless told otherwise.
NETWORK_ALPHA = 10.0
# The loss that counts as close to Adam's lowest, relative to it.
NEAR = 1.05


@dataclass(frozen=True)
class Effort:
    """How much to run."""

    rounds: int
    rates: tuple[float, ...]
    epochs: int
    steps: int
    most_rows: int


FULL = Effort(rounds=51, rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1), epochs=1000, steps=100, most_rows=10**9)
QUICK = Effort(rounds=5, rates=(1e-2, 1e-1), epochs=40, steps=15, most_rows=2000)


@dataclass(frozen=True)
class Data:
    """A CSV file, and how to show it."""

    title: str
    path: Path
    target: str
    categorical: tuple[str, ...]
    quantity: str
    unit: str
    scale: float


def data_sets() -> list[Data]:
    """The houses of this repository, and scikit-learn's diabetes data written to a CSV file, in its own units."""
    diabetes = load_diabetes(as_frame=True, scaled=False).frame.rename(columns={"target": "progression"})
    path = OUTPUT / "diabetes.csv"
    diabetes.astype({"sex": int}).to_csv(path, index=False)
    return [
        Data("House prices (synthetic)", HERE / "data" / "houses.csv", "price", (), "price", "thousand EUR", 1e3),
        Data("Diabetes (scikit-learn)", path, "progression", ("sex",), "progression after a year", "score", 1.0),
    ]


def command(*arguments: str | Path) -> None:
    """Shows a command as one would type it, and runs it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ python -m onestep {' '.join(words)}", flush=True)
    if code := cli(words):
        sys.exit(code)


@dataclass(frozen=True)
class Split:
    """Features and target to fit on, and held out: the rows that `fit` takes with its default seed."""

    X: np.ndarray
    y: np.ndarray
    X_held: np.ndarray
    y_held: np.ndarray

    def standardised(self, X: np.ndarray) -> torch.Tensor:
        """Features with mean 0 and standard deviation 1 over the rows to fit on."""
        return torch.from_numpy((X - self.X.mean(0)) / self.X.std(0)).float()

    def predict(self, model: nn.Module) -> np.ndarray:
        """What a model of the standardised features predicts for the rows held out, in the target's units."""
        with torch.no_grad():
            outputs = model(self.standardised(self.X_held))[:, 0].double().numpy()
        return np.asarray(self.y.mean() + self.y.std() * outputs)


def split(features: pd.DataFrame, target: pd.Series) -> Split:
    """Holds out a fifth of the rows; the median of the others stands in for missing values."""
    train, test = train_test_split(np.arange(len(target)), test_size=0.2, random_state=0)
    X = features.fillna(features.iloc[train].median()).to_numpy(dtype=np.float64)
    y = target.to_numpy(dtype=np.float64)
    return Split(X[train], y[train], X[test], y[test])


def all_columns(data: Data) -> Split:
    """Every column, categories as 0/1."""
    frame = pd.read_csv(data.path)
    target = frame.pop(data.target)
    return split(pd.get_dummies(frame.astype(dict.fromkeys(data.categorical, str)), drop_first=True), target)


def composite(X: torch.Tensor, Y: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge by torch alone; the centring leaves the intercept without a penalty, as the other two have it."""
    x_mean, y_mean = X.mean(0), Y.mean(0)
    X, Y = X - x_mean, Y - y_mean
    A = X.mT @ X + alpha * torch.eye(X.shape[1], dtype=X.dtype)
    W = torch.cholesky_solve(X.mT @ Y, torch.linalg.cholesky_ex(A)[0])
    return W[:, 0], (y_mean - x_mean @ W)[0]


def medians(fits: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of each fit, taken in turn (A B C A B C ...) so that all meet the same state of the machine."""
    for fit in fits.values():
        fit()
        fit()
    times: dict[str, list[float]] = {name: [] for name in fits}
    for _ in range(rounds):
        for name, fit in fits.items():
            begin = time.perf_counter()
            fit()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def compare(X: np.ndarray, y: np.ndarray, rounds: int) -> tuple[Any, Any]:
    """Prints weights and times of the three side by side; returns the fitted onestep and scikit-learn estimators."""
    ours = onestep.Ridge(alpha=ALPHA)
    theirs = sklearn.linear_model.Ridge(alpha=ALPHA, solver="cholesky")
    tensors = torch.from_numpy(X), torch.from_numpy(y)[:, None]
    fits: dict[str, Callable[[], Any]] = {
        "onestep.Ridge": lambda: ours.fit(X, y),
        "sklearn Ridge(solver='cholesky')": lambda: theirs.fit(X, y),
        "torch cholesky_ex + cholesky_solve": lambda: composite(*tensors, ALPHA),
    }
    times = medians(fits, rounds)
    weight, bias = composite(*tensors, ALPHA)
    found = [
        np.append(ours.coef_, ours.intercept_),
        np.append(theirs.coef_, theirs.intercept_),
        np.append(weight.numpy(), bias.numpy()),
    ]
    n, d = X.shape
    print(f"\nRidge(alpha={ALPHA:g}) on the same {n:,} x {d} matrix, float64, median of {rounds} runs in turn")
    print(f"  {'':<36}{'time':>10}{'onestep is':>14}{'weights differ by at most':>28}")
    for (name, seconds), other in zip(times.items(), found, strict=True):
        ratio, difference = "", ""
        if name != "onestep.Ridge":
            factor = seconds / times["onestep.Ridge"]
            ratio = f"{factor:.2f}x faster" if factor >= 1 else f"{1 / factor:.2f}x slower"
            difference = f"{np.max(np.abs(found[0] - other) / np.abs(other)):.1e} (relative)"
        print(f"  {name:<36}{seconds * 1e6:>7.0f} µs{ratio:>14}{difference:>28}")
    return ours, theirs


def draw(ax: Any, data: Data, truth: np.ndarray, predicted: np.ndarray, scores: str) -> None:
    """One panel: predicted against true values of the held-out rows."""
    size, alpha = (22, 0.55) if len(truth) < 1000 else (7, 0.3)
    truth, predicted = truth / data.scale, predicted / data.scale
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    margin = 0.03 * (ends[1] - ends[0])
    limits = (ends[0] - margin, ends[1] + margin)
    ax.plot(limits, limits, color="0.35", linewidth=1.2, linestyle="--", label="predicted = true", zorder=1)
    label = f"{len(truth):,} held-out rows"
    ax.scatter(truth, predicted, s=size, color="#2a6f97", alpha=alpha, linewidth=0, label=label, zorder=2)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.set_xlabel(f"true {data.quantity} ({data.unit})")
    ax.set_ylabel(f"predicted {data.quantity} ({data.unit})")
    ax.set_title(f"{data.title}\n{scores}", fontsize=11)
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}")
    ax.xaxis.set_major_formatter(plain)
    ax.yaxis.set_major_formatter(plain)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", frameon=False, fontsize=9)


def linear_models(effort: Effort) -> None:
    """Each data set by the command line, then by the three peers; and the picture."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    for ax, data in zip(axes, data_sets(), strict=True):
        print(f"\n=== {data.title}: {data.path}")
        saved = OUTPUT / f"{data.path.stem}.safetensors"
        options = ["--categorical", *data.categorical] if data.categorical else []
        command("fit", data.path, "--target", data.target, *options, "--save", saved)
        command("predict", saved, data.path, "--output", OUTPUT / f"{data.path.stem}_predicted.csv")
        parts = all_columns(data)
        ours, theirs = (model.predict(parts.X_held) for model in compare(parts.X, parts.y, effort.rounds))
        r2 = f"onestep {r2_score(parts.y_held, ours):.4f}, scikit-learn {r2_score(parts.y_held, theirs):.4f}"
        draw(ax, data, parts.y_held, ours, f"held-out R² (alpha={ALPHA:g}): {r2}")
    figure.savefig(PICTURE, dpi=150, bbox_inches="tight", pad_inches=0.2)
    print(f"\npicture: {PICTURE}")


def house_inputs(frame: pd.DataFrame) -> pd.DataFrame:
    """Ten inputs of a house: four numbers, the energy class as a grade, and the district. Rooms follow the area."""
    inputs = frame[["area_m2", "age_years", "distance_km", "garden_m2"]].copy()
    inputs["energy_grade"] = frame["energy_class"].map("ABCDEFG".index)
    return inputs.join(pd.get_dummies(frame["district"], prefix="district").drop(columns="district_Hillside"))


def block_group_inputs(frame: pd.DataFrame) -> pd.DataFrame:
    """Ten inputs of a block group: its eight numbers, the counts as logarithms, and how near the ocean is."""
    inputs = frame[["longitude", "latitude", "housing_median_age", "median_income"]].copy()
    for name in ("total_rooms", "total_bedrooms", "population", "households"):
        inputs[f"log_{name}"] = np.log(frame[name])
    inputs["inland"] = frame["ocean_proximity"] == "INLAND"
    inputs["at_the_water"] = frame["ocean_proximity"].isin(["NEAR OCEAN", "NEAR BAY", "ISLAND"])
    return inputs


@dataclass(frozen=True)
class Task:
    """What a network is fitted to; `alpha` is the penalty on its parameters against the sum of squared errors."""

    data: Data
    inputs: Callable[[pd.DataFrame], pd.DataFrame]
    alpha: float

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{self.data.path.stem}_network" + ("_decayed" if self.alpha else "")


def network_tasks() -> list[Task]:
    """The houses twice, and California once if it is there."""
    houses = data_sets()[0]
    tasks = [Task(houses, house_inputs, 0.0), Task(houses, house_inputs, NETWORK_ALPHA)]
    if CALIFORNIA.exists():
        title = "House values (California, 1990)"
        california = Data(title, CALIFORNIA, "median_house_value", (), "median value", "thousand USD", 1e3)
        tasks.append(Task(california, block_group_inputs, 0.0))
    else:
        print(f"\n{CALIFORNIA} is not there: the network is fitted to the synthetic houses only")
    return tasks


@dataclass
class Fit:
    """A fitted model, and the training loss after each step (the first is before any) with the seconds it came at."""

    method: str
    model: nn.Module
    losses: list[float]
    seconds: list[float]

    def seconds_to(self, loss: float) -> float | None:
        """When the training loss was first that low."""
        return next((s for s, reached in zip(self.seconds, self.losses, strict=True) if reached <= loss), None)


def network() -> nn.Sequential:
    """The network, always from the same first weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, UNITS), nn.ReLU(), nn.Linear(UNITS, 1))


def penalty(model: nn.Module, decay: float) -> float:
    """½ decay ‖θ‖²."""
    with torch.no_grad():
        return 0.5 * decay * sum(p.square().sum().item() for p in model.parameters()) if decay else 0.0


def by_adam(Z: torch.Tensor, t: torch.Tensor, decay: float, rate: float, epochs: int) -> Fit:
    """Adam over full batches."""
    model, losses, seconds = network(), [], []
    begin = time.perf_counter()
    # Its weight_decay adds the gradient of the penalty, as it should for the same minimum.
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
    for epoch in range(epochs + 1):
        loss = nn.functional.mse_loss(model(Z), t)
        losses.append(loss.item() + penalty(model, decay))
        seconds.append(time.perf_counter() - begin)
        if epoch < epochs:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Fit(f"Adam, learning rate {rate:g}", model, losses, seconds)


def by_onestep(
    method: str, model: nn.Module, Z: torch.Tensor, t: torch.Tensor, decay: float = 0.0, steps: int = 1
) -> Fit:
    """onestep.fit; its own preparations count."""
    begin = time.perf_counter()
    result = onestep.fit(model, (Z, t), "mse", weight_decay=decay, max_steps=steps, progress=False)
    preparing = time.perf_counter() - begin - result.history[-1].seconds
    losses = [result.initial_loss, *(record.loss for record in result.history)]
    seconds = [0.0, *(preparing + record.seconds for record in result.history)]
    return Fit(f"{method} (onestep.fit)", model, losses, seconds)


def in_raw_units(model: nn.Module, parts: Split) -> nn.Sequential:
    """The network that takes raw inputs and gives prices: the standardisation goes into its first and last layer."""
    first, last = nn.Linear(INPUTS, UNITS).double(), nn.Linear(UNITS, 1).double()
    raw = nn.Sequential(first, nn.ReLU(), last)
    raw.load_state_dict(model.state_dict())
    with torch.no_grad():
        first.weight /= torch.from_numpy(parts.X.std(0))
        first.bias.sub_(first.weight @ torch.from_numpy(parts.X.mean(0)))
        last.weight *= parts.y.std()
        last.bias.mul_(parts.y.std()).add_(parts.y.mean())
    return raw


def save_and_load(model: nn.Sequential, path: Path, X: np.ndarray) -> np.ndarray:
    """Predictions of the network that torch loads from the file by itself, compared with those of the saved one."""
    save_file(model.state_dict(), path)
    loaded = nn.Sequential(nn.Linear(INPUTS, UNITS), nn.ReLU(), nn.Linear(UNITS, 1)).double()
    loaded.load_state_dict(load_file(path))
    with torch.no_grad():
        predicted, before = loaded(torch.from_numpy(X)), model(torch.from_numpy(X))
    difference = (predicted - before).abs().max().item()
    print(f"  saved to {path}; loaded into torch.nn.Sequential, predictions differ by {difference:g}")
    return np.asarray(predicted[:, 0])


def race(parts: Split, decay: float, effort: Effort) -> dict[str, Fit]:
    """The linear model, Adam with the best of its rates, and Levenberg-Marquardt, in turn on the same rows."""
    Z = parts.standardised(parts.X)
    t = torch.from_numpy((parts.y - parts.y.mean()) / parts.y.std()).float()[:, None]
    # What torch imports and sets up at first use counts for nobody.
    by_adam(Z, t, decay, effort.rates[0], 2)
    by_onestep("", network(), Z, t, decay, 2)
    tried = {rate: by_adam(Z, t, decay, rate, effort.epochs) for rate in effort.rates}
    lowest = {rate: min(fit.losses) for rate, fit in tried.items()}
    best = min(lowest, key=lambda rate: lowest[rate])
    spent = sum(fit.seconds[-1] for fit in tried.values())
    print("  Adam's lowest training loss: " + ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in lowest.items()))
    print(f"  Adam's seconds are those of a run at {best:g} alone; to find that rate took {spent:.1f} s before")
    return {
        "linear": by_onestep("linear model", nn.Linear(INPUTS, 1), Z, t),
        "adam": by_adam(Z, t, decay, best, effort.epochs),
        "onestep": by_onestep("Levenberg-Marquardt", network(), Z, t, decay, effort.steps),
    }


def show(fits: dict[str, Fit], r2: dict[str, float]) -> None:
    """The table."""
    lowest = min(fits["adam"].losses)
    goals = (NEAR * lowest, lowest)
    heads = ("steps", *(f"s to loss {goal:.4f}" for goal in goals), "s in all", "last loss", "held-out R²")
    widths = (8, 18, 18, 10, 11, 13)
    print(f"\n  {'':<36}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for name, fit in fits.items():
        last, reached = "-", ["-", "-"]
        if name != "linear":
            last = f"{fit.losses[-1]:.4f}"
            times = [fit.seconds_to(goal) for goal in goals]
            reached = ["not reached" if seconds is None else f"{seconds:.2f}" for seconds in times]
        cells = (f"{len(fit.losses) - 1:,}", *reached, f"{fit.seconds[-1]:.2f}", last, f"{r2[name]:.4f}")
        print(f"  {fit.method:<36}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    print(
        f"  {lowest:.4f} is the lowest training loss that Adam had, {goals[0]:.4f} is {NEAR - 1:.0%} above it;", end=" "
    )
    print("seconds are of the optimisation alone")


def draw_race(ax: Any, fits: dict[str, Fit], loss: str) -> None:
    """One panel: training loss against seconds."""
    for name, color, marker in (("adam", "#c8553d", None), ("onestep", "#2a6f97", "o")):
        fit = fits[name]
        ax.plot(fit.seconds, fit.losses, color=color, marker=marker, markersize=3, linewidth=1.4, label=fit.method)
    ax.axhline(min(fits["adam"].losses), color="0.35", linewidth=1, linestyle=":", label="Adam's lowest")
    ax.set(yscale="log", xlabel="seconds", ylabel="training loss (standardised target)")
    ax.set_title(f"{INPUTS} inputs, {UNITS} relu, 1 output, from the same first weights\n{loss}", fontsize=11)
    ax.grid(color="0.92", which="both")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)


def networks(effort: Effort) -> None:
    """Each task by both methods; and the picture."""
    tasks = network_tasks()
    figure, axes = plt.subplots(len(tasks), 2, figsize=(11, 5.4 * len(tasks)), layout="constrained")
    for (left, right), task in zip(axes, tasks, strict=True):
        data = task.data
        frame = pd.read_csv(data.path)
        if len(frame) > effort.most_rows:
            frame = frame.sample(effort.most_rows, random_state=0)
        inputs = task.inputs(frame)
        parts = split(inputs, frame[data.target])
        decay = 2 * task.alpha / len(parts.y)
        loss = "mean squared error" + (f" + ½ · {decay:g} ‖θ‖²" if decay else "")
        print(f"\n=== {data.title}: {INPUTS} inputs, {UNITS} relu, 1 output; {loss}")
        print(f"  inputs: {', '.join(inputs)}")
        rows = f"{len(parts.y):,} rows to fit on, {len(parts.y_held):,} held out"
        print(f"  {rows}; float32, {torch.get_num_threads()} threads; same first weights, all rows in each step")
        fits = race(parts, decay, effort)
        r2 = {name: r2_score(parts.y_held, parts.predict(fit.model)) for name, fit in fits.items()}
        show(fits, r2)
        raw = in_raw_units(fits["onestep"].model, parts)
        predicted = save_and_load(raw, OUTPUT / f"{task.name}.safetensors", parts.X_held)
        scores = f"held-out R²: network {r2['onestep']:.4f}, linear model {r2['linear']:.4f}"
        draw(left, data, parts.y_held, predicted, scores)
        draw_race(right, fits, loss)
    figure.savefig(NETWORK_PICTURE, dpi=150, bbox_inches="tight", pad_inches=0.2)
    print(f"\npicture: {NETWORK_PICTURE}")


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description="Fit, compare and draw house prices and diabetes progression.")
    parser.add_argument("--quick", action="store_true", help="fewer runs, rows and steps")
    effort = QUICK if parser.parse_args().quick else FULL
    OUTPUT.mkdir(exist_ok=True)
    linear_models(effort)
    networks(effort)


if __name__ == "__main__":
    main()
