"""Batches of symmetric positive definite matrices: ``cholesky``, ``cholesky_solve``, ``solve_spd``.

Their kernels belong to csrc/normal.
"""

from onestep.ops._cuda import native
from onestep.ops.cholesky import cpu, derivatives
from onestep.ops.cholesky.schema import apply_spd_inverse, cholesky, cholesky_solve, solve_spd

if native is not None:
    from onestep.ops.cholesky import cuda as cuda

__all__ = ["apply_spd_inverse", "cholesky", "cholesky_solve", "cpu", "derivatives", "solve_spd"]
