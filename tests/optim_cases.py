"""Closures and quadratics for the optimisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onestep.optim import GaussNewton, LevenbergMarquardt, NewtonCG

KINDS: list[Any] = [LevenbergMarquardt, GaussNewton, NewtonCG]


DESIGN = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
START = torch.tensor([0.1, -0.2, 0.3, 0.0, 0.5], dtype=torch.float64)


def curve(x: Tensor, m: int = 40) -> Tensor:
    """m residuals of five parameters."""
    return (DESIGN[:m].to(x.dtype) @ x).sin() - 0.2


def parameter(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def closure_for(kind: Any, residuals: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What that optimiser wants to be given for least squares."""
    return (lambda: residuals().square().mean()) if kind is NewtonCG else residuals


def exact(kind: Any) -> dict[str, Any]:
    """Options with which conjugate gradients converge."""
    return {} if kind is LevenbergMarquardt else {"cg_tolerance": 0.0, "cg_iterations": 40}
