"""Linear heads under cross-entropy: the multinomial solver on features that are computed once."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import onestep
from onestep.training.structures import softmax_rows
from onestep.training.structures.kept_rows import KeptRows

CLASSES = 5


class Body(nn.Module):
    """A frozen layer below a head, which counts the rows that it is run on."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(10, 12).requires_grad_(False)
        self.head = nn.Linear(12, CLASSES, bias=bias)
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.head(torch.tanh(self.body(x)) + 0.5)


def table(rows: int = 400, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 10, generator=generator, dtype=dtype)
    scores = x @ torch.randn(10, CLASSES, generator=generator, dtype=dtype)
    return x, (scores - torch.empty_like(scores).exponential_(generator=generator).log()).argmax(1)


def model(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> Body:
    torch.manual_seed(1)
    return Body(bias=bias).to(dtype)


def minimum(loss: Any, x: Tensor, y: Tensor, decay: float, *, bias: bool = True) -> float:
    """By torch's L-BFGS."""
    copy = model(bias=bias)
    optimizer = torch.optim.LBFGS(
        copy.head.parameters(), max_iter=2000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss(copy(x), y) + 0.5 * decay * sum(p.square().sum() for p in copy.head.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    return closure().item()


def soft_targets(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.rand(len(y), CLASSES, generator=generator, dtype=torch.float64) + 2.0 * F.one_hot(y, CLASSES)
    return drawn / drawn.sum(1, keepdim=True)


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.0], dtype=torch.float64)
LOSSES = {
    "classes": "cross_entropy",
    "weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "all": partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.2, ignore_index=3),
}


@pytest.mark.parametrize(
    ("name", "soft"),
    [("classes", True), ("weights", False), ("weights", True), ("smoothing", True), ("all", False)],
)
def test_ends_at_the_minimum(name: str, soft: bool) -> None:
    x, y = table()
    target: Tensor = soft_targets(y) if soft else y
    bias = name != "smoothing"
    loss: Any = F.cross_entropy if name == "classes" else LOSSES[name]
    lowest = minimum(loss, x, target, 0.01, bias=bias)
    fitted = model(bias=bias)
    result = onestep.fit(fitted, (x, target), LOSSES[name], weight_decay=0.01, method="quasi_newton", progress=False)
    assert result.converged
    assert result.loss == pytest.approx(lowest, rel=1e-9)
    with torch.no_grad():
        penalty = 0.005 * sum(p.square().sum().item() for p in fitted.head.parameters())
        assert loss(fitted(x), target).item() + penalty == pytest.approx(lowest, rel=1e-9)
    estimate = onestep.fit(
        model(bias=bias), (x, target), LOSSES[name], weight_decay=0.01, method="closed_form", progress=False
    )
    assert lowest <= estimate.loss < 1.05 * lowest


def test_the_body_is_run_once_and_any_source_gives_the_same() -> None:
    x, y = table(2000, torch.float32)
    y[::7] = -100
    losses = []
    for data in (
        (x, y),
        DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True),
        [(x[:90], y[:90]), (x[90:], y[90:])],
    ):
        fitted = model(dtype=torch.float32)
        result = onestep.fit(fitted, data, "cross_entropy", weight_decay=1e-3, method="quasi_newton", progress=False)
        assert result.converged
        # Besides all rows once, a few of the first ones are looked at.
        assert fitted.rows < 1.5 * len(x)
        losses.append(result.loss)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_auto_takes_it_for_wide_heads_and_says_why_not_for_others() -> None:
    x, y = table()
    assert onestep.fit(model(), (x, y), "cross_entropy", progress=False).method == "quasi_newton"
    damped = onestep.fit(model(), (x, y), "cross_entropy", damping=1.0, max_steps=2, progress=False)
    assert damped.method != "quasi_newton"
    assert any("damping is given" in reason for reason in damped.reasons)
    with pytest.raises(ValueError, match="newton_cg"):
        onestep.fit(nn.Linear(10, 1).double(), (x, x[:, :1]), method="quasi_newton", progress=False)


def test_features_beyond_the_limit_are_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = table(dtype=torch.float32)
    in_memory = onestep.fit(model(dtype=torch.float32), (x, y), "cross_entropy", method="quasi_newton", progress=False)
    monkeypatch.setattr(softmax_rows, "most_kept_bytes", lambda: 4096)
    on_disk = onestep.fit(
        model(dtype=torch.float32), (x, y), "cross_entropy", method="quasi_newton", chunk_size=50, progress=False
    )
    assert on_disk.loss == pytest.approx(in_memory.loss, rel=1e-6)


def test_kept_rows_join_views_and_spill_parts() -> None:
    whole = torch.arange(60.0).view(20, 3)
    views = KeptRows(0)
    for part in whole.split(7):
        views.add(part)
    assert views.tensor().data_ptr() == whole.data_ptr()
    assert torch.equal(views.tensor(), whole)
    parts = KeptRows(100)
    for part in whole.split(7):
        parts.add(part.clone())
    assert parts.on_disk
    assert torch.equal(parts.tensor(), whole)


def test_classes_that_planes_separate_have_no_minimum() -> None:
    x = torch.cat((torch.randn(40, 10) - 4, torch.randn(40, 10) + 4)).double()
    y = torch.arange(2).repeat_interleave(40)
    result = onestep.fit(nn.Linear(10, 2).double(), (x, y), "cross_entropy", method="quasi_newton", progress=False)
    assert not result.converged
    assert "planes separate" in result.reason


def test_an_interrupted_fit_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    x, y = table()
    options: dict[str, Any] = {"weight_decay": 1e-4, "method": "quasi_newton", "progress": False}
    whole, stopped = model(), model()
    onestep.fit(whole, (x, y), "cross_entropy", **options)
    checkpoint = tmp_path / "fit.pt"
    first = onestep.fit(stopped, (x, y), "cross_entropy", max_steps=1, checkpoint=checkpoint, **options)
    assert not first.converged
    second = onestep.fit(stopped, (x, y), "cross_entropy", checkpoint=checkpoint, **options)
    assert second.converged
    assert torch.equal(whole.head.weight, stopped.head.weight)


def test_nan_is_named_and_changes_nothing() -> None:
    x, y = table()
    x[300, 3] = float("nan")
    broken = model()
    before = broken.head.weight.detach().clone()
    with pytest.raises(onestep.optim.NonFiniteError, match="step 1"):
        onestep.fit(broken, (x, y), "cross_entropy", method="quasi_newton", progress=False)
    assert torch.equal(broken.head.weight, before)


def test_rows_that_bend_lie_apart_from_the_others() -> None:
    # Nine rows of ten are told for sure, and lie elsewhere than those that bend: weights by curvature move the columns'
    # centres, which coupled the intercept to them, so that steps did not descend and the fit ended as if converged.
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(1000, 6, generator=generator, dtype=torch.float64)
    y = torch.full((1000,), 3)
    x[:100] = 5.0 + torch.randn(100, 6, generator=generator, dtype=torch.float64)
    y[:100] = (x[:100, :3] + torch.randn(100, 3, generator=generator, dtype=torch.float64)).argmax(1)
    decay = 1e-4
    torch.manual_seed(0)
    head = nn.Linear(6, 4, dtype=torch.float64)
    result = onestep.fit(
        head, (x, y), "cross_entropy", method="quasi_newton", weight_decay=decay, tol=1e-7, progress=False
    )
    loss = F.cross_entropy(head(x), y) + 0.5 * decay * sum(p.square().sum() for p in head.parameters())
    slopes = torch.autograd.grad(loss, list(head.parameters()))
    assert result.converged
    # The penalty alone bends by 1e-4: so far is the loss from its minimum at most, ‖slope‖² / 2e-4.
    assert sum(slope.square().sum() for slope in slopes).item() / (2 * decay) < 1e-6 * result.loss
