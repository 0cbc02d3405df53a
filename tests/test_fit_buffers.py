"""onestep.fit and the buffers of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import onestep

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.sin(X[:, :1])


@pytest.mark.parametrize("method", ["levenberg_marquardt", "gradient_descent"])
@pytest.mark.filterwarnings("ignore:fit evaluates the model in eval mode")
def test_a_checkpoint_knows_buffers_but_for_running_statistics(tmp_path: Path, method: str) -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float, mean: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm = nn.BatchNorm1d(X.shape[1], affine=False, dtype=X.dtype)
            self.norm.running_mean.fill_(mean)
            self.body = nn.Sequential(nn.Linear(X.shape[1], 3), nn.Tanh(), nn.Linear(3, 1)).to(X.dtype)
            self.register_buffer("factor", torch.tensor(factor, dtype=X.dtype))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.body(self.norm(x))

    options: dict[str, Any] = {"method": method, "checkpoint": tmp_path / "state.pt", "progress": False}
    onestep.fit(Scaled(1.0, 0.0), (X, Y), max_steps=2, **options)
    other = Scaled(7.0, 0.0)
    with pytest.raises(ValueError, match="is of another problem: other buffers"):
        onestep.fit(other, (X, Y), max_steps=4, **options)
    assert other.factor.item() == 7
    onestep.fit(Scaled(1.0, 0.5), (X, Y), max_steps=4, **options)
