"""``onestep.layerwise`` on models that are not on the CPU: on a GPU, or on a device that is pretended (elsewhere.py).

The same weights and reports as on the CPU, where the same kernels compute; no tensor is made on another device.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import DEVICE, Elsewhere, elsewhere, moved
from layerwise_cases import Mixture, Model, correlated
from torch import Tensor, nn

from onestep.layerwise import (
    LayerStatistics,
    Report,
    edit,
    load,
    merge,
    prune,
    quantize,
    refit,
    replace_blocks,
    save,
)
from onestep.linalg import inverse_cholesky
from onestep.linalg.damping import unit_cholesky

ON_GPU = torch.cuda.is_available()


class Place:
    """What brings models and data there."""

    def model(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).cuda() if ON_GPU else moved(model)

    def data(self, tensor: Tensor) -> Tensor:
        return tensor.to(DEVICE)


@pytest.fixture
def there() -> Iterator[Place]:
    """A GPU, or the pretended device."""
    if ON_GPU:
        yield Place()
    else:
        with elsewhere():
            yield Place()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def a_model() -> nn.Module:
    model = Model(12, 2)
    model.blocks.append(Mixture(12))
    return model


def with_mask(x: Tensor) -> dict[str, Tensor]:
    mask = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
    mask[0, 5:] = 0
    return {"x": x, "attention_mask": mask}


def pruned_then_refit(model: nn.Module, data: Any, teacher: nn.Module, **options: Any) -> Report:
    prune(model, data, 0.5, progress=False)
    return refit(model, data, teacher, progress=False, **options)


QUIET = {"progress": False}
Call = Callable[[nn.Module, Any, nn.Module], Report]
CALLS: dict[str, Call] = {
    "quantize": lambda model, data, teacher: quantize(model, data, 4, 8, **QUIET),
    "in order": lambda model, data, teacher: quantize(model, data, 3, 4, act_order=False, symmetric=True, **QUIET),
    "a scale a row": lambda model, data, teacher: quantize(model, data, 4, None, act_order=False, **QUIET),
    "at once": lambda model, data, teacher: quantize(model, data, 4, 8, teacher=None, sequential=False, **QUIET),
    "towards a teacher": lambda model, data, teacher: quantize(model, data, 4, 8, teacher=teacher, **QUIET),
    "half": lambda model, data, teacher: prune(model, data, 0.5, **QUIET),
    "2 of 4": lambda model, data, teacher: prune(model, data, (2, 4), **QUIET),
    "undamped": lambda model, data, teacher: prune(model, data[:1], 0.5, damping=0.0, **QUIET),
    "refit": lambda model, data, teacher: pruned_then_refit(model, data, teacher, layers=["*", "!*experts*"]),
    "zeros kept": lambda model, data, teacher: pruned_then_refit(
        model, data, teacher, layers=["*", "!*experts*"], keep_zeros=True
    ),
    "replace_blocks": lambda model, data, teacher: replace_blocks(model, data, ["blocks.0", "blocks.1"], **QUIET),
}


def zeros_kept(model: nn.Module, data: Any, teacher: nn.Module) -> Report:
    prune(model, data, 0.5, progress=False)
    return quantize(model, data, 4, 8, keep_zeros=True, progress=False)


CALLS["zeros kept in codes"] = zeros_kept


def here_again(tensor: Tensor) -> Tensor:
    return tensor.detach().here if isinstance(tensor.detach(), Elsewhere) else tensor.detach().cpu()


def assert_same(
    model: nn.Module, on_cpu: nn.Module, report: Report, expected: Report, *, exact: bool = not ON_GPU
) -> None:
    """``exact``: to the last bit, as where the CPU computes."""
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())
    if exact:
        # Where eigenvalues are rounding, ranks are told another way on CUDA.
        assert [replace(layer, rank=0) for layer in report.layers] == [
            replace(layer, rank=0) for layer in expected.layers
        ]
        for layer, other in zip(report.layers, expected.layers, strict=True):
            assert abs(layer.rank - other.rank) <= 1 and layer.rank_deficient == other.rank_deficient
        found = {name: here_again(parameter) for name, parameter in model.named_parameters()}
        for name, parameter in on_cpu.named_parameters():
            assert torch.equal(found[name], parameter), name
    else:
        for layer, other in zip(report.layers, expected.layers, strict=True):
            assert (layer.name, layer.rows, layer.dead) == (other.name, other.rows, other.dead)
            assert layer.error == pytest.approx(other.error, rel=0.1, abs=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_each_function(name: str, there: Place) -> None:
    base, data = a_model(), [with_mask(correlated(3, 20, 12)) for _ in range(2)]
    on_cpu, teacher = copy.deepcopy(base), copy.deepcopy(base)
    expected = CALLS[name](on_cpu, data, teacher)
    model, teacher = there.model(base), there.model(base)
    batches = [{key: there.data(value) for key, value in batch.items()} for batch in data]
    report = CALLS[name](model, batches, teacher)
    assert_same(model, on_cpu, report, expected)
    for weight in report.quantized.values():
        assert {part.device.type for part in (weight.codes, weight.scale, weight.zero, weight.group)} == {"cuda"}


def test_a_language_model(there: Place) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    mask = torch.ones(6, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    data = [{"input_ids": torch.randint(50, (6, 12)), "attention_mask": mask}]
    on_cpu = copy.deepcopy(base)
    expected = quantize(on_cpu, data, 4, 8, progress=False)
    model = there.model(base)
    report = quantize(model, [{key: there.data(value) for key, value in data[0].items()}], 4, 8, progress=False)
    # torch's attention is another one there.
    assert_same(model, on_cpu, report, expected, exact=False)


def test_merge(there: Place) -> None:
    a, b = Model(12, 1), Model(12, 1)
    x, y = correlated(3, 30, 12), correlated(3, 30, 12)
    expected, report = Report(), Report()
    on_cpu = merge([a, b], [[x], [y]], progress=False, report=expected)
    merged = merge([there.model(a), there.model(b)], [[there.data(x)], [there.data(y)]], progress=False, report=report)
    assert_same(merged, on_cpu, report, expected)


def edited(model: nn.Module, statistics: LayerStatistics, subjects: Tensor, targets: Tensor) -> Report:
    return edit(model, subjects, targets, layer="head", statistics=statistics, strength=10.0)


@pytest.mark.parametrize("in_files", [False, True])
def test_statistics_in_files_and_from_another_device(there: Place, tmp_path: Path, in_files: bool) -> None:
    base, x, y = Model(12, 1), correlated(3, 30, 12), correlated(3, 30, 12)
    subjects, targets = correlated(3, 4, 12), torch.randn(3, 5)
    on_cpu = copy.deepcopy(base)
    own = LayerStatistics(on_cpu, "head").collect([x, y], progress=False)
    own.save(tmp_path / "of the CPU")
    model = there.model(base)
    folder = tmp_path / "sums" if in_files else None
    collected = LayerStatistics(model, "head", folder=folder).collect([there.data(x), there.data(y)], progress=False)
    collected.save(tmp_path / "of there")
    # Of the CPU: read there, and read here what was saved there.
    read = LayerStatistics(model, "head", folder=folder).load(tmp_path / "of the CPU")
    back = LayerStatistics(base, "head").load(tmp_path / "of there")
    assert back["head"].gram.device.type == back["head"].total.device.type == "cpu"
    assert read["head"].gram.device.type == ("cpu" if in_files else "cuda")
    for statistics in (collected, read, back):
        torch.testing.assert_close(here_again(statistics["head"].gram), own["head"].gram, rtol=1e-4, atol=1e-4)
    both = LayerStatistics(model, "head", folder=folder).merge(collected).merge(own)
    assert both["head"].count == 2 * own["head"].count
    expected = edited(on_cpu, own, subjects, targets)
    report = edited(model, read, there.data(subjects), targets if in_files else there.data(targets))
    assert_same(model, on_cpu, report, expected)


def test_what_was_quantised_there_is_saved(there: Place, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    if not ON_GPU:
        pytest.skip("the pretended device has no addresses")
    model = there.model(Model(12, 2))
    report = quantize(model, [there.data(correlated(3, 30, 12))], 4, 8, progress=False)
    save(model, tmp_path / "model.safetensors", report.quantized)
    fresh = load(Model(12, 2), tmp_path / "model.safetensors")
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, here_again(dict(model.named_parameters())[name]))


@pytest.mark.parametrize("factor", [inverse_cholesky, unit_cholesky])
def test_damping_goes_up_there_too(factor: Callable[..., Any], there: Place) -> None:
    """A matrix of rank 1, one that is indefinite by 0.9, one that is fine and one that is not finite."""
    A = torch.stack([torch.ones(4, 4), torch.full((4, 4), 1.9).fill_diagonal_(1.0), torch.eye(4), torch.eye(4)])
    A[3, 2, 1] = torch.nan
    expected = factor(A)
    found = factor(there.data(A))
    assert (here_again(found.info) > 0).tolist() == [True, True, False, False]
    for one, other in zip(found, expected, strict=True):
        assert one.device.type == "cuda"
        torch.testing.assert_close(here_again(one), other, equal_nan=True)


def test_a_device_without_kernels_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 2)).to("meta")
    with pytest.raises(NotImplementedError, match=r"layer '0' is on meta; layers are solved on the CPU or on a CUDA"):
        quantize(model, [torch.ones(2, 4)], progress=False)


def test_the_pretended_device_refuses_tensors_of_two() -> None:
    if ON_GPU:
        pytest.skip("a GPU does so by itself")
    with elsewhere() as device, warnings.catch_warnings():
        there = torch.ones(2, device=device)
        assert there.device == device and isinstance(there.sum(), Elsewhere)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + torch.ones(2)
        assert float((there + torch.tensor(1.0)).sum()) == 4.0
