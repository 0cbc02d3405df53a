"""Modules that run on onestep's kernels."""

from onestep.nn.attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
