"""Scores of penalties: leave-one-out and generalised cross-validation from one decomposition, folds from one each."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from torch import Tensor

from onestep.estimators._arrays import Array, to_tensor
from onestep.estimators._linear import FitData, as_targets
from onestep.estimators._spectrum import Spectrum, decompose, rows_with_weight


class _Identity(RegressorMixin, BaseEstimator):
    """Predicts what it is given, so that a scorer can be asked about predictions already made."""

    def predict(self, X: Any) -> Any:
        return X

    def __sklearn_is_fitted__(self) -> bool:
        return True


def gcv_scores(spectrum: Spectrum, alphas: Tensor) -> Array:
    """Minus (RSS/n) / (tr(I - H)/n)², n being the rows with weight: (A, k)."""
    n = rows_with_weight(spectrum.centred)
    rss = torch.zeros(len(alphas), spectrum.centred.Y.shape[1], dtype=torch.float64)
    for _, targets, errors in spectrum.residuals(alphas):
        rss[:, targets] += errors.square_().sum(dim=0)
    scores: Array = (-n * rss / spectrum.freedom(alphas).square()[:, None]).numpy()
    return scores


def loo_scores(spectrum: Spectrum, alphas: Tensor, *, keep: bool) -> tuple[Array, Array | None]:
    """Minus the mean of w·error² (A, k), and w·error² itself (n, k, A) if it is to be kept."""
    n, k = spectrum.centred.Y.shape
    kept = np.empty((n, k, len(alphas))) if keep else None
    total = torch.zeros(len(alphas), k, dtype=torch.float64)
    for rows, targets, errors in spectrum.leave_one_out(alphas):
        squares = errors.square_()
        total[:, targets] += squares.sum(dim=0)
        if kept is not None:
            kept[rows, targets] = squares.mT.numpy()
    scores: Array = (-total / n).numpy()
    return scores, kept


def loo_predictions(spectrum: Spectrum, alphas: Tensor) -> Array:
    """What fits without a row say of it (n, k, A); NaN for rows without weight, whose errors the kernel form lacks."""
    Y, weight = spectrum.centred.Y, spectrum.centred.weight
    predictions = np.empty((*Y.shape, len(alphas)))
    for rows, targets, errors in spectrum.leave_one_out(alphas):
        if weight is not None:
            share = weight[rows, None, None].double()
            errors = torch.where(share > 0, errors / share.sqrt(), torch.nan)
        predictions[rows, targets] = (Y[rows, None, targets] - errors).mT.numpy()
    return predictions


def scorer_scores(scorer: Any, predictions: Array, y: Array, weight: Array | None, *, per_target: bool) -> Array:
    """What the scorer says of predictions (n, k, A) of the rows with weight: (A, k), or (A, 1) unless `per_target`."""
    extra = {}
    if weight is not None:
        used = weight > 0
        predictions, y, extra = predictions[used], y[used], {"sample_weight": weight[used]}
    k = predictions.shape[1]
    truth = y.reshape(-1, k)
    # One target is given as a vector, as scorers and callers expect.
    parts: list[Any] = list(range(k)) if per_target or k == 1 else [slice(None)]
    scores = [
        [scorer(_Identity(), predictions[:, part, a], truth[:, part], **extra) for part in parts]
        for a in range(predictions.shape[2])
    ]
    return np.array(scores, dtype=np.float64)


def fold_scores(
    scorer: Any, splits: Any, data: FitData, alphas: Tensor, *, fit_intercept: bool, per_target: bool
) -> Array:
    """The scorer's mean over folds (A, k) or (A, 1), each fold's rows decomposed once for all penalties."""
    scores = []
    for train, test in splits:
        weights = (None, None) if data.weight is None else (data.weight[train], data.weight[test])
        X, Y = data.X[train], as_targets(data.y[train], data.X)
        spectrum = decompose(X, Y, weights[0], alphas.min().item(), fit_intercept=fit_intercept)
        centred, x = spectrum.centred, data.X[test].double()
        predictions = np.empty((len(x), Y.shape[1], len(alphas)))
        for a, alpha in enumerate(alphas):
            W = spectrum.coef(alpha)
            predictions[:, :, a] = (x @ W + (centred.y_mean - centred.x_mean @ W)).numpy()
        weight = None if weights[1] is None else weights[1].numpy()
        scores.append(scorer_scores(scorer, predictions, data.y[test], weight, per_target=per_target))
    mean: Array = np.mean(scores, axis=0)
    return mean


def choose(scores: Array, alphas: Array, k: int, *, per_target: bool) -> tuple[Tensor, Tensor]:
    """The best penalty, the first of equals, and its score: scalars, or (k,) each if `per_target`.

    A score that is NaN is no reason to choose a penalty: UserWarning, and it comes last.
    """
    if not np.isfinite(scores).all():
        warnings.warn(
            f"the scores of the alphas are not all finite: {scores.tolist()}; a penalty whose score is NaN is chosen "
            "only if all are. R² of folds with a single row is undefined: pass another scoring, or larger folds",
            UserWarning,
            stacklevel=4,
        )
        known = np.where(np.isnan(scores), -np.inf, scores)
    else:
        known = scores
    if per_target and k > 1:
        best = known.argmax(axis=0)
        return to_tensor(alphas[best]), to_tensor(scores[best, np.arange(k)])
    best = known.mean(axis=1).argmax()
    return torch.tensor(alphas[best]), torch.tensor(scores[best].mean())
