"""The mathematics of examples/influence.py: what is foretold happens, and the gradients are torch's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

for package in ("matplotlib", "sklearn"):
    pytest.importorskip(package)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import influence  # noqa: E402


def test_what_is_foretold_happens() -> None:
    X, y, wrong, X_held, y_held = influence.load()
    model = influence.fit(X, y)
    # At the minimum, λ included.
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    slopes = influence.gradients(model, X, y)
    assert (slopes.sum(0) + influence.WEIGHT_DECAY * influence.ROWS * theta).abs().max() < 1e-3
    row = nn.functional.cross_entropy(model(X[:1]), y[:1])
    torch.testing.assert_close(
        slopes[0], torch.cat([g.flatten() for g in torch.autograd.grad(row, list(model.parameters()))])
    )
    found, _ = influence.influences(model, X, y, X_held, y_held)
    total = found.sum(1)
    rows = total.argmin()[None]
    true = influence.left_out(model, X, y, X_held, y_held, rows)
    # To first order in a row; the one that matters most is the hardest.
    torch.testing.assert_close(total[rows], true, rtol=0.05, atol=0)
    assert wrong[total.argsort()[:75]].float().mean() > 0.7
