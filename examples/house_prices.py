"""Fits house prices and diabetes progression in one step from the command line, and compares with two peers.

    python examples/house_prices.py [--quick]

The houses are synthetic (see make_houses.py); the diabetes data is the one that scikit-learn ships. The peers solve the
same problem on the same matrix: scikit-learn's Ridge(solver="cholesky"), and the torch composite one would write by
hand. Writes examples/output/house_prices.png, predicted against true values of both data sets.
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
from sklearn.datasets import load_diabetes
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

import onestep
from onestep.cli import main as cli

HERE = Path(__file__).resolve().parent
# Short paths where it runs from the repository, for they are shown.
HERE = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
OUTPUT = HERE / "output"
PICTURE = OUTPUT / "house_prices.png"
ALPHA = 1.0


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


def split(data: Data) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """X and y to fit on, X and y held out: the rows that `fit` takes with its default seed."""
    frame = pd.read_csv(data.path)
    y = frame.pop(data.target).to_numpy(dtype=np.float64)
    X = pd.get_dummies(frame.astype(dict.fromkeys(data.categorical, str)), drop_first=True).to_numpy(dtype=np.float64)
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0)
    return X[train], y[train], X[test], y[test]


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


def draw(ax: Any, data: Data, truth: np.ndarray, predicted: np.ndarray, r2: tuple[float, float]) -> None:
    """One panel: predicted against true values of the held-out rows."""
    truth, predicted = truth / data.scale, predicted / data.scale
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    margin = 0.03 * (ends[1] - ends[0])
    limits = (ends[0] - margin, ends[1] + margin)
    ax.plot(limits, limits, color="0.35", linewidth=1.2, linestyle="--", label="predicted = true", zorder=1)
    ax.scatter(
        truth, predicted, s=22, color="#2a6f97", alpha=0.55, linewidth=0, label=f"{len(truth)} held-out rows", zorder=2
    )
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.set_xlabel(f"true {data.quantity} ({data.unit})")
    ax.set_ylabel(f"predicted {data.quantity} ({data.unit})")
    scores = f"held-out R² (alpha={ALPHA:g}): onestep {r2[0]:.4f}, scikit-learn {r2[1]:.4f}"
    ax.set_title(f"{data.title}\n{scores}", fontsize=11)
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}")
    ax.xaxis.set_major_formatter(plain)
    ax.yaxis.set_major_formatter(plain)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", frameon=False, fontsize=9)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description="Fit, compare and draw house prices and diabetes progression.")
    parser.add_argument("--quick", action="store_true", help="time fewer runs")
    rounds = 5 if parser.parse_args().quick else 51
    OUTPUT.mkdir(exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    for ax, data in zip(axes, data_sets(), strict=True):
        print(f"\n=== {data.title}: {data.path}")
        saved = OUTPUT / f"{data.path.stem}.safetensors"
        options = ["--categorical", *data.categorical] if data.categorical else []
        command("fit", data.path, "--target", data.target, *options, "--save", saved)
        command("predict", saved, data.path, "--output", OUTPUT / f"{data.path.stem}_predicted.csv")
        X, y, X_held, y_held = split(data)
        ours, theirs = compare(X, y, rounds)
        predicted = ours.predict(X_held)
        draw(ax, data, y_held, predicted, (r2_score(y_held, predicted), r2_score(y_held, theirs.predict(X_held))))
    figure.savefig(PICTURE, dpi=150, bbox_inches="tight", pad_inches=0.2)
    print(f"\npicture: {PICTURE}")


if __name__ == "__main__":
    main()
