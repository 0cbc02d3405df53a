"""Logistic and Poisson regression by Newton's method."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import d2_tweedie_score
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor

from onestep._fork import one_thread_after_fork
from onestep.estimators._arrays import Array, check_finite, check_flag, give_labels, giver_of, sparse_operand, to_numpy
from onestep.estimators._labels import check_balanced, encode_labels
from onestep.estimators._linear import FitData, LinearEstimator, as_targets, in_range
from onestep.estimators._newton import Minimum, minimise
from onestep.estimators._path import Path
from onestep.estimators._problem import total_weight
from onestep.estimators._sparse import SparsePoisson, dense_if_small, is_large_sparse
from onestep.estimators._threads import kernels_have_the_threads
from onestep.linalg.narrow import working_dtype
from onestep.solvers.multinomial import Solution, SparseRows, solve_multinomial
from onestep.solvers.multinomial.sparse import coordinates_of


def check_number(name: str, value: Any, *, integer: bool = False, positive: bool = False) -> Any:
    """`value` if it is such a number."""
    kind: Any = numbers.Integral if integer else numbers.Real
    wanted = f"a {'positive' if positive else 'non-negative'} {'integer' if integer else 'number'}"
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if not (value > 0 if positive else value >= 0):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return value


class _GLM(LinearEstimator):
    """The fit that both share: W (d + 1, k) with the intercept last."""

    fit_intercept: bool
    warm_start: bool
    tol: float
    max_iter: int
    n_iter_: Any
    # What to say where the loss has no minimum.
    _no_optimum: str

    def _minimise(self, data: FitData, y: Tensor, family: str, penalty: float, outputs: int) -> Tensor:
        intercept = check_flag("fit_intercept", self.fit_intercept)
        warm = check_flag("warm_start", self.warm_start)
        tol, max_iter = check_number("tol", self.tol), check_number("max_iter", self.max_iter, integer=True)
        path = Path(data.X, y, family, data.weight, outputs=outputs, intercept=intercept)
        found = path.solve(penalty, self._start(data.X, path.shape) if warm else None, tol=tol, max_iter=max_iter)
        self._accept(found, data.X)
        return path.weights(found)

    def _accept(self, found: Minimum | Solution, X: Tensor) -> None:
        """Says what is wrong with a solution, if anything is."""
        if not math.isfinite(found.loss):
            self._explain_non_finite(X)
        if found.runaway:
            raise ValueError(self._no_optimum)
        if not found.converged:
            warnings.warn(
                f"{type(self).__name__} stopped after {found.iterations} iterations (max_iter={self.max_iter}) with a "
                f"largest slope of {found.slope:.2e}; expected at most tol={self.tol}, and a step that promises "
                "little. Raise max_iter, penalise more, or pass float64.",
                ConvergenceWarning,
                stacklevel=5,
            )
        self.n_iter_ = found.iterations

    def _start(self, X: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """The coefficients of the last fit, if they fit this one."""
        if not hasattr(self, "coef_"):
            return None
        coef, intercept = (value.to(working_dtype(X)) for value in self._coefficients())
        W = coef.T if coef.dim() == 2 and len(shape) == 2 else coef.flatten()
        if self.fit_intercept:
            W = torch.cat((W, intercept.reshape(1, *W.shape[1:])))
        return W.contiguous() if tuple(W.shape) == shape else None

    def _explain_non_finite(self, X: Tensor) -> None:
        check_finite(X)
        raise ValueError("the loss is not finite at the start: X is too large for its dtype; scale it or pass float64")

    def _weights(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """coef (d, k) and intercept (k,)."""
        columns = W[:, None] if W.dim() == 1 else W
        if self.fit_intercept:
            return columns[:-1], columns[-1]
        return columns, columns.new_zeros(columns.shape[1])


class LogisticRegression(_GLM, ClassifierMixin, BaseEstimator):
    """Binary and multinomial logistic regression with an l2 penalty, without a copy of X.

    Minimises Σ wᵢ ℓ(xᵢ, yᵢ) + ‖W‖² / (2C) over W and the intercepts, which are not penalised: ℓ is the log-loss of one
    sigmoid for two classes, of a softmax for more. A Newton step is a Cholesky solve of the Hessian where there are few
    rows; with many it is conjugate gradients with one-pass Hessian-vector products, preconditioned by the Hessian of a
    sample (`onestep.curvature.glm`). Many classes are fitted by preconditioned L-BFGS (`onestep.solvers.multinomial`).
    Columns are centred and scaled implicitly, so that their units and offsets do not matter. (Lin, Weng and Keerthi,
    Trust Region Newton Method for Large-Scale Logistic Regression, JMLR 9, 2008.)

    A drop-in for `sklearn.linear_model.LogisticRegression` with an l2 penalty or none, and no choice of solvers.
    A sparse X never becomes dense.

    Args:
        C: inverse of the penalty, > 0; infinity for none.
        tol: stop when no slope of the objective, divided by the sum of weights, exceeds this (as scikit-learn does),
            and a step promises next to nothing. Where float32 rows halt before that, the fit goes on in float64.
        max_iter: most Newton steps.
        fit_intercept: whether to fit intercepts.
        class_weight: None, "balanced", or a dict of label to weight; multiplies sample_weight.
        warm_start: start from the coefficients of the last fit.

    Attributes:
        classes_: (C,) sorted labels, in y's dtype; a tensor if y was one.
        coef_: (1, d) for two classes, else (C, d); X's dtype (fp32 for 16 bits); a tensor if X was one.
        intercept_: (1,) or (C,), as for `coef_`; zeros without an intercept.
        n_iter_: (1,) int32, Newton steps over all rows.
        n_features_in_: d, an int.
        feature_names_in_: (d,) column names (dtype object), where X is a data frame with them.

    Examples:
        >>> import numpy as np
        >>> from onestep import LogisticRegression
        >>> X = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> LogisticRegression().fit(X, ["no", "no", "yes", "yes"]).predict([[2.5]])
        array(['yes'], dtype='<U3')
    """

    _accepts_sparse = True
    _no_optimum = (
        "a plane separates the classes, so that without a penalty (C=inf) the coefficients have no finite optimum; "
        "pass a finite C"
    )

    def __init__(
        self,
        C: Any = 1.0,
        *,
        tol: float = 1e-4,
        max_iter: int = 100,
        fit_intercept: bool = True,
        class_weight: Any = None,
        warm_start: bool = False,
    ) -> None:
        self.C = C
        self.tol = tol
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.warm_start = warm_start

    @kernels_have_the_threads
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LogisticRegression:
        """Fit to X and the labels y.

        Args:
            X: (n, d), fp32 or fp64 of any strides, read in place; fp16 and bf16 (computed in fp32) and
                integers of a numpy.memmap (fp64), converted in chunks; other integers, and whatever else holds numbers,
                converted to fp64. Array, memmap, data frame, CPU tensor, or scipy.sparse or a torch CSR or CSC tensor
                (CSR in place, else converted to CSR).
            y: (n,) labels of any kind, of two classes or more.
            sample_weight: (n,) or a number, >= 0; None for ones.

        Returns:
            The estimator.

        Raises:
            ValueError: shapes that disagree, NaN or infinity, one class, a parameter out of range, a tensor not on the
                CPU; values whose squares overflow or underflow in float64, coefficients beyond the range of X's dtype;
                or without a penalty classes that a plane separates, whose coefficients would be infinite.
            TypeError: a parameter of the wrong type.

        Warns:
            sklearn.exceptions.ConvergenceWarning: max_iter was reached, or the precision of X's dtype.
        """
        inverse_penalty = check_number("C", self.C, positive=True)
        X, given = sparse_operand(X), X
        if is_large_sparse(X):
            return self._fit_sparse(X, y, sample_weight, inverse_penalty, given=given)
        X = dense_if_small(X, given)
        data, classes, indices = self._labelled(X, y, sample_weight)
        labels, family, outputs = self._targets(data, indices, len(classes))
        penalty = 1.0 / (inverse_penalty * total_weight(data.X, data.weight))
        W = self._minimise(data, labels, family, penalty, outputs)
        self._set_weights(W, data, classes, like=y)
        self.n_iter_ = np.array([self.n_iter_], dtype=np.int32)
        return self

    def _fit_sparse(
        self, X: Any, y: Any, sample_weight: Any, inverse_penalty: float, *, given: Any
    ) -> LogisticRegression:
        """The fit of a scipy.sparse X, always by the multinomial solver: two classes have the scores ∓η/2."""
        intercept, warm = check_flag("fit_intercept", self.fit_intercept), check_flag("warm_start", self.warm_start)
        tol, max_iter = check_number("tol", self.tol), check_number("max_iter", self.max_iter, integer=True)
        X, data = self._check_sparse(X, y, sample_weight, given=given, y_numeric=False)
        like, labels = data.X, data.y
        classes, indices = encode_labels(labels)
        if len(classes) < 2:
            raise ValueError(f"y has one class, {classes.tolist()[0]!r}; expected at least two")
        data = self._weigh_classes(data, classes, indices)
        total, weight = total_weight(like, data.weight), data.weight
        if weight is not None:
            weight = (weight.double() / (total / X.shape[0])).to(like.dtype)
        coordinates = coordinates_of(X, weight, intercept=intercept)
        rows = SparseRows(X, torch.from_numpy(indices), weight, coordinates, len(classes))
        binary, columns = len(classes) == 2, X.shape[1] + intercept
        start = self._start(like, (columns,) if binary else (columns, len(classes))) if warm else None
        if start is not None:
            start = coordinates.invert(torch.stack((-start / 2, start / 2), 1) if binary else start)
        # ‖η/2‖² twice is half of ‖η‖².
        penalty = (2.0 if binary else 1.0) / (inverse_penalty * total)
        found = solve_multinomial(rows, penalty, start, tol=tol, max_iter=max_iter)
        self._accept(found, like)
        W = coordinates.weights(found.V, torch.float64)
        self._set_weights(W[:, 1] - W[:, 0] if binary else W, data, classes, like=y)
        self.n_iter_ = np.array([found.iterations], dtype=np.int32)
        return self

    def _labelled(self, X: Any, y: Any, sample_weight: Any) -> tuple[FitData, Array, Array]:
        """The rows with the weights of their classes, the classes, and the number of each row's class."""
        data = self._check_fit(X, y, sample_weight, y_numeric=False)
        classes, indices = encode_labels(data.y)
        if len(classes) < 2:
            raise ValueError(f"y has one class, {classes.tolist()[0]!r}; expected at least two")
        return self._weigh_classes(data, classes, indices), classes, indices

    @staticmethod
    def _targets(data: FitData, indices: Array, classes: int) -> tuple[Tensor, str, int]:
        """y, the family and the number of outputs."""
        labels = torch.from_numpy(indices)
        return (labels.to(data.dtype), "logistic", 1) if classes == 2 else (labels, "softmax", classes)

    def _set_weights(self, W: Tensor, data: FitData, classes: Array, *, like: Any) -> None:
        """``like`` is y as it came, whose kind of array classes_ are."""
        # A shift common to all classes changes no probability; of all optima this is the symmetric one.
        W = in_range(W if W.dim() == 1 else W - W.mean(1, keepdim=True), data.dtype)
        coef, intercept = self._weights(W)
        self.coef_ = data.give(coef.mT.contiguous())
        self.intercept_ = data.give(intercept.clone())
        self.classes_ = give_labels(classes, like)

    def _weigh_classes(self, data: FitData, classes: np.ndarray, indices: np.ndarray) -> FitData:
        if self.class_weight is None:
            return data
        check_balanced(self.class_weight, classes, indices, data.weight)
        weights = compute_class_weight(
            self.class_weight, classes=classes, y=classes[indices], sample_weight=to_numpy("weight", data.weight)
        )
        weight = torch.from_numpy(weights[indices]).to(data.dtype)
        return data._replace(weight=weight if data.weight is None else weight * data.weight)

    def decision_function(self, X: Any) -> Any:
        """X coef_ᵀ + intercept_: the log-odds of classes_[1] against classes_[0], or the softmax's inputs.

        Args:
            X: (n, d), array, data frame or CPU tensor.

        Returns:
            (n,) for two classes, else (n, C); X's dtype; a tensor if X is one.

        Raises:
            ValueError, sklearn.exceptions.NotFittedError: X does not fit, or there was no fit.
        """
        return giver_of(X)(self._decisions(X))

    def _decisions(self, X: Any) -> Tensor:
        scores = self._scores(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: Any) -> Any:
        """The most probable label.

        Args:
            X: (n, d), array, data frame or CPU tensor.

        Returns:
            (n,) labels; a tensor if X is one and the labels are numbers.

        Raises:
            ValueError, sklearn.exceptions.NotFittedError: as for `decision_function`.
        """
        scores = self._decisions(X).numpy()
        classes = to_numpy("classes_", self.classes_)
        labels = classes[(scores > 0).astype(np.intp) if scores.ndim == 1 else scores.argmax(axis=1)]
        return give_labels(labels, X)

    @one_thread_after_fork()
    def predict_proba(self, X: Any) -> Any:
        """The probability of each class.

        Args:
            X: (n, d), array, data frame or CPU tensor.

        Returns:
            (n, C), rows that sum to 1; X's dtype; a tensor if X is one.

        Raises:
            ValueError, sklearn.exceptions.NotFittedError: as for `decision_function`.
        """
        return giver_of(X)(self._log_probabilities(X).exp())

    @one_thread_after_fork()
    def predict_log_proba(self, X: Any) -> Any:
        """The logarithm of `predict_proba`, without its underflow.

        Args:
            X: (n, d), array, data frame or CPU tensor.

        Returns:
            (n, C); X's dtype; a tensor if X is one.

        Raises:
            ValueError, sklearn.exceptions.NotFittedError: as for `decision_function`.
        """
        return giver_of(X)(self._log_probabilities(X))

    def _log_probabilities(self, X: Any) -> Tensor:
        scores = self._decisions(X)
        if scores.dim() == 1:
            scores = torch.stack((torch.zeros_like(scores), scores), dim=1)
        return scores.log_softmax(dim=1)


class PoissonRegressor(_GLM, RegressorMixin, BaseEstimator):
    """Poisson regression with a log link and an l2 penalty, by Newton's method, without a copy of X.

    Minimises Σ wᵢ (eᶯ − yᵢη) / Σ wᵢ + ½ alpha ‖W‖², η = xᵢW + b, over W and b, which is not penalised (McCullagh and
    Nelder, Generalized Linear Models, 1989). Steps as for `LogisticRegression`.

    A drop-in for `sklearn.linear_model.PoissonRegressor`. A sparse X never becomes dense.

    Args:
        alpha: penalty, >= 0.
        fit_intercept: whether to fit b.
        max_iter: most Newton steps.
        tol: stop when no slope of the objective exceeds this.
        warm_start: start from the coefficients of the last fit.

    Attributes:
        coef_: (d,); X's dtype (fp32 for 16 bits); a tensor if X was one.
        intercept_: scalar in X's dtype; 0.0 without an intercept.
        n_iter_: an int, Newton steps over all rows.
        n_features_in_: d, an int.
        feature_names_in_: (d,) column names (dtype object), where X is a data frame with them.

    Examples:
        >>> from onestep import PoissonRegressor
        >>> model = PoissonRegressor(alpha=0.0).fit([[0.0], [1.0]], [1.0, 2.0])  # twice as many a unit of x
        >>> model.predict([[2.0]]).round(2)
        array([4.])
    """

    _accepts_sparse = True
    _no_optimum = (
        "y is zero in all rows on one side of a plane, as in a category without counts, so that without a penalty "
        "(alpha=0) the coefficients have no finite optimum; pass alpha > 0"
    )

    def __init__(
        self,
        *,
        alpha: Any = 1.0,
        fit_intercept: bool = True,
        max_iter: int = 100,
        tol: float = 1e-4,
        warm_start: bool = False,
    ) -> None:
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start

    @kernels_have_the_threads
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PoissonRegressor:
        """Fit to X and the counts y.

        Args:
            X: (n, d), as for `LogisticRegression.fit`.
            y: (n,) counts or rates, >= 0, not all zero.
            sample_weight: (n,) or a number, >= 0; None for ones. The exposure, where y is a rate.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError: as for `LogisticRegression.fit`; or y is negative or zero everywhere; or without a
                penalty zero in all rows of a category, whose coefficient would be -infinity.

        Warns:
            sklearn.exceptions.ConvergenceWarning: max_iter was reached, or the precision of X's dtype.
        """
        penalty = float(check_number("alpha", self.alpha))
        X, given = sparse_operand(X), X
        rows = None
        if is_large_sparse(X):
            rows, data = self._check_sparse(X, y, sample_weight, given=given, y_numeric=True)
        else:
            data = self._check_fit(dense_if_small(X, given), y, sample_weight, y_numeric=True)
        targets = as_targets(column_or_1d(data.y, warn=True), data.X)[:, 0]
        if targets.min() < 0:
            raise ValueError(f"y must not be negative, got {targets.min().item()}: some value(s) of y are out of range")
        if self.fit_intercept and not (targets if data.weight is None else targets * data.weight).any():
            raise ValueError("y is zero in every row, so that the intercept has no finite optimum")
        if rows is None:
            W = self._minimise(data, targets, "poisson", penalty, 1)
        else:
            W = self._minimise_sparse(rows, data, targets, penalty)
        coef, intercept = self._weights(in_range(W, data.dtype))
        self.coef_ = data.give(coef[:, 0].clone())
        self.intercept_ = data.give(intercept[0].clone()) if self.fit_intercept else 0.0
        return self

    def _minimise_sparse(self, rows: Any, data: FitData, y: Tensor, penalty: float) -> Tensor:
        intercept, warm = check_flag("fit_intercept", self.fit_intercept), check_flag("warm_start", self.warm_start)
        tol, max_iter = check_number("tol", self.tol), check_number("max_iter", self.max_iter, integer=True)
        weight = data.weight
        if weight is not None:
            weight = (weight.double() / (total_weight(data.X, weight) / len(data.X))).to(data.dtype)
        coordinates = coordinates_of(rows, weight, intercept=intercept)
        shape = (rows.shape[1] + intercept,)
        start = self._start(data.X, shape) if warm else None
        start = None if start is None else coordinates.invert(start)
        problem = SparsePoisson(data.X, y, "poisson", weight, penalty, coordinates, rows)
        found = minimise(problem, shape, start, tol=tol, max_iter=max_iter)
        self._accept(found, data.X)
        return coordinates.weights(found.V, torch.float64)

    @one_thread_after_fork()
    def predict(self, X: Any) -> Any:
        """The expected count e^(X coef_ + intercept_).

        Args:
            X: (n, d), array, data frame or CPU tensor.

        Returns:
            (n,); X's dtype; a tensor if X is one.

        Raises:
            ValueError, sklearn.exceptions.NotFittedError: X does not fit, or there was no fit.
        """
        return giver_of(X)(self._scores(X).exp())

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """D², the fraction of the Poisson deviance explained (scikit-learn's score of its PoissonRegressor).

        Args:
            X: (n, d), array or tensor.
            y: (n,) counts.
            sample_weight: (n,), or None for equal weights.

        Returns:
            The score, 1.0 at best.

        Raises:
            NotFittedError: nothing has been fitted.
            ValueError: X has other columns than fit's or values that are not finite, the lengths do not go together, or
                a count is negative.
            ZeroDivisionError: all counts are 0, so that there is no deviance to explain (scikit-learn's own).
        """
        check_is_fitted(self)
        truth, weight = to_numpy("y", y), to_numpy("sample_weight", sample_weight)
        predicted = to_numpy("prediction", self.predict(X))
        return float(d2_tweedie_score(truth, predicted, sample_weight=weight, power=1))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags
