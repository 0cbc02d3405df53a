"""LogisticRegression and RidgeClassifier with many classes against scikit-learn."""

from __future__ import annotations

import math
import time
import timeit
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.special import logsumexp
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression
from sklearn.linear_model import RidgeClassifier as SklearnRidgeClassifier

from onestep import LogisticRegression, RidgeClassifier


class Case(NamedTuple):
    """n × d features in k classes; ``decades``: over how many the eigenvalues of XᵀX spread; the goal of the ratio."""

    n: int
    d: int
    k: int
    C: float
    decades: float
    dtype: Any
    goal: float


CASES = [
    Case(16_000, 512, 200, C, decades, dtype, 2.5)
    for C in (1.0, 100.0)
    for decades in (0.0, 6.0)
    for dtype in (np.float64, np.float32)
] + [
    Case(50_000, 768, 1000, 1.0, 0.0, np.float32, 3.0),
    Case(50_000, 768, 1000, 1.0, 6.0, np.float32, 3.0),
    Case(200_000, 64, 10, 1.0, 0.0, np.float32, 3.5),
    Case(200_000, 64, 10, 1.0, 6.0, np.float32, 3.5),
    Case(1_000_000, 64, 2, 1.0, 0.0, np.float32, 5.0),
]


def draw(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Features of a given spectrum and labels drawn from a softmax of them."""
    generator = np.random.default_rng(0)
    X = generator.standard_normal((case.n, case.d), dtype=np.float32)
    rotation = np.linalg.qr(generator.standard_normal((case.d, case.d)))[0].astype(np.float32)
    scale = np.logspace(0, -case.decades / 2, case.d, dtype=np.float32)
    X = ((X * (scale / np.sqrt(np.mean(scale**2)))) @ rotation).astype(case.dtype)
    scores = X @ (generator.standard_normal((case.d, case.k)) * 2 / np.sqrt(case.d)).astype(case.dtype)
    for rows in range(0, case.n, 10_000):
        scores[rows : rows + 10_000] += generator.gumbel(size=scores[rows : rows + 10_000].shape).astype(case.dtype)
    return X, scores.argmax(1)


def objective(model: Any, X: np.ndarray, y: np.ndarray, C: float) -> float:
    """The mean of what both minimise, in float64."""
    coef, total = np.atleast_2d(model.coef_).astype(np.float64), 0.0
    for rows in range(0, len(X), 20_000):
        scores = X[rows : rows + 20_000].astype(np.float64) @ coef.T + model.intercept_
        if scores.shape[1] == 1:
            scores = np.hstack([np.zeros_like(scores), scores])
        total += (logsumexp(scores, axis=1) - scores[np.arange(len(scores)), y[rows : rows + 20_000]]).sum()
    return (total + 0.5 * np.square(coef).sum() / C) / len(X)


def ours_to(X: np.ndarray, y: np.ndarray, C: float, target: float) -> LogisticRegression:
    """Ours, with the loosest tolerance of half a decade each whose objective is no higher than the peer's.

    A tighter tolerance ends no higher, so that each range, loose ones first, is searched by bisection.
    """
    tols = 10.0 ** -np.arange(1, 12, 0.5)
    for low, high in ((0, 3), (4, 7), (8, 15), (16, len(tols) - 1)):
        found = None
        first, last, middle = low, high, high
        while first <= last:
            model = LogisticRegression(C=C, tol=tols[middle], max_iter=2000)
            if objective(model.fit(X, y), X, y, C) <= target:
                found, last = model, middle - 1
            elif middle == high:
                break
            else:
                first = middle + 1
            middle = (first + last) // 2
        if found is not None:
            return found
    raise AssertionError(f"no tolerance reaches the peer's objective of {target}")


def rounds_of(seconds: float, *, seven: float, one: float) -> int:
    """7 up to so many seconds a fit, 1 from so many on, odd and evenly by the logarithm between."""
    share = math.log(max(seconds, seven) / seven) / math.log(one / seven)
    return 7 - 2 * round(3 * min(1.0, share))


def no_worse(objective: Callable[[Any], float]) -> Callable[[Any, Any], None]:
    """A check that ours ends at the peer's objective, to a thousandth: both have tolerances."""

    def check(ours: Any, peer: Any) -> None:
        assert objective(ours) <= (1 + 1e-3) * objective(peer)

    return check


@pytest.mark.parametrize("tight", [False, True], ids=["same objective", "tol 1e-6"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.n}x{c.d}x{c.k}-C{c.C:g}-{c.decades:g}dec-{c.dtype.__name__}")
@pytest.mark.benchmark(group="Multinomial")
def test_logistic_regression(compare: Callable[..., float], case: Case, tight: bool) -> None:
    """The peer at its default tolerance and ours stopped at its objective, or both at 1e-6."""
    X, y = draw(case)
    peer = SklearnLogisticRegression(C=case.C, max_iter=2000, tol=1e-6 if tight else 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        begin = time.perf_counter()
        peer.fit(X, y)
        rounds = rounds_of(time.perf_counter() - begin, seven=0.5, one=10.0)
        target = objective(peer, X, y, case.C)
        tightest = LogisticRegression(C=case.C, tol=1e-6, max_iter=2000)
        ours = tightest.fit(X, y) if tight else ours_to(X, y, case.C, target)
        compare(
            lambda: ours.fit(X, y),
            lambda: peer.fit(X, y),
            check=no_worse(lambda model: objective(model, X, y, case.C)),
            rounds=rounds,
            settle=0.2,
            case=f"{case.n:,} × {case.d}, {case.k} classes, C = {case.C:g}, eigenvalues over {case.decades:g} decades, "
            f"{case.dtype.__name__}, {'both at 1e-6' if tight else 'same objective'}",
            goal=case.goal,
            error=objective(ours, X, y, case.C) / target - 1,
            peer_error=0.0,
        )


@pytest.mark.benchmark(group="Multinomial")
def test_breast_cancer(compare: Callable[..., float]) -> None:
    X, y = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    peer = SklearnLogisticRegression().fit(X, y)
    ours = LogisticRegression().fit(X, y)
    least = objective(peer, X, y, 1.0)
    compare(
        lambda: LogisticRegression().fit(X, y),
        lambda: peer.fit(X, y),
        check=no_worse(lambda model: objective(model, X, y, 1.0)),
        case="569 × 30, 2 classes",
        goal=1.0,
        error=objective(ours, X, y, 1.0) / least - 1,
        peer_error=0.0,
    )


@pytest.mark.benchmark(group="Multinomial")
def test_sparse(compare: Callable[..., float]) -> None:
    """Against the fastest of scikit-learn's solvers that take sparse rows of many classes."""
    generator = np.random.default_rng(0)
    X = scipy.sparse.random(20_000, 100_000, 1e-3, "csr", rng=generator)
    y = (X @ generator.normal(size=(100_000, 20)) * 3 + generator.gumbel(size=(20_000, 20))).argmax(1)
    peers = [SklearnLogisticRegression(solver=solver, max_iter=2000) for solver in ("lbfgs", "newton-cg")]
    peer = min(peers, key=lambda each: timeit.timeit(lambda: each.fit(X, y), number=1))

    def loss(model: Any) -> float:
        scores = model.decision_function(X)
        losses = logsumexp(scores, axis=1) - scores[np.arange(len(y)), y]
        return float(losses.sum() + 0.5 * np.square(model.coef_).sum())

    target = loss(peer)
    models = (LogisticRegression(tol=tol, max_iter=2000).fit(X, y) for tol in 10.0 ** -np.arange(1, 8))
    ours = next(model for model in models if loss(model) <= target)
    compare(
        lambda: ours.fit(X, y),
        lambda: peer.fit(X, y),
        rounds=3,
        settle=0.2,
        check=no_worse(loss),
        case=f"sparse, 20,000 × 100,000, density 1e-3, 20 classes; peer: {peer.solver}",
        goal=1.0,
        error=loss(ours) / target - 1,
        peer_error=0.0,
    )


@pytest.mark.benchmark(group="Multinomial")
def test_ridge_classifier(compare: Callable[..., float]) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20_000, 768, generator=generator).numpy()
    y = torch.randint(0, 1000, (20_000,), generator=generator).numpy()
    ours, peer = RidgeClassifier().fit(X, y), SklearnRidgeClassifier(solver="cholesky").fit(X, y)
    compare(
        lambda: RidgeClassifier().fit(X, y),
        lambda: peer.fit(X, y),
        settle=0.2,
        case="RidgeClassifier, 20,000 × 768, 1,000 classes",
        goal=6.0,
        error=float(abs(ours.coef_ - peer.coef_).max()),
        peer_error=0.0,
    )
