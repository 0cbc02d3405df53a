"""The language-model head: ``linear_cross_entropy`` and ``linear_cross_entropy_tangent``."""

from onestep.ops._cuda import native
from onestep.ops.lmhead import cpu, derivatives
from onestep.ops.lmhead.schema import (
    accumulation_dtype,
    check_operands,
    linear_cross_entropy,
    linear_cross_entropy_tangent,
)

if native is not None:
    from onestep.ops.lmhead import cuda as cuda

__all__ = [
    "accumulation_dtype",
    "check_operands",
    "cpu",
    "derivatives",
    "linear_cross_entropy",
    "linear_cross_entropy_tangent",
]
