"""What the linear estimators share: checking what they are given, and predicting."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from onestep._fork import one_thread_after_fork
from onestep.estimators._arrays import FLOATS, Array, check_weight, give_back, sparse_operand, to_numpy, to_tensor


class FitData(NamedTuple):
    """X (n, d) and weight (n,) or None as tensors over the caller's memory, y as numpy, and which kind X was."""

    X: Tensor
    y: Array
    weight: Tensor | None
    tensors: bool


class LinearEstimator:
    """Mixin for estimators with `coef_` (d,) or (k, d) and `intercept_`; numpy in, numpy out, tensors likewise."""

    coef_: Any
    intercept_: Any
    # Whether X may be a scipy.sparse matrix.
    _accepts_sparse = False

    def _check_fit(
        self, X: Any, y: Any, sample_weight: Any, *, y_numeric: bool, min_rows: int = 1, reset: bool = True
    ) -> FitData:
        """The arguments of a fit; ``reset``: whether X sets the features, or must have those of the first call."""
        tensors = isinstance(X, Tensor)
        # Whether X is finite shows in its Gram matrix; looking here would cost a second pass over it.
        X, y = validate_data(
            self,
            to_numpy("X", X),
            to_numpy("y", y),
            dtype=FLOATS,
            ensure_all_finite=False,
            ensure_min_samples=min_rows,
            multi_output=True,
            y_numeric=y_numeric,
            reset=reset,
        )
        weight = None if sample_weight is None else to_tensor(check_weight(sample_weight, X.shape[0], X.dtype))
        return FitData(to_tensor(X), y, weight, tensors)

    def _check_sparse(
        self, X: Any, y: Any, sample_weight: Any, *, tensors: bool, y_numeric: bool
    ) -> tuple[Any, FitData]:
        """A scipy.sparse X in CSR form, and the arguments with a tensor of its shape and type, of no memory, as X."""
        X, y = validate_data(
            self, X, to_numpy("y", y), dtype=FLOATS, accept_sparse="csr", multi_output=True, y_numeric=y_numeric
        )
        weight = None if sample_weight is None else to_tensor(check_weight(sample_weight, X.shape[0], X.dtype))
        like = torch.zeros(1, 1, dtype=torch.float32 if X.dtype == np.float32 else torch.float64).expand(X.shape)
        return X, FitData(like, y, weight, tensors)

    def _set_coefficients(self, coef: Tensor, intercept: Tensor, data: FitData, *, fit_intercept: bool) -> None:
        """Keep W (d, k) and b (k,) in X's type and kind, with scikit-learn's shapes: one target gives a 1-D coef_."""
        single = coef.shape[1] == 1
        coef, intercept = coef.to(data.X.dtype), intercept.to(data.X.dtype)
        self.coef_ = give_back((coef[:, 0] if single else coef.mT).contiguous(), tensors=data.tensors)
        if fit_intercept:
            self.intercept_ = give_back(intercept[0] if data.y.ndim == 1 else intercept, tensors=data.tensors)
        else:
            self.intercept_ = 0.0

    @one_thread_after_fork()
    def _linear(self, X: Any) -> Any:
        """X coef_ᵀ + intercept_, in the type and kind of X."""
        check_is_fitted(self)
        tensors = isinstance(X, Tensor)
        if self._accepts_sparse:
            X = sparse_operand(X)
        if self._accepts_sparse and issparse(X):
            rows = validate_data(self, X, dtype=FLOATS, accept_sparse="csr", reset=False)
            coef = to_numpy("coef_", self.coef_).astype(rows.dtype, copy=False)
            scores = (rows @ coef.T + to_numpy("intercept_", self.intercept_)).astype(rows.dtype, copy=False)
            return give_back(torch.from_numpy(scores), tensors=tensors)
        x = to_tensor(validate_data(self, to_numpy("X", X), dtype=FLOATS, reset=False))
        coef = torch.as_tensor(self.coef_).to(x.dtype)
        values = x @ (coef if coef.ndim == 1 else coef.mT)
        return give_back(values.add_(torch.as_tensor(self.intercept_).to(x.dtype)), tensors=tensors)

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
        """
        inputs = to_numpy("X", sparse_operand(X)), to_numpy("y", y), to_numpy("sample_weight", sample_weight)
        return float(super().score(*inputs))  # type: ignore[misc]


def as_targets(y: Array, X: Tensor) -> Tensor:
    """y (n,) or (n, k) as (n, k) of X's type; a view where y has it already. ValueError if it does not fit."""
    column = y[:, None] if y.ndim == 1 else y
    dtype = X.numpy().dtype
    with np.errstate(over="ignore"):
        converted = np.asarray(column, dtype=dtype)
    if converted is not column and not np.isfinite(converted).all():
        raise ValueError(f"y holds values too large for X's type, {dtype}: rescale y, or pass X as float64")
    return to_tensor(converted)
