"""Problems for Ridge and its solution of minimum norm."""

import numpy as np


def problem(rng, n, d, k=None, dtype=np.float64):
    X = rng.normal(size=(n, d)) + rng.normal(size=d)
    noise = rng.normal(size=(n,) if k is None else (n, k))
    y = X @ rng.normal(size=(d,) if k is None else (d, k)) + noise + 3.0
    return X.astype(dtype), y.astype(dtype)


def rank_deficient(rng, rows, case):
    """X (rows, 6) of rank 5 or 4, or as it is drawn where `case` names no dependence; and y (rows, 2)."""
    X, y = problem(rng, rows, 6, 2)
    # Few bits, so that sums of columns are exact in fp32 too.
    X = np.round(X * 64) / 64
    if case == "duplicate":
        X[:, 5] = X[:, 0]
    elif case == "sum":
        X[:, 5] = X[:, 0] - X[:, 1]
    elif case == "constant":
        X[:, 5] = X[:, 4] = 0.1
    elif case == "zero":
        X[:, 2] = 0.0
    return X, y


def tolerance(dtype):
    return 2e-5 if dtype == np.float32 else 1e-9


def minimum_norm(X, y, weight, fit_intercept):
    root = np.ones(len(X)) if weight is None else np.sqrt(weight)
    if fit_intercept:
        X = X - np.average(X, axis=0, weights=root**2)
        y = y - np.average(y, axis=0, weights=root**2)
    return np.linalg.lstsq(X * root[:, None], y * root[:, None], rcond=1e-9)[0].T
