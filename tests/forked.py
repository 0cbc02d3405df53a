"""Jobs in a child that is forked from this process, as it is."""

import os
import signal
import time
import traceback

import numpy as np
import pytest
import torch


def use_threads():
    """Has torch and MKL make their pools of threads in this process, which a fork does not keep."""
    torch.set_num_threads(2)
    torch.ones(1_000_000).sum()
    torch.linalg.eigh(torch.eye(200, dtype=torch.float64))


def run_in_forked_child(jobs, seconds=120, **tolerances):
    """Runs each job, a function that returns an array, here and in a forked child, which must not hang nor differ."""
    expected = {name: job() for name, job in jobs.items()}
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for name, job in jobs.items():
                os.write(writing, f"{name}, ".encode())
                np.testing.assert_allclose(job(), expected[name], **tolerances)
            assert torch.get_num_threads() == 2
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    deadline, ended = time.monotonic() + seconds, 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail(f"the forked child hangs in the last of: {os.read(reading, 10_000).decode()}")
    os.close(reading)
    assert status == 0, "see the child's traceback"
