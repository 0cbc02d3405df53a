"""Targets, threads, forks, interrupts: what runs around the kernels."""

import ctypes
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import Child

import onestep
from onestep import _native, _runtime, integrations
from onestep.curvature import glm
from onestep.linalg import cholesky, gram, solve_normal, solve_normal_ex

ALL_TARGETS = ("generic", "avx2", "avx512", "amx")


@pytest.fixture
def threads():
    """Sets torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def start(*arguments, **environment):
    """A fresh interpreter that finds the same onestep as this one; the target is its own choice unless given."""
    path = [str(Path(onestep.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if name != "ONESTEP_TARGET"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=inherited | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=60):
    """The status, output and errors of a process, which is killed rather than waited for without end."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output, errors


FRESH_IMPORT = """
import json, sys, torch

def settings():
    return [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.initial_seed()]

before = settings()
import onestep
facts = {"target": onestep.info()["cpu_target"], "before": before, "after": settings(), "modules": list(sys.modules)}

def asked_for(path):  # after `import onestep` alone, where the library that the module needs is missing
    try:
        return str(eval(path))
    except ImportError as error:
        return str(error)

sys.modules.update(dict.fromkeys(("sklearn", "transformers", "lightning", "keras")))
paths = ("estimators", "integrations", *(f"integrations.{name}" for name in dir(onestep.integrations)))
facts["asked for"] = {path: asked_for(f"onestep.{path}") for path in paths}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def fresh_import():
    """What importing onestep, with no setting made, did to an interpreter."""
    status, output, errors = finish(start("-c", FRESH_IMPORT))
    assert status == 0, errors
    return json.loads(output)


def workload(seed=0):
    """Inputs that take every way through the kernels: packed, many and few, blocked, a long table, one large matrix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    square = normal(300, 300, dtype=torch.float64)
    return {
        "packed": (normal(400, 12, 5), normal(400, 12, 2)),
        "many": (normal(40000, 3, 1), normal(40000, 3, 1)),
        "blocked": (normal(20, 60, 40), normal(20, 60, 2)),
        "long": (normal(30000, 6), normal(30000, 1)),
        "large": (square @ square.T + 300 * torch.eye(300, dtype=torch.float64),),
    }


def solve_all(inputs):
    """Every kernel's result; nothing here but onestep uses threads."""
    return [
        solve_normal(*inputs["packed"]),
        solve_normal(*inputs["many"]),
        solve_normal(*inputs["blocked"], ridge=0.1),
        solve_normal(*inputs["long"], refine=1),
        gram(*inputs["long"])[0],
        cholesky(*inputs["large"]),
        *model_of(*inputs["long"]),
    ]


def model_of(X, Y):
    point = glm(X, Y, Y[: X.shape[1]], "gaussian", weight=Y[:, 0].square())
    return point.loss, point.grad, point.hvp(point.grad), point.gram()


def equal(first, second):
    """Whether two lists of tensors are bitwise equal; without torch, whose threads a forked child must not use."""
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(first, second, strict=True))


# ----------------------------------------------------------------------------------------------------------------- info


def test_info():
    facts = onestep.info()
    assert {name: type(value) for name, value in facts.items()} == {
        "version": str,
        "cpu_target": str,
        "cpu_targets_supported": list,
        "threads": int,
        "thread_source": str,
        "torch": str,
        "cuda_build": str,
        "cuda_devices": list,
        "cuda_driver": str,
    }
    assert facts["version"] == onestep.__version__
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["thread_source"] == "pool"
    assert facts["cpu_target"] in facts["cpu_targets_supported"]
    assert set(facts["cpu_targets_supported"]) <= set(ALL_TARGETS)
    assert facts["cpu_targets_supported"][0] == "generic"


def test_info_is_a_copy():
    onestep.info()["cpu_targets_supported"].clear()
    assert onestep.info()["cpu_targets_supported"]


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.long
def test_command_line_info_under_a_target_that_is_not_the_default():
    facts = onestep.info()
    targets = facts["cpu_targets_supported"]
    status, output, errors = finish(start("-m", "onestep", "info", ONESTEP_TARGET=targets[0]))
    assert status == 0, errors
    printed = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in output.splitlines())
    assert printed.keys() == facts.keys()
    assert printed["cpu_target"] == targets[0]
    assert printed["cpu_targets_supported"] == ", ".join(targets)
    assert printed["version"] == onestep.__version__


def test_best_target_is_the_default(fresh_import):
    assert fresh_import["target"] == onestep.info()["cpu_targets_supported"][-1]


def test_unknown_target_fails_at_import(monkeypatch):
    """In a second copy of the module that selects it."""
    monkeypatch.setenv("ONESTEP_TARGET", "sse2")
    with pytest.raises(ImportError, match=r"ONESTEP_TARGET='sse2'.*not known") as caught:
        runpy.run_path(_runtime.__file__)
    for target in onestep.info()["cpu_targets_supported"]:
        assert re.search(rf"\b{target}\b", str(caught.value))


@pytest.mark.parametrize("target", ALL_TARGETS)
def test_target_that_the_machine_lacks(target, monkeypatch):
    if target in _native.supported_targets():
        pytest.skip(f"this machine has {target}")
    active = _native.active_target()
    monkeypatch.setenv("ONESTEP_TARGET", target)
    with pytest.raises(ImportError, match=f"'{target}' is not supported by this machine.* expected one of: generic"):
        _runtime._select_target()
    assert _native.active_target() == active


def test_targets_agree():
    inputs = workload()
    active = _native.active_target()
    results = []
    try:
        for target in _native.supported_targets():
            _native.select_target(target)
            results.append(solve_all(inputs))
    finally:
        _native.select_target(active)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- threads


def test_thread_count_does_not_change_a_bit(threads):
    inputs = workload()
    threads(1)
    expected = solve_all(inputs)
    for count in (2, 3, 1, 4):
        threads(count)
        assert onestep.info()["threads"] == count
        assert equal(solve_all(inputs), expected)


def test_thread_count_does_not_change_a_bit_of_a_gradient(threads):
    def gradients():
        results = []
        for X, Y in (workload()["packed"], workload()["blocked"], workload()["long"]):
            leaves = (X.requires_grad_(), Y.requires_grad_())
            W = solve_normal(*leaves, ridge=0.1)
            results += torch.autograd.grad(W, leaves, torch.ones_like(W))
        return results

    threads(1)
    expected = gradients()
    threads(2)
    assert equal(gradients(), expected)


def test_serial_without_torchs_thread_pool(threads):
    threads(2)
    inputs = workload()
    expected = solve_all(inputs)
    try:
        _native.set_thread_count(0)
        assert onestep.info()["thread_source"] == "serial"
        assert equal(solve_all(inputs), expected)
    finally:
        _runtime._follow_torchs_threads()
    assert onestep.info()["thread_source"] == "pool"
    assert equal(solve_all(inputs), expected)


def test_threads_flush_denormals_as_their_caller_does(threads):
    """torch.set_flush_denormal holds for the calling thread; the bits must not depend on who else computes."""
    threads(2)
    X = torch.full((200_000, 32), 1e-20)
    assert (gram(X)[0] > 0).all()
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU does not flush denormals")
        flushed = gram(X)[0]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(flushed, torch.zeros(32, 32))
    assert (gram(X)[0] > 0).all()


class LibraryWithoutShim:
    def __init__(self, path):
        pass


def test_torch_without_the_shim_leaves_the_kernels_serial(monkeypatch):
    try:
        _native.set_thread_count(0)
        monkeypatch.setattr(ctypes, "CDLL", LibraryWithoutShim)
        _runtime._follow_torchs_threads()
        assert onestep.info()["thread_source"] == "serial"
    finally:
        monkeypatch.undo()
        _runtime._follow_torchs_threads()
    assert onestep.info()["thread_source"] == "pool"


def test_calls_from_many_python_threads(threads):
    threads(2)
    inputs = workload()
    expected = solve_all(inputs)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: solve_all(inputs), range(12)))
    assert all(equal(result, expected) for result in results)


def test_failures_stay_in_their_python_thread():
    X, Y = workload()["packed"]
    broken = torch.zeros_like(X)

    def solve(index):
        if index % 2:
            with pytest.raises(torch.linalg.LinAlgError):
                solve_normal(broken, Y)
        return solve_normal(X, Y)

    with ThreadPoolExecutor(4) as pool:
        assert equal(list(pool.map(solve, range(8))), [solve_normal(X, Y)] * 8)


def test_gil_is_released():
    """While one thread is in a kernel, which never returns to Python, another one gets to run."""
    X = torch.randn(200_000, 64)
    entered, done = threading.Event(), threading.Event()
    ticks = []

    def tick():
        entered.wait()
        while not done.is_set():
            ticks.append(None)
            time.sleep(0.001)

    clock = threading.Thread(target=tick)
    clock.start()
    interval = sys.getswitchinterval()
    try:
        # Python itself would not take the GIL away from a thread within a minute.
        sys.setswitchinterval(60)
        entered.set()
        gram(X)
        during = len(ticks)
    finally:
        sys.setswitchinterval(interval)
        done.set()
        clock.join()
    assert during > 0


# ----------------------------------------------------------------------------------------------------------------- fork


def status_of_child(child, timeout=20):
    """The exit status of a forked child, which is killed rather than waited for without end."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the forked child hangs after {timeout} s")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's own about forking with threads
def test_fork_after_threads_were_used(threads):
    threads(2)
    inputs = workload()
    expected = solve_all(inputs)
    left = torch.randn(600, 600)
    left @ left  # torch's own pool has worked, too
    child = os.fork()
    if child == 0:
        # Nothing but os._exit: the child must not go on with pytest, and torch's own threads are not safe here.
        try:
            good = (
                equal(solve_all(inputs), expected)
                and equal(solve_all(inputs), expected)
                and onestep.info()["thread_source"].startswith("serial")
            )
            os._exit(0 if good else 3)
        finally:
            os._exit(4)
    assert status_of_child(child) == 0
    assert equal(solve_all(inputs), expected)
    assert onestep.info()["thread_source"] == "pool"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_from_a_python_thread_and_gradients_in_the_child(threads):
    threads(2)
    X, Y = workload()["packed"]

    def gradient():
        leaf = X.clone().requires_grad_()
        return torch.autograd.grad(solve_normal(leaf, Y), leaf, torch.ones(400, 5, 2))[0]

    expected = gradient()
    children = []

    def fork():
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if torch.equal(gradient(), expected) else 3)
            finally:
                os._exit(4)
        children.append(child)

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    assert status_of_child(children[0]) == 0


class Problems(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        X, Y = torch.randn(300, 12, 5, generator=generator), torch.randn(300, 12, 1, generator=generator)
        return solve_normal(X, Y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_solves_in_data_loader_workers(threads):
    threads(2)
    problems = Problems()
    expected = [problems[index] for index in range(len(problems))]
    solve_all(workload())
    loader = torch.utils.data.DataLoader(
        problems, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert equal(list(loader), expected)


# ----------------------------------------------------------------------------------------------------------- interrupts


# A job that a shell starts in the background inherits "ignore" for SIGINT: the child asks for Python's handler.
INTERRUPTED = """
import signal, torch, onestep
signal.signal(signal.SIGINT, signal.default_int_handler)
X, Y = torch.randn(200, 30, 8), torch.randn(200, 30, 1)
onestep.linalg.solve_normal(X, Y)
print("running", flush=True)
while True:
    onestep.linalg.solve_normal(X, Y)
"""


def test_interrupt_ends_a_loop_of_calls():
    child = Child(INTERRUPTED)
    deadline = time.monotonic() + 60
    while child.written() != "running\n" and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    child.send(signal.SIGINT)
    done = child.finish(timeout=20)
    assert done.returncode == 1
    assert done.errors.strip().endswith("KeyboardInterrupt")


# -------------------------------------------------------------------------------------------------------- no surprises


def test_import_leaves_torchs_settings_alone(fresh_import):
    assert fresh_import["after"] == fresh_import["before"]


def test_import_leaves_scikit_learn_for_later(fresh_import):
    assert "sklearn" not in fresh_import["modules"]


def test_modules_of_extras_are_loaded_when_asked_for_and_name_what_they_need(fresh_import):
    assert not {"onestep.estimators", "onestep.integrations"} & set(fresh_import["modules"])
    found = fresh_import["asked for"]
    assert found.pop("integrations").startswith("<module 'onestep.integrations'")
    needed = {"estimators": "scikit-learn", "integrations.trainer": "transformers accelerate"}
    for path in ("estimators", *(f"integrations.{name}" for name in dir(integrations))):
        # Not an extra of "onestep": PyPI has another package of this name.
        assert f"pip install {needed.get(path, path.rpartition('.')[2])}" in found.pop(path), path
    assert found == {}


def test_modules_of_extras_are_found_from_the_package_alone(monkeypatch):
    pytest.importorskip("sklearn")
    estimators = importlib.import_module("onestep.estimators")
    monkeypatch.delattr(onestep, "estimators")  # as it is before the first import
    assert onestep.estimators is estimators
    # Those that the documentation names, and no other: what they share is not for users.
    assert dir(integrations) == ["keras", "lightning", "trainer", "transformers"]
    for module in (onestep, integrations):
        with pytest.raises(AttributeError, match=f"'{module.__name__}' has no attribute 'nothing'"):
            _ = module.nothing


def test_results_do_not_alias_inputs_or_each_other():
    X, Y = workload()["packed"]
    before = X.clone(), Y.clone()
    solved = solve_normal_ex(X, Y)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in (X, Y, *solved)}
    assert len(pointers) == 6
    assert equal((X, Y), before)
