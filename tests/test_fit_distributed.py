"""onestep.fit on two processes of torch.distributed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
onestep.fit(fitted, (X, y), method={method!r}, max_steps=6, tol=0.0, progress=False)
torch.save(model.state_dict(), {out!r} + str(rank))
"""


def run(tmp_path: Path, method: str, failure: str = "") -> list[subprocess.CompletedProcess[str]]:
    """The script in two processes, and what became of them; a hang fails."""
    script = SCRIPT.format(
        tests=str(Path(__file__).parent),
        store=str(tmp_path / "store"),
        out=str(tmp_path / "out"),
        method=method,
        failure=failure,
    )
    commands = [[sys.executable, "-c", script, str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, "", error)
        for process, error in zip(processes, errors, strict=True)
    ]


@pytest.mark.parametrize("method", ["closed_form", "levenberg_marquardt", "gauss_newton"])
def test_two_processes_fit_what_one_does(tmp_path: Path, method: str) -> None:
    # Conjugate gradients that end before they converge magnify rounding; on a linear model they do converge.
    for process in run(tmp_path, method):
        assert process.returncode == 0, process.stderr
    first, second = (torch.load(tmp_path / f"out{rank}") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    alone: nn.Module = network() if method == "levenberg_marquardt" else nn.Linear(5, 1).double()
    onestep.fit(alone, table(301), method=method, max_steps=6, tol=0.0, progress=False)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-7, atol=1e-9)


LAUNCHED = """
import os, sys
import torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
import onestep
from test_fit import network, table

if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
model = network()
onestep.fit(model, table(301), batch_size=100, max_steps=5, tol=0.0, progress=False)
torch.save(model.state_dict(), {out!r} + f"{{rank}}of{{size}}")
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_torchrun_fits_what_one_process_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out")))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for options in ([], launcher):
        process = subprocess.Popen([sys.executable, *options, str(script)], stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            # torchrun ends its processes when it is told to end.
            process.terminate()
            process.wait(60)
        assert process.returncode == 0, errors
    alone, first, second = (torch.load(tmp_path / f"out{which}") for which in ("0of1", "0of2", "1of2"))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-7, atol=1e-9)
        assert not torch.equal(value, network().state_dict()[name])


@pytest.mark.parametrize(("failure", "message"), [("raises", "process 1 of 2 failed"), ("dies", "probably died")])
def test_a_failing_process_is_an_error_on_the_other(tmp_path: Path, failure: str, message: str) -> None:
    first, second = run(tmp_path, "gauss_newton", failure)
    assert first.returncode == 1
    assert message in first.stderr
    assert second.returncode == (7 if failure == "dies" else 1)
