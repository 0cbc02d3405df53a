"""onestep: solve, don't iterate.

``onestep.fit`` solves for a model's parameters, with the optimisers of ``onestep.optim`` and the products of
``onestep.curvature``; batched least squares and Cholesky solves (``onestep.linalg``, ``torch.ops.onestep.*``) and
scikit-learn estimators (``Ridge``, ``RidgeCV``, ``RidgeClassifier``, ``LogisticRegression``, ``PoissonRegressor``)
stand on compiled kernels.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from onestep import _program, curvature, functional, layerwise, linalg, nn, ops, optim  # noqa: F401 (before torch)
from onestep._runtime import info
from onestep.training import FitResult, fit

if TYPE_CHECKING:
    from onestep.estimators import (
        LogisticRegression,
        LogisticRegressionCV,
        PoissonRegressor,
        Ridge,
        RidgeClassifier,
        RidgeCV,
    )

__version__ = version("onestep")

__all__ = [
    "FitResult",
    "LogisticRegression",
    "LogisticRegressionCV",
    "PoissonRegressor",
    "Ridge",
    "RidgeCV",
    "RidgeClassifier",
    "__version__",
    "curvature",
    "fit",
    "functional",
    "info",
    "layerwise",
    "linalg",
    "nn",
    "ops",
    "optim",
]

# The estimators need scikit-learn, which is an extra, and take a second to import: they are loaded when asked for.
_ESTIMATORS = frozenset(
    {"LogisticRegression", "LogisticRegressionCV", "PoissonRegressor", "Ridge", "RidgeCV", "RidgeClassifier"}
)


def __getattr__(name: str) -> Any:
    if name in _ESTIMATORS:
        from onestep import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module 'onestep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
