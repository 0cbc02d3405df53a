"""Products with Hessians and Gauss-Newton matrices, without the matrices."""

from onestep.curvature._estimates import Estimate
from onestep.curvature._products import ggnvp, hvp
from onestep.curvature.operators import FisherOperator, GaussNewtonOperator, HessianOperator, SolveReport

__all__ = [
    "Estimate",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "SolveReport",
    "ggnvp",
    "hvp",
]
