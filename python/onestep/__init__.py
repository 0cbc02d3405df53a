"""onestep: solve, don't iterate.

``onestep.fit`` solves for a model's parameters, with the optimisers of ``onestep.optim`` and the products of
``onestep.curvature``; batched least squares and Cholesky solves (``onestep.linalg``, ``torch.ops.onestep.*``) and
scikit-learn estimators (``Ridge``, ``RidgeCV``, ``RidgeClassifier``, ``LogisticRegression``, ``LogisticRegressionCV``,
``PoissonRegressor``) stand on compiled kernels.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onestep import _program, curvature, functional, layerwise, linalg, nn, ops, optim  # noqa: F401 (before torch)
from onestep._runtime import info, own_version
from onestep.training import FitResult, fit

if TYPE_CHECKING:
    from onestep import estimators, integrations
    from onestep.estimators import (
        LogisticRegression,
        LogisticRegressionCV,
        PoissonRegressor,
        Ridge,
        RidgeClassifier,
        RidgeCV,
    )

__version__ = own_version()

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
    "estimators",
    "fit",
    "functional",
    "info",
    "integrations",
    "layerwise",
    "linalg",
    "nn",
    "ops",
    "optim",
]

# Estimators need scikit-learn, integrations the libraries that they are named after: both are loaded when asked for.
_MODULES = frozenset({"estimators", "integrations"})
_ESTIMATORS = frozenset(
    {"LogisticRegression", "LogisticRegressionCV", "PoissonRegressor", "Ridge", "RidgeCV", "RidgeClassifier"}
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"onestep.{name}")
    if name in _ESTIMATORS:
        return getattr(importlib.import_module("onestep.estimators"), name)
    raise AttributeError(f"module 'onestep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
