"""LogisticRegression and the like where float32 has too few digits, or too small a range."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn import linear_model

from onestep import LogisticRegression, PoissonRegressor, Ridge, RidgeClassifier, RidgeCV


def penalised(model, X, y, C):
    """scikit-learn's objective, in float64."""
    scores = X.astype(np.float64) @ model.coef_.astype(np.float64).T + model.intercept_.astype(np.float64)
    scores = np.concatenate((0 * scores, scores), 1) if scores.shape[1] == 1 else scores
    losses = logsumexp(scores, axis=1) - scores[np.arange(len(y)), y]
    return C * losses.sum() + 0.5 * (model.coef_.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize(
    ("n", "d", "classes", "decades"),
    [(20000, 20, 2, 3), (200, 5, 3, 2), (2000, 20, 3, 0), (20000, 20, 3, 3), (1000, 8, 10, 3)],
)
@pytest.mark.parametrize("tol", [1e-4, 1e-6])
def test_separable_classes_end_below_scikit_learn(rng, n, d, classes, decades, tol):
    """Losses of 1e-9 a row, and steps of which rounding alone decides, are left to float64."""
    means, y = 6 * rng.standard_normal((classes, d)), rng.integers(0, classes, n)
    X = (means[y] + 0.1 * rng.standard_normal((n, d))) * 10 ** np.linspace(-decades, decades, d)
    X = X.astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = LogisticRegression(C=1e4, tol=tol).fit(X, y)
    theirs = linear_model.LogisticRegression(C=1e4, tol=tol, max_iter=1000).fit(X, y)
    assert penalised(ours, X, y, 1e4) <= penalised(theirs, X, y, 1e4)
    exact = LogisticRegression(C=1e4, tol=tol).fit(X.astype(np.float64), y)
    assert penalised(ours, X, y, 1e4) <= 1.01 * penalised(exact, X, y, 1e4)


def test_a_loss_below_the_rounding_of_float32_goes_on_in_float64():
    """Separable classes and columns over three decades: the minimum is 3e-9 a row, of losses rounded to 1e-7."""
    draw = np.random.default_rng(12)
    means, y = 3 * draw.standard_normal((3, 100)), draw.integers(0, 3, 3000)
    y[:3] = range(3)
    X = (means[y] + draw.standard_normal((3000, 100))) * 10 ** (3 * (np.linspace(0, 1, 100) - 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        narrow, wide = LogisticRegression(C=1e4).fit(X.astype(np.float32), y), LogisticRegression(C=1e4).fit(X, y)
    assert penalised(narrow, X.astype(np.float32), y, 1e4) < 1.001 * penalised(wide, X, y, 1e4)


@pytest.mark.parametrize("C", [1e4, np.inf])
@pytest.mark.parametrize("seed", [0, 2, 5])
def test_many_rows_of_three_classes(seed, C):
    """What all classes have in common bends nothing: steps of rounding that way passed for a minimum at infinity."""
    draw = np.random.default_rng(seed)
    X = draw.standard_normal((60000, 4))
    y = np.digitize(X @ [1.0, -2.0, 0.5, 0.0] + 0.5 * draw.standard_normal(60000), [-1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LogisticRegression(C=C).fit(X.astype(np.float32), y)
        exact = LogisticRegression(C=C).fit(X, y)
    assert found.n_iter_[0] <= 8
    np.testing.assert_allclose(found.coef_, exact.coef_, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("dtype", "shift", "most"), [(np.float64, 1e5, 1e-6), (np.float32, 1e3, 1e-6), (np.float32, 1e5, 1e-3)]
)
def test_many_classes_far_from_zero(rng, dtype, shift, most):
    """Columns lose their means before digits are cut off; slopes of such columns need not be small."""
    Z = rng.standard_normal((5000, 30))
    y = (Z @ rng.standard_normal((30, 120)) + 2 * rng.gumbel(size=(5000, 120))).argmax(1)
    y[:120] = range(120)
    X = (Z + shift).astype(dtype)
    rows = X.astype(np.float64) - X.astype(np.float64).mean(0)
    least = penalised(LogisticRegression(tol=1e-8, max_iter=1000).fit(rows, y), rows, y, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LogisticRegression().fit(X, y)
    assert penalised(found, X, y, 1.0) < (1 + most) * least


def test_many_classes_of_very_small_values(rng):
    """Slopes in W are small anywhere, which passed for a minimum at infinity."""
    Z = rng.standard_normal((4000, 8))
    y = (Z @ (0.3 * rng.standard_normal((8, 110))) + 2 * rng.gumbel(size=(4000, 110))).argmax(1)
    y[:110] = range(110)
    expected = LogisticRegression(C=np.inf, max_iter=1000).fit(Z, y)
    for dtype, scale in ((np.float64, 1e-6), (np.float32, 1e-30)):
        found = LogisticRegression(C=np.inf, max_iter=1000).fit((Z * scale).astype(dtype), y)
        np.testing.assert_allclose(found.coef_ * np.float64(scale), expected.coef_, atol=0.05)


ESTIMATORS = {
    "ridge": (lambda s: Ridge(alpha=0.0), "numbers"),
    "penalised ridge": (lambda s: Ridge(alpha=s * s), "numbers"),
    "ridge cv": (lambda s: RidgeCV(alphas=np.array([0.1, 1.0, 10.0]) * s * s), "numbers"),
    "ridge classifier": (lambda s: RidgeClassifier(alpha=s * s), "classes"),
    "two classes": (lambda s: LogisticRegression(C=np.inf), "binary"),
    "three classes": (lambda s: LogisticRegression(C=np.inf), "classes"),
    "penalised": (lambda s: LogisticRegression(C=1 / s / s), "binary"),
    "counts": (lambda s: PoissonRegressor(alpha=0.0), "counts"),
}


def made(rng, n, kind):
    X = rng.standard_normal((n, 4))
    scores = X @ [1.0, -2.0, 0.5, 0.0]
    if kind == "numbers":
        return X, scores + 0.1 * rng.standard_normal(n) + 0.3
    if kind == "binary":
        return X, (rng.random(n) < 1 / (1 + np.exp(-scores))).astype(int)
    if kind == "classes":
        return X, np.digitize(scores + 0.5 * rng.standard_normal(n), [-1, 1])
    return X, rng.poisson(np.exp(0.5 * scores)).astype(float)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-6, 1e30, 1e36])
@pytest.mark.parametrize(("dtype", "n"), [(np.float32, 300), (np.float32, 40000), (np.float64, 300)])
def test_columns_of_very_small_and_large_values(rng, name, scale, dtype, n):
    """Squares of float32 underflow from 1e-19 on, and slopes of such columns are small anywhere."""
    make, kind = ESTIMATORS[name]
    X, y = made(rng, n, kind)
    expected, found = make(1.0).fit(X, y), make(scale).fit((X * scale).astype(dtype), y)
    np.testing.assert_allclose(found.coef_ * np.float64(scale), expected.coef_, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_coefficients_beyond_the_dtype_are_refused(rng, name):
    make, kind = ESTIMATORS[name]
    X, y = made(rng, 300, kind)
    with pytest.raises(ValueError, match="beyond the range of float32"):
        make(1e-40).fit((X * 1e-40).astype(np.float32), y)


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e160, 1e200])
@pytest.mark.parametrize("name", ["ridge", "two classes", "three classes", "counts"])
def test_values_whose_squares_float64_does_not_hold_are_right_or_refused(rng, name, scale):
    make, kind = ESTIMATORS[name]
    X, y = made(rng, 300, kind)
    try:
        found = make(1.0).fit(X * scale, y)
    except ValueError as error:
        assert "rescale" in str(error)
    else:
        np.testing.assert_allclose(found.coef_ * scale, make(1.0).fit(X, y).coef_, rtol=1e-3, atol=1e-3)
