"""Polar factors against five Newton-Schulz iterations in torch, as torch.optim.Muon has them, on whole batches.

The peer leaves singular values in about [0.7, 1.1]; ours are in [0.995, 1] from a hundredth of the norm on.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from whole_networks import newton_schulz

from onestep.linalg import polar


@pytest.mark.benchmark(group="polar factors")
@pytest.mark.parametrize("shape", [(24, 144, 576), (16, 144, 144), (8, 768, 3072)], ids=str)
def test_polar(compare: Callable[..., float], shape: tuple[int, int, int]) -> None:
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    batch, n, m = shape
    ours, theirs = (float(1 - torch.linalg.svdvals(found[0].double()).amin()) for found in (polar(M), newton_schulz(M)))
    # Square matrices of normal numbers have singular values near 0.
    assert ours < 5e-3 or n == m

    def is_orthogonal(found: Tensor, _: Tensor) -> None:
        assert float(1 - torch.linalg.svdvals(found[0].double()).amin()) == ours

    compare(
        lambda: polar(M),
        lambda: newton_schulz(M),
        rounds=3 if n > 256 else 7,
        check=is_orthogonal,
        case=f"polar of {batch} × ({n} × {m}); peer: five Newton-Schulz iterations",
        # Gram matrix, two factors with inverses, their products, and the factor itself.
        flops=batch * (3 * n * n * m + 8 * n**3),
        goal=3.0,
        error=ours,
        peer_error=theirs,
    )
