"""The multinomial solver: minima that scikit-learn's Newton method agrees on, for shapes and features of many kinds."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn import linear_model
from sklearn.datasets import load_digits

from onestep import LogisticRegression
from onestep.estimators import _path
from onestep.solvers.coordinates import Coordinates
from onestep.solvers.multinomial import DenseRows, Descent, memory, rows, solve, solve_multinomial


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture(autouse=True)
def no_newton(monkeypatch):
    """Small problems take this solver, too."""
    monkeypatch.setattr(_path, "newton_pays", lambda n, shape: False)


def draw(rng, n, d, k, spread=0.0, offset=0.0):
    X = rng.normal(size=(n, d)) @ np.linalg.qr(rng.normal(size=(d, d)))[0]
    y = (X @ rng.normal(size=(d, k)) * 2 / np.sqrt(d) + rng.gumbel(size=(n, k))).argmax(1)
    y[:k] = np.arange(k)
    return X * np.logspace(0, spread, d) + offset, y


def unlike(rng, decades, intercept, features=lambda X: X):
    """2,000 rows of 20 classes whose shares lie as many decades apart."""
    X = rng.normal(size=(2000, 32))
    scores = X @ rng.normal(size=(32, 20)) * 2 / np.sqrt(32) + decades * np.log(10) * np.linspace(-0.5, 0.5, 20)
    y = (scores + rng.gumbel(size=scores.shape)).argmax(1)
    y[:20] = np.arange(20)
    X = torch.from_numpy(features(X))
    return DenseRows(X, torch.from_numpy(y), None, Coordinates.of(X, None, intercept=intercept), 20)


def objective(W, b, X, y, C, weight=1.0):
    scores = X.astype(np.float64) @ np.asarray(W, dtype=np.float64).T + b
    losses = logsumexp(scores, axis=1) - scores[np.arange(len(y)), y]
    return C * np.sum(weight * losses) + 0.5 * np.square(W, dtype=np.float64).sum()


def minimum(X, y, C, fit_intercept=True, weight=None):
    """By scikit-learn's Newton method, on columns of like scale where there is no penalty to speak of."""
    model = linear_model.LogisticRegression(C=C, solver="newton-cholesky", tol=1e-11, fit_intercept=fit_intercept)
    model.fit(X.astype(np.float64), y, weight)
    return objective(model.coef_, model.intercept_, X, y, C, 1.0 if weight is None else weight)


@pytest.mark.parametrize(
    ("n", "d", "k", "spread", "C"),
    [
        (600, 5, 3, 0.0, 1.0),
        (400, 20, 15, 2.0, 10.0),
        (1500, 8, 20, 0.0, 0.1),
        (60, 80, 4, 0.0, 1.0),
        (900, 1, 6, 3.0, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_reaches_the_minimum(rng, n, d, k, spread, C, dtype):
    X, y = draw(rng, n, d, k, spread)
    X = X.astype(dtype)
    least = minimum(X, y, C)
    model = LogisticRegression(C=C, max_iter=1000).fit(X, y)
    assert objective(model.coef_, model.intercept_, X, y, C) <= least * (1 + 1e-5)
    if dtype == np.float64:
        model = LogisticRegression(C=C, max_iter=2000, tol=1e-9).fit(X, y)
        assert objective(model.coef_, model.intercept_, X, y, C) <= least * (1 + 1e-10)
        np.testing.assert_allclose(model.intercept_.sum(), 0, atol=1e-8)


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_weights_and_far_columns(rng, fit_intercept):
    X, y = draw(rng, 500, 6, 20, offset=1000.0 if fit_intercept else 0.0)
    weight = rng.uniform(0.1, 3.0, size=len(X)) * (np.arange(len(X)) >= 20)
    weight[:20] = 0.5
    least = minimum(X - X.mean(0) if fit_intercept else X, y, 1.0, fit_intercept, weight)
    model = LogisticRegression(fit_intercept=fit_intercept, tol=1e-8, max_iter=1000).fit(X, y, weight)
    # 1000 in each column costs the scores three digits.
    assert objective(model.coef_, model.intercept_, X, y, 1.0, weight) <= least * (1 + 1e-7)


def test_samples_are_starts(monkeypatch):
    """Many rows: over three draws the passes over all of them are fewer, and the results are those of all rows."""
    passes = np.zeros(2)
    for seed in range(3):
        X, y = draw(np.random.default_rng(seed), 40_000, 10, 8)
        coordinates = Coordinates.of(torch.from_numpy(X), None, intercept=True)
        data = DenseRows(torch.from_numpy(X), torch.from_numpy(y), None, coordinates, 8)
        with_samples = solve_multinomial(data, 1e-4, None, tol=1e-4, max_iter=200)
        with monkeypatch.context() as patch:
            patch.setattr(solve, "_samples", lambda rows: [])
            without = solve_multinomial(data, 1e-4, None, tol=1e-4, max_iter=200)
        assert with_samples.loss == pytest.approx(without.loss, rel=1e-6)
        assert with_samples.converged and without.converged
        passes += with_samples.passes, without.passes
    assert passes[0] < 0.96 * passes[1], passes


def test_soft_labels(rng):
    """Probabilities as labels: the same as rows repeated with the probabilities as weights."""
    X, _ = draw(rng, 200, 5, 4)
    P = rng.dirichlet(np.ones(4), size=200)
    x = torch.from_numpy(X)
    coordinates = Coordinates.of(x, None, intercept=True)
    soft = solve_multinomial(
        DenseRows(x, torch.from_numpy(P), None, coordinates, 4), 0.01, None, tol=1e-9, max_iter=500
    )
    repeated = DenseRows(
        x.repeat_interleave(4, dim=0), torch.arange(4).repeat(200), torch.from_numpy(4 * P.ravel()), coordinates, 4
    )
    hard = solve_multinomial(repeated, 0.01, None, tol=1e-9, max_iter=500)
    assert soft.loss == pytest.approx(hard.loss, rel=1e-10)
    torch.testing.assert_close(
        soft.V - soft.V.mean(1, keepdim=True), hard.V - hard.V.mean(1, keepdim=True), atol=1e-6, rtol=0
    )


def test_the_same_for_any_number_of_threads_and_chunks(rng, monkeypatch, restore_threads):
    X, y = draw(rng, 3000, 12, 20)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(LogisticRegression().fit(X, y).coef_)
    np.testing.assert_array_equal(*results)
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 20_000)
    np.testing.assert_allclose(LogisticRegression().fit(X, y).coef_, results[0], atol=1e-3)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_with_and_without_the_factor(rng, monkeypatch, limit):
    monkeypatch.setattr(memory, "_LARGEST_FACTOR", limit)
    X, y = draw(rng, 500, 10, 8, spread=1.0)
    model = LogisticRegression(max_iter=1000).fit(X, y)
    assert objective(model.coef_, model.intercept_, X, y, 1.0) <= minimum(X, y, 1.0) * (1 + 1e-5)


def test_the_gram_matrix_is_taken_when_it_pays(rng, monkeypatch):
    images, y = load_digits(return_X_y=True)
    # More features than pay at first, and nearly dependent ones.
    X = torch.from_numpy(np.tanh(images[:900] / 16 @ rng.uniform(-0.125, 0.125, size=(64, 400))))
    data = DenseRows(X, torch.from_numpy(y[:900]), None, Coordinates.of(X, None, intercept=True), 10)
    found = solve_multinomial(data, 1e-4, None, tol=1e-5, max_iter=1000)
    monkeypatch.setattr(solve, "_REWEIGH", 10**9)
    without = solve_multinomial(data, 1e-4, None, tol=1e-5, max_iter=1000)
    assert found.converged and found.loss == pytest.approx(without.loss, rel=1e-5)
    assert found.passes < 0.7 * without.passes, (found.passes, without.passes)


@pytest.mark.parametrize(("decades", "C", "passes"), [(0, 1.0, 22), (2, 1.0, 30), (2, 100.0, 90)])
def test_an_intercept_and_unlike_classes_cost_few_passes(decades, C, passes):
    """18, 27 and 83; without the classes' means of the columns 28, 33 and 97, with one level 18, 60 and 220."""
    data = unlike(np.random.default_rng(5), decades, True)
    found = solve_multinomial(data, 1 / (C * data.count), None, tol=1e-5, max_iter=1000)
    assert found.converged and found.passes < passes


@pytest.mark.parametrize(("decades", "C", "passes"), [(2, 1.0, 24), (2, 100.0, 27)])
def test_unlike_classes_that_no_intercept_follows(decades, C, passes):
    """20 and 23 passes: probabilities stay alike. With levels by share from the start there were 30 and 31."""
    data = unlike(np.random.default_rng(5), decades, False)
    found = solve_multinomial(data, 1 / (C * data.count), None, tol=1e-5, max_iter=1000)
    assert found.converged and found.passes < passes


@pytest.mark.parametrize(("C", "passes"), [(1.0, 60), (100.0, 130)])
def test_unlike_classes_that_columns_follow(C, passes):
    """49 and 108 passes; 83 and 425 with one level, 110 and 177 where a step may shift all classes."""
    data = unlike(np.random.default_rng(5), 2, False, lambda X: np.maximum(X + 0.3, 0))
    descent = Descent(data, 1 / (C * data.count), tol=1e-5)
    descent.begin(None)
    while not descent.ended:
        descent.step()
    assert descent.converged and descent.passes < passes
    assert descent.point.V.sum(1).abs().max().item() <= 1e-10 * descent.point.V.abs().max().item()


def test_unlike_classes_of_more_columns_than_rows():
    """39 passes; 70 with the classes' means and levels over a diagonal."""
    rng = np.random.default_rng(2)
    X = rng.normal(size=(600, 800))
    scores = X @ rng.normal(size=(800, 5)) * 2 / 800**0.5 + 6 * np.log(10) * np.linspace(-0.5, 0.5, 5)
    y = (scores + rng.gumbel(size=scores.shape)).argmax(1)
    y[:5] = np.arange(5)
    x = torch.from_numpy(X)
    data = DenseRows(x, torch.from_numpy(y), None, Coordinates.of(x, None, intercept=True), 5)
    found = solve_multinomial(data, 1e-3, None, tol=1e-5, max_iter=150)
    assert found.converged and found.passes < 50


@pytest.mark.parametrize("intercept", [False, True])
def test_goes_on_from_a_state(intercept):
    """After the Gram matrix was taken anew: with the same bits. And from a state that knows no levels."""
    data = unlike(np.random.default_rng(5), 2, intercept, lambda X: np.maximum(X + 0.3, 0))
    whole = Descent(data, 1e-6, tol=1e-5)
    whole.begin(None)
    for _ in range(23):
        whole.step()
    state = whole.state()
    assert len(state["memory"]["levels"].unique()) > 1
    older = {**state, "memory": {name: state["memory"][name] for name in ("pairs", "spread", "gram")}}
    others = [Descent(data, 1e-6, tol=1e-5) for _ in range(2)]
    for other, kept in zip(others, (state, older), strict=True):
        other.restore(kept)
    for descent in (whole, *others):
        while not descent.ended:
            descent.step()
        assert descent.converged
    torch.testing.assert_close(others[0].point.V, whole.point.V, atol=0, rtol=0)
    assert others[1].point.loss == pytest.approx(whole.point.loss, rel=1e-6)


def test_separable_classes(rng):
    X = rng.normal(size=(90, 3))
    y = np.digitize(X[:, 0], [-0.5, 0.0, 0.5])
    with pytest.raises(ValueError, match="a plane separates the classes"):
        LogisticRegression(C=np.inf).fit(X, y)
    overlapping = rng.integers(0, 4, size=90)
    model = LogisticRegression(C=np.inf, tol=1e-6).fit(X, overlapping)
    least = minimum(X, overlapping, 1e10)
    assert objective(model.coef_, model.intercept_, X, overlapping, 1e10) <= least * (1 + 1e-6)


def test_warm_start(rng):
    X, y = draw(rng, 500, 6, 20)
    model = LogisticRegression(warm_start=True).fit(X, y)
    first = model.n_iter_[0]
    assert first > 5 and model.fit(X, y).n_iter_[0] <= 2


def test_features_that_are_not_finite(rng):
    X, y = draw(rng, 100, 6, 20)
    X[3, 2] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        LogisticRegression().fit(X, y)


@pytest.mark.long
def test_separable_classes_end_no_higher_than_scikit_learn() -> None:
    """Where no row bends L-BFGS takes the decrement for nothing: it ended at 2,276, scikit-learn at 284."""
    rng = np.random.default_rng(0)
    n, d, k = 20_000, 256, 50
    y = np.arange(n) % k
    X = (rng.standard_normal((k, d)) * 3)[y] + rng.standard_normal((n, d))
    X *= np.logspace(0, 3, d)[rng.permutation(d)] / 30
    model = LogisticRegression(C=1e4, tol=1e-4, max_iter=1000).fit(X, y)
    log_loss = -np.log(model.predict_proba(X)[np.arange(n), y]).sum()
    assert 1e4 * log_loss + 0.5 * np.square(model.coef_).sum() < 284
