"""onestep._serial_torch: torch on the calling thread, our kernels on as many threads as before."""

import math
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import onestep
from onestep import _serial_torch, linalg
from onestep._serial_torch import eigh, serial_for, serial_torch
from onestep.evaluation.data import as_source

needs_openmp = pytest.mark.skipif(_serial_torch.set_openmp_threads is None, reason="torch was built without libgomp")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_openmp
def test_holds_for_the_calling_thread_and_ends(two_threads):
    seen = []
    with serial_torch():
        with serial_torch():
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert seen == [1, 1, 2]
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), serial_torch():
        raise KeyError
    assert torch.get_num_threads() == 2


def test_kernels_keep_their_threads(two_threads):
    """A kernel's helper takes part of a long loop: the process uses more CPU time than its calling thread."""
    X = torch.randn(64, 2000, 128)

    def helped() -> float:
        process, thread = time.process_time(), time.thread_time()
        for _ in range(8):
            linalg.gram(X)
        return (time.process_time() - process) - (time.thread_time() - thread)

    helped()
    with serial_torch():
        # About half of 0.3 s, or nothing while other processes take the second core.
        assert any(helped() > 0.02 for _ in range(20))
    torch.set_num_threads(1)
    with serial_torch():
        assert helped() < 0.01


def test_estimators_leave_the_number_alone(two_threads):
    X = np.random.default_rng(0).standard_normal((200, 3))
    for estimator in (onestep.Ridge(), onestep.RidgeCV(), onestep.RidgeClassifier(), onestep.LogisticRegression()):
        estimator.fit(X, X[:, 0] > 0)
        assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="NaN"):
        onestep.Ridge().fit(X * np.nan, X[:, 0])
    assert torch.get_num_threads() == 2


@needs_openmp
def test_an_interrupt_while_it_ends_leaves_nothing_behind(two_threads, monkeypatch):
    set_threads = _serial_torch.set_openmp_threads

    def interrupted(threads):
        set_threads(threads)
        if threads > 1:
            raise KeyboardInterrupt
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(_serial_torch, "set_openmp_threads", interrupted)
        with pytest.raises(KeyboardInterrupt), serial_torch():
            pass
    assert torch.get_num_threads() == 2
    with serial_torch():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_scorers_have_all_threads(two_threads):
    seen = set()

    def scorer(model, X, y):
        seen.add(torch.get_num_threads())
        return model.score(X, y)

    X = np.random.default_rng(0).standard_normal((60, 3))
    onestep.LogisticRegressionCV(Cs=2, cv=2, scoring=scorer).fit(X, X[:, 0] > 0)
    assert seen == {2}


class ThreadsOf(TorchDispatchMode):
    """On how many threads each operation runs, with the number of elements of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        threads, result = torch.get_num_threads(), function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, torch.Tensor):
            self.seen.append((str(function).split(".")[1], threads, tuple(first.shape)))
        return result

    def threads(self, *names):
        """Where the result is a large matrix: of up to 32,768 numbers torch makes no region."""
        return {threads for name, threads, shape in self.seen if name in names and math.prod(shape) > 1 << 15}


@needs_openmp
def test_a_process_beside_has_few_regions_to_disturb(two_threads):
    """RidgeCV has the large product of a block on both threads, and what takes a fraction of a millisecond on one."""
    generator = np.random.default_rng(0)
    X, Y = generator.standard_normal((3000, 64)), generator.standard_normal((3000, 3000))
    with ThreadsOf() as mode:
        few = onestep.RidgeCV().fit(X, Y[:, 0])
    assert {shape[1] for name, threads, shape in mode.seen if name == "mm" and threads == 2 and shape[0] > 64} == {64}
    assert mode.threads("sub", "pow", "square") == {1}
    with ThreadsOf() as mode:
        onestep.RidgeCV().fit(X, Y)  # products with many targets gain by two threads
    assert mode.threads("mm") == {2} and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    again = onestep.RidgeCV().fit(X, Y[:, 0])
    assert again.best_score_ == pytest.approx(few.best_score_, rel=1e-12)


@needs_openmp
@pytest.mark.parametrize("shape", [(3000, 64), (60, 200)])
def test_small_eigendecompositions_are_on_one_thread(two_threads, shape):
    """So a process beside has nothing to disturb, and from 51 rows on bits do not depend on the number of threads."""
    X = np.random.default_rng(0).standard_normal(shape)
    with ThreadsOf() as mode:
        model = onestep.RidgeCV().fit(X, X[:, 0])
    assert {threads for name, threads, _ in mode.seen if name == "_linalg_eigh"} == {1} and "eigh" in model.solver_path_
    gram = torch.from_numpy(X.T @ X if len(X) > len(X.T) else X @ X.T)
    values, vectors = eigh(gram)
    torch.set_num_threads(1)
    assert torch.equal(vectors, torch.linalg.eigh(gram)[1]) and torch.equal(values, torch.linalg.eigh(gram)[0])
    assert np.array_equal(onestep.RidgeCV().fit(X, X[:, 0]).coef_, model.coef_)


@needs_openmp
def test_large_eigendecompositions_keep_the_threads(two_threads):
    with ThreadsOf() as mode:
        eigh(torch.eye(200, dtype=torch.float64))
    assert {threads for name, threads, _ in mode.seen if name == "_linalg_eigh"} == {2}


@needs_openmp
def test_rows_of_a_sample_are_gathered_on_one_thread(two_threads):
    X, y = torch.randn(5000, 16), torch.randn(5000, 1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    with ThreadsOf() as mode:
        onestep.fit(model, (X, y), "mse", method="levenberg_marquardt", max_steps=2, progress=False)
    assert {threads for name, threads, _ in mode.seen if name in ("index", "sqrt")} == {1}
    wide = torch.randn(5000, 300)
    with ThreadsOf() as mode:  # that many numbers are worth both threads
        rows = as_source((wide, y), 0).sample(0, 4000)[0].inputs
    assert rows.numel() > 1 << 19 and {threads for name, threads, shape in mode.seen if shape == (4000, 300)} == {2}


def test_small_operations_have_the_same_bits(two_threads):
    """For them ``serial_for`` is: each number of the result is made by itself."""
    torch.manual_seed(0)
    X, w, rows = torch.randn(8192, 64).double(), torch.randn(64, 3).double(), torch.randint(8192, (5000,))
    operations = (lambda: X.square(), lambda: X - w[:, 0], lambda: X @ w, lambda: X[rows], lambda: X.abs().sqrt())
    for operation in operations:
        expected = operation()
        with serial_for(X.numel()):
            assert torch.equal(operation(), expected)
