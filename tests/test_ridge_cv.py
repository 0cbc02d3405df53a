"""RidgeCV: leave-one-out against refits without the row, and scikit-learn's choice of penalty."""

import numpy as np
import pytest
import torch
from sklearn import linear_model
from sklearn.datasets import load_diabetes
from sklearn.model_selection import KFold, LeaveOneOut
from sklearn.utils.estimator_checks import parametrize_with_checks

from onestep import Ridge, RidgeCV
from onestep.estimators._spectrum import decompose

ALPHAS = np.array([1e-3, 0.1, 2.0, 50.0])


@parametrize_with_checks([RidgeCV(), RidgeCV(method="gcv", fit_intercept=False)])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.fixture(params=[None, 40], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr("onestep.estimators._centred._BLOCK", request.param)


def problem(rng, n, d, k=None):
    X = rng.normal(size=(n, d)) + rng.normal(size=d)
    shape = (d,) if k is None else (d, k)
    return X, X @ rng.normal(size=shape) + 2.0 * rng.normal(size=(n, *shape[1:])) + 3.0


def refits(X, y, weight, alpha, fit_intercept):
    """w · squared error of each row under a fit without it."""
    errors = np.empty_like(y)
    for i in range(len(X)):
        rest = np.arange(len(X)) != i
        model = linear_model.Ridge(alpha, fit_intercept=fit_intercept, solver="svd")
        model.fit(X[rest], y[rest], None if weight is None else weight[rest])
        errors[i] = y[i] - model.predict(X[i : i + 1])[0]
    return errors**2 if weight is None else (errors.T**2 * weight).T


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize(("n", "d"), [(80, 5), (12, 1), (9, 8), (8, 8), (10, 25)])
def test_leave_one_out_is_what_refits_give(rng, n, d, k, fit_intercept, weighted):
    X, y = problem(rng, n, d, k)
    weight = None
    if weighted:
        weight = rng.uniform(0.2, 2.0, size=n)
        weight[3] = 0.0
    ours = RidgeCV(ALPHAS, fit_intercept=fit_intercept, store_cv_results=True).fit(X, y, weight)
    expected = np.stack([refits(X, y, weight, alpha, fit_intercept) for alpha in ALPHAS], axis=-1)
    assert ours.cv_results_.shape == expected.shape
    np.testing.assert_allclose(ours.cv_results_, expected, rtol=1e-6, atol=1e-9)
    means = expected.reshape(-1, len(ALPHAS)).mean(axis=0)
    assert ours.alpha_ == ALPHAS[means.argmin()]
    assert ours.best_score_ == pytest.approx(-means.min())
    assert ours.solver_path_ == ("dual_eigh" if n < d else "eigh")
    model = Ridge(ours.alpha_, fit_intercept=fit_intercept).fit(X, y, weight)
    np.testing.assert_allclose(ours.coef_, model.coef_, rtol=1e-7)
    np.testing.assert_allclose(ours.intercept_, model.intercept_, rtol=1e-7)


@pytest.mark.parametrize("n", [60, 11])
def test_tiny_penalties_on_collinear_features(rng, n):
    X, y = problem(rng, n, 6)
    if n == 11:
        X = np.hstack([X, X])
    X[:, 5] = X[:, 4]
    alphas = [1e-11, 1e-9, 1.0]
    ours = RidgeCV(alphas, store_cv_results=True).fit(X, y)
    assert ours.solver_path_ == ("svd" if n == 60 else "dual_svd")
    expected = np.stack([refits(X, y, None, alpha, True) for alpha in alphas], axis=-1)
    np.testing.assert_allclose(ours.cv_results_, expected, rtol=1e-4)


@pytest.mark.parametrize("scoring", [None, "neg_mean_absolute_error", "r2"])
@pytest.mark.parametrize("per_target", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize(("n", "d"), [(50, 6), (12, 20)])
def test_chooses_as_scikit_learn(rng, n, d, k, weighted, per_target, scoring):
    if per_target and scoring and k is None:
        pytest.skip("scikit-learn indexes y as two-dimensional")
    X, y = problem(rng, n, d, k)
    weight = rng.uniform(0.2, 2.0, size=n) if weighted else None
    options = {"alphas": np.logspace(-3, 3, 9), "alpha_per_target": per_target, "scoring": scoring}
    ours = RidgeCV(**options, store_cv_results=True).fit(X, y, weight)
    theirs = linear_model.RidgeCV(**options, store_cv_results=True).fit(X, y, weight)
    np.testing.assert_array_equal(ours.alpha_, theirs.alpha_)
    np.testing.assert_allclose(ours.best_score_, np.squeeze(theirs.best_score_), rtol=1e-8)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-7)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-7)
    np.testing.assert_allclose(ours.cv_results_, theirs.cv_results_, rtol=1e-6, atol=1e-9)
    assert ours.coef_.shape == theirs.coef_.shape
    assert np.shape(ours.alpha_) == np.shape(theirs.alpha_)


def test_scorer_ignores_rows_without_weight(rng):
    X, y = problem(rng, 12, 20)
    weight = np.ones(12)
    weight[[2, 5]] = 0.0
    options = {"scoring": "neg_mean_absolute_error", "store_cv_results": True}
    ours = RidgeCV(ALPHAS, **options).fit(X, y, weight)
    kept = RidgeCV(ALPHAS, **options).fit(X[weight > 0], y[weight > 0])
    assert ours.alpha_ == kept.alpha_
    assert ours.best_score_ == pytest.approx(kept.best_score_)
    np.testing.assert_array_equal(np.isnan(ours.cv_results_).all(axis=1), weight == 0)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize(("n", "d"), [(40, 5), (10, 25)])
def test_gcv_criterion(rng, n, d, fit_intercept, weighted):
    X, y = problem(rng, n, d, 2)
    weight = rng.uniform(0.2, 2.0, size=n) if weighted else np.ones(n)
    if weighted:
        weight[1] = 0.0
    ours = RidgeCV(ALPHAS, method="gcv", fit_intercept=fit_intercept).fit(X, y, weight)
    used, root = weight > 0, np.sqrt(weight)[:, None]
    rows, expected = used.sum(), []
    for alpha in ALPHAS:
        design = np.hstack([X, np.ones((n, int(fit_intercept)))]) * root
        penalty = np.diag([alpha] * d + [0.0] * int(fit_intercept))
        hat = design @ np.linalg.solve(design.T @ design + penalty, design.T)
        residual = (y * root) - hat @ (y * root)
        expected.append((residual**2).sum(axis=0).mean() / rows / (1 - np.trace(hat) / rows) ** 2)
    assert ours.alpha_ == ALPHAS[np.argmin(expected)]
    assert ours.best_score_ == pytest.approx(-min(expected), rel=1e-7)


@pytest.mark.parametrize("cv", [4, KFold(3, shuffle=True, random_state=0)])
@pytest.mark.parametrize("scoring", [None, "neg_mean_squared_error"])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("d", [6, 60])
def test_folds_choose_as_scikit_learn(rng, d, k, scoring, cv):
    X, y = problem(rng, 50, d, k)
    options = {"alphas": np.logspace(-2, 3, 8), "cv": cv, "scoring": scoring}
    ours, theirs = RidgeCV(**options).fit(X, y), linear_model.RidgeCV(**options).fit(X, y)
    assert ours.alpha_ == theirs.alpha_
    assert ours.best_score_ == pytest.approx(theirs.best_score_)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-6)


def test_folds_of_one_row_are_leave_one_out(rng):
    X, y = problem(rng, 20, 3, 2)
    folds = RidgeCV(ALPHAS, cv=LeaveOneOut(), scoring="neg_mean_squared_error", alpha_per_target=True).fit(X, y)
    loo = RidgeCV(ALPHAS, alpha_per_target=True).fit(X, y)
    np.testing.assert_allclose(folds.best_score_, loo.best_score_)
    np.testing.assert_array_equal(folds.alpha_, loo.alpha_)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_diabetes(dtype):
    X, y = load_diabetes(return_X_y=True)
    alphas = np.logspace(-4, 2, 13)
    ours = RidgeCV(alphas).fit(X.astype(dtype), y)
    theirs = linear_model.RidgeCV(alphas).fit(X, y)
    assert ours.alpha_ == theirs.alpha_
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8 if dtype == np.float64 else 1e-4)
    assert ours.coef_.dtype == dtype


@pytest.mark.parametrize("closeness", [1e-1, 1e-3, 1e-5])
def test_fp32_on_nearly_collinear_features_is_accurate(rng, closeness):
    X, y = problem(rng, 3000, 5)
    X[:, 4] = X[:, 3] + closeness * X[:, 4]
    X, y = X.astype(np.float32), y.astype(np.float32)
    ours = RidgeCV(ALPHAS, store_cv_results=True).fit(X, y)
    theirs = linear_model.RidgeCV(ALPHAS, store_cv_results=True).fit(X.astype(np.float64), y.astype(np.float64))
    assert ours.alpha_ == theirs.alpha_
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.cv_results_, theirs.cv_results_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", [3, 30])
def test_large_offsets_do_not_cancel(rng, d):
    X, y = problem(rng, 20, d)
    X = (X + 1e4).astype(np.float32)
    ours, theirs = RidgeCV(ALPHAS).fit(X, y), linear_model.RidgeCV(ALPHAS).fit(X.astype(np.float64), y)
    assert ours.alpha_ == theirs.alpha_
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"method": "gcv"}, {"scoring": "neg_mean_absolute_error"}, {"cv": 4}])
@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 20)])
def test_a_penalty_per_target_is_that_of_separate_fits(rng, n, d, options, monkeypatch):
    monkeypatch.setattr("onestep.estimators._spectrum._COLUMNS", 10)
    X = rng.standard_normal((n, d))
    Y = X @ rng.standard_normal((d, 5)) * np.logspace(-3, 1, 5) + rng.standard_normal((n, 5))
    weight = rng.uniform(0.2, 2.0, size=n)
    ours = RidgeCV(ALPHAS, alpha_per_target=True, **options).fit(X, Y, weight)
    alone = [RidgeCV(ALPHAS, **options).fit(X, y, weight) for y in Y.T]
    assert len(set(ours.alpha_)) > 1
    np.testing.assert_array_equal(ours.alpha_, [model.alpha_ for model in alone])
    np.testing.assert_allclose(ours.best_score_, [model.best_score_ for model in alone], rtol=1e-9)
    np.testing.assert_allclose(ours.coef_, [model.coef_ for model in alone], rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(ours.intercept_, [model.intercept_ for model in alone], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("method", ["loo", "gcv"])
@pytest.mark.parametrize(("n", "d"), [(70, 50), (40, 60)])
def test_errors_of_many_targets_come_in_blocks(rng, n, d, method):
    k, alphas = 2000, torch.logspace(-2, 2, 20, dtype=torch.float64)
    X, Y = torch.from_numpy(rng.standard_normal((n, d))), torch.from_numpy(rng.standard_normal((n, k)))
    spectrum = decompose(X, Y, None, 0.01, fit_intercept=True)
    errors = spectrum.leave_one_out(alphas) if method == "loo" else spectrum.residuals(alphas)
    seen = torch.zeros(n, k)
    for rows, targets, block in errors:
        assert block.numel() <= 128 * 4096
        seen[rows, targets] += 1
    assert (seen == 1).all()


def test_tensors_in_tensors_out(rng):
    X, y = problem(rng, 30, 4, 2)
    options = {"alphas": ALPHAS, "alpha_per_target": True, "store_cv_results": True}
    expected = RidgeCV(**options).fit(X, y)
    ours = RidgeCV(**options).fit(torch.from_numpy(X).requires_grad_(), torch.from_numpy(y))
    for name in ("coef_", "intercept_", "alpha_", "best_score_", "cv_results_"):
        assert isinstance(getattr(ours, name), torch.Tensor), name
        np.testing.assert_array_equal(getattr(ours, name).numpy(), getattr(expected, name))
    assert isinstance(ours.predict(torch.from_numpy(X)), torch.Tensor)
    assert isinstance(ours.predict(X), np.ndarray)


def test_one_alpha(rng):
    X, y = problem(rng, 10, 2)
    assert RidgeCV(0.3).fit(X, y).alpha_ == RidgeCV([0.3]).fit(X, y).alpha_ == 0.3


@pytest.mark.parametrize(
    ("params", "arguments", "error", "message"),
    [
        ({"alphas": [1.0, 0.0]}, {}, ValueError, "alphas must be positive and finite"),
        ({"alphas": []}, {}, (TypeError, ValueError), "alphas must be"),
        ({"alphas": "many"}, {}, TypeError, "alphas must be a positive number or a list"),
        ({"method": "lo"}, {}, ValueError, "method must be 'loo' or 'gcv', got 'lo'"),
        ({"method": "gcv", "scoring": "r2"}, {}, ValueError, "scoring and store_cv_results need method='loo'"),
        ({"method": "gcv", "store_cv_results": True}, {}, ValueError, "need method='loo'"),
        ({"cv": []}, {}, ValueError, r"cv=\[\].*expected a number of folds"),
        ({"cv": {}}, {}, TypeError, "cv is {}"),
        ({"cv": np.ones(3)}, {}, TypeError, "cv=array.*pairs of row numbers"),
        ({"method": np.ones(3)}, {}, ValueError, "method must be 'loo' or 'gcv'"),
        ({}, {"sample_weight": "a"}, ValueError, "sample_weight is 'a'"),
        ({"cv": 3, "store_cv_results": True}, {}, ValueError, "store_cv_results=True needs cv=None, got cv=3"),
        ({"alpha_per_target": 1}, {}, TypeError, "alpha_per_target must be True or False"),
        ({"scoring": "rr2"}, {}, ValueError, "scoring"),
        ({}, {"sample_weight": [0, 0, 1, 0, 0]}, ValueError, "needs two rows with weight"),
        ({}, {"X": np.full((5, 2), np.nan)}, ValueError, "Input X contains NaN"),
        ({}, {"X": np.full((5, 9), np.inf)}, ValueError, "Input X contains infinity"),
        ({}, {"X": np.ones((1, 2)), "y": [1.0]}, ValueError, "minimum of 2 is required"),
    ],
)
def test_bad_input(params, arguments, error, message):
    arguments = {"X": np.arange(10.0).reshape(5, 2) ** 2, "y": np.arange(5.0), **arguments}
    with pytest.raises(error, match=message):
        RidgeCV(**params).fit(**arguments)
