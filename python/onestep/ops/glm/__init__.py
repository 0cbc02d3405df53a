"""Generalised linear models: ``glm_point`` (loss, gradient, curvature) and ``glm_product`` (Hessian products)."""

from onestep.ops._cuda import native
from onestep.ops.glm import cpu, derivatives
from onestep.ops.glm.schema import FAMILIES, glm_point, glm_product, parameter_dtype

if native is not None:
    from onestep.ops.glm import cuda as cuda

__all__ = ["FAMILIES", "cpu", "derivatives", "glm_point", "glm_product", "parameter_dtype"]
