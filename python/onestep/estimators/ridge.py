"""Ridge regression and the classifier made of it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from onestep._fork import one_thread_after_fork
from onestep.estimators._arrays import check_alphas, check_flag, give_labels, giver_of, sparse_operand, to_numpy
from onestep.estimators._deviations import MOST_FEATURES, Deviations
from onestep.estimators._indicators import solve_indicators
from onestep.estimators._labels import check_balanced, encode_labels
from onestep.estimators._linear import FitData, LinearEstimator, as_targets
from onestep.estimators._solve import Solution, solve_ridge
from onestep.estimators._sparse import SparseLeastSquares, dense_if_small, is_large_sparse
from onestep.estimators._stream import add_chunk, solve_sums
from onestep.estimators._threads import kernels_have_the_threads
from onestep.linalg import NormalEquations
from onestep.linalg.narrow import working_dtype


class _RidgeBase(LinearEstimator):
    """The fit that regression and classification share."""

    alpha: Any
    fit_intercept: bool
    n_iter_: None
    solver_path_: str
    _accepts_sparse = True

    def _check_parameters(self, k: int) -> tuple[Tensor, bool]:
        """alpha (k,) float64, and fit_intercept."""
        alphas = check_alphas("alpha", self.alpha, positive=False)
        if alphas.size not in (1, k):
            raise ValueError(f"alpha holds {alphas.size} penalties for {k} targets; expected one, or one per target")
        return torch.from_numpy(alphas).reshape(-1).expand(k), check_flag("fit_intercept", self.fit_intercept)

    def _solve(self, data: FitData, Y: Tensor) -> Solution:
        alpha, fit_intercept = self._check_parameters(Y.shape[1])
        solution = solve_ridge(data.X, Y, data.weight, alpha, fit_intercept=fit_intercept)
        self._set_solution(solution, data, fit_intercept=fit_intercept)
        return solution

    def _solve_sparse(self, X: Any, data: FitData, Y: Any, offset: float = 0.0) -> None:
        alpha, fit_intercept = self._check_parameters(Y.shape[1])
        weight = None if data.weight is None else data.weight.numpy()
        solution = SparseLeastSquares(X, weight, fit_intercept).solve(Y, offset, alpha)
        self._set_solution(solution, data, fit_intercept=fit_intercept)

    def _set_solution(self, solution: Solution, data: FitData, *, fit_intercept: bool) -> None:
        self.solver_path_ = solution.path
        self._set_coefficients(solution.coef, solution.intercept, data, fit_intercept=fit_intercept)
        self.n_iter_ = None


class Ridge(_RidgeBase, MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Linear least squares with an l2 penalty, solved in one pass over X and without a copy of it.

    Minimises ‖√w (Y - XW - b)‖² + alpha ‖W‖² over W, and over b if `fit_intercept`, through the centred normal
    equations (XᵀDX + alpha I) W = XᵀDY (Hoerl and Kennard 1970), solved in float64. Their condition is the square of
    X's: where it is too much for fp32 sums, X is read again and summed in float64, and where it would cost more than
    half the digits of that, a QR of the rows takes over (TSQR; Demmel, Grigori, Hoemmen and Langou 2012).

    A drop-in for `sklearn.linear_model.Ridge`, without a choice of solvers: `solver_path_` says what ran. A sparse X
    never becomes dense: sums of up to 2,048 features are factored, more are solved by conjugate gradients.

    Args:
        alpha: penalty, >= 0, in units of X²·weight; a number, or an array (k,) of one per target.
        fit_intercept: whether to fit b, which is not penalised. X is centred as it is read, in no memory of its own.

    Attributes:
        coef_: (d,) for one target, else (k, d); X's dtype (fp32 for 16 bits); a tensor if X was one.
        intercept_: scalar for y (n,), (k,) for y (n, k), as for `coef_`; 0.0 without an intercept.
        n_features_in_: d, an int.
        feature_names_in_: (d,) column names (dtype object), where X is a data frame with them.
        n_iter_: None, as nothing is iterated; for scikit-learn's sake.
        solver_path_: "cholesky" (d x d), "dual_cholesky" (n x n, where n < d), "least_squares" (QR and SVD, where
            Cholesky would be inaccurate), "minimum_norm" (the same, rank-deficient: of all minimisers the one of least
            ‖W‖), "conjugate_gradients" (sparse X), or several joined by "+" where penalties differ. `partial_fit` knows
            "cholesky", "eigh" (d x d, where Cholesky would be inaccurate) and "minimum_norm".

    Examples:
        >>> import numpy as np
        >>> from onestep import Ridge
        >>> X = np.array([[0.0], [1.0], [2.0]])
        >>> Ridge(alpha=0.0).fit(X, [1.0, 3.0, 5.0]).predict([[3.0]]).round(6)
        array([7.])
    """

    # What partial_fit has added up; None before, and after fit.
    _equations: NormalEquations | None = None
    # What standard deviations are made of; None after partial_fit, or with many features.
    _deviations: Deviations | None = None

    def __init__(self, alpha: Any = 1.0, *, fit_intercept: bool = True) -> None:
        self.alpha = alpha
        self.fit_intercept = fit_intercept

    @kernels_have_the_threads
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Ridge:
        """Fit to X and y; gradients do not flow through a fit, so tensors are detached.

        Forgets what `partial_fit` has added up.

        Args:
            X: (n, d), fp32 or fp64 of any strides, read in place; fp16 and bf16 (computed in fp32) and
                integers of a numpy.memmap (fp64), converted in chunks; other integers, and whatever else holds numbers,
                converted to fp64. Array, memmap, data frame, CPU tensor, or scipy.sparse or a torch CSR or CSC tensor.
            y: (n,) or (n, k), converted to X's dtype.
            sample_weight: (n,) or a number, >= 0; None for ones. Weight 2 is the same as the row twice.

        Returns:
            The estimator.

        Raises:
            ValueError: shapes that disagree, NaN or infinity, negative alpha or weight, a tensor not on the CPU, values
                so small that their squares underflow in float64, or coefficients beyond the range of X's dtype.
            TypeError: alpha that is no number.

        Warns:
            scipy.linalg.LinAlgWarning: the solution is not unique, and the one of minimum norm was taken.
        """
        self._equations = self._deviations = None
        X, given = sparse_operand(X), X
        if is_large_sparse(X):
            rows, data = self._check_sparse(X, y, sample_weight, given=given, y_numeric=True)
            self._solve_sparse(rows, data, as_targets(data.y, data.X).numpy())
            return self
        data = self._check_fit(dense_if_small(X, given), y, sample_weight, y_numeric=True)
        Y = as_targets(data.y, data.X)
        solution = self._solve(data, Y)
        if data.X.shape[1] <= MOST_FEATURES:
            alpha, fit_intercept = self._check_parameters(Y.shape[1])
            self._deviations = Deviations(solution, Y, alpha, fit_intercept=fit_intercept)
        return self

    @kernels_have_the_threads
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Ridge:
        """Fit to these rows and to those of all earlier calls, none of which are kept.

        Their normal equations are: d² + d k float64 numbers, however many the rows (`onestep.linalg.NormalEquations`).
        The result is that of `fit` on all rows at once, to rounding, as long as X is not ill-conditioned: sums square
        its condition, and without the rows there is no orthogonal factor to turn to. Features nearer to linear
        dependence than about 1e-7 of their length count as dependent. Each call solves anew, at a cost of d³; `alpha`
        may change between calls, `fit_intercept` may not.

        Args:
            X: (n, d), as for `fit`; any n from 1. The first call sets d, the names of the features and whether the
                sums are of fp32 or fp64 rows; fp32 rows are summed in fp64 where they need it.
            y: (n,) or (n, k), as many targets in every call.
            sample_weight: (n,) or a number, >= 0; None for ones.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError: as for `fit`; or X or y has other columns than in earlier calls, or `fit_intercept`
                has changed. The rows are not added then.

        Warns:
            scipy.linalg.LinAlgWarning: as for `fit`: with alpha 0, until there are more rows than features.
            UserWarning: the estimator was fitted by `fit`, which keeps no sums: a new one begins with these rows.
        """
        first = self._equations is None
        if first and hasattr(self, "coef_"):
            warnings.warn(
                "fit keeps no sums of its rows: partial_fit starts anew from the rows that it is given",
                UserWarning,
                stacklevel=3,
            )
        data = self._check_fit(X, y, sample_weight, y_numeric=True, reset=first)
        self._add(data, as_targets(data.y, data.X))
        return self

    def _add(self, data: FitData, Y: Tensor) -> None:
        k = Y.shape[1]
        alpha, fit_intercept = self._check_parameters(k)
        if self._equations is None:
            equations = NormalEquations(data.X.shape[1], k, intercept=fit_intercept, dtype=data.dtype)
        else:
            # The sums are shared, as they are never written into: the estimator changes when all has gone well.
            equations = copy.copy(self._equations)
        if k != equations.k:
            raise ValueError(f"y has {k} targets; expected {equations.k}, as in the first call to partial_fit")
        if fit_intercept != equations.intercept:
            raise ValueError(
                f"fit_intercept is {fit_intercept}; expected {equations.intercept}, as in the first call to partial_fit"
            )
        add_chunk(equations, data.X, Y, data.weight)
        self._set_solution(solve_sums(equations, alpha), data, fit_intercept=fit_intercept)
        self._equations, self._deviations = equations, None

    @one_thread_after_fork()
    def predict(self, X: Any, return_std: bool = False) -> Any:
        """X coef_ᵀ + intercept_.

        With `return_std` also the standard deviation of a new observation: the root of
        σ²(1 + 1/Σw + x̃ᵀ(X̃ᵀDX̃ + alpha I)⁻¹x̃), X̃ the centred rows of the fit, σ² their weighted squared residuals over
        Σw - tr(hat matrix), what the fit leaves of the degrees of freedom. For alpha 0 it is that of ordinary least
        squares; for alpha > 0 that of Bayesian ridge regression whose prior has the precision alpha/σ² (Bishop,
        Pattern Recognition and Machine Learning, 2006, 3.3).

        Args:
            X: (n, d), array, data frame or CPU tensor.
            return_std: whether to return (prediction, standard deviation).

        Returns:
            (n,) for one target, else (n, k), in X's dtype; a tensor if X is one. Or a pair of these.

        Raises:
            ValueError: wrong number of features, NaN or infinity; or with `return_std` no unique solution, no degrees
                of freedom left, more than 1,024 features, or a fit by `partial_fit`.
            sklearn.exceptions.NotFittedError: `fit` was not called.
        """
        give, mean = giver_of(X), self._scores(X)
        if not check_flag("return_std", return_std):
            return give(mean)
        if self._deviations is None:
            raise ValueError(
                f"return_std=True needs a model that was fitted by fit (not partial_fit) to at most {MOST_FEATURES} "
                f"features; this one has {self.n_features_in_}"
            )
        rows = self._check_rows(X)
        deviations = self._deviations.of(rows).reshape(mean.shape)
        return give(mean), give(deviations.to(working_dtype(rows)))


class RidgeClassifier(_RidgeBase, ClassifierMixin, BaseEstimator):
    """Classification by ridge regression on targets of ±1, one column a class (one column in all for two classes).

    A drop-in for `sklearn.linear_model.RidgeClassifier`, with sparse X, too; see `Ridge` for the mathematics and the
    paths.

    Args:
        alpha: penalty, >= 0; a number, or an array of one per column of targets.
        fit_intercept: whether to fit an intercept, which is not penalised.
        class_weight: {label: weight}, "balanced" (n / (C · count of the class)), or None; multiplies `sample_weight`.

    Attributes:
        classes_: (C,) the labels, sorted, in y's dtype; a tensor if y was a tensor.
        coef_: (d,) for two classes, else (C, d); X's dtype (fp32 for 16 bits); a tensor if X was one.
        intercept_: (1,) for two classes, else (C,), as for `coef_`; 0.0 without an intercept.
        n_features_in_, feature_names_in_, n_iter_, solver_path_: as for `Ridge`.

    Examples:
        >>> from onestep import RidgeClassifier
        >>> model = RidgeClassifier().fit([[0.0], [1.0], [2.0], [3.0]], ["no", "no", "yes", "yes"])
        >>> model.predict([[2.5]])
        array(['yes'], dtype='<U3')
    """

    classes_: Any

    def __init__(self, alpha: Any = 1.0, *, fit_intercept: bool = True, class_weight: Any = None) -> None:
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight

    @kernels_have_the_threads
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> RidgeClassifier:
        """Fit to X and the labels y.

        Args:
            X: (n, d), as for `Ridge.fit`.
            y: (n,) labels of any kind, or (n, C) of zeros and ones where a row may have several.
            sample_weight: (n,) or a number, >= 0; None for ones.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError: as for `Ridge.fit`, or y is continuous, or class_weight names no class.

        Warns:
            scipy.linalg.LinAlgWarning: as for `Ridge.fit`.
        """
        X, given = sparse_operand(X), X
        rows = None
        if is_large_sparse(X):
            rows, data = self._check_sparse(X, y, sample_weight, given=given, y_numeric=False)
        else:
            data = self._check_fit(dense_if_small(X, given), y, sample_weight, y_numeric=False)
        self._multilabel = type_of_target(data.y).startswith("multilabel")
        labels = data.y if self._multilabel else column_or_1d(data.y, warn=True)
        if self.class_weight is not None:
            if not self._multilabel:
                check_balanced(self.class_weight, *encode_labels(labels), data.weight)
            weight = torch.from_numpy(compute_sample_weight(self.class_weight, labels)).to(data.dtype)
            data = data._replace(weight=weight if data.weight is None else weight * data.weight)
        if rows is not None:
            classes = self._fit_sparse(rows, data, labels)
        else:
            classes = self._fit_multilabel(data) if self._multilabel else self._fit_classes(data, labels)
        self.classes_ = give_labels(classes, y)
        return self

    def _fit_multilabel(self, data: FitData) -> Any:
        binarizer = LabelBinarizer(pos_label=1, neg_label=-1)
        Y = as_targets(binarizer.fit_transform(data.y), data.X)
        self._solve(data._replace(y=Y.numpy()), Y)
        return binarizer.classes_

    def _fit_sparse(self, X: Any, data: FitData, labels: Any) -> Any:
        """The fit of a scipy.sparse X: the classes' indicators, of one element a row, are multiplied by it as such."""
        if self._multilabel:
            binarizer = LabelBinarizer(pos_label=1, neg_label=0, sparse_output=True)
            Y, classes = binarizer.fit_transform(labels), binarizer.classes_
        else:
            classes, indices = encode_labels(labels)
            Y = csr_array(
                (np.ones(len(indices)), indices, np.arange(len(indices) + 1)), shape=(len(indices), len(classes))
            )
            # One column for two classes; a single class is the sign of "no".
            Y = Y[:, [1]] if len(classes) == 2 else Y if len(classes) > 2 else csr_array((len(indices), 1))
        self._solve_sparse(X, data._replace(y=np.empty((0, Y.shape[1]))), 2.0 * Y, -1.0)
        return classes

    def _fit_classes(self, data: FitData, labels: Any) -> Any:
        """Labels of one class a row; more than two classes without their n·k targets, where that is accurate."""
        classes, indices = encode_labels(labels)
        n, d = data.X.shape
        if len(classes) > 2 and n >= d:
            alpha, intercept = self._check_parameters(len(classes))
            solution = solve_indicators(data.X, indices, len(classes), data.weight, alpha, fit_intercept=intercept)
            if solution is not None:
                # y of as many columns: the intercept is (k,) then.
                shaped = data._replace(y=np.empty((0, len(classes))))
                self._set_solution(solution, shaped, fit_intercept=intercept)
                return classes
        signs = np.full((n, len(classes)), -1.0)
        signs[np.arange(n), indices] = 1.0
        # For two classes one column, and an intercept (1,), as scikit-learn's is; for a single class the sign of "no".
        Y = as_targets(signs[:, 1:] if len(classes) == 2 else signs if len(classes) > 2 else -signs, data.X)
        self._solve(data._replace(y=Y.numpy()), Y)
        return classes

    def decision_function(self, X: Any) -> Any:
        """X coef_ᵀ + intercept_: how far on the positive side of each boundary a row lies, in units of the ±1 targets.

        Args:
            X: (n, d), array, data frame or CPU tensor.

        Returns:
            (n,) for two classes, positive for classes_[1], else (n, C); X's dtype; a tensor if X is one.

        Raises:
            ValueError, sklearn.exceptions.NotFittedError: as for `Ridge.predict`.
        """
        return self._linear(X)

    def predict(self, X: Any) -> Any:
        """The label of the largest decision value.

        Args:
            X: (n, d), array, data frame or CPU tensor.

        Returns:
            (n,) labels, or (n, C) zeros and ones after a multilabel fit; a tensor if X is one and the labels are
            numbers.

        Raises:
            ValueError, sklearn.exceptions.NotFittedError: as for `Ridge.predict`.
        """
        scores = self._scores(X).numpy()
        classes = to_numpy("classes_", self.classes_)
        if self._multilabel:
            labels = (scores > 0).astype(np.int64)
            labels = labels[:, None] if labels.ndim == 1 else labels
        elif scores.ndim == 1:
            # Rows of one class alone have nothing on the positive side.
            labels = classes[((scores > 0) & (len(classes) > 1)).astype(np.intp)]
        else:
            labels = classes[scores.argmax(axis=1)]
        return give_labels(labels, X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
