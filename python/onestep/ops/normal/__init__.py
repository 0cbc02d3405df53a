"""The normal-equations family: ``gram``, ``moments``, ``solve_normal`` and what their derivatives need."""

from onestep.ops._cuda import native
from onestep.ops.normal import cpu, derivatives
from onestep.ops.normal.schema import (
    apply_normal_inverse,
    gram,
    moments,
    solve_normal,
    solve_normal_backward,
    solve_normal_ex,
)

if native is not None:
    from onestep.ops.normal import cuda as cuda

__all__ = [
    "apply_normal_inverse",
    "cpu",
    "derivatives",
    "gram",
    "moments",
    "solve_normal",
    "solve_normal_backward",
    "solve_normal_ex",
]
