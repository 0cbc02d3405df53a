"""Scaled dot-product attention, and the ops that its derivatives up to order two are made of."""

from onestep.ops.attention import cpu, cuda, derivatives
from onestep.ops.attention.schema import (
    COMPUTE_DTYPES,
    attention,
    attention_and_jvp,
    attention_backward,
    attention_backward_and_jvp,
    attention_backward_jvp,
    attention_jvp,
    check_dtype,
)

__all__ = [
    "COMPUTE_DTYPES",
    "attention",
    "attention_and_jvp",
    "attention_backward",
    "attention_backward_and_jvp",
    "attention_backward_jvp",
    "attention_jvp",
    "check_dtype",
    "cpu",
    "cuda",
    "derivatives",
]
