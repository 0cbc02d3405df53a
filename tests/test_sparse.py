"""Estimators on scipy.sparse matrices: the numbers of the dense fit, and scikit-learn's."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.special import logsumexp
from sklearn import linear_model

from onestep import LogisticRegression, PoissonRegressor, Ridge, RidgeClassifier
from onestep.estimators import _newton, _sparse
from onestep.solvers.multinomial import memory


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch):
    monkeypatch.setattr("onestep.estimators._sparse.SMALL_SPARSE", 0)


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def draw(rng, n, d, k, density=0.2):
    X = scipy.sparse.random(n, d, density, "csr", rng=rng)
    y = (X @ rng.normal(size=(d, k)) * 3 + rng.gumbel(size=(n, k))).argmax(1)
    y[:k] = np.arange(k)
    return X, y


def objective(model, X, y, C, weight=1.0):
    scores = model.decision_function(X)
    scores = np.stack((np.zeros_like(scores), scores), 1) if scores.ndim == 1 else scores
    losses = logsumexp(scores, axis=1) - scores[np.arange(len(y)), y]
    return C * np.sum(weight * losses) + 0.5 * np.square(model.coef_).sum()


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("limit", [0, 8192])
def test_agrees_with_the_dense_fit(monkeypatch, rng, k, fit_intercept, weighted, limit):
    monkeypatch.setattr(memory, "_LARGEST_FACTOR", limit)
    X, y = draw(rng, 400, 20, k)
    weight = rng.uniform(0, 2, 400) if weighted else None
    options = {"C": 2.0, "fit_intercept": fit_intercept, "tol": 1e-9, "max_iter": 2000}
    ours = LogisticRegression(**options).fit(X, y, weight)
    right = LogisticRegression(**options).fit(X.toarray(), y, weight)
    np.testing.assert_allclose(ours.coef_, right.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.intercept_, right.intercept_, atol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(X), right.predict_proba(X.toarray()), atol=1e-6)
    np.testing.assert_array_equal(ours.predict(X), ours.predict(X.toarray()))


@pytest.mark.parametrize("format", ["csr", "csc", "coo"])
def test_formats_types_and_labels(rng, format):
    X, y = draw(rng, 200, 10, 3)
    labels = np.array(["a", "b", "c"])[y]
    ours = LogisticRegression().fit(X.asformat(format).astype(np.float32), labels)
    assert ours.coef_.dtype == np.float32
    right = linear_model.LogisticRegression(tol=1e-9, max_iter=1000).fit(X, labels)
    np.testing.assert_allclose(ours.coef_, right.coef_, atol=1e-2)
    np.testing.assert_array_equal(ours.classes_, right.classes_)


def test_many_columns_stay_sparse(rng):
    """Memory of a few copies of the stored elements; objective no higher than scikit-learn's."""
    X, y = draw(rng, 2000, 20_000, 4, density=1e-3)
    tracemalloc.start()
    ours = LogisticRegression().fit(X, y)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 0.1 * X.shape[0] * X.shape[1] * 8
    theirs = linear_model.LogisticRegression(max_iter=1000).fit(X, y)
    assert objective(ours, X, y, 1.0) <= objective(theirs, X, y, 1.0) * (1 + 1e-6)


def test_warm_start_and_errors(rng):
    for k in (2, 4):
        X, y = draw(rng, 300, 10, k)
        model = LogisticRegression(warm_start=True).fit(X, y)
        first = model.n_iter_[0]
        assert model.fit(X, y).n_iter_[0] < first
    X.data[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        LogisticRegression().fit(X, y)


@pytest.mark.parametrize("largest", [0, 2048])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_is_that_of_the_dense_rows(monkeypatch, rng, largest, fit_intercept, weighted):
    """By a factor and by conjugate gradients; a penalty for each target; far means, which are centred implicitly."""
    monkeypatch.setattr(_sparse, "_LARGEST_GRAM", largest)
    X, _ = draw(rng, 300, 20, 2)
    X.data += 3
    Y, weight = rng.normal(size=(300, 3)), rng.uniform(0, 2, 300) if weighted else None
    options = {"alpha": [0.5, 2.0, 0.5], "fit_intercept": fit_intercept}
    ours, right = Ridge(**options).fit(X, Y, weight), Ridge(**options).fit(X.toarray(), Y, weight)
    assert ours.solver_path_ == ("cholesky" if largest else "conjugate_gradients")
    np.testing.assert_allclose(ours.coef_, right.coef_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ours.intercept_, right.intercept_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ours.predict(X), right.predict(X.toarray()), atol=1e-8)
    assert ours.score(X, Y) == pytest.approx(right.score(X.toarray(), Y))


def test_ridge_without_a_penalty_has_the_least_norm(rng):
    X = scipy.sparse.random(30, 80, 0.2, "csr", rng=rng)
    y = rng.normal(size=30)
    ours = Ridge(alpha=0.0, fit_intercept=False).fit(X, y)
    np.testing.assert_allclose(ours.coef_, np.linalg.lstsq(X.toarray(), y)[0], atol=1e-6)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("format", ["csr", "csc"])
def test_ridge_classifier_is_that_of_the_dense_rows(rng, k, format):
    X, y = draw(rng, 300, 20, k)
    options = {"class_weight": "balanced"}
    ours, right = RidgeClassifier(**options).fit(X.asformat(format), y), RidgeClassifier(**options).fit(X.toarray(), y)
    assert ours.coef_.shape == right.coef_.shape
    np.testing.assert_allclose(ours.coef_, right.coef_, atol=1e-9)
    np.testing.assert_allclose(ours.intercept_, right.intercept_, atol=1e-9)
    np.testing.assert_array_equal(ours.predict(X), right.predict(X.toarray()))
    several = np.stack((y == 0, y > 0, rng.random(300) < 0.3), 1).astype(int)
    ours, right = RidgeClassifier().fit(X, several), RidgeClassifier().fit(X.toarray(), several)
    np.testing.assert_allclose(ours.coef_, right.coef_, atol=1e-9)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("largest", [4, 1024])
def test_poisson_is_that_of_the_dense_rows(monkeypatch, rng, fit_intercept, weighted, largest):
    monkeypatch.setattr(_newton, "_LARGEST_GRAM", largest)
    monkeypatch.setattr(_newton, "_SAMPLES", (100, 50))
    X, _ = draw(rng, 900, 8, 2)
    y = rng.poisson(np.exp(X @ rng.normal(size=8) + 0.5))
    weight = rng.uniform(0, 2, 900) if weighted else None
    options = {"alpha": 0.01, "fit_intercept": fit_intercept, "tol": 1e-9}
    ours, right = PoissonRegressor(**options).fit(X, y, weight), PoissonRegressor(**options).fit(X.toarray(), y, weight)
    np.testing.assert_allclose(ours.coef_, right.coef_, atol=1e-7)
    np.testing.assert_allclose(ours.intercept_, right.intercept_, atol=1e-7)
    np.testing.assert_allclose(ours.predict(X), right.predict(X.toarray()), rtol=1e-6)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensors(rng, layout):
    """In place, and tensors come out."""
    X, y = draw(rng, 300, 20, 3)
    tensor = torch.from_numpy(X.toarray()).to_sparse(layout=layout)
    for model in (Ridge(), RidgeClassifier(), LogisticRegression(), PoissonRegressor()):
        ours = model.fit(tensor, torch.from_numpy(y))
        coef, scores = ours.coef_, ours.predict(tensor)
        assert isinstance(coef, torch.Tensor) and isinstance(scores, torch.Tensor)
        right = model.fit(X, y)
        np.testing.assert_array_equal(coef.numpy(), right.coef_)
        np.testing.assert_array_equal(scores.numpy(), right.predict(X))


def test_sparse_ridge_memory(rng):
    """Twice X at most beside it, and nothing of n × d."""
    X, y = scipy.sparse.random(4000, 20_000, 0.01, "csr", rng=rng), rng.integers(0, 5, 4000)
    tracemalloc.start()
    RidgeClassifier(alpha=100.0).fit(X, y)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 * (X.data.nbytes + X.indices.nbytes) + 20 * 20_000 * 5 * 8
