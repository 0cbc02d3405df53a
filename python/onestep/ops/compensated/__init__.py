"""A layer solved with the Gram matrix of its inputs: ``inverse_cholesky``, ``unit_cholesky``, ``compensated_sweep``."""

from onestep.ops._cuda import native
from onestep.ops.compensated import cpu, derivatives
from onestep.ops.compensated.schema import NOT_FINITE, compensated_sweep, inverse_cholesky, unit_cholesky

if native is not None:
    from onestep.ops.compensated import cuda as cuda

__all__ = ["NOT_FINITE", "compensated_sweep", "cpu", "derivatives", "inverse_cholesky", "unit_cholesky"]
