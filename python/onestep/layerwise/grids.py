"""Grids that weights are rounded to."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.layerwise.export import QuantizedWeight


def rounded(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> QuantizedWeight:
    """Rounding to nearest, each group of columns on the grid of its own range."""
    group = torch.arange(weight.shape[1], device=weight.device) // group_size
    grids = [_grid(*_range(part, symmetric), bits, symmetric) for part in weight.split(group_size, dim=1)]
    scale, zero = (torch.stack(parts, 1) for parts in zip(*grids, strict=True))
    return QuantizedWeight(_codes(weight, scale[:, group], zero[:, group], bits), scale, zero, group, bits)


def _range(part: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each row, 0 among them."""
    low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = (low == 0) & (high == 0)
    return low.masked_fill(empty, -1), high.masked_fill(empty, 1)


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The scale and the code of 0 for each row."""
    most = 2**bits - 1
    scale = (high - low) / most
    return scale, torch.full_like(low, (most + 1) / 2) if symmetric else (-low / scale).round()


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((weight / scale).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)
