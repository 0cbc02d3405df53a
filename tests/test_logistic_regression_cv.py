"""LogisticRegressionCV: scikit-learn's scores and choice, and a path that costs little more than one fit."""

import numpy as np
import pytest
import torch
from sklearn import linear_model
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import LeaveOneOut
from sklearn.utils.estimator_checks import parametrize_with_checks

from onestep import LogisticRegression, LogisticRegressionCV
from onestep.estimators import _path
from onestep.estimators._path import Path


@parametrize_with_checks([LogisticRegressionCV(Cs=3, cv=3)])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def draw(rng, n=300, d=5, k=3):
    X = rng.normal(size=(n, d))
    return X, (X @ rng.normal(size=(d, k)) + rng.gumbel(size=(n, k))).argmax(1)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("scoring", [None, "neg_log_loss"])
@pytest.mark.parametrize("newton", [True, False])
def test_agrees_with_scikit_learn(monkeypatch, rng, k, scoring, newton):
    monkeypatch.setattr(_path, "newton_pays", lambda n, shape: newton)
    X, y = draw(rng, k=k)
    Cs = np.array([1e-3, 1e-2, 0.1, 1.0, 10.0])
    ours = LogisticRegressionCV(Cs, cv=4, scoring=scoring, tol=1e-8, max_iter=500).fit(X, y)
    for fold, (train, test) in enumerate(folds(X, y)):
        for a, C in enumerate(Cs):
            model = linear_model.LogisticRegression(C=C, tol=1e-9, max_iter=1000).fit(X[train], y[train])
            if scoring is None:
                right = model.score(X[test], y[test])
            else:
                right = np.mean(model.predict_log_proba(X[test])[np.arange(len(test)), y[test]])
            assert ours.scores_[fold, a] == pytest.approx(right, abs=1e-5)
    best = ours.scores_.mean(0).argmax()
    assert Cs[best] == ours.C_
    right = linear_model.LogisticRegression(C=ours.C_, tol=1e-9, max_iter=1000).fit(X, y)
    np.testing.assert_allclose(ours.coef_, right.coef_, atol=1e-5)
    np.testing.assert_array_equal(ours.predict(X), right.predict(X))
    assert ours.scores_.shape == ours.n_iter_.shape == (4, 5)


def folds(X, y):
    from sklearn.model_selection import StratifiedKFold

    return StratifiedKFold(4).split(X, y)


def test_weights_tensors_and_no_refit(rng):
    X, y = draw(rng)
    weight = rng.integers(0, 3, len(X)).astype(float)
    model = LogisticRegressionCV(3, refit=False).fit(torch.from_numpy(X), torch.from_numpy(y), weight)
    assert isinstance(model.coef_, torch.Tensor) and isinstance(model.predict(torch.from_numpy(X)), torch.Tensor)
    np.testing.assert_array_equal(model.Cs_, [1e-4, 1.0, 1e4])
    # Means of the folds' coefficients are near the fit of all rows.
    right = LogisticRegression(C=model.C_).fit(X, y, weight)
    np.testing.assert_allclose(model.coef_.numpy(), right.coef_, atol=0.1)


def test_a_path_shares_its_preparation_and_starts(monkeypatch, rng):
    """20 values of C: one Gram matrix, and at most a third of the iterations of as many fits."""
    monkeypatch.setattr(_path, "newton_pays", lambda n, shape: False)
    X, y = draw(rng, 1000, 10, 12)
    path = Path(torch.from_numpy(X), torch.from_numpy(y), "softmax", None, outputs=12, intercept=True)
    made = []
    monkeypatch.setattr(_path.Gram, "of", lambda rows, of=_path.Gram.of: made.append(1) or of(rows))
    start, warm, cold = None, 0, 0
    for C in np.logspace(-2, 2, 20):
        found = path.solve(1 / (1000 * C), start, tol=1e-4, max_iter=500)
        anew = path.solve(1 / (1000 * C), None, tol=1e-4, max_iter=500)
        assert found.loss == pytest.approx(anew.loss, rel=1e-4)
        warm, cold, start = warm + found.iterations, cold + anew.iterations, path.weights(found)
    assert len(made) == 1
    assert warm < 0.6 * cold


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"Cs": [1.0, -1.0]}, ValueError, "Cs must be positive"),
        ({"Cs": 0}, ValueError, "Cs must be a positive integer"),
        ({"refit": 1}, TypeError, "refit must be True or False"),
        ({"cv": 1}, ValueError, "cv=1: k-fold"),
        ({"cv": []}, ValueError, r"cv=\[\].*expected a number of folds"),
    ],
)
def test_bad_parameters(parameters, error, message):
    X, y = load_iris(return_X_y=True)
    with pytest.raises(error, match=message):
        LogisticRegressionCV(**parameters).fit(X, y)


def test_stopping_early_warns(rng):
    X, y = draw(rng)
    with pytest.warns(ConvergenceWarning, match="fits stopped at max_iter=1"):
        LogisticRegressionCV(max_iter=1).fit(X, y)


def test_scores_that_are_all_undefined_are_told() -> None:
    """The area under the curve of one row."""
    X = np.random.default_rng(0).standard_normal((12, 2))
    y = np.arange(12) % 2
    with pytest.warns(UserWarning) as caught:
        LogisticRegressionCV([0.1, 1.0], cv=LeaveOneOut(), scoring="roc_auc").fit(X, y)
    assert any("the scores of 24 of 24 fits are NaN" in str(each.message) for each in caught)
