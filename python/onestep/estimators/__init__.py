"""Estimators with scikit-learn's contract, fitted by solving rather than iterating."""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError("onestep.Ridge needs scikit-learn: pip install 'onestep[sklearn]'") from error

from onestep.estimators.ridge import Ridge, RidgeClassifier
from onestep.estimators.ridge_cv import RidgeCV

__all__ = ["Ridge", "RidgeCV", "RidgeClassifier"]
