"""Logistic and Poisson regression on columns of unlike scale, far from zero, and on data that a plane separates."""

import warnings

import numpy as np
import pytest
from scipy import sparse
from scipy.special import logsumexp
from sklearn import linear_model
from sklearn.model_selection import LeaveOneOut

from onestep import LogisticRegression, LogisticRegressionCV, PoissonRegressor, RidgeClassifier, RidgeCV


def years_and_incomes(rng, n=200):
    X = np.stack([rng.integers(1950, 2020, n).astype(float), 3e5 + 1e5 * rng.normal(size=n)], 1)
    return X, 0.05 * (X[:, 0] - 1985) + 1e-5 * (X[:, 1] - 3e5)


def log_loss(model, X, y):
    scores = np.asarray(model.decision_function(X), dtype=np.float64)
    return np.mean(np.logaddexp(0, scores) - y * scores)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_years_and_incomes(rng, dtype):
    """The right values are those of scikit-learn's Newton method on standardised columns."""
    X, eta = years_and_incomes(rng)
    X = X.astype(dtype)
    y = (rng.uniform(size=len(X)) < 1 / (1 + np.exp(-eta))).astype(int)
    Z = X.astype(np.float64)
    Z = (Z - Z.mean(0)) / Z.std(0)
    right = linear_model.LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10).fit(Z, y)
    ours = LogisticRegression(C=np.inf).fit(X, y)
    slopes = right.coef_ / X.astype(np.float64).std(0)
    np.testing.assert_allclose(slopes, [[0.0621, 1.03e-5]], rtol=5e-3)
    np.testing.assert_allclose(ours.coef_, slopes, rtol=1e-6 if dtype == np.float64 else 1e-4)
    assert log_loss(ours, X, y) == pytest.approx(0.47924, abs=1e-5)
    assert ours.n_iter_[0] < 10


@pytest.mark.parametrize("n", [400, 60_000])
@pytest.mark.parametrize("C", [1.0, np.inf])
def test_far_from_zero(rng, n, C):
    """Adding 1000 to every feature moves the intercept and nothing else."""
    X = rng.normal(size=(n, 6))
    y = X @ rng.normal(size=6) + rng.logistic(size=n) > 0
    near = LogisticRegression(C=C, tol=1e-8).fit(X, y)
    far = LogisticRegression(C=C, tol=1e-8).fit(X + 1000.0, y)
    np.testing.assert_allclose(far.coef_, near.coef_, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(far.intercept_ + 1000.0 * far.coef_.sum(), near.intercept_, atol=1e-5)


def test_several_classes(rng):
    X, eta = years_and_incomes(rng, 300)
    y = np.digitize(eta + rng.logistic(size=300), [-1, 1])
    mean, deviation = X.mean(0), X.std(0)
    near = linear_model.LogisticRegression(C=1e6, tol=1e-10, max_iter=1000).fit((X - mean) / deviation, y)
    ours = LogisticRegression(C=1e14, tol=1e-6).fit(X, y)
    np.testing.assert_allclose(ours.coef_, near.coef_ / deviation, rtol=1e-4)


def test_rare_category(rng):
    """A column that varies only in rows which the sample for the scales leaves out."""
    n = 50_000
    X = rng.normal(size=(n, 3))
    X[:, 2] = 0
    X[1:1000:2, 2] = 1e-3
    y = X @ [1.0, -1.0, 2000.0] + rng.logistic(size=n) > 0
    ours = LogisticRegression(C=np.inf).fit(X, y)
    right = linear_model.LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10).fit(X * [1, 1, 1e3], y)
    np.testing.assert_allclose(ours.coef_, right.coef_ * [1, 1, 1e3], rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1e-3])
def test_poisson(rng, alpha):
    X, eta = years_and_incomes(rng)
    y = rng.poisson(np.exp(eta / 2))
    scale = X.std(0)
    ours = PoissonRegressor(alpha=alpha).fit(X, y)
    right = linear_model.PoissonRegressor(alpha=0, solver="newton-cholesky", tol=1e-10).fit((X - X.mean(0)) / scale, y)
    if alpha == 0:
        np.testing.assert_allclose(ours.coef_, right.coef_ / scale, rtol=1e-5)

    def objective(model, Z):
        mean = model.predict(Z)
        return np.mean(mean - y * np.log(mean)) + 0.5 * alpha * np.square(model.coef_).sum()

    theirs = linear_model.PoissonRegressor(alpha=alpha, solver="newton-cholesky").fit(X, y)
    assert objective(ours, X) <= objective(theirs, X) + 1e-9
    assert objective(ours, X) <= objective(right, (X - X.mean(0)) / scale) + (1e-9 if alpha == 0 else 1.0)


@pytest.mark.parametrize(("spread", "tol"), [(3.0, 1e-4), (0.0, 1e-6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_never_stops_above_scikit_learn(rng, spread, tol, weighted):
    """Separable classes and a weak penalty: every slope is small long before the objective is near its minimum."""
    n, d, classes = 1000, 24, 6
    centres = rng.normal(size=(classes, d))
    y = rng.integers(0, classes, n)
    X = (centres[y] + rng.normal(size=(n, d))) * np.logspace(0, spread, d)
    weight = 1e3 * rng.uniform(0.5, 1.5, size=n) if weighted else np.ones(n)
    C = 1e4 / weight.mean()

    def objective(model):
        scores = model.decision_function(X)
        losses = weight * (logsumexp(scores, axis=1) - scores[np.arange(n), y])
        return losses.sum() + 0.5 * np.square(model.coef_).sum() / C

    ours = LogisticRegression(C=C, tol=tol).fit(X, y, weight)
    for solver in ("lbfgs", "newton-cholesky"):
        theirs = linear_model.LogisticRegression(C=C, tol=tol, solver=solver, max_iter=1000).fit(X, y, weight)
        assert objective(ours) <= objective(theirs) * (1 + 1e-6)
    minimum = linear_model.LogisticRegression(C=C, tol=1e-12, solver="newton-cholesky").fit(X, y, weight)
    assert objective(ours) <= objective(minimum) * (1 + 1e-4)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scale_of_the_weights(rng, scale):
    X = rng.normal(size=(300, 4))
    y = X[:, 0] + rng.logistic(size=300) > 0
    weight = rng.uniform(size=300)
    ours = LogisticRegression(C=1 / scale).fit(X, y, scale * weight)
    np.testing.assert_allclose(ours.coef_, LogisticRegression().fit(X, y, weight).coef_, rtol=1e-9)


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_category_without_counts(rng, fit_intercept):
    category = np.arange(60) % 3
    y = rng.poisson(3, 60) * (category != 1)
    model = PoissonRegressor(alpha=0, fit_intercept=fit_intercept)
    with pytest.raises(ValueError, match=r"y is zero in all rows on one side.*pass alpha > 0"):
        model.fit(np.eye(3)[category], y)
    # With counts in every category there is an optimum: the logarithms of the means.
    model.fit(np.eye(3)[category], y + 1)
    means = [np.mean((y + 1)[category == c]) for c in range(3)]
    np.testing.assert_allclose(model.predict(np.eye(3)), means, rtol=1e-5)


@pytest.mark.parametrize("label", [2, "rare"])
def test_balanced_class_without_weight(rng, label):
    y = np.array([0, 1, label], dtype=object if label == "rare" else int).astype(str if label == "rare" else int)
    y, X = y[np.arange(12) % 3], rng.normal(size=(12, 2))
    for kind in (LogisticRegression, LogisticRegressionCV, RidgeClassifier):
        for rows in (X, sparse.csr_array(X)) if kind is RidgeClassifier else (X,):
            with pytest.raises(ValueError, match=rf"class_weight='balanced'.*zero in all rows of class '?{label}'?"):
                kind(class_weight="balanced").fit(rows, y, (np.arange(12) % 3 != 2).astype(float))


@pytest.mark.parametrize("labels", [[2**63 + 5, 2**63 + 9], [2**64 - 1, 0], [2**64 - 1, 2**64 - 3, 2**64 - 2]])
def test_labels_above_the_signed_integers(rng, labels):
    labels = np.array(labels, dtype=np.uint64)
    y = labels[np.arange(60) % len(labels)]
    X = rng.normal(size=(60, 3)) + 3.0 * (np.arange(60) % len(labels))[:, None]
    for model in (LogisticRegression().fit(X, y), RidgeClassifier().fit(X, y)):
        np.testing.assert_array_equal(model.classes_, np.sort(labels))
        assert model.classes_.dtype == np.uint64
        np.testing.assert_array_equal(model.predict(X[:3]), linear_model.LogisticRegression().fit(X, y).predict(X[:3]))


@pytest.mark.filterwarnings("ignore:R.2 score is not well-defined")
def test_scores_that_are_undefined(rng):
    X = rng.normal(size=(12, 2))
    y = X @ [1, 2.0] + rng.normal(size=12)
    with pytest.warns(UserWarning, match="scores of the alphas are not all finite"):
        RidgeCV(cv=LeaveOneOut()).fit(X, y)

    def scorer(estimator, X, y):
        error = np.square(estimator.predict(X) - y).mean()
        return np.nan if scorer.calls.pop(0) == 0 else -error

    scorer.calls = [0, 1, 1] * 3
    with pytest.warns(UserWarning, match="scores of the alphas are not all finite"):
        model = RidgeCV((0.1, 1.0, 1e6), cv=3, scoring=scorer).fit(X, y)
    assert model.alpha_ == 1.0 and model.best_score_ < 0


@pytest.mark.parametrize("shape", [(400, 4), (4000, 8)])
@pytest.mark.parametrize("C", [np.inf, 1.0])
def test_three_classes_far_from_zero_in_float32(shape: tuple[int, int], C: float) -> None:
    """Newton's method on a small copy in float64."""
    draw = np.random.default_rng(0)
    X = (draw.standard_normal(shape) + 1000).astype(np.float32)
    scores = (X.astype(float) - 1000) @ draw.standard_normal((shape[1], 3))
    y = (scores + draw.gumbel(size=scores.shape)).argmax(1)
    exact = LogisticRegression(C=C, tol=1e-9, max_iter=1000).fit(X.astype(float) - 1000, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LogisticRegression(C=C).fit(X, y)
    assert found.n_iter_[0] <= 12
    np.testing.assert_allclose(found.coef_, exact.coef_, atol=2e-5 * abs(exact.coef_).max())


@pytest.mark.parametrize("estimator", [LogisticRegression(), PoissonRegressor()])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_million_from_zero_in_float32(rng, estimator, weighted):
    """No number of float32 is near enough to tell a slope from rounding there, but few rows are computed in float64."""
    X = (rng.normal(size=(500, 4)) + 2e6).astype(np.float32)
    Z = X.astype(np.float64) - X.astype(np.float64).mean(0)
    eta = Z @ [1.0, -1.0, 0.5, 0.0]
    counts = isinstance(estimator, PoissonRegressor)
    y = rng.poisson(np.exp(np.clip(eta, -3, 2))) if counts else (eta + rng.logistic(size=500) > 0).astype(int)
    weight = rng.integers(0, 3, 500).astype(np.float32) if weighted else None
    peer = getattr(linear_model, type(estimator).__name__)(solver="newton-cholesky", tol=1e-10)
    right = peer.fit(Z, y, sample_weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = estimator.fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(ours.coef_, right.coef_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_classes_without_an_intercept_in_float32(seed):
    """Columns far from zero are nearly parallel: float32 comes to a halt, and float64 goes on from there."""
    rng = np.random.default_rng(seed)
    X = (rng.normal(size=(100, 6)) + 10.0 ** rng.uniform(0, 3, 6)).astype(np.float32)
    y = np.argmax(rng.normal(size=(100, 3)) + (X - X.mean(0)) @ rng.normal(size=(6, 3)), 1)
    right = LogisticRegression(C=10.0, fit_intercept=False).fit(X.astype(np.float64), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = LogisticRegression(C=10.0, fit_intercept=False).fit(X, y)
    assert ours.coef_.dtype == np.float32
    np.testing.assert_allclose(ours.coef_, right.coef_, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["two classes", "three classes", "counts"])
@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows_far_from_zero_in_float32(rng, kind, weighted):
    """Rows beyond the size of a float64 copy; those of no weight may hold anything."""
    X = (rng.normal(size=(40_000, 4)) + 1e6).astype(np.float32)
    Z = X.astype(np.float64) - 1e6
    eta = 0.05 * Z @ [1.0, -1.0, 0.5, 0.0]
    weight = rng.integers(0, 3, len(X)).astype(np.float32) if weighted else None
    if weighted:
        X[np.flatnonzero(weight == 0)[:2]] = 1e30
    if kind == "counts":
        y, ours = rng.poisson(np.exp(eta)), PoissonRegressor(alpha=0.0)
        right = linear_model.PoissonRegressor(alpha=0.0, solver="newton-cholesky", tol=1e-10)
    else:
        scores = np.stack([eta, -eta] if kind == "two classes" else [eta, -eta, 0 * eta], 1)
        y, ours = np.argmax(scores + rng.gumbel(size=scores.shape), 1), LogisticRegression()
        right = linear_model.LogisticRegression(tol=1e-10, max_iter=1000)
    right.fit(Z, y, sample_weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(ours.coef_, right.coef_, rtol=1e-4, atol=2e-5)
    assert np.max(ours.n_iter_) <= 12


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("mean", [1e-4, 1e-6, 1e-9])
def test_rare_counts(rng, mean, dtype):
    """Rates per person and year: all slopes are below tol, which does not say that counts are zero beyond a plane."""
    X = rng.normal(size=(300, 3))
    y = rng.poisson(np.exp(X @ [0.5, -0.5, 0.0] + 2))
    right = PoissonRegressor(alpha=0.0, tol=1e-10).fit(X, y)
    ours = PoissonRegressor(alpha=0.0).fit(X.astype(dtype), (y * (mean / y.mean())).astype(dtype))
    np.testing.assert_allclose(ours.coef_, right.coef_, rtol=1e-3, atol=1e-4)
    assert ours.intercept_ == pytest.approx(right.intercept_ + np.log(mean / y.mean()), abs=1e-3)
