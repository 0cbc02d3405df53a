"""LogisticRegression on scipy.sparse matrices: the numbers of the dense fit, and scikit-learn's."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse
from scipy.special import logsumexp
from sklearn import linear_model

from onestep import LogisticRegression
from onestep.solvers.multinomial import memory


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch):
    monkeypatch.setattr("onestep.estimators.glm._SMALL_SPARSE", 0)


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
