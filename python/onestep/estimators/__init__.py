"""Estimators with scikit-learn's contract, fitted by solving rather than iterating."""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError("onestep's estimators need scikit-learn: pip install scikit-learn") from error

from onestep.estimators.glm import LogisticRegression, PoissonRegressor
from onestep.estimators.logistic_cv import LogisticRegressionCV
from onestep.estimators.ridge import Ridge, RidgeClassifier
from onestep.estimators.ridge_cv import RidgeCV

__all__ = ["LogisticRegression", "LogisticRegressionCV", "PoissonRegressor", "Ridge", "RidgeCV", "RidgeClassifier"]
