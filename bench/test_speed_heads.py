"""Heads on frozen features: `fit` against Adam and L-BFGS, the closed form, a path of penalties, cross-validation."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV as SklearnLogisticRegressionCV
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import onestep
from onestep import LogisticRegression, LogisticRegressionCV

ROWS, FEATURES, CLASSES, DECAY = 20_000, 256, 100, 1e-4
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
# How far above the minimum counts as there, relatively: of ours and of L-BFGS, and of Adam.
NEAR, NEAR_OF_ADAM = 1e-4, 5e-3
BATCH, LOOK_EVERY, MOST_EPOCHS = 256, 20, 30
# Adam's rate stays, or falls to zero along a cosine in so many epochs.
HORIZONS = (None, 5, 10, 20)


class Data(NamedTuple):
    """Features (n,d), classes (n,) drawn from a softmax of them, and the least loss."""

    X: Tensor
    y: Tensor
    least: float


@cache
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(ROWS, FEATURES, generator=generator)
    scores = X @ (torch.randn(FEATURES, CLASSES, generator=generator) * 2 / FEATURES**0.5)
    uniform = torch.rand(scores.shape, generator=generator).clamp_min_(1e-12)
    y = (scores - (-uniform.log()).log()).argmax(1)
    exact = head().double()
    onestep.fit(exact, (X.double(), y), "cross_entropy", weight_decay=DECAY, tol=1e-8, max_steps=200, progress=False)
    return Data(X, y, objective(exact, X.double(), y))


def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES)


def penalised(model: nn.Linear, X: Tensor, y: Tensor) -> Tensor:
    """What all minimise: cross-entropy and ½ decay ‖θ‖², the bias included."""
    assert model.bias is not None
    return cross_entropy(model(X), y) + 0.5 * DECAY * (model.weight.square().sum() + model.bias.square().sum())


def objective(model: nn.Linear, X: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return penalised(model, X, y).item()


class Schedule(NamedTuple):
    """Adam's rate, and the epochs in which it falls to zero."""

    rate: float
    epochs: int | None

    def __str__(self) -> str:
        return f"{self.rate:g}" + (f" falling in {self.epochs} epochs" if self.epochs else "")


def adam(schedule: Schedule) -> Iterator[nn.Linear]:
    """The head after each step."""
    X, y, _ = data()
    model = head()
    per_epoch, epochs = ROWS // BATCH, schedule.epochs or MOST_EPOCHS
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        order = torch.randperm(ROWS, generator=generator)
        for rows in order.split(BATCH)[:per_epoch]:
            optimizer.zero_grad()
            penalised(model, X[rows], y[rows]).backward()
            optimizer.step()
            if schedule.epochs is not None:
                cosine.step()
            yield model


def steps_of_adam(schedule: Schedule) -> int | None:
    """Steps until the head is near enough, looked at every so many."""
    X, y, least = data()
    for step, model in enumerate(adam(schedule), 1):
        if step % LOOK_EVERY == 0 and objective(model, X, y) <= (1 + NEAR_OF_ADAM) * least:
            return step
    return None


def lbfgs(iterations: int) -> nn.Linear:
    X, y, _ = data()
    model = head()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = penalised(model, X, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def ours(tol: float) -> nn.Linear:
    X, y, _ = data()
    model = head()
    onestep.fit(model, (X, y), "cross_entropy", weight_decay=DECAY, tol=tol, progress=False)
    return model


def loosest() -> float:
    """The loosest tolerance of half a decade each with which `fit` ends near the minimum."""
    X, y, least = data()
    found = (tol for tol in 10.0 ** -np.arange(1, 9, 0.5) if objective(ours(tol), X, y) <= (1 + NEAR) * least)
    return float(next(found))


def both_near(mine: nn.Linear, theirs: nn.Linear) -> None:
    X, y, least = data()
    assert objective(mine, X, y) <= (1 + NEAR) * least
    assert objective(theirs, X, y) <= (1 + NEAR_OF_ADAM) * least


def head_case(peer: str, tol: float) -> str:
    return f"fit, {ROWS:,} × {FEATURES}, {CLASSES} classes, within 1e-4 of the minimum (tol {tol:g}); peer: {peer}"


@pytest.mark.benchmark(group="Heads")
def test_fit_against_adam(compare: Callable[..., float]) -> None:
    """Seconds until within 1e-4 of the minimum, against Adam's until within 0.5 %, at the best of four rates."""
    tried = [Schedule(rate, epochs) for rate in RATES for epochs in HORIZONS]
    reached = {schedule: steps for schedule in tried if (steps := steps_of_adam(schedule)) is not None}
    schedule, steps = min(reached.items(), key=lambda each: each[1])

    def peer() -> nn.Linear:
        return next(itertools.islice(adam(schedule), steps - 1, None))

    tol = loosest()
    case = head_case(f"Adam at {schedule}, {steps} batches of {BATCH}, to 0.5 %", tol)
    compare(lambda: ours(tol), peer, check=both_near, case=case, goal=2.5)


@pytest.mark.benchmark(group="Heads")
def test_fit_against_lbfgs(compare: Callable[..., float]) -> None:
    X, y, least = data()
    iterations = next(n for n in range(5, 400, 5) if objective(lbfgs(n), X, y) <= (1 + NEAR) * least)
    tol = loosest()
    case = head_case(f"torch.optim.LBFGS, {iterations} iterations", tol)
    compare(lambda: ours(tol), lambda: lbfgs(iterations), check=both_near, case=case, goal=1.5)


@pytest.mark.benchmark(group="Heads")
def test_closed_form(compare: Callable[..., float]) -> None:
    """At most six gradients' time, and within 5 % of the minimum."""
    X, y, least = data()

    def closed_form() -> nn.Linear:
        model = head()
        onestep.fit(model, (X, y), "cross_entropy", weight_decay=DECAY, method="closed_form", progress=False)
        return model

    def six_gradients() -> None:
        model = head()
        for _ in range(6):
            model.zero_grad()
            penalised(model, X, y).backward()

    def is_near(mine: nn.Linear, _: None) -> None:
        assert objective(mine, X, y) <= 1.05 * least

    error = objective(closed_form(), X, y) / least - 1
    case = f"closed form under cross-entropy, {ROWS:,} × {FEATURES}, {CLASSES} classes, {error:.2%} above the minimum"
    compare(closed_form, six_gradients, check=is_near, case=f"{case}; peer: six gradients", goal=1.0)


def few_classes() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    X = generator.standard_normal((20_000, 128), dtype=np.float32)
    scores = X @ (generator.standard_normal((128, 20), dtype=np.float32) * 2 / 128**0.5)
    return X, (scores + generator.gumbel(size=scores.shape)).argmax(1)


@pytest.mark.benchmark(group="Heads")
def test_path_of_penalties(compare: Callable[..., float]) -> None:
    """Twenty penalties by one path of warm starts, against one fit at C = 1: at most four times its time."""
    X, y = few_classes()
    Cs = np.logspace(-3, 3, 20)
    # One split of which all rows are fitted; scores of few rows.
    split = [(np.arange(len(X)), np.arange(100))]

    def path() -> Any:
        return LogisticRegressionCV(Cs, cv=split, refit=False, max_iter=1000).fit(X, y)

    def is_converged(found: Any, _: Any) -> None:
        assert (found.n_iter_ < 1000).all()

    compare(
        path,
        lambda: LogisticRegression(max_iter=1000).fit(X, y),
        check=is_converged,
        case="path of 20 penalties, 20,000 × 128, 20 classes; peer: one fit of ours",
        goal=0.25,
    )


@pytest.mark.benchmark(group="Heads")
def test_cross_validation(compare: Callable[..., float]) -> None:
    X, y = few_classes()
    Cs = np.logspace(-3, 3, 10)

    def peer() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SklearnLogisticRegressionCV(Cs=Cs, cv=5, max_iter=1000).fit(X, y)

    def mine() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            return LogisticRegressionCV(Cs, cv=5, max_iter=1000).fit(X, y)

    def are_alike(mine: Any, theirs: Any) -> None:
        # Accuracy of the same folds at the same penalties.
        assert abs(mine.scores_.mean(0) - np.asarray(next(iter(theirs.scores_.values()))).mean(0)).max() < 5e-3

    compare(
        mine,
        peer,
        rounds=3,
        settle=0.2,
        check=are_alike,
        case="LogisticRegressionCV, 5 folds, 10 penalties, 20,000 × 128, 20 classes",
        goal=5.0,
    )
