"""Ragged least-squares problems that gather their rows. Their kernels belong to csrc/normal."""

from onestep.ops.segments import cpu, derivatives
from onestep.ops.segments.schema import apply_segments_inverse, solve_normal_segments, solve_normal_segments_ex

__all__ = ["apply_segments_inverse", "cpu", "derivatives", "solve_normal_segments", "solve_normal_segments_ex"]
