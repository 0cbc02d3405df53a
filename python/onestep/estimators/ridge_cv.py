"""Ridge regression that chooses its penalty from one factorisation."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.metrics import check_scoring
from torch import Tensor

from onestep._fork import one_thread_after_fork
from onestep.estimators._arrays import Array, check_alphas, check_flag, splits_of
from onestep.estimators._linear import FitData, LinearEstimator, as_targets
from onestep.estimators._selection import choose, fold_scores, gcv_scores, loo_predictions, loo_scores, scorer_scores
from onestep.estimators._spectrum import Spectrum, decompose


class RidgeCV(LinearEstimator, MultiOutputMixin, RegressorMixin, BaseEstimator):
    """`Ridge` that takes the best of a grid of penalties by leave-one-out or generalised cross-validation.

    One eigendecomposition, of the d x d Gram or for n < d of the n x n kernel, serves every penalty. The leave-one-out
    error of row i is its residual over 1 - hᵢᵢ, exactly what refitting without the row would give, weights and
    intercept included (Allen 1974); "gcv" puts the mean of 1 - h in its place (Golub, Heath and Wahba 1979), which
    saves the leverages and does not change when rows are rotated. X is read twice and not copied.

    Args:
        alphas: penalties to choose from, > 0: a number or an array (A,). The first of equals wins.
        fit_intercept: whether to fit an intercept, which is not penalised.
        method: "loo" or "gcv", where `cv` is None.
        cv: None; or a number of folds, a splitter or (train, test) index pairs, as scikit-learn takes them. Each fold
            is one factorisation for all penalties, of a copy of its rows.
        scoring: a scorer's name or callable, asked about the held-out predictions of the rows that have weight, with
            their weights; keeps (n, k, A) float64, not with "gcv". None for minus the mean squared error, R² with `cv`.
        alpha_per_target: whether each target has its own penalty, as if it were fitted alone; with `cv`, too, where
            scikit-learn refuses it.
        store_cv_results: whether to keep `cv_results_`; "loo" only.

    Attributes:
        alpha_: a float, the penalty chosen; (k,) float64 with `alpha_per_target` and several targets.
        best_score_: a float, its score, or with `alpha_per_target` (k,) float64, that of each target; higher is better:
            minus the mean over rows and targets of weight · error², minus the GCV criterion (RSS/n) / (1 - tr H/n)²
            over the n rows that have weight, or the mean over folds of what `scoring` gave.
        cv_results_: (n, A) for y (n,), else (n, k, A), in X's dtype (fp32 for 16 bits): weight · squared leave-one-out
            error, or with `scoring` the leave-one-out predictions, where those of rows without weight are NaN.
        coef_, intercept_, n_features_in_, feature_names_in_: as for `Ridge`.
        solver_path_: "eigh" (d x d), "dual_eigh" (n x n), or "svd", "dual_svd" where the smallest penalty is too small
            next to the Gram's largest eigenvalue for an eigendecomposition of it to be accurate.

    Examples:
        >>> import numpy as np
        >>> from onestep import RidgeCV
        >>> X = np.array([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
        >>> Y = np.array([[-4.0, 1.0], [-2.0, -1.0], [0.0, 0.0], [2.0, 1.0], [4.0, -1.0]])
        >>> RidgeCV([0.1, 100.0], alpha_per_target=True).fit(X, Y).alpha_
        array([  0.1, 100. ])
    """

    solver_path_: str
    cv_results_: Any

    def __init__(
        self,
        alphas: Any = (0.1, 1.0, 10.0),
        *,
        fit_intercept: bool = True,
        method: str = "loo",
        cv: Any = None,
        scoring: Any = None,
        alpha_per_target: bool = False,
        store_cv_results: bool = False,
    ) -> None:
        self.alphas = alphas
        self.fit_intercept = fit_intercept
        self.method = method
        self.cv = cv
        self.scoring = scoring
        self.alpha_per_target = alpha_per_target
        self.store_cv_results = store_cv_results

    @one_thread_after_fork()
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> RidgeCV:
        """Choose the penalty and fit with it; tensors are detached.

        Args:
            X: (n, d) with n >= 2, as for `Ridge.fit`.
            y: (n,) or (n, k), converted to X's dtype.
            sample_weight: (n,) or a number, >= 0; None for ones. Weighs a row in the fit and its error in the score.

        Returns:
            The estimator.

        Raises:
            ValueError: as for `Ridge.fit`, alphas not all positive, an unknown method, or options that exclude one
                another.
            TypeError: alphas that are no numbers, sparse X.
        """
        alphas = torch.from_numpy(check_alphas("alphas", self.alphas, positive=True)).reshape(-1)
        fit_intercept = self._check_options()
        data = self._check_fit(X, y, sample_weight, y_numeric=True, min_rows=2)
        if data.weight is not None and int((data.weight > 0).sum()) < 2:
            raise ValueError("sample_weight is zero for all rows but one; leaving one out needs two rows with weight")
        Y = as_targets(data.y, data.X)
        spectrum = decompose(data.X, Y, data.weight, alphas.min().item(), fit_intercept=fit_intercept)
        if self.cv is not None:
            scores = self._fold_scores(data, alphas)
        elif self.method == "gcv":
            scores = gcv_scores(spectrum, alphas)
        else:
            scores = self._loo_scores(spectrum, data, alphas)
        alpha, score = choose(scores, alphas.numpy(), Y.shape[1], per_target=self.alpha_per_target)
        if alpha.ndim == 0:
            self.alpha_, self.best_score_ = alpha.item(), score.item()
        else:
            self.alpha_, self.best_score_ = (data.give(value) for value in (alpha, score))
        self.solver_path_ = spectrum.path
        coef = spectrum.coef(alpha)
        intercept = spectrum.centred.y_mean - spectrum.centred.x_mean @ coef
        self._set_coefficients(coef, intercept, data, fit_intercept=fit_intercept)
        return self

    def predict(self, X: Any) -> Any:
        """X coef_ᵀ + intercept_.

        Args:
            X: (n, d), array, data frame or CPU tensor.

        Returns:
            (n,) for one target, else (n, k), in X's dtype; a tensor if X is one.

        Raises:
            ValueError, sklearn.exceptions.NotFittedError: as for `Ridge.predict`.
        """
        return self._linear(X)

    def _check_options(self) -> bool:
        """`fit_intercept`, once the options agree with one another."""
        check_flag("alpha_per_target", self.alpha_per_target)
        keeps = check_flag("store_cv_results", self.store_cv_results)
        if not (isinstance(self.method, str) and self.method in ("loo", "gcv")):
            raise ValueError(f"method must be 'loo' or 'gcv', got {self.method!r}")
        if self.cv is None and self.method == "gcv" and (keeps or self.scoring is not None):
            raise ValueError("method='gcv' has no error of each row: scoring and store_cv_results need method='loo'")
        if self.cv is not None and keeps:
            raise ValueError(f"store_cv_results=True needs cv=None, got cv={self.cv!r}")
        return check_flag("fit_intercept", self.fit_intercept)

    def _loo_scores(self, spectrum: Spectrum, data: FitData, alphas: Tensor) -> Array:
        results: Array | None
        if self.scoring is None:
            scores, results = loo_scores(spectrum, alphas, keep=self.store_cv_results)
        else:
            scorer = check_scoring(self, scoring=self.scoring)
            results = loo_predictions(spectrum, alphas)
            weight = None if data.weight is None else data.weight.numpy()
            scores = scorer_scores(scorer, results, data.y, weight, per_target=self.alpha_per_target)
        if self.store_cv_results and results is not None:
            kept = torch.from_numpy(results[:, 0] if data.y.ndim == 1 else results)
            self.cv_results_ = data.give(kept.to(data.dtype))
        return scores

    def _fold_scores(self, data: FitData, alphas: Tensor) -> Array:
        return fold_scores(
            check_scoring(self, scoring=self.scoring or "r2"),
            splits_of(self.cv, data.X, data.y, classifier=False),
            data,
            alphas,
            fit_intercept=self.fit_intercept,
            per_target=self.alpha_per_target,
        )
