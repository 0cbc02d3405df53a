"""What the linear estimators share: checking what they are given, and predicting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import is_classifier
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from onestep._fork import one_thread_after_fork
from onestep.estimators._arrays import (
    FLOATS,
    Array,
    check_finite,
    check_weight,
    from_other,
    giver_of,
    is_stored,
    sparse_operand,
    stored_array,
    to_numpy,
    to_tensor,
)
from onestep.linalg.narrow import widened_chunks, working_dtype


class FitData(NamedTuple):
    """X (n, d) and weight (n,) or None as tensors over the caller's memory, y as numpy; ``give``: to the kind of X."""

    X: Tensor
    y: Array
    weight: Tensor | None
    give: Callable[[Tensor], Any]

    @property
    def dtype(self) -> torch.dtype:
        """Of targets, weights and coefficients: X's, or what rows of 16 bits and integers are computed in."""
        return working_dtype(self.X)


class LinearEstimator:
    """Mixin for estimators with `coef_` (d,) or (k, d) and `intercept_`; results are of the kind that X is."""

    coef_: Any
    intercept_: Any
    # Whether X may be a scipy.sparse matrix.
    _accepts_sparse = False

    def _check_fit(
        self, X: Any, y: Any, sample_weight: Any, *, y_numeric: bool, min_rows: int = 1, reset: bool = True
    ) -> FitData:
        """The arguments of a fit; ``reset``: whether X sets the features, or must have those of the first call."""
        give = giver_of(X)
        X = from_other("X", X)
        stored, bits = is_stored(X), isinstance(X, Tensor) and X.dtype == torch.bfloat16
        # Whether X is finite shows in its Gram matrix; looking here would cost a second pass over it.
        X, y = validate_data(
            self,
            stored_array(X) if stored else to_numpy("X", X),
            to_numpy("y", y),
            dtype=None if stored else FLOATS,
            ensure_all_finite=False,
            ensure_min_samples=min_rows,
            multi_output=True,
            y_numeric=y_numeric,
            reset=reset,
        )
        rows = to_tensor(X).view(torch.bfloat16) if bits else to_tensor(X)
        weight = None if sample_weight is None else to_tensor(check_weight(sample_weight, len(rows), numpy_dtype(rows)))
        return FitData(rows, y, weight, give)

    def _check_sparse(self, X: Any, y: Any, sample_weight: Any, *, given: Any, y_numeric: bool) -> tuple[Any, FitData]:
        """A scipy.sparse X in CSR form, and the arguments with a tensor of its shape and type, of no memory, as X.

        ``given`` is X as the caller gave it.
        """
        X, y = validate_data(
            self, X, to_numpy("y", y), dtype=FLOATS, accept_sparse="csr", multi_output=True, y_numeric=y_numeric
        )
        weight = None if sample_weight is None else to_tensor(check_weight(sample_weight, X.shape[0], X.dtype))
        like = torch.zeros(1, 1, dtype=torch.float32 if X.dtype == np.float32 else torch.float64).expand(X.shape)
        return X, FitData(like, y, weight, giver_of(given))

    def _set_coefficients(self, coef: Tensor, intercept: Tensor, data: FitData, *, fit_intercept: bool) -> None:
        """Keep W (d, k) and b (k,) in X's type and kind, with scikit-learn's shapes: one target gives a 1-D coef_."""
        single = coef.shape[1] == 1
        coef, intercept = in_range(coef, data.dtype), in_range(intercept, data.dtype)
        self.coef_ = data.give((coef[:, 0] if single else coef.mT).contiguous())
        if fit_intercept:
            self.intercept_ = data.give(intercept[0] if data.y.ndim == 1 else intercept)
        else:
            self.intercept_ = 0.0

    def _linear(self, X: Any) -> Any:
        """X coef_ᵀ + intercept_, in the type and kind of X."""
        return giver_of(X)(self._scores(X))

    @one_thread_after_fork()
    def _scores(self, X: Any) -> Tensor:
        """The same as a tensor."""
        check_is_fitted(self)
        if self._accepts_sparse:
            X = sparse_operand(X)
        if self._accepts_sparse and issparse(X):
            rows = validate_data(self, X, dtype=FLOATS, accept_sparse="csr", reset=False)
            coef = to_numpy("coef_", self.coef_).astype(rows.dtype, copy=False)
            scores = (rows @ coef.T + to_numpy("intercept_", self.intercept_)).astype(rows.dtype, copy=False)
            return torch.from_numpy(scores)
        x = self._check_rows(X)
        dtype = working_dtype(x)
        coef, intercept = (value.to(dtype) for value in self._coefficients())
        W = coef if coef.ndim == 1 else coef.mT
        if x.dtype == dtype:
            values = x @ W
        else:
            values = torch.empty(len(x), *W.shape[1:], dtype=dtype)
            for rows, chunk in widened_chunks(x):
                values[rows] = chunk @ W
        return values.add_(intercept)

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        """coef_ and intercept_ as tensors."""
        return torch.as_tensor(from_other("coef_", self.coef_)), torch.as_tensor(
            from_other("intercept_", self.intercept_)
        )

    def _check_rows(self, X: Any) -> Tensor:
        """Rows to predict for, finite and with the features of the fit, in the type that they are stored in."""
        X = from_other("X", X)
        if not is_stored(X):
            return to_tensor(validate_data(self, to_numpy("X", X), dtype=FLOATS, reset=False))
        array = validate_data(self, stored_array(X), dtype=None, ensure_all_finite=False, reset=False)
        rows = to_tensor(array)
        rows = rows.view(torch.bfloat16) if isinstance(X, Tensor) and X.dtype == torch.bfloat16 else rows
        check_finite(rows)
        return rows

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.input_tags.sparse = self._accepts_sparse
        return tags

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """scikit-learn's score: R² of a regressor, accuracy of a classifier.

        Args:
            X: (n, d), array or tensor.
            y: (n,) or (n, k), the truth; array or tensor.
            sample_weight: (n,), or None for equal weights.

        Returns:
            The score, 1.0 at best.

        Raises:
            NotFittedError: nothing has been fitted.
            ValueError: X has other columns than fit's or values that are not finite, or the lengths do not go together.
        """
        predicted = to_numpy("prediction", self.predict(X))  # type: ignore[attr-defined]
        metric = accuracy_score if is_classifier(self) else r2_score
        return float(metric(to_numpy("y", y), predicted, sample_weight=to_numpy("sample_weight", sample_weight)))


def as_targets(y: Array, X: Tensor) -> Tensor:
    """y (n,) or (n, k) as (n, k) of X's type; a view where y has it already. ValueError if it does not fit."""
    column = y[:, None] if y.ndim == 1 else y
    dtype = numpy_dtype(X)
    with np.errstate(over="ignore"):
        converted = np.asarray(column, dtype=dtype)
    if converted is not column and not np.isfinite(converted).all():
        raise ValueError(f"y holds values too large for X's type, {dtype}: rescale y, or pass X as float64")
    return to_tensor(converted)


def in_range(coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """The coefficients in X's type. ValueError if finite ones are infinite there."""
    converted = coefficients.to(dtype)
    if bool(converted.isinf().any()) and not bool(coefficients.isinf().any()):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"the coefficients go up to {coefficients.abs().max().item():.1e}, beyond the range of {name}, since X's "
            "values are so small: rescale X, or pass float64"
        )
    return converted


def numpy_dtype(X: Tensor) -> np.dtype[Any]:
    """numpy's name for what is computed in beside X."""
    return np.dtype(np.float32 if working_dtype(X) == torch.float32 else np.float64)
