"""What benchmarks hold results to after they were timed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def agree(ours: Any, theirs: Any, tolerance: float = 1e-3) -> None:
    """Asserts that two results are the same to a part of their norm: tensors, arrays, fitted estimators, or several."""
    if hasattr(ours, "coef_"):
        ours, theirs = ours.coef_, theirs.coef_
    if isinstance(ours, (tuple, list)):
        for one, other in zip(ours, theirs, strict=True):
            agree(one, other, tolerance)
        return
    found, expected = (torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x.detach()).double()
                       for x in (ours, theirs))  # fmt: skip
    assert found.numel() == expected.numel(), f"{tuple(found.shape)} and {tuple(expected.shape)} do not match"
    error = float((found.flatten() - expected.flatten()).norm() / expected.norm())
    assert error <= tolerance, f"the results differ by {error:.1e} of their norm; expected at most {tolerance:g}"
