"""A child that was forked after the parent used torch's threads: estimators, fit and operators run there, too."""

import tempfile
import threading

import numpy as np
import pytest
import scipy.sparse
import torch
from forked import run_in_forked_child, use_threads
from torch.utils._python_dispatch import TorchDispatchMode

import onestep
from onestep import (
    LogisticRegression,
    LogisticRegressionCV,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    RidgeCV,
    _fork,
    linalg,
)
from onestep._cached import cached_property
from onestep._fork import one_thread_after_fork
from onestep.curvature import GaussNewtonOperator, Laplace, glm, hvp
from onestep.estimators._centred import Primal
from onestep.functional import linear_cross_entropy, scaled_dot_product_attention
from onestep.layerwise import load, quantize, refit, save
from onestep.linalg.damping import unit_cholesky

rng = np.random.default_rng(0)
X = rng.normal(size=(2000, 40))
Y = X[:, :10] + rng.normal(size=(2000, 10))
LABELS = Y.argmax(1)
DEPENDENT = np.hstack([X, X[:, :5]])
FLOATS = torch.from_numpy(X).float()
TALL = torch.from_numpy(np.tile(X, (20, 1)))
TALL_LABELS, TALL_COUNTS = torch.from_numpy(np.tile(LABELS, 20)), torch.arange(40_000) % 5
SPARSE = scipy.sparse.csr_array(np.where(X > 1.0, X, 0.0))


def fitted_module():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1)).double()
    data = torch.from_numpy(X), torch.from_numpy(Y[:, :1])
    onestep.fit(model, data, "mse", method="newton_cg", max_steps=2, progress=False)
    return next(model.parameters()).detach().numpy()


def operator_product():
    model = torch.nn.Linear(40, 10).double()
    operator = GaussNewtonOperator(model, (torch.from_numpy(X), torch.from_numpy(Y)), progress=False)
    return (operator @ torch.ones(410, dtype=torch.float64)).numpy()


def product():
    inputs, targets, W = torch.from_numpy(X), torch.from_numpy(Y), torch.ones(40, 10, dtype=torch.float64)
    return hvp(lambda w: (inputs @ w - targets).square().mean(), W, W).numpy()


def sums():
    equations = onestep.linalg.NormalEquations(40, 10, dtype=torch.float64)
    equations.update(torch.from_numpy(X), torch.from_numpy(Y))
    return equations.merge(equations).solve(0.1).W.numpy()


def wide_sums():
    """Sums of so many features that torch makes, adds and copies them by several threads."""
    rows = np.tile(X, (1, 8)) + np.random.default_rng(1).normal(size=(2000, 320))
    equations = onestep.linalg.NormalEquations(320, 10, dtype=torch.float64)
    equations.update(torch.from_numpy(rows), torch.from_numpy(Y))
    restored = onestep.linalg.NormalEquations(320, 10, dtype=torch.float64)
    restored.load_state_dict(equations.state_dict())
    return restored.sweep([0.1, 10.0]).W.numpy()


def glm_matrices():
    point = glm(TALL, TALL_LABELS, torch.zeros(40, 10, dtype=torch.float64), "softmax")
    counts = glm(TALL, TALL_COUNTS, torch.zeros(40, dtype=torch.float64), "poisson")
    matrices = point.gram(), point.gram_blocks(), point.gram_diagonal(), point.diagonal_curvature(), counts.gram()
    return np.concatenate([matrix.numpy().ravel()[:1000] for matrix in matrices])


def refitted_layer():
    torch.manual_seed(0)
    teacher, model = torch.nn.Linear(40, 30), torch.nn.Linear(40, 30)
    refit(torch.nn.Sequential(model), FLOATS, torch.nn.Sequential(teacher), progress=False)
    return model.weight.detach().numpy()


def posterior():
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 10).double()
    return Laplace(model, (torch.from_numpy(X), torch.from_numpy(Y)), "mse").standard_deviations().numpy()


def differentiable():
    """Functions, where they are differentiated, and cotangents; made in the parent, since torch's own products hang."""
    torch.manual_seed(0)
    A = torch.randn(400, 400, dtype=torch.float64)
    A = A @ A.mT + 400 * torch.eye(400)
    rows, ones = torch.randn(3000, 64, dtype=torch.float64), torch.ones(400, 400, dtype=torch.float64)
    functions = {
        "cholesky": (linalg.cholesky, A),
        "inverse_cholesky": (lambda a: linalg.inverse_cholesky(a)[0], A),
        "cholesky_solve": (lambda a: linalg.cholesky_solve(ones, a), linalg.cholesky(A)),
        "solve_spd": (lambda a: linalg.solve_spd(a, ones), A),
        "gram": (lambda x: linalg.gram(x)[0], torch.randn(40_000, 32, dtype=torch.float64)),
        "solve_normal": (lambda x: linalg.solve_normal(x, rows[:, :32]), rows),
        "dual": (lambda x: linalg.solve_normal(x, ones[:, :8], ridge=0.5), torch.randn(400, 900, dtype=torch.float64)),
    }
    return [(function, at, torch.ones_like(function(at))) for function, at in functions.values()]


DIFFERENTIABLE = differentiable()


def derivatives():
    """Backward passes, whose formulas are made of torch's operations."""
    found = []
    for function, at, cotangent in DIFFERENTIABLE:
        at = at.detach().requires_grad_()
        found.append(torch.autograd.grad(function(at), at, cotangent)[0].numpy().ravel()[:1000])
    return np.concatenate(found)


def tangents():
    return np.concatenate(
        [torch.func.jvp(function, (at,), (at,))[1].numpy().ravel()[:1000] for function, at, _ in DIFFERENTIABLE]
    )


def grams():
    """Of a matrix whose columns are independent, and of one in which one is the sum of others, which no pivot tells."""
    rows = np.random.default_rng(0).normal(size=(600, 300))
    regular = rows.T @ rows
    rows[:, 100] = rows[:, 101:].sum(1)
    return torch.from_numpy(np.stack([regular, rows.T @ rows]))


GRAMS = grams()


JOBS = {
    "RidgeCV": lambda: RidgeCV().fit(X, Y).coef_,
    "RidgeCV by folds": lambda: RidgeCV(cv=3).fit(X, Y[:, 0]).coef_,
    "Ridge": lambda: Ridge(alpha=0.0).fit(DEPENDENT, Y).coef_,
    "partial_fit": lambda: Ridge(alpha=0.0).partial_fit(DEPENDENT, Y).coef_,
    "RidgeClassifier": lambda: RidgeClassifier().fit(X, LABELS).decision_function(X),
    "LogisticRegression": lambda: LogisticRegression(tol=1e-8).fit(X, LABELS).predict_proba(X),
    "LogisticRegressionCV": lambda: LogisticRegressionCV(Cs=2, cv=2).fit(X, LABELS).predict_proba(X),
    "LogisticRegression of sparse X": lambda: LogisticRegression(tol=1e-8).fit(SPARSE, LABELS).predict_proba(SPARSE),
    "PoissonRegressor": lambda: PoissonRegressor().fit(X, Y[:, 0].clip(0)).predict(X),
    "fit": fitted_module,
    "operator": operator_product,
    "hvp": product,
    "NormalEquations": sums,
    "wide NormalEquations": wide_sums,
    "glm": glm_matrices,
    "refit": refitted_layer,
    "Laplace": posterior,
    "solve_normal": lambda: onestep.linalg.solve_normal(torch.from_numpy(X), torch.from_numpy(Y)).numpy(),
    "derivatives": derivatives,
    "tangents": tangents,
    "inverse_cholesky": lambda: onestep.linalg.inverse_cholesky(GRAMS).U[0].numpy(),
    "unit_cholesky": lambda: unit_cholesky(GRAMS).R[0].numpy(),
    "polar": lambda: onestep.linalg.polar(torch.from_numpy(X[:400])).numpy(),
}


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning", "ignore::DeprecationWarning")
def test_forked_child(restore_threads):
    use_threads()
    run_in_forked_child(JOBS, rtol=1e-6, atol=1e-9)


class Threads(TorchDispatchMode):
    """On how many threads torch runs each operation with so many numbers that it shares them between threads."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) else result
        tensors = [part for part in (*args, first) if isinstance(part, torch.Tensor)]
        if max((part.numel() for part in tensors), default=0) > 1 << 15:
            self.seen.setdefault(torch.get_num_threads(), set()).add(str(function))
        return result


# What makes the operands below, which is the caller's.
OPERANDS = {
    "aten.slice.Tensor",
    "aten.ones.default",
    "aten.zeros.default",
    "aten.uniform_.default",
    "aten.empty.memory_format",
}


def halves(*shape):
    return torch.ones(*shape, dtype=torch.bfloat16)


WIDE = torch.nn.Sequential(torch.nn.Linear(200, 200))
QUANTIZED = quantize(WIDE, [torch.randn(300, 200)], bits=4, progress=False).quantized


def saved_and_loaded():
    with tempfile.TemporaryDirectory() as folder:
        save(WIDE, f"{folder}/model", QUANTIZED)
        load(WIDE, f"{folder}/model")


FUNCTIONS = {
    "dequantize": lambda: QUANTIZED["0"].dequantize(),
    "save and load": saved_and_loaded,
    "solve_normal": lambda: linalg.solve_normal(halves(2500, 16), halves(2500, 16), ridge=1.0),
    "gram": lambda: linalg.gram(halves(2500, 16), halves(2500, 16)),
    "moments": lambda: linalg.moments(halves(2500, 16), halves(2500, 16)),
    "segments": lambda: linalg.solve_normal_segments(
        halves(2500, 16), halves(2500, 16), torch.tensor([0, 2500]), ridge=1.0
    ),
    "attention": lambda: scaled_dot_product_attention(halves(2, 600, 32), halves(2, 9, 32), halves(2, 9, 32)),
    "mask": lambda: scaled_dot_product_attention(
        FLOATS[:300, :4].double(), FLOATS[:300, :4].double(), FLOATS[:300, :4].double(), torch.zeros(300, 300)
    ),
    "many rows": lambda: linear_cross_entropy(
        torch.zeros(40_000, 2), torch.zeros(3, 2), torch.zeros(40_000, dtype=torch.int64)
    ),
    "MultiheadAttention": lambda: onestep.nn.MultiheadAttention(32, 2, batch_first=True)(
        torch.ones(1, 1200, 32), torch.ones(1, 1200, 32), torch.ones(1, 1200, 32), need_weights=False
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_conversions_of_operands_are_on_one_thread(restore_threads, monkeypatch, name):
    """What a function does by torch before and after its kernel, such as the conversion of 16-bit tensors."""
    torch.set_num_threads(2)
    monkeypatch.setattr(_fork, "_forked", True)
    with Threads() as mode:
        FUNCTIONS[name]()
    mode.seen.get(2, set()).difference_update(OPERANDS)
    assert not mode.seen.get(2) and mode.seen.get(1), mode.seen
    assert torch.get_num_threads() == 2


def test_nothing_changes_outside_a_fork(restore_threads):
    torch.set_num_threads(2)
    with one_thread_after_fork():
        assert torch.get_num_threads() == 2


def test_cached_properties_have_no_lock():
    """A lock that another thread of the parent held would never be free in the child."""
    assert not hasattr(Primal._in_double, "lock")
    assert isinstance(Primal._in_double, cached_property)

    class Counted:
        calls = 0

        @cached_property
        def value(self):
            self.calls += 1
            return self.calls

    counted = Counted()
    assert (counted.value, counted.value, counted.calls) == (1, 1, 1)


def test_each_thread_gets_its_number_back(restore_threads, monkeypatch):
    """The thread that ends first in a forked child, too."""
    monkeypatch.setattr(_fork, "_forked", True)
    torch.set_num_threads(2)
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with one_thread_after_fork():
            inside.set()
            leave.wait(60)

    other = threading.Thread(target=stay)
    with one_thread_after_fork():
        other.start()
        assert inside.wait(60)
        assert torch.get_num_threads() == 1
    number = torch.get_num_threads()
    leave.set()
    other.join()
    assert number == 2 and torch.get_num_threads() == 2
