"""Solving NormalEquations: penalties, singular equations, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import assert_bitwise
from normal_equations_cases import Rows, accumulate, assert_same, exact, problem, relative, tolerance

from onestep.linalg import NormalEquations

LinAlgError = torch.linalg.LinAlgError


# ------------------------------------------------------------------------------------------------------------ solving


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_sweep_is_solve_for_each_penalty(k, intercept, dtype):
    equations = accumulate(problem(300, 8, k, dtype, weighted=True, offset=3.0), 100, intercept=intercept)
    ridges = [0.0, 1e-6, 0.1, 1.0, 1e3, 1e9]
    sweep = equations.sweep(ridges)
    assert sweep.W.shape == (6, 8, k)
    assert sweep.intercept.shape == (6, k)
    assert sweep.W.dtype == sweep.intercept.dtype == dtype
    for index, ridge in enumerate(ridges):
        W, b = equations.solve(ridge)
        assert relative(sweep.W[index], W) < tolerance(dtype)
        assert relative(sweep.intercept[index] + 1, b + 1) < tolerance(dtype)


def test_sweep_takes_a_tensor(dtype):
    equations = accumulate(problem(30, 3, 1, dtype), 30)
    assert_bitwise(equations.sweep(torch.tensor([0.5, 2.0])).W, equations.sweep([0.5, 2.0]).W)


def test_sweep_of_features_in_far_apart_units():
    """The eigenvalues are 10³⁶ apart: of the small ones nothing is left in a decomposition of the whole."""
    rows = problem(200, 4, 1, torch.float64)
    units = torch.tensor([1e-9, 1.0, 1e9, 1e-3], dtype=torch.float64)
    equations = accumulate(rows._replace(X=rows.X * units), 50)
    for ridge, W in zip((0.0, 1e-12), equations.sweep([0.0, 1e-12]).W, strict=True):
        assert relative(W * units[:, None], exact(rows, ridge / units**2, False)[0]) < 1e-12


def test_sweep_of_no_penalties(dtype):
    sweep = accumulate(problem(20, 3, 2, dtype), 20).sweep([])
    assert sweep.W.shape == (0, 3, 2)
    assert sweep.intercept.shape == (0, 2)


def test_one_penalty_per_feature(dtype):
    rows = problem(50, 3, 2, dtype)
    ours = accumulate(rows, 50)
    assert_bitwise(ours.solve(torch.full((3,), 0.5)).W, ours.solve(0.5).W)
    assert_bitwise(ours.solve([0.5, 0.5, 0.5]).W, ours.solve(torch.tensor(0.5)).W)
    # A feature that is penalised without measure drops out.
    W = ours.solve([0.0, 1e30, 0.0]).W
    assert float(W[1].abs().max()) < 1e-20
    left_out = exact(rows._replace(X=rows.X[:, [0, 2]]), 0.0, False)[0]
    assert relative(W[[0, 2]], left_out) < tolerance(dtype)


def test_units_of_the_features_do_not_matter():
    rows = problem(100, 4, 1, torch.float64)
    units = torch.tensor([1e-9, 1.0, 1e9, 1e-3], dtype=torch.float64)
    W = accumulate(rows._replace(X=rows.X * units), 30, intercept=True).solve().W
    assert relative(W * units[:, None], exact(rows, 0.0, True)[0]) < 1e-12


@pytest.mark.parametrize("intercept", [False, True])
def test_solutions_are_differentiable_in_the_ridge(intercept):
    equations = accumulate(problem(30, 4, 2, torch.float64), 9, intercept=intercept)
    ridge = torch.tensor([0.1, 0.5, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(equations.solve, ridge)
    assert torch.autograd.gradcheck(lambda value: equations.solve(value[0]), ridge)
    assert torch.autograd.gradcheck(equations.sweep, ridge)


def singular(kind: str, dtype: torch.dtype) -> Rows:
    rows = problem(3 if kind == "few rows" else 500, 4, 1, dtype, weighted="constant" in kind)
    X = rows.X
    if kind == "duplicate":
        X[:, 3] = X[:, 0]
    elif kind == "sum":
        X[:, 3] = X[:, 0] - 0.3 * X[:, 1] + X[:, 2]
    elif kind == "zero":
        X[:, 2] = 0
    elif kind == "constant":
        X[:, 2] = 1 / 3
    elif kind == "large constant":
        X[:, 2] = 12345.678
    elif kind == "no rows":
        return rows.part(slice(0, 0))
    return rows


SINGULAR = {
    "duplicate": "feature 3 is linearly dependent on those before it",
    "sum": "feature 3 is linearly dependent on those before it",
    "zero": "feature 2 is constant in all rows",
    "constant": "feature 2 is constant in all rows",
    "large constant": "feature 2 is constant in all rows",
    "few rows": "is linearly dependent on those before it",
    "no rows": "0 rows and 4 features.*feature 0 is constant",
}


# What is left of a constant in fp64, cut into chunks of 64, is noise and not zero.
@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("kind", SINGULAR)
def test_singular_equations_raise(kind, size, dtype):
    rows = singular(kind, dtype)
    equations = accumulate(rows, size, intercept=True)
    for attempt in (equations.solve, lambda: equations.sweep([1.0, 0.0])):
        with pytest.raises(LinAlgError, match=SINGULAR[kind]):
            attempt()
    solution = equations.solve(1.0)
    if kind in ("zero", "constant", "large constant"):
        assert solution.W[2] == 0
    if kind == "no rows":
        assert not solution.W.any()
        assert not solution.intercept.any()
    else:
        assert relative(solution.W, exact(rows, 1.0, True)[0]) < 10 * tolerance(dtype)


def test_singular_without_intercept(dtype):
    with pytest.raises(LinAlgError, match="feature 2 is zero in all rows"):
        accumulate(singular("zero", dtype), 64).solve()
    # A constant is a feature like any other where there is no intercept.
    rows = singular("constant", dtype)
    assert relative(accumulate(rows, 64).solve().W, exact(rows, 0.0, False)[0]) < 10 * tolerance(dtype)


def test_a_solution_that_overflows_raises():
    equations = NormalEquations(1, 1).update(torch.full((2, 1), 1e-18), torch.full((2, 1), 1e18))
    assert equations.sums.cross == pytest.approx(2.0)
    with pytest.raises(LinAlgError, match=r"the solution overflows torch\.float32"):
        NormalEquations(1, 1).update(torch.full((2, 1), 1e-18), torch.full((2, 1), 1e30)).solve()
    assert equations.solve().W.item() == pytest.approx(1e36)


# --------------------------------------------------------------------------------------------------------- bad input


def bad_updates() -> dict[str, tuple[Any, type[Exception], str]]:
    X, Y, w = torch.ones(5, 3), torch.ones(5, 2), torch.ones(5)
    hole = torch.ones(5, 3)
    hole[3, 1] = torch.nan
    return {
        "X no tensor": (([[1.0, 2.0, 3.0]], Y), TypeError, "X is list; expected torch.Tensor"),
        "Y no tensor": ((X, None), TypeError, "Y is NoneType; expected torch.Tensor"),
        "weight no tensor": ((X, Y, 2.0), TypeError, "weight is float; expected torch.Tensor"),
        "X integer": ((X.long(), Y), TypeError, "X has dtype torch.int64; expected float32"),
        "X wide": ((X.double(), Y), TypeError, r"X has dtype torch.float64; expected torch.float32.*X\.float\(\)"),
        "Y wide": ((X, Y.double()), TypeError, "Y has dtype torch.float64; expected torch.float32"),
        "weight wide": ((X, Y, w.double()), TypeError, "weight has dtype torch.float64; expected torch.float32"),
        "X vector": ((X[0], Y), ValueError, r"X has shape \(3,\); expected \(n, 3\)"),
        "X batch": ((X[None], Y[None]), ValueError, r"X has shape \(1, 5, 3\); expected \(n, 3\)"),
        "X columns": ((X[:, :2], Y), ValueError, r"X has shape \(5, 2\); expected \(n, 3\)"),
        "Y rows": ((X, Y[:4]), ValueError, r"Y has shape \(4, 2\); expected \(5, 2\), as many rows as X"),
        "Y columns": ((X, Y[:, :1]), ValueError, r"Y has shape \(5, 1\); expected \(5, 2\)"),
        "Y vector": ((X, Y[:, 0]), ValueError, r"Y has shape \(5,\); expected \(5, 2\)"),
        "weight length": ((X, Y, w[:4]), ValueError, r"weight has shape \(4,\); expected \(5,\), one per row"),
        "weight matrix": ((X, Y, w[:, None]), ValueError, r"weight has shape \(5, 1\); expected \(5,\)"),
        "weight negative": ((X, Y, -w), ValueError, "weight has negative values; expected values >= 0"),
        "X device": ((X.to("meta"), Y), ValueError, "X is on device meta; expected cpu"),
        "X sparse": ((X.to_sparse(), Y), ValueError, "X has layout torch.sparse_coo"),
        "X NaN": ((hole, Y), ValueError, "X holds NaN or infinity, first in row 3"),
        "Y infinite": ((X, Y / 0), ValueError, "Y holds NaN or infinity, first in row 0"),
        "weight NaN": ((X, Y, w * torch.nan), ValueError, "weight holds NaN or infinity, first in row 0"),
        "overflow": ((torch.eye(5, 3) * 1e30, Y), ValueError, r"products overflow torch\.float32"),
        "grad": ((X.clone().requires_grad_(), Y), NotImplementedError, "has no derivative; detach"),
    }


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("name", bad_updates())
def test_a_bad_update_raises_and_adds_nothing(name, intercept):
    arguments, error, message = bad_updates()[name]
    equations = NormalEquations(3, 2, intercept=intercept, dtype=torch.float32).update(torch.eye(4, 3), torch.eye(4, 2))
    before = copy.deepcopy(equations)
    with pytest.raises(error, match=message):
        equations.update(*arguments)
    assert_same(equations, before)


def test_a_vector_is_offered_where_it_would_do():
    with pytest.raises(ValueError, match=r"Y has shape \(4,\); expected \(5, 1\) or \(5,\), as many rows as X"):
        NormalEquations(3, 1).update(torch.ones(5, 3), torch.ones(4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"d": 0}, ValueError, "d=0; expected an integer >= 1"),
        ({"d": 2.0}, TypeError, "d is float; expected an integer >= 1"),
        ({"d": True}, TypeError, "d is bool; expected an integer >= 1"),
        ({"k": -1}, ValueError, "k=-1; expected an integer >= 0"),
        ({"k": None}, TypeError, "k is NoneType; expected an integer >= 0"),
        ({"intercept": 1}, TypeError, "intercept is int; expected True or False"),
        ({"dtype": torch.bfloat16}, TypeError, r"dtype is torch.bfloat16; expected torch.float32 or torch.float64"),
        ({"dtype": "float32"}, TypeError, "dtype is float32; expected torch.float32"),
        ({"device": "mps"}, ValueError, "device is mps; expected 'cpu' or 'cuda'"),
        ({"device": torch.device("meta")}, ValueError, "device is meta; expected 'cpu' or 'cuda'"),
        ({"device": None}, ValueError, "device is None; expected 'cpu' or 'cuda'"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        NormalEquations(**{"d": 3, "k": 1, **arguments})


@pytest.mark.parametrize(
    ("ridge", "error", "message"),
    [
        (-1.0, ValueError, "ridge=-1.0; expected a number >= 0, or 3 of them, finite"),
        (float("nan"), ValueError, "ridge=nan; expected a number >= 0"),
        (float("inf"), ValueError, "ridge=inf; expected a number >= 0, or 3 of them, finite"),
        ([1.0, 2.0], ValueError, r"ridge has shape \(2,\); expected a number >= 0, or 3 of them"),
        (torch.ones(1, 3), ValueError, r"ridge has shape \(1, 3\); expected"),
        (torch.tensor([1.0, -1.0, 0.0]), ValueError, "ridge=.*; expected a number >= 0"),
        ("big", TypeError, "ridge is str; expected a number >= 0"),
        (None, TypeError, "ridge is NoneType; expected a number >= 0"),
        (True, TypeError, "ridge is bool; expected a number >= 0"),
        (torch.tensor(True), TypeError, "ridge has dtype torch.bool; expected a number >= 0"),
        (1j, TypeError, "ridge is complex; expected a number >= 0"),
        (torch.ones((), dtype=torch.complex64), TypeError, "ridge has dtype torch.complex64"),
        (torch.ones((), device="meta"), ValueError, "ridge is on device meta; expected cpu"),
    ],
)
def test_bad_ridge(ridge, error, message):
    equations = accumulate(problem(20, 3, 1, torch.float32), 20)
    with pytest.raises(error, match=message):
        equations.solve(ridge)


@pytest.mark.parametrize(
    ("ridges", "error", "message"),
    [
        (1.0, ValueError, r"ridges has shape \(\); expected a sequence of numbers >= 0"),
        (torch.ones(2, 3), ValueError, r"ridges has shape \(2, 3\); expected a sequence"),
        ([1.0, -1.0], ValueError, r"ridges=\[1.0, -1.0\]; expected a sequence of numbers >= 0, finite"),
        ([1.0, "x"], TypeError, "ridges is list; expected a sequence of numbers >= 0"),
    ],
)
def test_bad_ridges(ridges, error, message):
    with pytest.raises(error, match=message):
        accumulate(problem(20, 3, 1, torch.float32), 20).sweep(ridges)
