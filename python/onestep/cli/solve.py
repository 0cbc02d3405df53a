"""Fitting the models: both on standardised columns, whose weights are then taken back to the units of the file."""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import nn

import onestep

from .columns import Column
from .errors import CliError, note
from .model import LinearModel, Model, NetworkModel


@dataclass(frozen=True)
class Solve:
    """How a fit went: the path or method that was taken, its time, its steps, and why they ended."""

    path: str
    seconds: float
    steps: int = 1
    reason: str = ""


@dataclass(frozen=True)
class _Standard:
    """Features and target with mean 0 and standard deviation 1 in `dtype`, and how to take weights back.

    So the condition number of the normal equations does not depend on the units of the file, and a penalty weighs on
    every column alike.
    """

    mean: np.ndarray
    scale: np.ndarray
    centre: float
    spread: float
    features: np.ndarray
    target: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, y: np.ndarray, dtype: str) -> _Standard:
        with np.errstate(all="ignore"):
            mean, scale = features.mean(0), features.std(0)
            centre, spread = float(y.mean()), float(y.std()) or 1.0
            standard = ((features - mean) / scale).astype(dtype)
            response = ((y - centre) / spread).astype(dtype)
        if not all(np.isfinite(part).all() for part in (scale, spread, standard, response)):
            raise CliError(f"the numbers are too large or too close together for {dtype}: rescale the columns")
        return cls(mean, scale, centre, spread, standard, response)

    @classmethod
    def of_classes(cls, features: np.ndarray, codes: np.ndarray, dtype: str) -> _Standard:
        """The features alone are standardised; the target is the number of the class."""
        data = cls.of(features, np.zeros(len(codes)), dtype)
        return replace(data, centre=0.0, spread=1.0, target=codes)

    def first(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A layer (k, d), (k,) that takes the raw features, from one that takes the standardised.

        Its bias makes up for the rounding of its weights to the precision that they are kept in.
        """
        raw = (weight / self.scale).astype(self.features.dtype)
        return raw, bias - raw.astype(np.float64) @ self.mean

    def last(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A layer (1, k), (1,) that gives the target, from one that gives the standardised."""
        return weight * self.spread, self.centre + self.spread * bias


# Up to so many parameters "auto" forms the matrix of curvature.
_MOST_DENSE = 2048


def _cast(layers: list[tuple[np.ndarray, np.ndarray]], dtype: str) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    with np.errstate(all="ignore"):
        cast = tuple((weight.astype(dtype), bias.astype(dtype)) for weight, bias in layers)
    if not all(np.isfinite(part).all() for layer in cast for part in layer):
        raise CliError(f"the weights are too large for {dtype}: rescale the columns")
    return cast


# By how much of the target's standard deviation, or of a class's score, the precision that weights are kept in may move
# a prediction: an intercept of 1e8 is rounded to a multiple of 8 in float32.
_MOST_OFF = 1e-4


def _check_digits(exact: Model, kept: Model, features: np.ndarray, spread: float, dtype: str) -> None:
    """Raises where the weights as they are kept predict something else than the weights that were solved for."""
    with np.errstate(all="ignore"):
        off = float(np.abs(exact.scores(features) - kept.scores(features)).max())
    if not off <= _MOST_OFF * spread:
        raise CliError(
            f"{dtype} cannot hold these weights and intercepts: predictions would be off by up to {off:.3g}, because "
            "the numbers of some column are large beside their differences; pass --dtype float64, or subtract a "
            "constant from that column"
        )


@dataclass(frozen=True)
class Task:
    """What is fitted: the target's name, the columns, the classes (none: the target is a number), the target's unit."""

    target: str
    columns: Sequence[Column]
    classes: Sequence[str] = ()
    unit: str | None = ""

    def standardise(self, features: np.ndarray, y: np.ndarray, dtype: str) -> _Standard:
        """The features, and the target where it is a number, with mean 0 and standard deviation 1."""
        return (_Standard.of_classes if self.classes else _Standard.of)(features, y, dtype)


def _ridge(data: _Standard, alpha: float) -> tuple[np.ndarray, np.ndarray, str, int]:
    """The weights (1, d), the bias (1,), the path taken and its steps."""
    try:
        with warnings.catch_warnings():
            # That the weights are not unique is told by the path, and reported by the caller.
            warnings.simplefilter("ignore", RuntimeWarning)
            estimator = onestep.Ridge(alpha=alpha).fit(data.features, data.target)
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise CliError(f"the fit failed ({error}); try a small penalty, such as --alpha 0.001") from None
    layer = np.asarray(estimator.coef_).reshape(1, -1), np.asarray(estimator.intercept_).reshape(1)
    return *layer, estimator.solver_path_, 1


def _logistic(data: _Standard, alpha: float) -> tuple[np.ndarray, np.ndarray, str, int]:
    """The same with one row for each class: Σ log loss + ½ alpha ‖W‖², by Newton's method."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator = onestep.LogisticRegression(C=1 / alpha if alpha else np.inf, tol=1e-8, max_iter=200)
        estimator.fit(data.features, data.target)
    for warning in caught:
        note(str(warning.message))
    weight, bias = np.asarray(estimator.coef_), np.asarray(estimator.intercept_)
    if len(weight) == 1:  # two classes: the log-odds of the second
        weight, bias = np.vstack([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return weight, bias, "newton", int(np.max(estimator.n_iter_))


def fit_linear(task: Task, features: np.ndarray, y: np.ndarray, alpha: float, dtype: str) -> tuple[LinearModel, Solve]:
    """Fits the weights: in one step for a number, by Newton's method for classes."""
    data = task.standardise(features, y, dtype)
    begin = time.perf_counter()
    weight, bias, path, steps = (_logistic if task.classes else _ridge)(data, alpha)
    seconds = time.perf_counter() - begin
    with np.errstate(all="ignore"):
        layer = data.first(*data.last(weight, bias))
    exact, model = (
        LinearModel(task.target, tuple(task.columns), tuple(task.classes), task.unit, *part)
        for part in (layer, *_cast([layer], dtype))
    )
    _check_digits(exact, model, features, data.spread, dtype)
    return model, Solve(path, seconds, steps)


def relu_network(widths: Sequence[int], dtype: str) -> nn.Sequential:
    """Linear, ReLU, Linear ...: from widths[0] inputs to widths[-1] outputs."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, dtype=getattr(torch, dtype)), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fit_network(
    task: Task,
    features: np.ndarray,
    y: np.ndarray,
    alpha: float,
    dtype: str,
    *,
    hidden: Sequence[int],
    max_steps: int,
    seed: int,
) -> tuple[NetworkModel, Solve]:
    """Fits a relu network by `onestep.fit`, from first weights drawn with `seed`.

    Minimises Σ(error)² + alpha ‖θ‖² of the standardised target, θ being all weights and biases: the penalty of the
    linear model. `onestep.fit` minimises the mean of the squares plus ½ weight_decay ‖θ‖², hence 2 alpha / rows. For
    classes it is Σ log loss + ½ alpha ‖θ‖², hence alpha / rows.
    """
    data = task.standardise(features, y, dtype)
    decay = (1 if task.classes else 2) * alpha / len(y)
    try:
        network = relu_network([features.shape[1], *hidden, len(task.classes) or 1], dtype)
        parameters = sum(p.numel() for p in network.parameters())
        result = onestep.fit(
            network,
            (torch.from_numpy(data.features), torch.from_numpy(data.target)),
            "cross_entropy" if task.classes else "mse",
            # Tables are small, and their networks are fitted to the end: steps that know the curvature.
            method="auto" if parameters <= _MOST_DENSE else "gauss_newton",
            max_steps=max_steps,
            weight_decay=decay,
            initialize=True,
            seed=seed,
            progress=sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None,
        )
    except RuntimeError as error:
        # torch has no type of its own for it.
        if "allocate memory" in str(error):
            raise MemoryError from None
        raise
    if result.reason == "interrupted" and not result.history:
        raise KeyboardInterrupt
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in network if isinstance(m, nn.Linear)]
    with np.errstate(all="ignore"):
        layers[0], layers[-1] = data.first(*layers[0]), data.last(*layers[-1])
    exact, model = (
        NetworkModel(task.target, tuple(task.columns), tuple(task.classes), task.unit, part)
        for part in (tuple(layers), _cast(layers, dtype))
    )
    _check_digits(exact, model, features, data.spread, dtype)
    return model, Solve(result.method, result.history[-1].seconds, len(result.history), result.reason)
