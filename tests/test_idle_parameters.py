"""Parameters on which the outputs do not depend, but for rounding: they stay where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import onestep
from onestep.evaluation.parameters import ParameterVector
from onestep.optim import GaussNewton, LevenbergMarquardt
from onestep.optim.idle import made_of_rounding
from onestep.optim.objective import ClosureObjective

TYPES = [torch.float64, torch.float32]


class Encoder(nn.Module):
    """A transformer's layer and a head. Elements 4 to 7 of its ``in_proj_bias`` are the bias of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))

    def key_bias(self) -> Tensor:
        return self.layer.self_attn.in_proj_bias[4:8].detach().clone()


class Pool(nn.Module):
    """Attention with one query, whose bias adds the same to all scores."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.value = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).softmax(1) * self.value(x).tanh()).sum(1)


def sequences(dtype: torch.dtype, rows: int = 20, length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, length, 4, dtype=torch.float64, generator=generator).to(dtype)


def pooled(dtype: torch.dtype) -> tuple[Pool, Tensor, Tensor]:
    torch.manual_seed(1)
    x = sequences(dtype, 100, 4)
    return Pool().to(dtype), x, x[:, :, 0].amax(1, keepdim=True)


def encoder_fit(dtype: torch.dtype, loss: str, steps: int) -> tuple[Encoder, Tensor, onestep.FitResult]:
    torch.manual_seed(0)
    model = Encoder().to(dtype)
    # Biases that are zero cannot be moved by a part of themselves.
    before = model.key_bias()
    x = sequences(dtype)
    target = x[:, 0, :2].sin() if loss == "mse" else (x[:, :, 0].amax(1) > 1).long()
    with pytest.warns(UserWarning, match="eval mode"):
        result = onestep.fit(
            model, (x, target), loss=loss, method="levenberg_marquardt", max_steps=steps, progress=False
        )
    return model, before, result


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_key_biases_of_a_transformer_stay(loss: str) -> None:
    """Their gradients are 1e-17, and so are their columns of the Jacobian: the first step had the norm 1e16."""
    results = {}
    for dtype in TYPES:
        model, before, result = encoder_fit(dtype, loss, 20)
        assert torch.equal(model.key_bias(), before)
        assert max(parameter.abs().max().item() for parameter in model.parameters()) < 1e3
        assert max(record.step_norm for record in result.history) < 1e3
        results[dtype] = result
    # The same steps, as long as float32 follows.
    for precise, rounded in list(zip(*(result.history for result in results.values()), strict=False))[:4]:
        assert rounded.loss == pytest.approx(precise.loss, rel=1e-3)
    for result in results.values():
        assert result.loss < 0.1 * result.history[0].loss


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("method", ["levenberg_marquardt", "gauss_newton", "newton_cg"])
def test_a_bias_that_softmax_ignores_is_as_good_as_frozen(method: str, dtype: torch.dtype) -> None:
    results = {}
    for frozen in (True, False):
        model, x, y = pooled(dtype)
        model.score.bias.requires_grad_(not frozen)
        before = model.score.bias.detach().clone()
        results[frozen] = onestep.fit(model, (x, y), loss="mse", method=method, max_steps=150, progress=False)
        assert torch.equal(model.score.bias, before)
    assert results[False].converged and results[True].converged
    assert results[False].loss == pytest.approx(results[True].loss, rel=1e-6)
    if method == "levenberg_marquardt":
        assert len(results[False].history) == len(results[True].history)


@pytest.mark.parametrize("kind", [LevenbergMarquardt, GaussNewton])
def test_closures_have_idle_parameters_too(kind: type[LevenbergMarquardt] | type[GaussNewton]) -> None:
    model, x, y = pooled(torch.float32)
    before = model.score.bias.detach().clone()
    optimizer = kind(model.parameters())
    first = optimizer.step(lambda: model(x) - y)
    for _ in range(15):
        optimizer.step(lambda: model(x) - y)
    assert torch.equal(model.score.bias, before)
    assert optimizer.report.new_loss < 0.5 * first


@pytest.mark.parametrize("method", ["levenberg_marquardt", "gauss_newton"])
def test_weight_decay_takes_idle_parameters_to_zero(method: str) -> None:
    model, x, y = pooled(torch.float64)
    with torch.no_grad():
        model.score.bias.fill_(3.0)
    onestep.fit(model, (x, y), loss="mse", method=method, weight_decay=1e-3, max_steps=60, progress=False)
    assert model.score.bias.abs() < 1e-3


def test_idle_parameters_stay_where_curvature_is_of_a_sample(tmp_path: Path) -> None:
    """And a fit that is resumed forms the kept inverse without them, to the bit."""

    def fit(model: Pool, steps: int) -> onestep.FitResult:
        return onestep.fit(
            model,
            (x, y),
            loss="mse",
            method="levenberg_marquardt",
            curvature_batch_size=40,
            max_steps=steps,
            progress=False,
            checkpoint=tmp_path / f"{id(model)}.pt",
        )

    whole, x, y = pooled(torch.float64)
    before = whole.score.bias.detach().clone()
    fit(whole, 12)
    assert torch.equal(whole.score.bias, before)
    halves, *_ = pooled(torch.float64)
    fit(halves, 5)
    fit(halves, 12)
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", TYPES)
def test_features_in_tiny_units_are_not_idle(dtype: torch.dtype) -> None:
    """Their columns are as small as rounding would be, and have all digits."""
    unit = 1e-14 if dtype == torch.float64 else 1e-7
    scale = torch.tensor([unit, 1.0, 1e3], dtype=torch.float64)
    X = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (X @ torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64)).tanh().to(dtype)
    found = {}
    for units in (torch.ones_like(scale), scale):
        w = torch.zeros(3, dtype=dtype, requires_grad=True)
        optimizer, inputs = LevenbergMarquardt([w]), (X * units).to(dtype)
        for _ in range(6):
            optimizer.step(lambda inputs=inputs, w=w: (inputs @ w).tanh() - y)
        found[units[0].item()] = w.detach().double() * units
    torch.testing.assert_close(found[unit], found[1.0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[unit], torch.tensor([0.5, -1.0, 0.3]).double(), rtol=1e-3, atol=1e-3)


def test_what_is_made_of_rounding() -> None:
    """A bias ahead of a softmax is; one of a unit of relu that never fires has no derivatives, which are exact."""
    model, x, _ = pooled(torch.float64)
    dead = torch.nn.Parameter(torch.tensor([-1e3], dtype=torch.float64))
    parameters = ParameterVector([*model.parameters(), dead])
    objective = ClosureObjective(lambda: model(x) + (dead + x[:, 0, :1]).relu(), scalar=False, optimizer="")
    before = parameters.read()
    sizes = objective.output_gradient(parameters).abs()
    idle, known = made_of_rounding(objective, parameters, sizes, None)
    expected = torch.arange(len(parameters)) == 4
    assert torch.equal(parameters.read(), before)
    assert idle is not None and torch.equal(idle, expected)
    assert known is not None and torch.equal(known, -1.0 * expected.double())
    # It stays out with what is known, and comes back where it has gained influence.
    objective.output_gradient = None  # type: ignore[method-assign, assignment]
    assert torch.equal(made_of_rounding(objective, parameters, sizes, known)[0], expected)
    sizes[4] = sizes.max() / 100
    assert made_of_rounding(objective, parameters, sizes, known)[0] is None
