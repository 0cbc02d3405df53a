"""Scaled dot-product attention and the products that close its derivatives of order two."""

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
