"""onestep._serial_torch: torch on the calling thread, our kernels on as many threads as before."""

import threading
import time

import numpy as np
import pytest
import torch

import onestep
from onestep import _serial_torch, linalg
from onestep._serial_torch import serial_torch

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
