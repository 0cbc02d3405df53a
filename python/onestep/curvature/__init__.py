"""Products with Hessians and Gauss-Newton matrices, without the matrices."""

from onestep.curvature._products import ggnvp, hvp
from onestep.curvature.glm import GLMPoint, glm

__all__ = ["GLMPoint", "ggnvp", "glm", "hvp"]
