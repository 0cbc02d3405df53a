"""RidgeClassifier: scikit-learn's numbers and labels of every kind."""

import numpy as np
import pytest
import torch
from scipy.linalg import LinAlgWarning
from sklearn import linear_model
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.utils.estimator_checks import parametrize_with_checks

from onestep import Ridge, RidgeClassifier


@parametrize_with_checks([RidgeClassifier(), RidgeClassifier(alpha=0.1)])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def assert_agree(ours, theirs, X):
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-6, atol=1e-9)
    assert ours.coef_.shape == theirs.coef_.shape
    assert np.shape(ours.intercept_) == np.shape(theirs.intercept_)
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


@pytest.mark.parametrize("load", [load_breast_cancer, load_iris])
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 3.0}])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_agrees_with_scikit_learn(rng, load, class_weight, weighted, fit_intercept):
    X, y = load(return_X_y=True)
    weight = rng.uniform(0.2, 2.0, size=len(X)) if weighted else None
    options = {"alpha": 0.5, "fit_intercept": fit_intercept, "class_weight": class_weight}
    ours = RidgeClassifier(**options).fit(X, y, weight)
    theirs = linear_model.RidgeClassifier(**options, solver="svd").fit(X, y, weight)
    assert_agree(ours, theirs, X)
    assert ours.score(X, y, weight) == pytest.approx(theirs.score(X, y, weight))
    assert ours.solver_path_ == "cholesky"


@pytest.mark.parametrize("labels", [["no", "yes"], ["a", "b", "c"], [False, True], [-1.0, 1.0], [3, 5, 9]])
@pytest.mark.parametrize("shape", [(60, 4), (20, 30)])
def test_labels_of_any_kind(rng, shape, labels):
    X = rng.normal(size=shape)
    y = np.array(labels)[np.arange(shape[0]) % len(labels)]
    assert_agree(RidgeClassifier().fit(X, y), linear_model.RidgeClassifier(solver="svd").fit(X, y), X)


@pytest.mark.parametrize("labels", [3, 1])
def test_multilabel(rng, labels):
    X = rng.normal(size=(50, 4))
    Y = (X @ rng.normal(size=(4, 3)) > 0).astype(int)
    Y[:, labels:] = 0
    ours, theirs = RidgeClassifier().fit(X, Y), linear_model.RidgeClassifier().fit(X, Y)
    assert_agree(ours, theirs, X)
    assert ours.score(X, Y) == theirs.score(X, Y)
    assert isinstance(ours.predict(torch.from_numpy(X)), torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3])
def test_tensors_in_tensors_out(rng, classes, dtype):
    X = torch.from_numpy(rng.normal(size=(60, 4))).to(dtype)
    y = torch.arange(60) % classes
    weight = torch.rand(60, dtype=dtype)
    expected = RidgeClassifier(class_weight="balanced").fit(X.numpy(), y.numpy(), weight.numpy())
    ours = RidgeClassifier(class_weight="balanced").fit(X, y, weight)
    for name in ("coef_", "intercept_", "classes_"):
        assert isinstance(getattr(ours, name), torch.Tensor)
        np.testing.assert_array_equal(getattr(ours, name).numpy(), getattr(expected, name))
    assert ours.decision_function(X).dtype == dtype
    assert ours.predict(X).dtype == y.dtype
    np.testing.assert_array_equal(ours.predict(X).numpy(), expected.predict(X.numpy()))
    assert isinstance(ours.predict(X.numpy()), np.ndarray)
    assert ours.score(X, y) == expected.score(X.numpy(), y.numpy())


def test_tensor_rows_and_text_labels(rng):
    X = torch.from_numpy(rng.normal(size=(20, 3)))
    y = np.where(X[:, 0].numpy() > 0, "up", "down")
    ours = RidgeClassifier().fit(X, y)
    assert isinstance(ours.coef_, torch.Tensor)
    assert set(ours.predict(X)) == {"up", "down"}


@pytest.mark.parametrize(
    ("params", "arguments", "message"),
    [
        ({}, {"y": [0.1, 0.2, 0.3, 0.4, 0.5]}, "Unknown label type"),
        ({"class_weight": "even"}, {}, "even"),
        ({"alpha": [1.0, 2.0]}, {}, "alpha holds 2 penalties for 1 targets"),
        ({}, {"sample_weight": -1.0}, "sample_weight must not be negative, got -1"),
        ({}, {"X": np.full((5, 2), np.nan)}, "Input X contains NaN"),
    ],
)
def test_bad_input(params, arguments, message):
    arguments = {"X": np.arange(10.0).reshape(5, 2) ** 2, "y": [0, 1, 0, 1, 0], **arguments}
    with pytest.raises(ValueError, match=message):
        RidgeClassifier(**params).fit(**arguments)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_by_class(monkeypatch, fit_intercept, weighted, dtype):
    """Many classes: the same as with n·k targets of ±1, for several blocks of rows and far columns."""
    monkeypatch.setattr("onestep.estimators._centred._BLOCK", 1000)
    rng = np.random.default_rng(1)
    X = (rng.normal(size=(700, 9)) + (50.0 if fit_intercept else 0.5)).astype(dtype)
    y = rng.integers(0, 40, 700)
    X[:, 0] += 0.1 * y
    weight = rng.uniform(size=700) * (np.arange(700) % 7 > 0) if weighted else None
    alpha = rng.uniform(0.1, 3.0, size=40).round(1)
    ours = RidgeClassifier(alpha=alpha, fit_intercept=fit_intercept).fit(X, y, weight)
    targets = np.where(y[:, None] == np.arange(40), 1.0, -1.0)
    right = Ridge(alpha=alpha, fit_intercept=fit_intercept).fit(X.astype(np.float64), targets, weight)
    tolerance = 1e-9 if dtype == np.float64 else 2e-5
    np.testing.assert_allclose(ours.coef_, right.coef_, atol=tolerance)
    np.testing.assert_allclose(ours.intercept_, right.intercept_, atol=100 * tolerance)
    assert ours.solver_path_ == "cholesky" and ours.coef_.shape == (40, 9)


def test_sums_by_class_of_dependent_features():
    rng = np.random.default_rng(2)
    X = rng.normal(size=(200, 4))[:, [0, 1, 2, 3, 3]]
    y = rng.integers(0, 5, 200)
    with pytest.warns(LinAlgWarning):
        ours = RidgeClassifier(alpha=0.0).fit(X, y)
    with pytest.warns(LinAlgWarning):
        right = Ridge(alpha=0.0).fit(X, np.where(y[:, None] == np.arange(5), 1.0, -1.0))
    np.testing.assert_allclose(ours.coef_, right.coef_, atol=1e-10)
    assert ours.solver_path_ == "minimum_norm"


def test_rows_of_one_class_are_predicted_as_it() -> None:
    X = np.array([[1.5], [-0.3]], dtype=np.float32)
    for label in (0, 7):
        model = RidgeClassifier(fit_intercept=False).fit(X, [label, label])
        np.testing.assert_array_equal(model.predict(np.concatenate([X, -100 * X])), label)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("mean", [1.0, 1e4])
def test_float32_rows_are_added_up_by_class(weighted, fit_intercept, mean):
    """In float32 a few at a time; in float64 where a mean far from zero would cost digits. One class has no weight."""
    rng = np.random.default_rng(5)
    X, y = (rng.normal(size=(700, 6)) + mean).astype(np.float32), rng.integers(0, 5, 700)
    X[:, 0] += y
    weight = rng.uniform(0, 2, 700) * (y != 3) if weighted else None
    ours = RidgeClassifier(fit_intercept=fit_intercept).fit(X, y, weight)
    right = linear_model.RidgeClassifier(fit_intercept=fit_intercept, solver="svd").fit(X.astype(np.float64), y, weight)
    np.testing.assert_allclose(ours.coef_, right.coef_, rtol=1e-4, atol=1e-5 * abs(right.coef_).max())
