"""Operators in use: modes of the model, progress, what they refuse, processes and threads."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from operator_cases import CLASSES, OPERATORS, ROWS, Setting, functional_mse
from processes import Child, finish_all
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from onestep.curvature import FisherOperator, GaussNewtonOperator, HessianOperator
from onestep.optim import NonFiniteError

# --------------------------------------------------------------------------------------------------- modes and progress


def test_the_model_is_in_eval_mode_and_put_back() -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop, self.modes = nn.Linear(4, CLASSES), nn.Dropout(0.5), set()

        def forward(self, x: Tensor) -> Tensor:
            self.modes.add((self.training, self.drop.training))
            return self.drop(self.layer(x))

    model = Watching().double()
    model.layer.eval()
    setting = Setting()
    with pytest.warns(UserWarning, match="HessianOperator evaluates the model in eval mode: Dropout") as caught:
        op = HessianOperator(model, setting.batches(5, 6), "cross_entropy")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="FisherOperator evaluates") as caught:
        FisherOperator(model, setting.batches(5, 6), "cross_entropy")
    assert caught[0].filename == __file__
    op @ torch.ones(op.shape[0]).double()
    op.loss_and_gradient()
    assert model.modes == {(False, False)}
    assert (model.training, model.drop.training, model.layer.training) == (True, True, False)
    model.forward = lambda x: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        op @ torch.ones(op.shape[0]).double()
    assert (model.training, model.drop.training, model.layer.training) == (True, True, False)


def test_no_gradients_and_no_settings_are_left_behind() -> None:
    setting = Setting("attention")
    op = setting.operator(HessianOperator)
    op @ setting.V
    op.loss_and_gradient()
    assert all(p.grad is None and p.requires_grad for p in setting.model.parameters())
    assert torch.is_grad_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_a_long_pass_shows_a_bar_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm.auto")
    bars = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.options, self.count, self.closed = options, 0, False
            bars.append(self)

        def set_postfix(self, *args: Any, **kwargs: Any) -> None:
            pass

        def update(self, steps: int) -> None:
            self.count += steps

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    setting = Setting()
    loader = DataLoader(TensorDataset(setting.inputs, setting.target), batch_size=4)
    op = GaussNewtonOperator(setting.model, loader, "cross_entropy")
    op @ setting.V
    (bar,) = bars
    assert bar.options["total"] == bar.count == ROWS and bar.closed
    assert bar.options["delay"] > 0 and not bar.options["leave"] and bar.options["desc"] == "GaussNewtonOperator @ 3"
    setting.operator(HessianOperator) @ setting.V
    assert len(bars) == 1


def test_without_tqdm_a_warning_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    setting = Setting()
    with pytest.warns(UserWarning, match=r"needs tqdm.*pip install tqdm"):
        op = HessianOperator(setting.model, (setting.inputs, setting.target), "cross_entropy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op @ setting.V


# --------------------------------------------------------------------------------------------------------------- errors


class Shuffling:
    """The rows in another order each time."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.random = setting, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(ROWS, generator=self.random)
        return iter([(self.setting.inputs[rows], self.setting.target[rows]) for rows in order.split(4)])


class Shrinking(Shuffling):
    """Fewer batches each time."""

    def __iter__(self) -> Iterator[Any]:
        self.batches = getattr(self, "batches", self.setting.batches(2, 2, 2, 2, 2, 1))[:-1]
        return iter(self.batches)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))


@pytest.mark.parametrize("case", [Shuffling, Shrinking, Noisy])
def test_data_or_a_model_that_changes_is_refused(case: Any) -> None:
    setting = Setting()
    data: Any = setting.batches(4, 7) if case is Noisy else case(setting)
    model = Noisy().double() if case is Noisy else setting.model
    with pytest.raises(ValueError, match=r"data: .*shuffle=False"):
        HessianOperator(model, data, "cross_entropy")
    HessianOperator(model, data, "cross_entropy", check_deterministic=False)


def test_a_pass_that_drops_other_rows_each_time_is_refused() -> None:
    setting = Setting()
    loader = DataLoader(TensorDataset(setting.inputs, setting.target), batch_size=4, shuffle=True, drop_last=True)
    with pytest.raises(ValueError, match="drop_last=True and shuffle=True"):
        HessianOperator(setting.model, loader, "cross_entropy")


def test_data_that_is_not_finite_is_named() -> None:
    setting = Setting()
    setting.inputs[6, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="batch 1: its inputs hold NaN or infinity, first in row 2 of 4"):
        setting.operator(HessianOperator)
    for kind in OPERATORS:
        op = setting.operator(kind, check_deterministic=False)
        for V in (setting.V, setting.V[:, 0]):
            with pytest.raises(NonFiniteError, match="batch 1: its inputs hold NaN or infinity, first in row 2 of 4"):
                op @ V


def test_a_product_that_is_not_finite_is_named() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sqrt()

    x = torch.tensor([[1.0], [2.0], [0.0], [3.0]], dtype=torch.float64)
    op = HessianOperator(Root(), list(zip(x.split(1), x.split(1), strict=True)))
    with pytest.raises(NonFiniteError, match="batch 2: the product is NaN or infinite although its data is finite"):
        op @ torch.ones(1, dtype=torch.float64)


def test_targets_that_are_all_ignored_leave_nothing() -> None:
    setting = Setting()
    setting.target[:] = -100
    with pytest.raises(ValueError, match="every target of the data is ignored"):
        setting.operator(HessianOperator) @ setting.V


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": "mlp"}, TypeError, "model is str"),
        ({"loss": "hinge"}, ValueError, "loss='hinge'; expected one of .*'mse', 'cross_entropy', 'poisson', 'bce'"),
        ({"loss": "model"}, ValueError, "loss='model'; expected one of 'mse'"),
        ({"loss": 3}, TypeError, "loss is int"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, ValueError, "CrossEntropyLoss with reduction='sum'"),
        ({"data": 3}, TypeError, "data is int"),
        ({"data": []}, ValueError, "data holds no batches"),
        (
            {"data": (torch.zeros(0, 3), torch.tensor(1.0))},
            ValueError,
            r"data holds a tensor of shape \(\), which has no",
        ),
        ({"data": (torch.zeros(4, 3), torch.zeros(5, 1))}, ValueError, r"data holds tensors of \[4, 5\] rows"),
        ({"reduction": "none"}, ValueError, "reduction='none'; expected 'mean' or 'sum'"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0; expected at least 1"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size is float; expected an integer"),
        ({"kind": "exact"}, ValueError, "kind='exact'; expected 'true' or 'empirical'"),
        ({"mc_samples": 0}, ValueError, "mc_samples=0; expected at least 1"),
        ({"mc_samples": 2, "kind": "empirical"}, ValueError, "mc_samples=2 with kind='empirical'"),
        ({"loss": functional_mse}, ValueError, "kind='true' needs the distribution behind the loss"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    setting = Setting()
    arguments = {"model": setting.model, "loss": "cross_entropy", "data": setting.batches(4, 7)} | changed
    with pytest.raises(error, match=message):
        FisherOperator(**arguments)


def test_parameters_must_be_trainable() -> None:
    setting = Setting()
    setting.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter has requires_grad=True"):
        setting.operator(HessianOperator)


def test_vectors_that_do_not_fit_are_named() -> None:
    setting = Setting()
    op, p = setting.operator(HessianOperator), setting.p
    for v, error, message in [
        (torch.zeros(p + 1).double(), ValueError, rf"v has shape \({p + 1},\); expected \({p},\) or \({p}, k\)"),
        (torch.zeros(1, 1, p).double(), ValueError, r"v has shape \(1, 1, "),
        (torch.zeros(p), ValueError, "v is torch.float32 on cpu; expected torch.float64 on cpu"),
        (torch.full((p,), torch.nan).double(), ValueError, "v holds NaN or infinity"),
        ([1.0] * p, TypeError, "v is list; expected a tensor or a dict of tensors"),
        ({"a": torch.zeros(1)}, ValueError, "different names: 0.bias, 0.weight, 2.bias, 2.weight, a"),
    ]:
        with pytest.raises(error, match=message):
            op @ v
    named = {name: torch.zeros_like(value) for name, value in setting.point.items()}
    for changed, error, message in [
        ({"0.bias": torch.zeros(6).double()}, ValueError, r"v\['0.bias'\] has shape \(6,\); expected \(5,\) or"),
        ({"0.bias": torch.zeros(5)}, ValueError, r"v\['0.bias'\] is torch.float32"),
        ({"0.bias": 1.0}, TypeError, r"v\['0.bias'\] is float"),
        ({"0.weight": torch.zeros(5, 4, 2).double()}, ValueError, r"'0.bias'\] has shape \(5,\); expected \(5, 2\)"),
    ]:
        with pytest.raises(error, match=message):
            op @ (named | changed)


def test_bad_arguments_of_methods_are_named() -> None:
    setting = Setting()
    op, b = setting.operator(GaussNewtonOperator), setting.V[:, 0]
    for options, error, message in [
        ({"damping": -1.0}, ValueError, "damping=-1.0; expected a finite number >= 0"),
        ({"damping": float("nan")}, ValueError, "damping=nan"),
        ({"damping": None}, TypeError, "damping is NoneType; expected a finite number >= 0"),
        ({"damping": "a"}, TypeError, "damping is str"),
        ({"damping": True}, TypeError, "damping is bool"),
        ({"damping": torch.ones(2)}, TypeError, "damping is Tensor"),
        ({"tolerance": None}, TypeError, "tolerance is NoneType; expected a number between 0 and 1"),
        ({"indefinite": torch.ones(2)}, ValueError, "indefinite=tensor.*; expected 'raise' or 'minres'"),
        ({"preconditioner": np.ones(3)}, TypeError, "preconditioner is array"),
        ({"tolerance": 0.0}, ValueError, "tolerance=0.0; expected a number between 0 and 1"),
        ({"max_iterations": 0}, ValueError, "max_iterations=0; expected at least 1"),
        ({"max_iterations": 1.5}, TypeError, "max_iterations is float"),
        (
            {"preconditioner": "jacobi"},
            TypeError,
            "preconditioner is 'jacobi'; expected None, 'diagonal'",
        ),
        ({"preconditioner": lambda r: r[:2]}, ValueError, r"preconditioner returned shape \(2,\)"),
        ({"preconditioner": lambda r: -r}, ValueError, "preconditioner .* expected positive definite"),
    ]:
        with pytest.raises(error, match=message):
            op.solve(b, **({"damping": 0.1} | options))
    assert torch.equal(op.solve(b, torch.tensor(0.5))[0], op.solve(b, np.float64(0.5))[0])
    with pytest.raises(ValueError, match=r"b has shape \(2,\)"):
        op.solve(torch.zeros(2).double(), 0.1)
    for options, error, message in [
        ({"progress": None}, TypeError, "progress is NoneType; expected True or False"),
        ({"check_deterministic": torch.ones(2)}, TypeError, "check_deterministic is Tensor"),
        ({"reduction": np.ones(3)}, ValueError, "reduction=array.*; expected 'mean' or 'sum'"),
        ({"data": "a"}, TypeError, "data is 'a'; expected a pair of tensors"),
    ]:
        given = {"model": setting.model, "data": (setting.inputs, setting.target), "loss": "cross_entropy"}
        with pytest.raises(error, match=message):
            HessianOperator(**(given | options))
    for method in (op.trace, op.diagonal):
        with pytest.raises(ValueError, match="samples=1; expected at least 2"):
            method(1)
        with pytest.raises(TypeError, match="samples is float"):
            method(2.0)
        with pytest.raises(TypeError, match=r"generator is int; expected a torch\.Generator"):
            method(2, generator=3)


# ------------------------------------------------------------------------------------------------------------ processes


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
sys.path.insert(0, {tests!r})
from operator_cases import OPERATORS, Setting
from onestep.optim import NonFiniteError

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=2)
setting, results = Setting(), []
# One row more than two processes share evenly would be repeated by the sampler.
setting.inputs, setting.target = setting.inputs[:10], setting.target[:10]
rows = TensorDataset(setting.inputs, setting.target)
sharded = DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows, shuffle=False))
for kind in OPERATORS:
    for data in ((setting.inputs, setting.target), [part for part in DataLoader(rows, batch_size=3)], sharded):
        op = setting.operator(kind, data)
        results.append(op @ setting.V)
    results.append(op.solve(setting.V, 1.0, tolerance=1e-12)[0])
    results += [op.trace(8).value, op.loss_and_gradient()[1]]
try:
    op @ (setting.V + rank)
except ValueError as error:
    results.append(str(error))
setting.inputs[9, 0] = torch.nan
try:
    setting.operator(kind, (setting.inputs, setting.target))
except NonFiniteError as error:
    results.append(str(error))
torch.save(results, {out!r} + str(rank))
"""


def test_two_processes_multiply_as_one_does(tmp_path: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), store=str(tmp_path / "store"), out=str(tmp_path / "out"))
    for process in finish_all([Child(script, rank) for rank in range(2)]):
        assert process.returncode == 0, process.errors
    first, second = (torch.load(tmp_path / f"out{rank}") for rank in range(2))
    *first, unequal, nan_seen = first
    *second, unequal_there, nan_there = second
    assert unequal == unequal_there == "v differs between processes; expected the same vectors in all"
    assert "process 1 of 2 failed" in nan_seen and "its inputs hold NaN" in nan_there
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    setting = Setting()
    setting.inputs, setting.target = setting.inputs[:10], setting.target[:10]
    expected = []
    for kind in OPERATORS:
        op = setting.operator(kind, (setting.inputs, setting.target))
        expected += [op @ setting.V] * 3
        expected.append(op.solve(setting.V, 1.0, tolerance=1e-12)[0])
        expected += [op.trace(8).value, op.loss_and_gradient()[1]]
    for ours, alone in zip(first, expected, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-11)


def test_thread_counts_agree(restore_threads: None) -> None:
    setting = Setting()
    op = setting.operator(HessianOperator)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(op @ setting.V)
    assert torch.equal(*results)
