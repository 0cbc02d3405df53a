"""LogisticRegression and PoissonRegressor: scikit-learn's contract, its numbers, and what it leaves to the caller."""

import warnings

import numpy as np
import pytest
import torch
from sklearn import linear_model
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from onestep import LogisticRegression, PoissonRegressor
from onestep.estimators import _newton
from onestep.estimators._problem import Point, Problem
from onestep.estimators._small import SmallProblem
from onestep.solvers.coordinates import Coordinates


@parametrize_with_checks([LogisticRegression(), PoissonRegressor()])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def table(load):
    X, y = load(return_X_y=True)
    X, y = X[:600, :30], y[:600]
    return (X - X.mean(axis=0)) / (X.std(axis=0) + 1e-9), y


def objective(model, X, y, weight=None):
    """scikit-learn's: C Σ wᵢ ℓᵢ + ½‖W‖², in fp64."""
    scores = np.asarray(model.decision_function(X), dtype=np.float64)
    if scores.ndim == 1:
        scores = np.stack((np.zeros_like(scores), scores), axis=1)
    indices = np.searchsorted(model.classes_, y)
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(y)), indices]
    return model.C * np.sum(losses if weight is None else weight * losses) + 0.5 * np.square(model.coef_).sum()


@pytest.mark.parametrize("load", [load_breast_cancer, load_iris, load_digits])
@pytest.mark.parametrize("C", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_agrees_with_scikit_learn(load, C, fit_intercept):
    X, y = table(load)
    ours = LogisticRegression(C=C, fit_intercept=fit_intercept, tol=1e-9).fit(X, y)
    theirs = linear_model.LogisticRegression(C=C, fit_intercept=fit_intercept, tol=1e-9, max_iter=20_000).fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-3)
    assert objective(ours, X, y) <= objective(theirs, X, y) * (1 + 1e-12)
    assert ours.coef_.shape == theirs.coef_.shape
    assert ours.intercept_.shape == np.shape(theirs.intercept_) or not fit_intercept
    assert ours.n_iter_.shape == (1,) and ours.n_iter_[0] <= max(20, theirs.n_iter_[0])
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-4)
    np.testing.assert_allclose(np.exp(ours.predict_log_proba(X)), ours.predict_proba(X), rtol=1e-12)
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y))


@pytest.mark.parametrize("class_weight", ["balanced", {0: 3.0, 1: 0.5}])
def test_weights(rng, class_weight):
    X, y = table(load_breast_cancer)
    weight = rng.uniform(0.0, 2.0, size=len(y))
    options = {"class_weight": class_weight, "tol": 1e-9}
    ours = LogisticRegression(**options).fit(X, y, weight)
    theirs = linear_model.LogisticRegression(**options, max_iter=10_000).fit(X, y, weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_rows_by_conjugate_gradients(rng, classes, dtype):
    """Enough rows that the Hessian is that of a sample; the minimum is that of all."""
    X = rng.normal(size=(60_000, 6)).astype(dtype)
    logits = X @ rng.normal(size=(6, classes)) + rng.gumbel(size=(len(X), classes))
    y = logits.argmax(axis=1)
    ours = LogisticRegression().fit(X, y)
    theirs = linear_model.LogisticRegression(tol=1e-10, max_iter=1000).fit(X.astype(np.float64), y)
    assert objective(ours, X, y) <= objective(theirs, X, y) * (1 + 1e-8)
    assert ours.coef_.dtype == dtype


@pytest.mark.parametrize("largest", [4, 40])
def test_preconditioners_of_many_parameters(monkeypatch, rng, largest):
    """The Hessian of one output, or its diagonal where that is too large to factor."""
    monkeypatch.setattr(_newton, "_LARGEST_GRAM", largest)
    X, y = table(load_digits)
    y = y > 4
    ours = LogisticRegression(tol=1e-7).fit(X[:, :20], y)
    theirs = linear_model.LogisticRegression(tol=1e-9, max_iter=10_000).fit(X[:, :20], y)
    assert objective(ours, X[:, :20], y) <= objective(theirs, X[:, :20], y) * (1 + 1e-9)


def test_rows_sorted_by_class(rng):
    X = rng.normal(size=(50_000, 3))
    y = np.sort(rng.integers(0, 2, size=len(X)))
    X[:, 0] += y
    ours = LogisticRegression().fit(X, y)
    theirs = linear_model.LogisticRegression(tol=1e-10).fit(X, y)
    assert objective(ours, X, y) <= objective(theirs, X, y) * (1 + 1e-8)


@pytest.mark.parametrize("labels", [["no", "yes"], ["a", "b", "c"], [False, True], [-1.0, 1.0], [3, 5, 9], [-7, 10**9]])
def test_labels_of_any_kind(rng, labels):
    y = np.array(labels)[np.arange(60) % len(labels)]
    X = rng.normal(size=(60, 3)) + 0.5 * (np.arange(60) % len(labels))[:, None]
    ours, theirs = LogisticRegression().fit(X, y), linear_model.LogisticRegression().fit(X, y)
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)
    assert ours.classes_.dtype == theirs.classes_.dtype
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


def test_tensors_in_tensors_out(rng):
    X, y = torch.from_numpy(rng.normal(size=(50, 3))), torch.arange(50) % 2
    model = LogisticRegression().fit(X, y)
    assert isinstance(model.coef_, torch.Tensor) and isinstance(model.predict(X), torch.Tensor)
    torch.testing.assert_close(model.predict_proba(X).sum(1), torch.ones(50, dtype=torch.float64))


def test_without_a_penalty(rng):
    X = rng.normal(size=(500, 3))
    y = X @ [1.0, 2.0, -1.0] + rng.logistic(size=500) > 0
    ours = LogisticRegression(C=np.inf, tol=1e-9).fit(X, y)
    theirs = linear_model.LogisticRegression(C=np.inf, tol=1e-10).fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("quasi", [False, True])
def test_separable_classes(rng, classes, quasi):
    """Finite under the penalty; without one there is no optimum, which is an error, not a large number."""
    X = rng.normal(size=(90, 2))
    y = np.digitize(X[:, 0], [-0.4, 0.4][: classes - 1])
    if quasi:
        # Rows of both classes on the boundary itself.
        X[:6, 0], y[:6] = -0.4, [0, 1] * 3
    assert np.isfinite(LogisticRegression().fit(X, y).coef_).all()
    with pytest.raises(ValueError, match=r"a plane separates the classes.*pass a finite C"):
        LogisticRegression(C=np.inf).fit(X, y)


def test_stopping_early_warns(rng):
    X, y = table(load_breast_cancer)
    with pytest.warns(ConvergenceWarning, match="stopped after 1 iterations"):
        LogisticRegression(C=100.0, max_iter=1).fit(X, y)


def test_warm_start(rng):
    X, y = table(load_iris)
    model = LogisticRegression(warm_start=True, tol=1e-7).fit(X, y)
    again = model.n_iter_[0], model.fit(X, y).n_iter_[0]
    assert again[0] > 2 and again[1] <= 1


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"C": 0.0}, ValueError, "C must be a positive number, got 0.0"),
        ({"C": "1"}, TypeError, "C must be a positive number"),
        ({"tol": -1.0}, ValueError, "tol must be a non-negative number"),
        ({"max_iter": 2.5}, TypeError, "max_iter must be a non-negative integer"),
        ({"fit_intercept": 1}, TypeError, "fit_intercept must be True or False"),
    ],
)
def test_bad_parameters(parameters, error, message):
    with pytest.raises(error, match=message):
        LogisticRegression(**parameters).fit([[0.0], [1.0]], [0, 1])


def test_non_finite_rows():
    X = np.array([[0.0], [np.nan], [1.0]])
    with pytest.raises(ValueError, match="Input X contains NaN"):
        LogisticRegression().fit(X, [0, 1, 1])


def test_one_class():
    with pytest.raises(ValueError, match="y has one class, 7"):
        LogisticRegression().fit([[0.0], [1.0]], [7, 7])


@pytest.mark.parametrize("alpha", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_poisson_agrees_with_scikit_learn(rng, alpha, fit_intercept, weighted):
    X = rng.normal(size=(400, 4))
    y = rng.poisson(np.exp(X @ [0.3, -0.2, 0.1, 0.5] + 1))
    weight = rng.uniform(0.2, 2.0, size=len(X)) if weighted else None
    options = {"alpha": alpha, "fit_intercept": fit_intercept}
    ours = PoissonRegressor(**options, tol=1e-9).fit(X, y, weight)
    theirs = linear_model.PoissonRegressor(**options, tol=1e-10, max_iter=10_000).fit(X, y, weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-6)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-5)
    assert ours.score(X, y, weight) == pytest.approx(theirs.score(X, y, weight))


def test_poisson_far_from_the_start(rng):
    """Counts in the millions: the first full step overshoots eᶯ, the line search finds its way."""
    X = rng.normal(size=(300, 2))
    y = rng.poisson(np.exp(X @ [0.5, -0.5] + 14))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PoissonRegressor(alpha=0.0, tol=1e-3).fit(X, y)
    np.testing.assert_allclose(model.coef_, [0.5, -0.5], atol=1e-3)
    assert model.intercept_ == pytest.approx(14, abs=1e-3)


@pytest.mark.parametrize(("y", "message"), [([1.0, -1.0], "y must not be negative"), ([0.0, 0.0], "zero in every row")])
def test_poisson_bad_counts(y, message):
    with pytest.raises(ValueError, match=message):
        PoissonRegressor().fit([[0.0], [1.0]], y)


@pytest.mark.parametrize("family", ["logistic", "poisson"])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_small_problems_are_the_same_as_large_ones(rng, family, intercept, weighted):
    """Loss, gradient, slope, curvature and products of the copy in numpy against the kernels' passes over X."""
    X = torch.from_numpy(rng.normal(size=(40, 5)) * [1, 10, 0.1, 1, 1] + 3)
    y = torch.from_numpy(rng.integers(0, 2, size=40).astype(float))
    weight = torch.from_numpy(rng.uniform(0.5, 2, size=40)) if weighted else None
    problem = Problem(X, y, family, weight, 0.1, Coordinates.of(X, weight, intercept=intercept))
    small = SmallProblem.of(problem)
    assert type(small) is SmallProblem
    V, direction = torch.from_numpy(rng.normal(size=(2, 5 + intercept)) / 4)
    ours, general = small.at(V), problem.at(V)
    assert (ours.loss, ours.slope) == pytest.approx((general.loss, general.slope), rel=1e-12)
    torch.testing.assert_close(ours.grad, general.grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours.product(direction), general.product(direction), rtol=1e-11, atol=1e-13)
    curvature = ours.model.diagonal_curvature()[:, 0]
    torch.testing.assert_close(curvature, general.model.diagonal_curvature()[:, 0], rtol=1e-11, atol=0)
    torch.testing.assert_close(small.gram(curvature), problem.gram(curvature), rtol=1e-10, atol=1e-10)


def test_a_sample_with_rows_enough_saves_the_products(monkeypatch, rng):
    """Steps by the factor of a sample's Hessian alone reach the minimum of all rows."""
    monkeypatch.setattr(_newton, "_SAMPLES", (400, 100))
    X = rng.normal(size=(40_000, 4))
    y = X[:, 0] + rng.logistic(size=len(X)) > 0.5
    product = Point.product

    def of_samples_only(point, direction):
        assert len(point.problem.X) < len(X)
        return product(point, direction)

    monkeypatch.setattr(Point, "product", of_samples_only)
    ours = LogisticRegression().fit(X, y)
    theirs = linear_model.LogisticRegression(tol=1e-10, max_iter=1000).fit(X, y)
    assert objective(ours, X, y) <= objective(theirs, X, y) * (1 + 1e-10)
