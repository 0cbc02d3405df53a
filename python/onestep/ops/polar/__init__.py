"""The orthogonal polar factor: ``polar``."""

from onestep.ops._cuda import native
from onestep.ops.polar import cpu, derivatives
from onestep.ops.polar.schema import polar, raise_if_failed

if native is not None:
    from onestep.ops.polar import cuda as cuda

__all__ = ["cpu", "derivatives", "polar", "raise_if_failed"]
