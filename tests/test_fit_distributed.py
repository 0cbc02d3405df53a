"""onestep.fit on two processes of torch.distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_softmax_head
import torch
from processes import Child, Finished, finish_all
from test_fit import network, table
from torch import nn

import onestep

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
import onestep
from test_fit import network, table

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=2)
torch.manual_seed(rank)
X, y = table(301)
model = network() if {method!r} == "levenberg_marquardt" else torch.nn.Linear(5, 1).double()


class Failing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        if rank == 1 and self.calls == 12:
            if {failure!r} == "dies":
                os._exit(7)
            raise ValueError("rank 1 has had enough")
        return self.inner(x)


fitted = Failing() if {failure!r} else model
onestep.fit(fitted, (X, y), method={method!r}, max_steps=6, tol=0.0, chunk_size=64, progress=False)
torch.save(model.state_dict(), {out!r} + str(rank))
"""


def run(tmp_path: Path, method: str, failure: str = "") -> list[Finished]:
    """The script in two processes, and what became of them."""
    script = SCRIPT.format(
        tests=str(Path(__file__).parent),
        store=str(tmp_path / "store"),
        out=str(tmp_path / "out"),
        method=method,
        failure=failure,
    )
    return finish_all([Child(script, rank) for rank in range(2)])


@pytest.mark.parametrize("method", ["closed_form", "levenberg_marquardt", "gauss_newton"])
def test_two_processes_fit_what_one_does(tmp_path: Path, method: str) -> None:
    for process in run(tmp_path, method):
        assert process.returncode == 0, process.errors
    first, second = (torch.load(tmp_path / f"out{rank}") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    alone: nn.Module = network() if method == "levenberg_marquardt" else nn.Linear(5, 1).double()
    onestep.fit(alone, table(301), method=method, max_steps=6, tol=0.0, progress=False)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-7, atol=1e-9)


ALIKE = """
import sys
import torch
import torch.distributed as dist
from torch import nn
sys.path.insert(0, {tests!r})
import onestep
from test_fit import table

torch.set_num_threads(1)
rank, size = map(int, sys.argv[1:])
if size > 1:
    dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=size)
X, y = table(301)
classes = (X[:, 0] + 0.5 * y[:, 0] > 0).long() + (X[:, 1] > 0.5).long()
results = {{}}


def fit(name, data, loss, **options):
    torch.manual_seed(3)
    outputs = 3 if loss == "cross_entropy" else 1
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, outputs)).double()
    before = [p.detach().clone() for p in model.parameters()]
    result = onestep.fit(model, data, loss, tol=0.0, progress=False, **options)
    assert not torch.equal(before[0], model[0].weight)
    results[name] = [p.detach() for p in model.parameters()], [vars(r) | {{"seconds": 0}} for r in result.history]


# Chunks that are so small leave pieces of a few rows each.
few = dict(max_steps=2, cg_iterations=4, chunk_size=64)
fit("gauss_newton", (X, y), "mse", method="gauss_newton", **few)
fit("batches", (X, classes), "cross_entropy", method="gauss_newton", batch_size=50, curvature_batch_size=13, **few)
fit("sample", (X, y), "mse", method="gauss_newton", curvature_batch_size=30, **few | {{"chunk_size": 5}})
matrix = dict(method="levenberg_marquardt", curvature_batch_size=90, max_steps=2, chunk_size=64)
fit("matrix of a sample", (X, y), "mse", **matrix)
fit("newton_cg", (X, classes), "cross_entropy", method="newton_cg", batch_size=100, **few)
fit("three rows", (X[:3], y[:3]), "mse", method="gauss_newton", **few)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=17, shuffle=True)
fit("loader", loader, "mse", method="gauss_newton", batch_size=60, **few)
# Its batches are not cut but given out in turn.
fit("whole batches", loader, "mse", method="gauss_newton", **few | {{"chunk_size": 10_000}})
fit("gradient_descent", loader, "mse", method="gradient_descent", max_steps=3)
torch.save(results, {out!r} + f"{{rank}}of{{size}}")
"""


@pytest.mark.long
def test_processes_do_not_change_a_bit_of_matrix_free_fits(tmp_path: Path) -> None:
    """Conjugate gradients that end early would magnify the least difference."""
    script = ALIKE.format(tests=str(Path(__file__).parent), store=str(tmp_path / "store"), out=str(tmp_path / "out"))
    places = [(0, 1), (0, 2), (1, 2)]
    for process in finish_all([Child(script, rank, size) for rank, size in places]):
        assert process.returncode == 0, process.errors
    alone, *others = (torch.load(tmp_path / f"out{rank}of{size}") for rank, size in places)
    for other in others:
        for name, (values, history) in alone.items():
            assert all(map(torch.equal, other[name][0], values)), name
            assert str(other[name][1]) == str(history), name


HEAD = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
import onestep
from onestep.training.methods import softmax_estimate as softmax_head
from test_softmax_head import model, table

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=2)
softmax_head._KEPT, softmax_head._FIRST = {kept}, 4 * {kept}
head = model()
x, y = table(6000)
data = [(x[begin : begin + 500], y[begin : begin + 500]) for begin in range(0, 6000, 500)]
result = onestep.fit(head, data, "cross_entropy", method="closed_form", progress=False)
torch.save((head.state_dict(), result.loss, result.initial_loss), {out!r} + str(rank))
"""


@pytest.mark.parametrize("kept", [512, 8192], ids=["sampled", "all rows"])
def test_two_processes_estimate_the_head_that_one_does(tmp_path: Path, kept: int) -> None:
    names = {"store": str(tmp_path / "store"), "out": str(tmp_path / "out")}
    script = HEAD.format(tests=str(Path(__file__).parent), kept=kept, **names)
    for process in finish_all([Child(script, rank) for rank in range(2)]):
        assert process.returncode == 0, process.errors
    (state, loss, before), second = (torch.load(tmp_path / f"out{rank}") for rank in range(2))
    assert all(torch.equal(state[name], value) for name, value in second[0].items()) and second[1:] == (loss, before)
    x, y = test_softmax_head.table(6000)
    together, alone = test_softmax_head.model(), test_softmax_head.model()
    assert before == pytest.approx(test_softmax_head.loss_of(together, x, y), rel=1e-5)
    together.load_state_dict(state)
    onestep.fit(alone, (x, y), "cross_entropy", method="closed_form", progress=False)
    reached, lowest = (test_softmax_head.loss_of(fitted, x, y) for fitted in (together, alone))
    # Alone, all rows are solved for; together, they are sampled in other ways if there are more than are kept.
    assert reached == pytest.approx(lowest, rel=1e-4 if kept == 8192 else 0.02)
    assert loss == pytest.approx(reached, rel=1e-3 if kept == 8192 else 0.02)


# torchrun is this launcher with a program instead of a function; forked processes need not import everything again.
LAUNCHED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
sys.path.insert(0, {tests!r})
import onestep
from test_fit import network, table

def work():
    dist.init_process_group("gloo")
    model = network()
    onestep.fit(model, table(301), batch_size=100, max_steps=5, tol=0.0, progress=False)
    torch.save(model.state_dict(), {out!r} + str(dist.get_rank()))
    dist.destroy_process_group()

config = LaunchConfig(
    1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", monitor_interval=0.1
)
elastic_launch(config, work)()
"""


def test_torchruns_launcher_fits_what_one_process_does(tmp_path: Path) -> None:
    script = LAUNCHED.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out"))
    done = Child(script, has_children=True).finish()
    assert done.returncode == 0, done.errors
    alone, first, second = network(), torch.load(tmp_path / "out0"), torch.load(tmp_path / "out1")
    onestep.fit(alone, table(301), batch_size=100, max_steps=5, tol=0.0, progress=False)
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-7, atol=1e-9)
        assert not torch.equal(value, network().state_dict()[name])


@pytest.mark.parametrize(("failure", "message"), [("raises", "process 1 of 2 failed"), ("dies", "probably died")])
def test_a_failing_process_is_an_error_on_the_other(tmp_path: Path, failure: str, message: str) -> None:
    first, second = run(tmp_path, "gauss_newton", failure)
    assert first.returncode == 1
    assert message in first.errors
    assert second.returncode == (7 if failure == "dies" else 1)


SAMPLED = """
import sys
import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
import onestep
from onestep.curvature import HessianOperator

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=2)
x = torch.arange(7, dtype=torch.float64)[:, None]
data = TensorDataset(x, x.square())
found = []
for shuffle, batched in ((False, False), (True, False), (False, True)):
    sampler = DistributedSampler(data, shuffle=shuffle)
    loader = DataLoader(data, batch_size=2, sampler=sampler)
    if batched:
        loader = DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False))
    for method in ("closed_form", "newton_cg"):
        head = torch.nn.Linear(1, 1).double()
        onestep.fit(head, loader, method=method, progress=False)
        found.append(torch.cat([head.weight[0], head.bias]).detach())
torch.save(found, {out!r} + str(rank))
unequal = [(x, x)] * (2 + rank)
for call in (lambda: onestep.fit(head, unequal, progress=False), lambda: HessianOperator(head, unequal, "mse")):
    try:
        call()
    except ValueError as error:
        assert "data has " + str(2 + rank) + " items in this process, and 2.5 on average" in str(error), error
    else:
        raise AssertionError
"""


def test_rows_that_a_distributed_sampler_repeats_count_once(tmp_path: Path) -> None:
    script = SAMPLED.format(store=str(tmp_path / "store"), out=str(tmp_path / "out"))
    for process in finish_all([Child(script, rank) for rank in range(2)]):
        assert process.returncode == 0, process.errors
    # The line through (0, 0), (1, 1), ..., (6, 36).
    for found in (*torch.load(tmp_path / "out0"), *torch.load(tmp_path / "out1")):
        torch.testing.assert_close(found, torch.tensor([6.0, -5.0], dtype=torch.float64), rtol=1e-6, atol=1e-6)


UNEVEN = """
import sys
import torch
import torch.distributed as dist
import onestep

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=2)
X = torch.randn(60, 1, generator=torch.Generator().manual_seed(0))
y = 2.5 * X + 0.8
part = slice(0, 20) if rank == 0 else slice(20, 60)


class Batches:
    def __iter__(self):
        return iter([(X[i : i + 10], y[i : i + 10]) for i in range(part.start, part.stop, 10)])


for data, what in ((Batches(), "batches"), ((X[part], y[part]), "rows")):
    for method in ("auto", "levenberg_marquardt", "gauss_newton", "newton_cg", "gradient_descent"):
        try:
            onestep.fit(torch.nn.Linear(1, 1), data, method=method, progress=False)
        except ValueError as error:
            count = {{"batches": (2, 4), "rows": (20, 40)}}[what]
            assert f"has {{count[rank]}} {{what}} in this process, and {{sum(count) / 2:g}} on" in str(error), error
        else:
            raise AssertionError(f"{{method}} took {{what}} that differ")
"""


def test_processes_with_unlike_data_are_told(tmp_path: Path) -> None:
    """Rows of tensors before a step, batches of an iterable without a length after the first."""
    script = UNEVEN.format(store=str(tmp_path / "store"))
    for finished in finish_all([Child(script, rank) for rank in range(2)]):
        assert finished.returncode == 0, finished.errors
