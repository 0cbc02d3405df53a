"""Logistic regression that chooses its penalty by cross-validation, along a path of warm starts."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import check_scoring
from torch import Tensor

from onestep._fork import one_thread_after_fork
from onestep.estimators._arrays import Array, as_array, check_alphas, check_flag, splits_of, to_numpy
from onestep.estimators._linear import FitData
from onestep.estimators._newton import Minimum
from onestep.estimators._path import Path
from onestep.estimators._problem import total_weight
from onestep.estimators.glm import LogisticRegression, check_number
from onestep.linalg.narrow import widened
from onestep.solvers.multinomial import Solution


class LogisticRegressionCV(LogisticRegression):
    """`LogisticRegression` that takes the best of a grid of penalties by cross-validation.

    Each fold's rows are prepared once (scales, Gram matrix); its fits go from the strongest penalty to the weakest,
    each from the coefficients of the one before (a path of warm starts: Friedman, Hastie and Tibshirani 2010). The fit
    of all rows starts at the mean of the folds.

    Args:
        Cs: inverse penalties, > 0: an array, or a number of values from 1e-4 to 1e4, even on a logarithmic scale.
        cv: folds, as scikit-learn takes them; stratified by class. None for 5.
        scoring: a scorer's name or callable; None for accuracy. It is given the weights of the rows, if there are any.
        refit: whether to fit all rows with the best C; else coefficients are the mean of the folds'.
        tol, max_iter, fit_intercept, class_weight: as for `LogisticRegression`, whose fits of many classes end well
            below tol; here only that of all rows and each fold's first do, and the others at tol.

    Attributes:
        C_: a float, the inverse penalty chosen, the smallest of equals. All classes share it: scikit-learn has an array
            of it here, with the same value for each class.
        Cs_: (A,) float64, those tried, ascending.
        scores_: (folds, A) float64, of the rows that a fold holds out; higher is better.
        n_iter_: (folds, A) int32, iterations over all rows of the fold.
        classes_, coef_, intercept_, n_features_in_, feature_names_in_: as for `LogisticRegression`.

    Examples:
        >>> import numpy as np
        >>> from onestep import LogisticRegressionCV
        >>> X = np.linspace(-1, 1, 20)[:, None]
        >>> LogisticRegressionCV([0.01, 1.0], cv=2).fit(X, X[:, 0] > 0).predict([[-0.5], [0.5]])
        array([False,  True])
    """

    _accepts_sparse = False

    def __init__(
        self,
        Cs: Any = 10,
        *,
        cv: Any = None,
        scoring: Any = None,
        refit: bool = True,
        tol: float = 1e-4,
        max_iter: int = 100,
        fit_intercept: bool = True,
        class_weight: Any = None,
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.tol = tol
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight

    @one_thread_after_fork()
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LogisticRegressionCV:
        """Choose C and fit with it.

        Args:
            X: (n, d), as for `LogisticRegression.fit`; each fold copies its rows.
            y: (n,) labels of any kind, of two classes or more.
            sample_weight: (n,) or a number, >= 0; None for ones.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError: as for `LogisticRegression.fit`; Cs that are not positive; folds that cannot be made.

        Warns:
            sklearn.exceptions.ConvergenceWarning: max_iter was reached by some fits.
        """
        self.Cs_ = self._grid()
        refit, intercept = check_flag("refit", self.refit), check_flag("fit_intercept", self.fit_intercept)
        tol, max_iter = check_number("tol", self.tol), check_number("max_iter", self.max_iter, integer=True)
        data, classes, indices = self._labelled(X, y, sample_weight)
        labels, family, outputs = self._targets(data, indices, len(classes))
        scorer = check_scoring(self, scoring=self.scoring)
        folds = splits_of(5 if self.cv is None else self.cv, data.X, classes[indices], classifier=True)
        scores: list[list[float]] = []
        iterations: list[list[int]] = []
        weights: list[list[Tensor]] = []
        unfinished = 0
        for train, test in folds:
            weight = None if data.weight is None else data.weight[train]
            path = Path(data.X[train], labels[train], family, weight, outputs=outputs, intercept=intercept)
            found = self._along(path, 1.0 / total_weight(path.X, weight), tol, max_iter)
            unfinished += sum(not each.converged for each in found)
            iterations.append([each.iterations for each in found])
            weights.append([path.weights(each) for each in found])
            scores.append([self._score_of(W, classes, data, test, scorer) for W in weights[-1]])
        self.scores_ = np.array(scores)
        self.n_iter_ = np.array(iterations, dtype=np.int32)
        if np.isnan(self.scores_).any():
            undefined = int(np.isnan(self.scores_).sum())
            warnings.warn(
                f"the scores of {undefined} of {self.scores_.size} fits are NaN; a C with such a score "
                "is chosen only if all have one, and then the first. A score may be undefined for a fold with a single "
                "row or class: pass another scoring, or larger folds",
                UserWarning,
                stacklevel=3,
            )
        means = np.where(np.isnan(self.scores_), -np.inf, self.scores_).mean(axis=0)
        best = int(means.argmax())
        self.C_ = float(self.Cs_[best])
        W = torch.stack([fold[best] for fold in weights]).mean(0)
        if refit:
            path = Path(data.X, labels, family, data.weight, outputs=outputs, intercept=intercept)
            last = path.solve(1.0 / (self.C_ * total_weight(data.X, data.weight)), W, tol=tol, max_iter=max_iter)
            unfinished += not last.converged
            W = path.weights(last)
        if unfinished:
            warnings.warn(
                f"LogisticRegressionCV: {unfinished} of {self.n_iter_.size + refit} fits stopped at max_iter="
                f"{self.max_iter} or at the precision of X's dtype; raise max_iter, or pass float64",
                ConvergenceWarning,
                stacklevel=3,
            )
        self._set_weights(W, data, classes, like=y)
        return self

    def _along(self, path: Path, unit: float, tol: float, max_iter: int) -> list[Minimum | Solution]:
        """The fits for all Cs, of which the penalty is unit / C, each from the one before."""
        found: list[Minimum | Solution] = []
        for C in self.Cs_:
            found.append(path.solve(unit / C, found[-1] if found else None, tol=tol, max_iter=max_iter))
            if not np.isfinite(found[-1].loss):
                self._explain_non_finite(path.X)
        return found

    def _grid(self) -> Array:
        if isinstance(self.Cs, (int, np.integer)) and not isinstance(self.Cs, bool):
            return np.logspace(-4, 4, check_number("Cs", self.Cs, integer=True, positive=True))
        return np.unique(check_alphas("Cs", self.Cs, positive=True))

    def _score_of(self, W: Tensor, classes: Any, data: FitData, test: Array, scorer: Any) -> float:
        """The scorer's answer for the coefficients W on some rows."""
        model = LogisticRegression(fit_intercept=self.fit_intercept)
        rows = data._replace(give=as_array)
        model._set_weights(W, rows, classes, like=classes)
        model.n_features_in_ = data.X.shape[1]
        extra = {} if data.weight is None else {"sample_weight": data.weight[test].numpy()}
        labels = to_numpy("y", data.y)[test]
        return float(scorer(model, widened(data.X[test]).numpy(), labels, **extra))
