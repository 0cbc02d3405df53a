"""fit of parameters of 16 bits: refused with the remedy but for polar, where it died of torch's own errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import onestep

DTYPES = [torch.bfloat16, torch.float16]
DAMPED = ["levenberg_marquardt", "newton_cg", "gauss_newton", "gradient_descent"]


def regression(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    X = torch.randn(40, 3)
    return X.to(dtype), (X @ torch.tensor([[1.0], [-2.0], [0.5]])).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "closed_form", *DAMPED])
@pytest.mark.parametrize("model", [nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))])
def test_parameters_of_16_bits_are_refused(model: nn.Module, method: str, dtype: torch.dtype) -> None:
    said = rf"method='{method}'.*{dtype}.*model.float\(\), or method='polar'"
    with pytest.raises(ValueError, match=said):
        onestep.fit(model.to(dtype), regression(dtype), "mse", method=method, progress=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "quasi_newton", "newton_cg"])
def test_heads_of_16_bits_are_refused(method: str, dtype: torch.dtype) -> None:
    X, y = regression(dtype)
    with pytest.raises(ValueError, match=r"model.float\(\)"):
        onestep.fit(
            nn.Linear(3, 2, dtype=dtype), (X, (y[:, 0] > 0).long()), "cross_entropy", method=method, progress=False
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_polar_takes_them_and_frozen_ones_do_not_count(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
    assert onestep.fit(model, regression(dtype), "mse", method="polar", max_steps=3, progress=False).steps == 3

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 8, dtype=dtype).requires_grad_(False), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).float())

    assert onestep.fit(Head(), regression(dtype), "mse", progress=False).method == "closed_form"
