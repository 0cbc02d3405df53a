"""The multinomial solver's lengths of steps from a sample of the rows, and fits that start from another penalty's."""

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from onestep.estimators._path import Path
from onestep.solvers.coordinates import Coordinates
from onestep.solvers.multinomial import DenseRows, SparseRows, search, solve, solve_multinomial
from onestep.solvers.multinomial.search import Sample
from onestep.solvers.multinomial.sparse import coordinates_of


def draw(n, d, k, decades=0.0, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.logspace(0, -decades / 2, d)
    X = rng.normal(size=(n, d)) * (scale / np.sqrt(np.mean(scale**2))) @ np.linalg.qr(rng.normal(size=(d, d)))[0]
    y = (X @ rng.normal(size=(d, k)) * 2 / np.sqrt(d) + rng.gumbel(size=(n, k))).argmax(1)
    y[:k] = np.arange(k)
    return X + offset, y


def rows_of(X, y, k, dtype=torch.float64, weight=None, intercept=True):
    X = torch.from_numpy(X).to(dtype)
    weight = None if weight is None else torch.from_numpy(weight).to(dtype)
    return DenseRows(X, torch.from_numpy(y), weight, Coordinates.of(X, weight, intercept=intercept), k)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("factor", [0.2, 1.0, 4.0])
def test_the_length_is_that_of_the_least_loss(rng, intercept, weighted, factor):
    """Where the sample is all rows: as scipy finds it."""
    X, y = draw(500, 6, 5)
    weight = rng.uniform(0, 2, size=500) if weighted else None
    data = rows_of(X, y, 5, weight=weight, intercept=intercept)
    penalties = torch.full((6 + intercept, 1), 1e-2, dtype=torch.float64)
    objective = solve._Objective(data, penalties, data.count, solve.Memory(data, penalties[:, 0], solve.Gram.of(data)))
    V = torch.from_numpy(rng.normal(size=(6 + intercept, 5)) * 0.1)
    point = objective.at(V - V.mean(1, keepdim=True))
    direction = -point.gradient
    best = minimize_scalar(lambda t: objective.at(point.V + t * direction).loss).x
    direction *= factor * best
    slope = float((point.gradient * direction).sum())
    # Its slope there is at most a twentieth of what it was, and its length within the bounds of the search.
    assert Sample(data, 1.0).length(objective, point.V, direction, slope) == pytest.approx(1 / factor, rel=0.1)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_scores(rng, dtype, offset):
    """ZV in float64, for rows that are read as they are, centred first, or sparse."""
    X, y = draw(300, 4, 20, offset=offset)
    data = rows_of(X, y, 20, dtype)
    V = torch.from_numpy(rng.normal(size=(5, 20)))
    Z = (data.X.double() - data.coordinates.shift) / data.coordinates.scale
    exact = torch.cat((Z, torch.ones(300, 1)), 1) @ V
    torch.testing.assert_close(data.scores(V).double(), exact, atol=1e-4, rtol=0)
    if not offset:
        sparse = scipy.sparse.csr_array(X * (abs(X) > 0.5)).astype(np.float64 if dtype == torch.float64 else np.float32)
        thin = SparseRows(sparse, data.y, None, coordinates_of(sparse, None, intercept=True), 20)
        Z = (torch.from_numpy(sparse.toarray()).double() - thin.coordinates.shift) / thin.coordinates.scale
        exact = torch.cat((Z, torch.ones(300, 1)), 1) @ V
        torch.testing.assert_close(thin.scores(V).double(), exact, atol=1e-4, rtol=0)


def test_a_sample_is_small_beside_the_rows():
    for n, k, share in ((2000, 5, None), (3000, 5, 1 / 11), (16_000, 5, 1 / 32), (200_000, 5, 1 / 391)):
        sample = Sample.of(rows_of(np.zeros((n, 1)), np.arange(n) % k, k))
        assert (sample and sample.share) == share
    # Scores of many classes: 4 M numbers at most.
    sample = Sample.of(rows_of(np.zeros((40_000, 1)), np.arange(40_000) % 10_000, 10_000))
    assert sample is not None and sample._rows.count * 10_000 <= search._MOST_SCORES


def test_a_sample_without_weight_says_nothing():
    weight = np.zeros(4096)
    weight[1::2] = 1
    assert Sample.of(rows_of(np.zeros((4096, 1)), np.arange(4096) % 3, 3, weight=weight)) is None


def test_lengths_from_a_sample_spare_passes(monkeypatch):
    """Features over six decades: 37 passes instead of 61 for two draws."""
    passes = np.zeros(2)
    for seed in range(2):
        X, y = draw(4000, 128, 200, decades=6.0, seed=seed)
        data = rows_of(X, y, 200, torch.float32)
        found = solve_multinomial(data, 1 / 4000, None, tol=1e-3, max_iter=500)
        with monkeypatch.context() as patch:
            patch.setattr(solve, "_SEARCHED_DECREMENT", np.inf)
            without = solve_multinomial(data, 1 / 4000, None, tol=1e-3, max_iter=500)
        assert found.loss == pytest.approx(without.loss, rel=1e-4)
        passes += found.passes, without.passes
    assert passes[0] < 0.75 * passes[1], passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_from_the_solution_for_another_penalty(dtype, monkeypatch):
    """Without a pass to begin with, and to the minimum of its own penalty."""
    X, y = draw(3000, 12, 20)
    data = rows_of(X, y, 20, dtype)
    first = solve_multinomial(data, 1e-2, None, tol=1e-6, max_iter=100)
    assert first.found is not None and first.converged
    again = solve_multinomial(data, 2e-2, first, tol=1e-6, max_iter=0)
    pull = (data.coordinates.weights(first.V, torch.float64)[:-1].square().sum() * 0.5e-2).item()
    assert again.loss == pytest.approx(first.loss + pull, rel=1e-9)
    calls = []
    evaluate = DenseRows.evaluate
    monkeypatch.setattr(DenseRows, "evaluate", lambda *a, **k: calls.append(0) or evaluate(*a, **k))
    solve_multinomial(data, 1e-2, first, tol=1e-6, max_iter=100)
    assert not calls
    warm = solve_multinomial(data, 2e-2, first, tol=1e-7, max_iter=100)
    cold = solve_multinomial(data, 2e-2, None, tol=1e-7, max_iter=100)
    assert warm.loss == pytest.approx(cold.loss, rel=1e-6)
    torch.testing.assert_close(warm.V, cold.V, atol=1e-4, rtol=0)


def test_a_path_costs_few_passes(monkeypatch):
    """38.5 for twenty penalties, 11.25 for one fit; every slope within tol, every loss within 1e-5 of its minimum."""
    X, y = draw(6000, 64, 20)
    labels = torch.from_numpy(y)
    counted = 0.0
    evaluate, scores = DenseRows.evaluate, DenseRows.scores

    def counting(self, V, *, precise):
        nonlocal counted
        counted += self.count / 6000
        return evaluate(self, V, precise=precise)

    def counting_scores(self, V):
        nonlocal counted
        counted += 0.5 * self.count / 6000
        return scores(self, V)

    monkeypatch.setattr(DenseRows, "evaluate", counting)
    monkeypatch.setattr(DenseRows, "scores", counting_scores)

    def path():
        return Path(torch.from_numpy(X).float(), labels, "softmax", None, outputs=20, intercept=True)

    path().solve(1 / 6000, None, tol=1e-4, max_iter=100)
    one, counted = counted, 0.0
    along, found = path(), []
    for C in np.logspace(-3, 3, 20):
        found.append(along.solve(1 / (C * 6000), found[-1] if found else None, tol=1e-4, max_iter=100))
    assert counted <= 4 * one
    for C, each in zip(np.logspace(-3, 3, 20), found, strict=True):
        assert each.converged and each.slope <= 1e-4
        exact = along.solve(1 / (C * 6000), along.weights(each), tol=1e-6, max_iter=500)
        assert each.loss <= exact.loss * (1 + 1e-5)
        # The objective itself, from the coefficients.
        W = along.weights(each).numpy()
        eta = X @ W[:-1] + W[-1]
        losses = logsumexp(eta, axis=1) - eta[np.arange(6000), y]
        assert losses.mean() + 0.5 / (C * 6000) * np.square(W[:-1]).sum() == pytest.approx(each.loss, rel=1e-5)
