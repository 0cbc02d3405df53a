"""Ridge.predict(..., return_std=True) against ordinary least squares and Bayesian ridge regression by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from onestep import Ridge

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(40, 5)) + 3
Y = X @ RANDOM.normal(size=(5, 2)) + RANDOM.normal(size=(40, 2))
NEW = RANDOM.normal(size=(7, 5)) + 3


def by_hand(x: np.ndarray, y: np.ndarray, alpha: float, intercept: bool, weight: np.ndarray) -> np.ndarray:
    """By the augmented matrix, with the intercept as a column that is not penalised."""
    ones = np.ones((len(x), 1))
    design = np.hstack([x, ones]) if intercept else x
    new = np.hstack([NEW, np.ones((len(NEW), 1))]) if intercept else NEW
    penalty = alpha * np.eye(design.shape[1])
    if intercept:
        penalty[-1, -1] = 0
    gram = design.T @ (weight[:, None] * design)
    inverse = np.linalg.inv(gram + penalty)
    w = inverse @ design.T @ (weight[:, None] * y)
    left = weight.sum() - np.trace(inverse @ gram)
    noise = (weight[:, None] * (y - design @ w) ** 2).sum(0) / left
    return np.sqrt(noise * (1 + np.einsum("ni,ij,nj->n", new, inverse, new))[:, None])


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 2.5])
def test_by_hand(alpha: float, intercept: bool) -> None:
    weight = RANDOM.integers(1, 4, 40).astype(float)
    expected = by_hand(X, Y, alpha, intercept, weight)
    model = Ridge(alpha, fit_intercept=intercept).fit(X, Y, weight)
    mean, deviation = model.predict(NEW, return_std=True)
    np.testing.assert_array_equal(mean, model.predict(NEW))
    np.testing.assert_allclose(deviation, expected, rtol=1e-9)
    # A penalty a target, tensors in float32, and one target.
    both = Ridge([alpha, 1.0], fit_intercept=intercept).fit(X, Y, weight).predict(NEW, return_std=True)[1]
    other = by_hand(X, Y, 1.0, intercept, weight)
    np.testing.assert_allclose(both, np.stack([expected[:, 0], other[:, 1]], 1), rtol=1e-9)
    single = Ridge(alpha, fit_intercept=intercept).fit(torch.tensor(X).float(), torch.tensor(Y[:, 0]).float())
    found = single.predict(torch.tensor(NEW).float(), return_std=True)[1]
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float32 and found.shape == (7,)
    expected = by_hand(X, Y[:, :1], alpha, intercept, np.ones(40))[:, 0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_more_features_than_rows() -> None:
    """By the dual: the same as the augmented matrix's."""
    wide = RANDOM.normal(size=(12, 30))
    model = Ridge(3.0).fit(wide, Y[:12])
    assert model.solver_path_ == "dual_cholesky"
    at = RANDOM.normal(size=(4, 30))
    centred = wide - wide.mean(0)
    inverse = np.linalg.inv(centred.T @ centred + 3.0 * np.eye(30))
    left = 12 - 1 - np.trace(inverse @ centred.T @ centred)
    noise = ((Y[:12] - model.predict(wide)) ** 2).sum(0) / left
    shifted = at - wide.mean(0)
    expected = np.sqrt(noise * (1 + 1 / 12 + np.einsum("ni,ij,nj->n", shifted, inverse, shifted))[:, None])
    np.testing.assert_allclose(model.predict(at, return_std=True)[1], expected, rtol=1e-8)


def test_small_residuals_and_bad_conditions() -> None:
    """Residuals of 1e-7 of the targets, and columns that agree to 1e-7: through QR, not through squares."""
    close = np.column_stack([X, X[:, 0] + 1e-7 * RANDOM.normal(size=40)])
    for x, path in ((X, "cholesky"), (close, "least_squares")):
        y = x[:, :5] @ np.arange(1.0, 6.0) + 1e-7 * Y[:, 0]
        model = Ridge(0.0).fit(x, y)
        assert model.solver_path_ == path
        Q, R = np.linalg.qr(np.hstack([x, np.ones((40, 1))]))
        noise = ((y - Q @ (Q.T @ y)) ** 2).sum() / (40 - len(R))
        leverage = (np.linalg.solve(R.T, np.hstack([x[:5] + 0.5, np.ones((5, 1))]).T) ** 2).sum(0)
        found = model.predict(x[:5] + 0.5, return_std=True)[1]
        np.testing.assert_allclose(found, np.sqrt(noise * (1 + leverage)), rtol=1e-6)


def test_statsmodels() -> None:
    api = pytest.importorskip("statsmodels.api", reason="statsmodels is not installed")
    expected = api.OLS(Y[:, 0], api.add_constant(X)).fit().get_prediction(api.add_constant(NEW)).se_obs
    np.testing.assert_allclose(Ridge(0.0).fit(X, Y[:, 0]).predict(NEW, return_std=True)[1], expected, rtol=1e-9)


def test_refusals_and_pickles() -> None:
    model = Ridge(1.0).fit(X, Y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(NEW, return_std=True)[1], model.predict(NEW, return_std=True)[1])
    with pytest.raises(ValueError, match="fitted by fit \\(not partial_fit\\) to at most 1024 features"):
        Ridge(1.0).partial_fit(X, Y).predict(NEW, return_std=True)
    with pytest.raises(ValueError, match="fitted by fit"):
        Ridge(1.0).fit(RANDOM.normal(size=(3, 1025)), [1.0, 2.0, 4.0]).predict(np.ones((1, 1025)), return_std=True)
    with pytest.warns(Warning, match="rank"):
        flat = Ridge(0.0).fit(np.hstack([X, X]), Y)
    with pytest.raises(ValueError, match="the coefficients are not unique; expected alpha > 0"):
        flat.predict(np.hstack([NEW, NEW]), return_std=True)
    with pytest.raises(ValueError, match="nothing is left to tell the noise by"):
        Ridge(0.0).fit(X[:6], Y[:6]).predict(NEW, return_std=True)
