"""onestep.fit against tuned Adam on a small network, and the memory of its matrix-free steps against a gradient's."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import make_friedman1
from torch import Tensor, nn

import onestep

ROWS, EPOCHS = 20_000, 2_000
RATES = (1e-2, 3e-2, 1e-1, 2e-1)


def problem() -> tuple[Tensor, Tensor]:
    """Friedman's first function of ten inputs, of which five matter, with its usual noise; both sides standardised."""
    X, y = (torch.from_numpy(a).float() for a in make_friedman1(ROWS, 10, noise=1.0, random_state=0))
    return (X - X.mean(0)) / X.std(0), ((y - y.mean()) / y.std())[:, None]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))


def adam(X: Tensor, y: Tensor, rate: float, epochs: int) -> list[float]:
    """The loss before each full-batch epoch."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.benchmark(group="fit")
def test_levenberg_marquardt(compare: Callable[..., float]) -> None:
    """Seconds to the lowest loss that Adam, at the best of its learning rates, has in all its epochs."""
    X, y = problem()
    losses, rate = min(((adam(X, y, rate, EPOCHS), rate) for rate in RATES), key=lambda run: min(run[0]))
    target, epochs = min(losses), losses.index(min(losses)) + 1

    def levenberg_marquardt(steps: int) -> onestep.FitResult:
        return onestep.fit(network(), (X, y), method="levenberg_marquardt", max_steps=steps, progress=False)

    trial = [record.loss for record in levenberg_marquardt(200).history]
    steps = next((record + 1 for record, loss in enumerate(trial) if loss <= target), len(trial))

    def reaches(result: onestep.FitResult, losses: list[float]) -> None:
        assert result.loss <= 1.001 * min(losses)

    compare(
        lambda: levenberg_marquardt(steps),
        lambda: adam(X, y, rate, epochs),
        check=reaches,
        case=f"10-64-1 network, 20,000 rows: {steps} steps to {target:.5f} (reached {min(trial[:steps]):.5f}), "
        f"Adam {epochs:,} epochs at {rate:g}",
        goal=20.0,
    )


@pytest.mark.benchmark(group="fit")
def test_gauss_newton_on_text(benchmark: Any, tmp_path: Path) -> None:
    """Steps and seconds to the held-out loss that Adam, at the best of its rates, has after 200 steps."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    import text_generation as example

    text = example.read_text(None, held_out=512)
    torch.manual_seed(0)
    pretrained = example.GPT(len(text.alphabet), width=144, layers=4)
    # Past the plateau at 3.2, where the network knows no more than how often each character is.
    example.adam(pretrained, text, 3e-3, 300, "", 300)
    rates = (2e-3, 4e-3, 6e-3, 8e-3)
    runs = [example.adam(copy.deepcopy(pretrained), text, rate, 200, f"{rate:g}", 200) for rate in rates]
    best = min(runs, key=lambda run: run.losses[-1])
    ours = example.gauss_newton(
        copy.deepcopy(pretrained),
        text,
        tmp_path / "fit.pt",
        best.losses[-1],
        steps=40,
        batch=192,
        curvature=64,
        cg=8,
    )
    assert ours.losses[-1] <= 1.01 * best.losses[-1], "not a like loss"
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        case=f"1 M GPT: {ours.steps} Gauss-Newton steps from {best.losses[0]:.3f} to {ours.losses[-1]:.3f}, "
        f"Adam 200 steps at {best.name} to {best.losses[-1]:.3f}",
        peer_seconds=best.seconds[-1],
        own_seconds=ours.seconds[-1],
        ratio=best.seconds[-1] / ours.seconds[-1],
    )


@pytest.mark.benchmark(group="fit memory")
@pytest.mark.parametrize("method", ["gauss_newton", "newton_cg"])
def test_matrix_free_memory(benchmark: Any, method: str) -> None:
    """Peak RSS added by a step, and by a gradient, each in a fresh process; the goal is three gradients."""
    script = Path(__file__).parent / "fit_memory.py"
    added = {
        name: int(subprocess.check_output([sys.executable, script, name], text=True)) for name in ("gradient", method)
    }
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(
        case=f"{method} step of a 1.1 M Transformer, 64 × 64 tokens; peer: a gradient",
        added_mib=added[method] / 2**20,
        peer_added_mib=added["gradient"] / 2**20,
        goal_mib=3 * added["gradient"] / 2**20,
    )
