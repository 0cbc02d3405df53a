"""LogisticRegression against scikit-learn's, in time and in the loss that is reached."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

from onestep import LogisticRegression


class Problem(NamedTuple):
    """n rows of 64 features, labels drawn from a model of so many classes; scikit-learn's solvers; the goal."""

    n: int
    classes: int
    solvers: tuple[str, ...]
    goal: float


PROBLEMS = [
    Problem(1_000_000, 2, ("lbfgs", "newton-cholesky"), 4.0),
    Problem(200_000, 10, ("lbfgs", "newton-cg"), 2.5),
]
D = 64


def draw(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    X = generator.standard_normal((problem.n, D), dtype=np.float32)
    W = generator.standard_normal((D, problem.classes)) / 4
    return X, (X @ W + generator.gumbel(size=(problem.n, problem.classes))).argmax(1)


def objective(model: Any, X: np.ndarray, y: np.ndarray) -> float:
    """What both minimise, in float64 (C = 1)."""
    scores = model.decision_function(X).astype(np.float64)
    if scores.ndim == 1:
        scores = np.stack((np.zeros_like(scores), scores), axis=1)
    losses = logsumexp(scores, axis=1) - scores[np.arange(len(y)), y]
    return float(losses.sum() + 0.5 * np.square(model.coef_, dtype=np.float64).sum())


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: f"{problem.classes} classes")
@pytest.mark.benchmark(group="LogisticRegression")
def test_logistic_regression(compare: Callable[..., float], problem: Problem) -> None:
    """Against the fastest of scikit-learn's solvers; as errors, how far each ends above the lower loss of the two."""
    X, y = draw(problem)
    peers = {name: SklearnLogisticRegression(solver=name, max_iter=1000) for name in problem.solvers}
    name, peer = min(peers.items(), key=lambda each: timeit.timeit(lambda: each[1].fit(X, y), number=1))
    ours = LogisticRegression().fit(X, y)
    own_loss, peer_loss = objective(ours, X, y), objective(peer, X, y)
    least = min(own_loss, peer_loss)

    def is_no_worse(ours: Any, peer: Any) -> None:
        assert objective(ours, X, y) <= (1 + 1e-3) * objective(peer, X, y)

    compare(
        lambda: LogisticRegression().fit(X, y),
        lambda: peer.fit(X, y),
        rounds=5,
        settle=0.2,
        check=is_no_worse,
        case=f"{problem.n:,} × {D}, {problem.classes} classes; peer: {name}",
        goal=problem.goal,
        error=own_loss / least - 1,
        peer_error=peer_loss / least - 1,
    )
