"""Products with Hessians and Gauss-Newton matrices, without the matrices."""

from onestep.curvature._estimates import Estimate
from onestep.curvature._solve import SolveReport
from onestep.curvature.glm import GLMPoint, glm
from onestep.curvature.laplace import Laplace, Prediction
from onestep.curvature.operators import FisherOperator, GaussNewtonOperator, HessianOperator
from onestep.curvature.products import ggnvp, hvp

__all__ = [
    "Estimate",
    "FisherOperator",
    "GLMPoint",
    "GaussNewtonOperator",
    "HessianOperator",
    "Laplace",
    "Prediction",
    "SolveReport",
    "ggnvp",
    "glm",
    "hvp",
]
