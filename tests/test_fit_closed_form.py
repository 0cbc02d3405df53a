"""onestep.fit in closed form: the digits that are there, and the loss of the weights that are returned."""

from __future__ import annotations

import pytest
import torch
from nist import FILIP, FILIP_SQUARES, FILIP_X, FILIP_Y
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import onestep


def powers(x: Tensor, degree: int) -> Tensor:
    return x[:, None] ** torch.arange(1, degree + 1, dtype=x.dtype)


@pytest.mark.parametrize("decay", [0.0, 1e-30])
def test_filip_has_its_digits(decay: float) -> None:
    """With the constant as the intercept, which is taken out first, and as one more feature (a decayed bias)."""
    x, y = torch.tensor(FILIP_X, dtype=torch.float64), torch.tensor(FILIP_Y, dtype=torch.float64)[:, None]
    head = nn.Linear(10, 1).double()
    result = onestep.fit(head, (powers(x, 10), y), weight_decay=decay, progress=False)
    found = torch.cat([head.bias, head.weight[0, :4]])
    assert ((found / torch.tensor(FILIP, dtype=torch.float64) - 1).abs() < 1e-6).all()
    assert result.loss * 82 == pytest.approx(FILIP_SQUARES, rel=1e-7)
    assert "QR in float64" in result.reason


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_rows_than_features_have_the_solution_with_the_smallest_norm(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    X, y = (torch.randn(10, columns, generator=generator, dtype=dtype) for columns in (30, 1))
    head = nn.Linear(30, 1, bias=bias).to(dtype)
    result = onestep.fit(head, (X, y), progress=False)
    X, y = X.double(), y.double()
    mean_x, mean_y = (X.mean(0), y.mean(0)) if bias else (torch.zeros(30), torch.zeros(1))
    expected = torch.linalg.pinv(X - mean_x) @ (y - mean_y)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert (head.weight.mT.double() - expected).norm() < bound * expected.norm()
    assert result.loss == pytest.approx(mse_loss(head.double()(X), y).item(), rel=1e-6, abs=1e-24)
    assert f"{21 if bias else 20} of 30 features depend on others" in result.reason


def test_a_line_far_from_zero_is_found_in_float32() -> None:
    i = torch.arange(10_000.0)
    X, y = torch.stack([torch.ones_like(i), i], 1), (2020 + 2020 * i)[:, None]
    head = nn.Linear(2, 1, bias=False)
    result = onestep.fit(head, (X, y), progress=False)
    assert torch.equal(head.weight.detach(), torch.tensor([[2020.0, 2020.0]]))
    # To the rounding of outputs of 2e7 in float64.
    assert result.loss < 1e-16


def test_the_loss_is_that_of_the_rounded_weights() -> None:
    """Rounding coefficients to float32 moves outputs of 2e7 by more than the noise of a hundredth."""
    generator = torch.Generator().manual_seed(0)
    i = torch.arange(10_000.0)
    noise = 0.01 * torch.randn(10_000, generator=generator)
    X, y = torch.stack([torch.ones_like(i), i], 1), (0.1 + 0.3 * i + noise)[:, None]
    head = nn.Linear(2, 1, bias=False)
    result = onestep.fit(head, (X, y), progress=False)
    weight = head.weight.detach().double()
    assert result.loss == pytest.approx(mse_loss(X.double() @ weight.mT, y.double()).item(), rel=1e-6)
    exact = torch.linalg.lstsq(X.double(), y.double()).solution
    assert result.loss < 1.5 * mse_loss(X.double() @ exact, y.double()).item()


def test_columns_that_are_the_same_share_their_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [2.0], [3.0]]) + 0.5
    head = nn.Linear(4, 1)
    onestep.fit(head, (torch.cat([x, x[:, :1]], 1), y), progress=False)
    torch.testing.assert_close(head.weight.detach(), torch.tensor([[0.5, 2.0, 3.0, 0.5]]))


@pytest.mark.parametrize("seed", [0, 1, 5, 7])
def test_a_constant_column_beside_a_bias_far_from_zero(seed: int) -> None:
    """What centring leaves of the column is rounding noise, and has no weight: the bias has it all."""
    generator = torch.Generator().manual_seed(seed)
    i = torch.arange(10_000.0)
    y = (2020 + 2020 * i)[:, None] + torch.randn(10_000, 1, generator=generator)
    X, head = torch.stack([torch.ones_like(i), i], 1), nn.Linear(2, 1)
    result = onestep.fit(head, (X, y), progress=False)
    exact = torch.linalg.lstsq(X.double(), y.double()).solution
    assert torch.equal(head.weight.detach(), torch.tensor([[0.0, 2020.0]]))
    assert head.bias.item() == pytest.approx(exact[0].item(), abs=0.05)
    least = mse_loss(X.double() @ exact, y.double()).item()
    assert least < result.loss < 1.1 * least
    assert result.loss == pytest.approx(mse_loss(head(X), y).item(), rel=1e-2)
    assert "1 of 2 features depend on others" in result.reason


@pytest.mark.parametrize("rows", [200, 300, 500, 900, 3_000])
@pytest.mark.parametrize("value", [0.1, 1.0, 2020.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_column_beside_a_bias_has_no_weight(rows: int, value: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 3, generator=generator, dtype=dtype)
    y = 2 * x[:, :1] + 1 + 0.1 * torch.randn(rows, 1, generator=generator, dtype=dtype)
    head = nn.Linear(4, 1, dtype=dtype)
    X = torch.cat([x, x.new_full((rows, 1), value)], 1)
    result = onestep.fit(head, (X, y), method="closed_form", progress=False)
    ones = torch.cat([x, x.new_ones(rows, 1)], 1).double()
    expected = torch.linalg.lstsq(ones, y.double()).solution[:, 0].to(dtype)
    assert head.weight[0, 3].item() == 0
    torch.testing.assert_close(torch.cat([head.weight[0, :3], head.bias]).detach(), expected)
    assert "1 of 4 features depend on others" in result.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_indicator_for_every_class_beside_a_bias(dtype: torch.dtype) -> None:
    """Their sum is constant: with the bias they depend on each other, and the least norm has weights that add to 0."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(0, 3, (3_000,), generator=generator)
    X = torch.eye(3, dtype=dtype)[place]
    y = torch.tensor([1.0, 2.0, 6.0], dtype=dtype)[place][:, None]
    head = nn.Linear(3, 1, dtype=dtype)
    onestep.fit(head, (X, y), progress=False)
    torch.testing.assert_close(head.weight.detach(), torch.tensor([[-2.0, -1.0, 3.0]], dtype=dtype))
    torch.testing.assert_close(head.bias.detach(), torch.tensor([3.0], dtype=dtype))


def test_the_loss_is_that_which_the_model_computes() -> None:
    """Of weights that cancel, the model's own arithmetic loses more than the least loss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    X = torch.cat([x, x + 1e-3 * noise], 1).float()
    y = (1e4 * (X[:, 1:].double() - X[:, :1].double())).float()
    head = nn.Linear(2, 1)
    result = onestep.fit(head, (X, y), progress=False)
    own = mse_loss(head(X), y).item()
    assert own > 1e-9
    assert result.loss == pytest.approx(own, rel=0.1)
