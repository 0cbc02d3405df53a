"""Products with Hessians and Gauss-Newton matrices, without the matrices."""

from onestep.curvature._products import ggnvp, hvp

__all__ = ["ggnvp", "hvp"]
