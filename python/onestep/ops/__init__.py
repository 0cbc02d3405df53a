"""``torch.ops.onestep.*``: one op per kernel entry, with its schema, fake, vmap rule, kernels and derivatives.

A family is a folder: ``schema.py`` (schema, checks of operands, shapes of results, vmap rule), ``cpu.py`` and
``cuda.py`` (the kernels of a device), ``derivatives.py``.
"""

from onestep.ops import attention, cholesky, compensated, glm, lmhead, mlp, normal, polar, segments, sparse
from onestep.ops._cuda import build as cuda_build
from onestep.ops._library import install_kernels, records_derivatives

install_kernels()

__all__ = [
    "attention",
    "cholesky",
    "compensated",
    "cuda_build",
    "glm",
    "lmhead",
    "mlp",
    "normal",
    "polar",
    "records_derivatives",
    "segments",
    "sparse",
]
