"""onestep.fit(method="polar"): what it reaches, schedules, checkpoints, modes; validation data with every method."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import onestep


def rows(n: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    X = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return X, (X[:, 0] * X[:, 1]).sin() + X[:, 2].abs()


def network(*extra: nn.Module, width: int = 48) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.Tanh(), *extra, nn.Linear(width, width), nn.Tanh(), nn.Flatten(1), nn.Linear(width, 1)
    )


@pytest.mark.parametrize(("epochs", "steps"), [(2, 64), (6, 192), (20, 300), (60, 480)])
def test_few_passes_have_smaller_batches(epochs: int, steps: int) -> None:
    """As many rows as come to 300 steps, from 128 on; a pass has eight steps at least."""
    assert onestep.fit(network(), rows(4200), method="polar", epochs=epochs, progress=False).steps == steps


def test_auto_takes_it_for_networks_that_are_not_small() -> None:
    model = network()
    result = onestep.fit(model, rows(), validation=rows(seed=1), progress=False)
    assert (result.method, result.converged, result.reason) == ("polar", False, "max_steps=320 reached")
    assert "a step that solves for each layer" in result.choice
    # 300 steps of Adam on 64 rows each end at 0.48 and 0.15 with a rate of 0.003 and 0.01.
    assert result.validation_loss is not None and result.validation_loss < 0.14
    assert result.loss < 0.06
    assert result.loss == pytest.approx(sum(record.loss for record in result.history[-8:]) / 8)
    for options, method in (({"damping": 1.0}, "gauss_newton"), ({"cg_iterations": 3}, "gauss_newton")):
        assert onestep.fit(network(), rows(), max_steps=1, progress=False, **options).method == method
    assert onestep.fit(network(width=8), rows(), max_steps=1, progress=False).method == "levenberg_marquardt"
    with pytest.raises(ValueError, match=r"damping=1\.0 is not for method='polar'"):
        onestep.fit(network(), rows(), method="polar", damping=1.0, progress=False)


def test_the_gradients_that_the_user_has_stay() -> None:
    model = network()
    kept = torch.ones_like(model[0].weight)
    model[0].weight.grad = kept
    onestep.fit(model, rows(), method="polar", max_steps=2, progress=False)
    assert model[0].weight.grad is kept
    assert model[2].weight.grad is None


def test_weight_decay_is_part_of_the_loss() -> None:
    """A penalty that outweighs all else takes the parameters to zero, as with every method."""
    model = network()
    result = onestep.fit(model, rows(), method="polar", max_steps=400, weight_decay=100.0, progress=False)
    assert torch.cat([p.flatten() for p in model.parameters()]).abs().max() < 0.02
    assert result.history[0].loss > 50 * result.loss


@pytest.mark.parametrize("loader", [False, True], ids=["tensors", "loader"])
def test_resumes_with_the_same_bits(tmp_path: Path, loader: bool) -> None:
    """With dropout and batch norm, of a shuffled DataLoader too."""

    def run(checkpoint: Path | None, stop_after: int | None) -> tuple[nn.Module, onestep.FitResult]:
        model = network(nn.Dropout(0.3), nn.BatchNorm1d(48))
        data = DataLoader(TensorDataset(*rows(100)), batch_size=20, shuffle=True) if loader else rows(100)
        result = onestep.fit(
            model,
            data,
            method="polar",
            max_steps=40,
            validation=rows(40, seed=1),
            validation_every=7,
            patience=50,
            checkpoint=checkpoint,
            callback=lambda record: record.step == stop_after,
            progress=False,
        )
        return model, result

    before = torch.get_rng_state()
    whole, expected = run(None, None)
    assert torch.equal(torch.get_rng_state(), before) or loader
    run(tmp_path / "fit.pt", 33)
    resumed, result = run(tmp_path / "fit.pt", None)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [r.validation_loss for r in result.history] == [r.validation_loss for r in expected.history]
    assert [r.loss for r in result.history] == [r.loss for r in expected.history]
    assert resumed[3].num_batches_tracked == 40 and resumed.training


def test_schedules_by_steps_passes_and_seconds() -> None:
    result = onestep.fit(network(), rows(640), method="polar", epochs=2.5, batch_size=64, progress=False)
    assert (len(result.history), result.reason) == (25, "epochs=2.5 reached")
    loader = DataLoader(TensorDataset(*rows(100)), batch_size=20)
    assert len(onestep.fit(network(), loader, method="polar", epochs=2, progress=False).history) == 10
    result = onestep.fit(network(), rows(), method="polar", max_seconds=0.5, progress=False)
    assert result.reason == "max_seconds=0.5 reached"
    assert len(result.history) > 3
    with pytest.raises(ValueError, match="epochs is given for data of unknown length"):
        onestep.fit(network(), iter_again(loader), method="polar", epochs=2, progress=False)


class iter_again:
    """Can be read again, but has no length."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def test_validation_and_patience_of_a_damped_method() -> None:
    X, y = rows(24)
    noisy = y + torch.randn(24, generator=torch.Generator().manual_seed(2))
    model = network(width=20)
    result = onestep.fit(
        model, (X, noisy), method="levenberg_marquardt", validation=rows(seed=1), patience=3, tol=0.0, progress=False
    )
    held_out = [record.validation_loss for record in result.history]
    assert result.reason == "the validation loss has not fallen for 3 looks"
    assert held_out.index(min(held_out)) == len(held_out) - 4
    # The model has the parameters of the lowest one.
    X, y = rows(seed=1)
    assert (model(X)[:, 0] - y).square().mean().item() == pytest.approx(min(held_out), rel=1e-5)
    assert result.validation_loss == min(held_out)


def test_nan_is_named_and_leaves_the_last_parameters() -> None:
    X, y = rows(100)
    X[17, 3] = math.nan
    model = network()
    with pytest.raises(onestep.optim.NonFiniteError, match=r"step \d+, .*inputs hold NaN"):
        onestep.fit(model, (X, y), method="polar", max_steps=20, progress=False)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0; expected"),
        ({"epochs": 1, "max_steps": 1}, "both max_steps and epochs"),
        ({"patience": 3}, "patience is given without validation"),
        ({"validation": rows(8), "validation_every": 0}, "validation_every=0; expected at least 1"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onestep.fit(network(), rows(), progress=False, **options)


class Answer(dict):
    """As a model of transformers answers: by name, and without what is None."""

    __getattr__ = dict.get


class Classifier(nn.Module):
    """Takes a batch by name, and computes its own loss of labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Answer:
        logits = self.layers(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Answer(loss=loss, logits=logits)


def test_dicts_with_labels_and_outputs_with_logits_or_loss() -> None:
    X, y = rows(600)
    labels = (y > 0.5).long() + (y > 1.0).long()
    labels[::7] = -100
    items = [{"features": x, "labels": label} for x, label in zip(X, labels, strict=True)]
    ends = []
    for data in ({"features": X, "labels": labels}, items):
        kind = DataLoader(data, batch_size=75) if isinstance(data, list) else data
        for loss in ("cross_entropy", "model"):
            result = onestep.fit(
                Classifier(), kind, loss, max_steps=30, batch_size=75, validation=kind, chunk_size=50, progress=False
            )
            assert result.method == "polar"
            ends.append(result.validation_loss)
    # The model's own loss, in chunks, is the same one.
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    assert ends[2] == pytest.approx(ends[3], rel=1e-4)
    assert max(ends) < result.initial_loss - 0.03
    with pytest.raises(ValueError, match="method='gauss_newton' needs the model's outputs"):
        onestep.fit(Classifier(), items_loader(items), "model", method="gauss_newton", progress=False)
    with pytest.raises(TypeError, match="a dict of 'features'; expected one of them to be 'labels'"):
        onestep.fit(Classifier(), [{"features": X}], "model", progress=False)


def items_loader(items: list) -> DataLoader:
    return DataLoader(items, batch_size=50)


def test_a_language_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.arange(200).remainder(7).view(20, 10)
    data = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=5)
    result = onestep.fit(model, data, "model", max_steps=200, validation=data, progress=False)
    assert (result.method, result.initial_loss > 2.5) == ("polar", True)
    assert result.validation_loss is not None and result.validation_loss < 0.5
    with pytest.raises(ValueError, match="pass loss='model'"):
        onestep.fit(model, data, "cross_entropy", max_steps=1, progress=False)
