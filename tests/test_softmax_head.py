"""A linear head under cross-entropy from one pass over the data."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onestep
from onestep.training.methods import softmax_estimate as softmax_head

ROWS, FEATURES, CLASSES = 6_000, 8, 4


class Body(nn.Module):
    """A frozen layer below a head."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(10, FEATURES).requires_grad_(False)
        self.head = nn.Linear(FEATURES, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)) + 0.2)


def table(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 10, generator=generator)
    scores = torch.tanh(x @ torch.randn(10, 30, generator=generator)) @ torch.randn(30, CLASSES, generator=generator)
    # The class that is greatest under Gumbel noise is drawn from the softmax of the scores.
    return x, (scores - torch.empty_like(scores).exponential_(generator=generator).log()).argmax(1)


def model(*, bias: bool = True) -> Body:
    torch.manual_seed(1)
    return Body(bias=bias)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


class Passes:
    """Batches in random order, counting the rows that are read."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.read = x, y, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.x.split(500), self.y.split(500), strict=True):
            self.read += len(x)
            yield x, y


@pytest.mark.parametrize("bias", [True, False])
def test_one_pass_comes_close_and_newton_closes_the_rest(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fewer rows than in earnest, so that the test ends soon.
    monkeypatch.setattr(softmax_head, "_KEPT", 512)
    monkeypatch.setattr(softmax_head, "_FIRST", 2048)
    x, y = table()
    data, estimated = Passes(x, y), model(bias=bias)
    before = loss_of(estimated, x, y)
    result = onestep.fit(estimated, data, "cross_entropy", method="closed_form", progress=False)
    assert data.read == ROWS
    assert (result.method, result.converged, len(result.history)) == ("closed_form", False, 1)
    assert result.initial_loss == pytest.approx(before, rel=1e-4)
    estimate = loss_of(estimated, x, y)
    assert result.loss == pytest.approx(estimate, rel=0.02)
    exact = model(bias=bias)
    assert onestep.fit(exact, (x, y), "cross_entropy", method="newton_cg", tol=1e-3, progress=False).converged
    lowest = loss_of(exact, x, y)
    assert lowest <= estimate < 1.02 * lowest
    newton = onestep.fit(estimated, (x, y), "cross_entropy", method="newton_cg", tol=1e-3, progress=False)
    assert newton.converged
    assert newton.loss == pytest.approx(lowest, rel=1e-5)


@pytest.mark.parametrize("rows", [2049, 2080, 2500])
def test_a_little_more_than_the_first_rows_is_no_worse(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The final sample is not only of what comes after them."""
    monkeypatch.setattr(softmax_head, "_KEPT", 512)
    monkeypatch.setattr(softmax_head, "_FIRST", 2048)
    x, y = table(rows)
    data = [(x[begin : begin + 256], y[begin : begin + 256]) for begin in range(0, rows, 256)]
    estimated, exact = model(), model()
    onestep.fit(estimated, data, "cross_entropy", method="closed_form", progress=False)
    onestep.fit(exact, (x, y), "cross_entropy", method="newton_cg", tol=1e-3, progress=False)
    assert loss_of(estimated, x, y) < 1.02 * loss_of(exact, x, y)


def test_data_that_fits_in_memory_is_solved_as_it_is() -> None:
    x, y = table(3000)
    estimated, exact = model(), model()
    onestep.fit(estimated, (x, y), "cross_entropy", method="closed_form", progress=False)
    onestep.fit(exact, (x, y), "cross_entropy", method="newton_cg", tol=1e-3, progress=False)
    assert loss_of(estimated, x, y) == pytest.approx(loss_of(exact, x, y), rel=2e-3)


def test_positions_of_sequences_are_rows_and_ignored_ones_are_not() -> None:
    x, y = table(4000)
    sequences, flat = model(), model()
    ignored = y.clone()
    ignored[1::2] = -100
    shaped = (x.reshape(500, 8, 10), ignored.reshape(500, 8))
    # Which rows come first does not matter to data of this size, so the order of the two may differ.
    onestep.fit(sequences, shaped, "cross_entropy", method="closed_form", progress=False)
    onestep.fit(flat, (x[::2], y[::2]), "cross_entropy", method="closed_form", progress=False)
    assert loss_of(sequences, x, y) == pytest.approx(loss_of(flat, x, y), rel=1e-4)


def test_weight_decay_is_part_of_the_loss() -> None:
    x, y = table(3000)
    estimated, exact = model(), model()
    solved = onestep.fit(
        estimated, (x, y), "cross_entropy", method="closed_form", weight_decay=0.05, tol=1e-3, progress=False
    )
    newton = onestep.fit(
        exact, (x, y), "cross_entropy", method="newton_cg", weight_decay=0.05, tol=1e-3, progress=False
    )
    assert solved.loss == pytest.approx(newton.loss, rel=1e-3)


@pytest.mark.parametrize("row", [0, 2500])
def test_bad_data_and_other_models_are_refused_and_nothing_changes(row: int) -> None:
    x, y = table(3000)
    x[row, 3] = float("nan")
    broken = model()
    before = broken.head.weight.detach().clone()
    with pytest.raises(onestep.optim.NonFiniteError, match="NaN or infinity"):
        onestep.fit(broken, [(x, y)], "cross_entropy", method="closed_form", progress=False)
    assert torch.equal(broken.head.weight, before)
    with pytest.raises(ValueError, match="affine"):
        onestep.fit(
            nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, CLASSES)),
            table(100),
            "cross_entropy",
            method="closed_form",
            progress=False,
        )
    with pytest.raises(ValueError, match="newton_cg"):
        onestep.fit(nn.Linear(10, 1), (x, y.float()), "poisson", method="closed_form", progress=False)
