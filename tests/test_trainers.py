"""Hugging Face's Trainer and Lightning: PolarGrad as their optimiser, heads solved for by callbacks."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from docstrings import gaps_of_integration
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from onestep.optim import LevenbergMarquardt, PolarGrad

CLASSES = 3


class Texts(Dataset[Any]):
    """Rows of tokens whose class is that of the most frequent of three words."""

    def __init__(self, rows: int = 96) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(CLASSES, (rows,), generator=generator)
        noise = torch.randint(3, 20, (rows, 12), generator=generator)
        chosen = torch.rand(rows, 12, generator=generator) < 0.4
        self.tokens = torch.where(chosen, self.labels[:, None], noise)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def classifier(**config: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    options = {"vocab_size": 20, "max_position_embeddings": 16, "num_labels": CLASSES, **sizes, **config}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**options))


def train(model: Any, folder: Path, optimizer: Any = None, callback: Any = None, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", **options
    )
    schedule = None
    if optimizer is not None:
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 36)
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Texts(),
        optimizers=(optimizer, schedule),
        callbacks=[] if callback is None else [callback],
    )
    trainer.train()
    return trainer


def loss_and_gradient(model: Any, decay: float) -> tuple[float, Tensor]:
    """The mean loss over all texts in eval mode, and its gradient in the head, weight decay included."""
    texts, head = Texts(), model.classifier
    model.eval()
    loss = nn.functional.cross_entropy(model(input_ids=texts.tokens).logits, texts.labels)
    gradients = torch.autograd.grad(loss, list(head.parameters()))
    parts = [g + decay * p.detach() for g, p in zip(gradients, head.parameters(), strict=True)]
    return loss.item(), torch.cat([part.flatten() for part in parts])


def test_trainer_with_polar_grad_and_a_scheduler(tmp_path: Path) -> None:
    model = classifier()
    before, _ = loss_and_gradient(model, 0.0)
    optimizer = PolarGrad(model, lr=0.1, adam_lr=2e-2)
    train(model, tmp_path, optimizer, max_steps=36, save_strategy="no", per_device_train_batch_size=16)
    assert loss_and_gradient(model, 0.0)[0] < 0.5 * before
    # The scheduler has brought the rate of every group down.
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.1 * group["initial_lr"] for group in optimizer.param_groups]
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_trainer_solves_the_head(when: Any, tmp_path: Path) -> None:
    """Before: one step at a rate of 0 leaves the head at its minimum. After: the last step does not matter."""
    model = classifier()
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    from onestep.integrations.trainer import SolveHead

    body = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0 if when == "before" else 1e-2)
    first, _ = loss_and_gradient(model, 0.0)
    callback = SolveHead(when, weight_decay=1e-2, max_steps=30)
    train(model, tmp_path, optimizer, callback, max_steps=1, save_strategy="no")
    (result,) = callback.results
    loss, gradient = loss_and_gradient(model, 1e-2)
    assert result.converged and loss < 0.95 * first
    assert gradient.norm() < 1e-4
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, body) == (when == "before")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_trainer_refusals(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from onestep.integrations.trainer import SolveHead

    with pytest.raises(ValueError, match="when='sometimes'; expected one of 'before', 'after', 'both'"):
        SolveHead("sometimes")  # type: ignore[arg-type]
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8))
    with pytest.raises(NotImplementedError, match="does not take GPT2LMHeadModel"):
        SolveHead().on_train_begin(None, None, None, model=gpt, train_dataloader=DataLoader(Texts()))
    pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
    model = classifier()
    with pytest.raises(TypeError, match=r"LevenbergMarquardt.step\(\) needs a closure"):
        train(model, tmp_path, LevenbergMarquardt(model.parameters()), max_steps=1, save_strategy="no")


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(64, 4, generator=generator)
    return X, torch.sin(2 * X[:, :1]) + X[:, 1:2] * X[:, 2:3]


def lightning_fit(configure: Any, callback: Any = None, *, manual: bool = False, epochs: int = 20) -> Any:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
            self.automatic_optimization = not manual

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

        def training_step(self, batch: Any, number: int) -> Any:
            x, y = batch
            if not manual:
                return nn.functional.mse_loss(self(x), y)
            optimizer = self.optimizers().optimizer
            optimizer.step(lambda: self(x) - y)
            return None

        def configure_optimizers(self) -> Any:
            return configure(self)

    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[] if callback is None else [callback],
        )
        trainer.fit(module, DataLoader(TensorDataset(*rows()), batch_size=64))
    X, y = rows()
    with torch.no_grad():
        return module, nn.functional.mse_loss(module(X), y).item()


def test_lightning_with_polar_grad_and_a_closure() -> None:
    """Automatic optimisation drives PolarGrad; a closure in training_step drives Levenberg-Marquardt, much further."""
    _, untrained = lightning_fit(lambda module: torch.optim.SGD(module.parameters(), lr=0.0), epochs=1)
    _, polar = lightning_fit(lambda module: PolarGrad(module.network, lr=0.1, adam_lr=5e-2), epochs=40)
    _, damped = lightning_fit(lambda module: LevenbergMarquardt(module.parameters()), manual=True, epochs=30)
    assert polar < 0.5 * untrained
    assert damped < 0.05 * untrained


def test_lightning_solves_the_head() -> None:
    pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from onestep.integrations.lightning import SolveHead

    callback = SolveHead("mse", "after")
    module, loss = lightning_fit(lambda module: torch.optim.SGD(module.parameters(), lr=1e-2), callback, epochs=2)
    X, y = rows()
    with torch.no_grad():
        features = module.network[:2](X)
        features = torch.cat([features, torch.ones(64, 1)], 1).double()
        best = (y - features @ torch.linalg.lstsq(features, y.double()).solution).square().mean().item()
    assert callback.results[0].method == "closed_form"
    assert loss == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", ["trainer", "lightning"])
def test_public_names_are_documented(name: str) -> None:
    pytest.importorskip("transformers" if name == "trainer" else name)
    assert gaps_of_integration(importlib.import_module(f"onestep.integrations.{name}")) == {}
