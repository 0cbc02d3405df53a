"""NormalEquations: against fp64 on all rows at once, chunkings, merging, state, ranks, and what it refuses."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from cases import assert_bitwise
from torch import Tensor

from onestep.linalg import LinearSolution, Moments, NormalEquations, moments

LinAlgError = torch.linalg.LinAlgError


class Rows(NamedTuple):
    X: Tensor
    Y: Tensor
    weight: Tensor | None

    def part(self, rows: slice) -> Rows:
        return Rows(self.X[rows], self.Y[rows], None if self.weight is None else self.weight[rows])

    def chunks(self, size: int) -> list[Rows]:
        return [self.part(slice(start, start + size)) for start in range(0, len(self.X), size)]


def problem(
    n: int, d: int, k: int, dtype: torch.dtype, *, weighted: bool = False, offset: float = 0.0, name: str = ""
) -> Rows:
    generator = cases.seeded(f"rows {n} {d} {k} {name}")
    X = torch.randn(n, d, dtype=torch.float64, generator=generator)
    W = torch.randn(d, k, dtype=torch.float64, generator=generator)
    Y = X @ W + 0.5 * torch.randn(n, k, dtype=torch.float64, generator=generator) + 2 + offset
    weight = 0.5 + torch.rand(n, dtype=torch.float64, generator=generator) if weighted else None
    X += offset * (1 + torch.arange(d) / d)
    return Rows(X.to(dtype), Y.to(dtype), None if weight is None else weight.to(dtype))


def exact(rows: Rows, ridge: float | Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    """The minimiser over all rows at once, by a QR of the weighted and centred rows in fp64."""
    X, Y = rows.X.double(), rows.Y.double()
    w = torch.ones(len(X), dtype=torch.float64) if rows.weight is None else rows.weight.double()
    x_mean, y_mean = X.new_zeros(X.shape[1]), Y.new_zeros(Y.shape[1])
    if intercept:
        x_mean, y_mean = w @ X / w.sum(), w @ Y / w.sum()
        # The mean of what is left repairs the rounding of the means.
        x_mean, y_mean = x_mean + w @ (X - x_mean) / w.sum(), y_mean + w @ (Y - y_mean) / w.sum()
    penalty = torch.as_tensor(ridge, dtype=torch.float64).expand(X.shape[1]).sqrt().diag()
    root = w.sqrt().unsqueeze(-1)
    Q, R = torch.linalg.qr(torch.cat([root * (X - x_mean), penalty]))
    right = Q.T @ torch.cat([root * (Y - y_mean), penalty.new_zeros(X.shape[1], Y.shape[1])])
    W = torch.linalg.solve_triangular(R, right, upper=True)
    return W, y_mean - x_mean @ W


def accumulate(rows: Rows, size: int, *, intercept: bool = False) -> NormalEquations:
    equations = NormalEquations(rows.X.shape[1], rows.Y.shape[1], intercept=intercept, dtype=rows.X.dtype)
    for chunk in rows.chunks(size):
        equations.update(*chunk)
    return equations


def assert_same(ours: NormalEquations, theirs: NormalEquations) -> None:
    assert ours.count == theirs.count
    for part, expected in zip(ours.sums, theirs.sums, strict=True):
        assert_bitwise(part, expected)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm()) if expected.any() else float(actual.norm())


def tolerance(dtype: torch.dtype) -> float:
    return 2e-6 if dtype == torch.float32 else 1e-13


# ------------------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize("ridge", [0.0, 0.7, "features"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(("n", "d", "k", "size"), [(40, 1, 1, 3), (200, 7, 2, 1), (500, 12, 1, 90), (9000, 5, 3, 4500)])
def test_solution_is_that_of_all_rows_at_once(n, d, k, size, intercept, weighted, ridge, dtype):
    rows = problem(n, d, k, dtype, weighted=weighted)
    if ridge == "features":
        ridge = torch.linspace(0.0, 3.0, d, dtype=dtype)
    solution = accumulate(rows, size, intercept=intercept).solve(ridge)
    W, b = exact(rows, ridge, intercept)
    assert isinstance(solution, LinearSolution)
    assert solution.W.dtype == solution.intercept.dtype == dtype
    assert solution.W.shape == (d, k)
    assert solution.intercept.shape == (k,)
    assert relative(solution.W, W) < tolerance(dtype)
    if intercept:
        assert relative(solution.intercept, b) < tolerance(dtype)
    else:
        assert not solution.intercept.any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
def test_any_cut_gives_the_same_sums(intercept, weighted, dtype):
    rows = problem(1000, 6, 2, dtype, weighted=weighted, offset=5.0)
    whole = moments(*rows[:2], weight=rows.weight, center=intercept)
    for size in (1, 7, 128, 999, 1000):
        sums = accumulate(rows, size, intercept=intercept).sums
        assert isinstance(sums, Moments)
        for name, part, expected in zip(Moments._fields, sums, whole, strict=True):
            assert part.dtype == torch.float64
            assert part.shape == expected.shape
            assert relative(part, expected) < tolerance(dtype), (size, name)
        assert_bitwise(sums.gram, sums.gram.T)


def test_order_and_sizes_of_chunks_do_not_matter(dtype):
    """Rows in an order that gives every chunk a mean of its own, ten times the spread of the whole apart."""
    rows = problem(1200, 4, 1, dtype)
    rows.X.add_(torch.arange(12).repeat_interleave(100).to(dtype).unsqueeze(-1))
    equations = NormalEquations(4, 1, intercept=True, dtype=dtype)
    sizes = [1, 99, 0, 500, 3, 250, 347]
    assert sum(sizes) == 1200
    for chunk in (Rows(*parts) for parts in zip(rows.X.split(sizes), rows.Y.split(sizes), [None] * 7, strict=True)):
        equations.update(*chunk)
    shuffled = torch.randperm(1200, generator=cases.seeded("order"))
    again = accumulate(Rows(rows.X[shuffled], rows.Y[shuffled], None), 100, intercept=True)
    for ours in (equations, again):
        assert relative(ours.solve(0.5).W, exact(rows, 0.5, True)[0]) < 10 * tolerance(dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [50, 3000])
def test_means_a_million_times_the_spread(size, weighted, dtype):
    rows = problem(6000, 5, 2, dtype, weighted=weighted, offset=1e6)
    solution = accumulate(rows, size, intercept=True).solve()
    W, b = exact(rows, 0.0, True)
    # In float64 the means, and X itself, are rounded to 1e-10 of the spread.
    assert relative(solution.W, W) < (1e-5 if dtype == torch.float32 else 1e-10)
    residual = rows.Y.double() - rows.X.double() @ solution.W.double() - solution.intercept.double()
    best = rows.Y.double() - rows.X.double() @ W - b
    # b, of 10⁷ or less, is rounded to float32's half of 1; W too, but b makes up for it at the mean.
    assert float((residual - best).abs().max()) < (0.51 if dtype == torch.float32 else 1e-8)
    # What sums of squares about zero would keep.
    raw = torch.cat([rows.X, torch.ones_like(rows.X[:, :1])], dim=1)
    w = torch.ones_like(raw[:, 0]) if rows.weight is None else rows.weight
    naive = torch.linalg.lstsq(raw.T @ (w[:, None] * raw), raw.T @ (w[:, None] * rows.Y)).solution[:-1]
    assert relative(naive, W) > 1e-3


def test_the_intercept_is_that_of_the_rounded_solution():
    """W rounds to 1e-7 of itself, which means of 1e6 would make an error of 0.1 at the mean of the rows."""
    rows = problem(500, 3, 1, torch.float32, offset=1e6)
    rows = rows._replace(Y=(rows.X.double() @ torch.tensor([[0.3], [0.7], [-0.6]]).double()).float())
    equations = accumulate(rows, 100, intercept=True)
    W, b = equations.solve()
    at_mean = equations.sums.x_mean @ W.double() + b.double()
    assert float((at_mean - equations.sums.y_mean).abs()) <= torch.finfo(torch.float32).eps * float(b.abs())
    assert float(b.abs()) < 1e4


def test_float32_rows_to_a_millionth():
    """Float32 sums over slabs, which are added up in float64."""
    rows = problem(300_000, 16, 1, torch.float32)
    assert relative(accumulate(rows, 50_000).solve().W, exact(rows, 0.0, False)[0]) < 1e-6


@pytest.mark.parametrize("intercept", [False, True])
def test_weight_is_repetition(intercept, dtype):
    rows = problem(60, 4, 2, dtype)
    times = torch.randint(0, 4, (60,), generator=cases.seeded("times"))
    weighted = accumulate(Rows(rows.X, rows.Y, times.to(dtype)), 13, intercept=intercept)
    repeated = Rows(rows.X.repeat_interleave(times, 0), rows.Y.repeat_interleave(times, 0), None)
    assert relative(weighted.solve(0.1).W, exact(repeated, 0.1, intercept)[0]) < tolerance(dtype)
    assert weighted.sums.weight_sum == times.sum()
    assert weighted.count == 60


def test_weight_zero_leaves_a_row_out(dtype):
    rows = problem(100, 3, 1, dtype)
    weight = torch.ones(100, dtype=dtype)
    weight[40:70] = 0
    wrong = rows.X.clone()
    wrong[40:70] = 1e6
    ours = accumulate(Rows(wrong, rows.Y, weight), 35, intercept=True)
    kept = Rows(torch.cat([rows.X[:40], rows.X[70:]]), torch.cat([rows.Y[:40], rows.Y[70:]]), None)
    assert relative(ours.solve().W, exact(kept, 0.0, True)[0]) < 10 * tolerance(dtype)


def test_weight_zero_on_the_rows_that_are_looked_at_first():
    """Provisional means come from every 4th of 4096 rows, all of weight 0; the means are 1e4 times the spread."""
    rows = problem(4096, 3, 1, torch.float32, offset=1e4)
    weight = torch.ones(4096)
    weight[::4] = 0
    ours = NormalEquations(3, 1, intercept=True).update(rows.X, rows.Y, weight)
    assert relative(ours.solve().W, exact(rows._replace(weight=weight), 0.0, True)[0]) < 1e-5


def test_a_hundred_million_rows_in_small_updates():
    """What 10,000 additions to a growing sum round off."""
    rows = problem(10_000, 2, 1, torch.float64, offset=1e3)
    once = NormalEquations(2, 1, intercept=True, dtype=torch.float64).update(*rows)
    equations = NormalEquations(2, 1, intercept=True, dtype=torch.float64)
    for _ in range(10_000):
        equations.merge(once)
    assert equations.count == 10**8
    for part, single, factor in zip(equations.sums, once.sums, (1e4, 1e4, 1, 1, 1e4), strict=True):
        assert relative(part, factor * single) < 1e-12


def test_doubling_to_more_than_a_hundred_million_rows():
    """Two halves of different means, merged with themselves 2²⁰ times over, weigh as the halves do."""
    left = problem(100, 3, 1, torch.float64)
    right = problem(30, 3, 1, torch.float64, offset=10.0, name="right")
    halves = []
    for rows in (left, right):
        half = accumulate(rows, 7, intercept=True)
        for _ in range(20):
            half.merge(half)
        halves.append(half)
    both = halves[0].merge(halves[1])
    assert both.count == 130 * 2**20 > 10**8
    all_rows = Rows(torch.cat([left.X, right.X]), torch.cat([left.Y, right.Y]), None)
    W, b = exact(all_rows, 3.0 / 2**20, True)
    ours = both.solve(3.0)
    assert relative(ours.W, W) < 1e-12
    assert relative(ours.intercept, b) < 1e-12


# ------------------------------------------------------------------------------------------------------ what goes in


@pytest.mark.parametrize("intercept", [False, True])
def test_a_chunk_without_rows_changes_nothing(intercept, dtype):
    rows = problem(20, 3, 2, dtype)
    equations = NormalEquations(3, 2, intercept=intercept, dtype=dtype)
    equations.update(*rows.part(slice(0, 0)))
    equations.update(*rows)
    equations.update(*rows.part(slice(0, 0))._replace(weight=torch.ones(0, dtype=dtype)))
    assert_same(equations, NormalEquations(3, 2, intercept=intercept, dtype=dtype).update(*rows))


@pytest.mark.parametrize("intercept", [False, True])
def test_a_chunk_without_weight_changes_only_the_count(intercept, dtype):
    rows = problem(20, 3, 2, dtype)
    nothing = rows._replace(X=rows.X + 7, weight=torch.zeros(20, dtype=dtype))
    expected = NormalEquations(3, 2, intercept=intercept, dtype=dtype).update(*rows)
    for order in ([nothing, rows], [rows, nothing]):
        equations = NormalEquations(3, 2, intercept=intercept, dtype=dtype)
        for chunk in order:
            equations.update(*chunk)
        assert equations.count == 40
        for part, kept in zip(equations.sums, expected.sums, strict=True):
            assert_bitwise(part, kept)


def test_a_vector_of_targets(dtype):
    rows = problem(20, 3, 1, dtype)
    vector = NormalEquations(3, 1, dtype=dtype).update(rows.X, rows.Y[:, 0])
    assert_same(vector, NormalEquations(3, 1, dtype=dtype).update(rows.X, rows.Y))
    assert vector.solve().W.shape == (3, 1)


def test_no_targets(dtype):
    rows = problem(20, 3, 1, dtype)
    equations = NormalEquations(3, 0, intercept=True, dtype=dtype).update(rows.X, rows.Y[:, :0])
    assert equations.solve().W.shape == (3, 0)
    expected = accumulate(rows, 20, intercept=True).sums.gram
    torch.testing.assert_close(equations.sums.gram, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_any_layout(layout, dtype):
    rows = problem(300, 13, 2, dtype, weighted=True)
    laid = (cases.lay_out(rows.X, layout), cases.lay_out(rows.Y, layout), cases.lay_out(rows.weight, layout, 1))
    ours = NormalEquations(13, 2, intercept=True, dtype=dtype).update(*laid)
    assert_same(ours, NormalEquations(13, 2, intercept=True, dtype=dtype).update(*rows))


def test_rows_are_not_copied_where_the_dtype_fits(monkeypatch, dtype):
    rows = problem(30, 4, 2, dtype, weighted=True)
    strided = rows._replace(X=cases.lay_out(rows.X, "strided"))
    seen = []

    def spy(X: Tensor, Y: Tensor, **options: Any) -> Moments:
        seen.append((X.data_ptr(), Y.data_ptr(), options["weight"].data_ptr()))
        return moments(X, Y, **options)

    monkeypatch.setattr("onestep.linalg._accumulate.moments", spy)
    NormalEquations(4, 2, dtype=dtype).update(*rows).update(*strided)
    assert seen == [tuple(part.data_ptr() for part in given) for given in (rows, strided)]


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_rows_are_widened(narrow):
    rows = problem(30, 4, 1, torch.float64, weighted=True)
    given = [part.to(narrow) for part in rows]
    wide = NormalEquations(4, 1, dtype=torch.float64).update(*given)
    assert_same(wide, NormalEquations(4, 1, dtype=torch.float64).update(*(part.double() for part in given)))
    assert wide.solve().W.dtype == torch.float64


def test_dtype_is_torchs_default():
    assert NormalEquations(1, 1).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert NormalEquations(1, 1).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_do_not_change_a_bit(restore_threads, dtype):
    rows = problem(40_000, 9, 2, dtype, weighted=True)
    sums = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        sums.append(accumulate(rows, 17_000, intercept=True))
    assert_same(sums[1], sums[0])
    assert_same(sums[2], sums[0])


def test_sums_are_a_snapshot(dtype):
    rows = problem(20, 3, 1, dtype)
    equations = NormalEquations(3, 1, intercept=True, dtype=dtype).update(*rows)
    before = equations.sums
    kept = [part.clone() for part in before]
    equations.update(*rows)
    assert equations.sums.weight_sum == 40
    for part, then in zip(before, kept, strict=True):
        assert_bitwise(part, then)


def test_rows_from_inference_mode(dtype):
    rows = problem(20, 3, 1, dtype)
    expected = accumulate(rows, 10, intercept=True)
    equations = NormalEquations(3, 1, intercept=True, dtype=dtype)
    with torch.inference_mode():
        equations.update(*rows.part(slice(0, 10)))
    equations.update(*rows.part(slice(10, 20)))
    assert_same(equations, expected)
    assert_bitwise(equations.solve().W, expected.solve().W)


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


# ------------------------------------------------------------------------------------------------ merging and keeping


@pytest.mark.parametrize("intercept", [False, True])
def test_merge_is_as_one(intercept, dtype):
    rows = problem(300, 5, 2, dtype, weighted=True, offset=2.0)
    parts = [accumulate(chunk, 40, intercept=intercept) for chunk in rows.chunks(110)]
    others = [copy.deepcopy(part) for part in parts[1:]]
    merged = parts[0]
    for part in parts[1:]:
        assert merged.merge(part) is merged
    assert merged.count == 300
    assert relative(merged.solve(0.2).W, exact(rows, 0.2, intercept)[0]) < tolerance(dtype)
    for part, other in zip(parts[1:], others, strict=True):
        assert_same(part, other)


@pytest.mark.parametrize("intercept", [False, True])
def test_merging_nothing_changes_nothing(intercept, dtype):
    full = accumulate(problem(30, 4, 2, dtype), 10, intercept=intercept)
    expected = copy.deepcopy(full)
    assert_same(NormalEquations(4, 2, intercept=intercept, dtype=dtype).merge(full), expected)
    assert_same(full.merge(NormalEquations(4, 2, intercept=intercept, dtype=dtype)), expected)


def test_float64_sums_may_go_into_float32_ones_but_not_the_other_way():
    rows = problem(40, 3, 1, torch.float32)
    narrow, wide = NormalEquations(3, 1).update(*rows), NormalEquations(3, 1, dtype=torch.float64).update(*rows)
    with pytest.raises(TypeError, match=r"other has dtype torch.float32.*expected torch.float64"):
        wide.merge(narrow)
    assert narrow.merge(wide).count == 80


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (NormalEquations(4, 1), ValueError, "other has d=4, k=1, intercept=False; expected d=3, k=1, intercept=False"),
        (NormalEquations(3, 2), ValueError, "other has d=3, k=2"),
        (NormalEquations(3, 1, intercept=True), ValueError, "other has d=3, k=1, intercept=True; expected"),
        (None, TypeError, "other is NoneType; expected NormalEquations"),
    ],
)
def test_bad_merge(other, error, message):
    with pytest.raises(error, match=message):
        NormalEquations(3, 1).merge(other)


@pytest.mark.parametrize("intercept", [False, True])
def test_state_goes_on_bit_for_bit(tmp_path, intercept, dtype):
    rows = problem(200, 5, 2, dtype, weighted=True, offset=3.0)
    first, second = rows.chunks(120)
    equations = accumulate(first, 50, intercept=intercept)
    torch.save(equations.state_dict(), tmp_path / "state.pt")
    state = equations.state_dict()
    equations.update(*second)

    loaded = NormalEquations(5, 2, intercept=intercept, dtype=dtype).update(*second)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(loaded, accumulate(first, 50, intercept=intercept))
    assert_same(loaded.update(*second), equations)
    # Neither side can reach into the other.
    again = NormalEquations(5, 2, intercept=intercept, dtype=dtype)
    again.load_state_dict(state)
    for value in state.values():
        if isinstance(value, Tensor):
            value.fill_(-1)
    assert_same(again.update(*second), equations)


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_their_own_way(clone, dtype):
    rows = problem(100, 4, 1, dtype, offset=1.0)
    first, second = rows.chunks(60)
    equations = accumulate(first, 20, intercept=True)
    copied = clone(equations)
    copied.update(*second)
    assert_same(equations, accumulate(first, 20, intercept=True))
    assert_same(copied, equations.update(*second))
    assert repr(copied) == f"NormalEquations(d=4, k=1, intercept=True, dtype={dtype}, count=100)"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"d": 4}, ValueError, "state has d=4; expected d=3"),
        ({"k": 1}, ValueError, "state has k=1; expected k=2"),
        ({"intercept": True}, ValueError, "state has intercept=True; expected intercept=False"),
        ({"dtype": torch.float64}, ValueError, "state has dtype=torch.float64; expected dtype=torch.float32"),
        ({"count": -1}, ValueError, r"state\['count'\]=-1; expected an integer >= 0"),
        ({"count": 1.5}, TypeError, r"state\['count'\] is float; expected an integer >= 0"),
        ({"gram": None}, TypeError, r"state\['gram'\] is NoneType; expected torch.Tensor"),
        ({"gram": torch.eye(2).double()}, ValueError, r"state\['gram'\] has shape \(2, 2\); expected \(3, 3\)"),
        (
            {"gram": torch.eye(3)},
            ValueError,
            r"state\['gram'\] is torch.float32.*expected dense torch.float64 values",
        ),
        ({"gram": torch.eye(3).double() * torch.nan}, ValueError, r"state\['gram'\] holds NaN or infinity"),
        ({"gram": torch.ones(3, 3).double().triu()}, ValueError, r"state\['gram'\] is not symmetric"),
        ({"gram": -torch.eye(3).double()}, ValueError, r"state\['gram'\] is not symmetric with a diagonal >= 0"),
        ({"cross": torch.ones(3, 1).double()}, ValueError, r"state\['cross'\] has shape \(3, 1\); expected \(3, 2\)"),
        ({"weight_sum": -torch.ones(()).double()}, ValueError, r"state\['weight_sum'\] is -1.0; expected"),
        ({"extra": 1}, ValueError, r"state lacks \[\] and has unknown \['extra'\]; expected the keys"),
    ],
)
def test_bad_state(change, error, message):
    equations = NormalEquations(3, 2, dtype=torch.float32).update(torch.eye(4, 3), torch.eye(4, 2))
    before = copy.deepcopy(equations)
    with pytest.raises(error, match=message):
        equations.load_state_dict({**equations.state_dict(), **change})
    assert_same(equations, before)


def test_incomplete_state():
    equations = NormalEquations(3, 2)
    state = equations.state_dict()
    del state["x_mean"]
    with pytest.raises(ValueError, match=r"state lacks \['x_mean'\] and has unknown \[\]"):
        equations.load_state_dict(state)
    with pytest.raises(TypeError, match="state is list; expected a dict"):
        equations.load_state_dict([])


# -------------------------------------------------------------------------------------------------------------- ranks

RANKS = 2


def shard(rank: int, dtype: torch.dtype) -> Rows:
    return problem(150 + 70 * rank, 4, 2, dtype, weighted=True, offset=5.0 * rank, name="shard")


def reduce_on_one_rank(rank: int, folder: str) -> None:
    """What each process runs; it leaves what it found in a file."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    found: dict[str, Any] = {}
    for dtype in cases.DTYPES:
        for intercept in (False, True):
            equations = accumulate(shard(rank, dtype), 40, intercept=intercept)
            assert equations.all_reduce() is equations
            found[f"{dtype} {intercept}"] = equations.state_dict()
    # A rank that has seen nothing.
    rows = shard(1, torch.float32)
    idle = accumulate(rows if rank == 1 else rows.part(slice(0, 0)), 40, intercept=True)
    found["idle"] = idle.all_reduce().state_dict()
    wrong = {
        "d": NormalEquations(3 + rank, 2),
        "k": NormalEquations(3, 2 + rank),
        "intercept": NormalEquations(3, 2, intercept=rank == 1),
        "dtype": NormalEquations(3, 2, dtype=cases.DTYPES[rank]),
    }
    for name, equations in wrong.items():
        try:
            equations.all_reduce()
        except ValueError as error:
            found[f"wrong {name}"] = str(error)
    # Every rank makes every group; only its members may use it.
    alone = accumulate(shard(rank, torch.float32), 40)
    try:
        found["alone"] = alone.all_reduce(dist.new_group([1])).state_dict()
    except ValueError as error:
        found["alone"] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.spawn(reduce_on_one_rank, args=(str(folder),), nprocs=RANKS, join=False)
    # A join returns when one process ends, too.
    for _ in range(RANKS):
        if context.join(timeout=240):
            break
    else:
        for process in context.processes:
            process.kill()
        pytest.fail("all_reduce hangs")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("intercept", [False, True])
def test_all_ranks_end_with_the_same_bits_and_those_of_a_merge(ranks, intercept, dtype):
    merged = accumulate(shard(0, dtype), 40, intercept=intercept)
    merged.merge(accumulate(shard(1, dtype), 40, intercept=intercept))
    for found in ranks:
        equations = NormalEquations(4, 2, intercept=intercept, dtype=dtype)
        equations.load_state_dict(found[f"{dtype} {intercept}"])
        assert_same(equations, merged)
    shards = [shard(rank, dtype) for rank in range(RANKS)]
    rows = Rows(*(torch.cat(parts) for parts in zip(*shards, strict=True)))
    assert relative(equations.solve(0.3).W, exact(rows, 0.3, intercept)[0]) < 10 * tolerance(dtype)


def test_a_rank_may_have_seen_nothing(ranks):
    expected = accumulate(shard(1, torch.float32), 40, intercept=True)
    for found in ranks:
        equations = NormalEquations(4, 2, intercept=True)
        equations.load_state_dict(found["idle"])
        assert_same(equations, expected)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("d", "[4, 2, 0, 4]; expected [3, 2, 0, 4]"),
        ("k", "[3, 3, 0, 4]; expected [3, 2, 0, 4]"),
        ("intercept", "[3, 2, 1, 4]; expected [3, 2, 0, 4]"),
        ("dtype", "[3, 2, 0, 8]; expected [3, 2, 0, 4]"),
    ],
)
def test_ranks_that_differ_all_raise(ranks, name, values):
    for found in ranks:
        assert re.search(r"rank 1 of the group.*" + re.escape(values), found[f"wrong {name}"])


def test_a_group_of_one_changes_nothing_and_refuses_others(ranks):
    equations = NormalEquations(4, 2)
    equations.load_state_dict(ranks[1]["alone"])
    assert_same(equations, accumulate(shard(1, torch.float32), 40))
    assert "this process is not in group" in ranks[0]["alone"]


def test_all_reduce_without_a_process_group():
    with pytest.raises(
        RuntimeError, match=r"all_reduce needs a process group: call torch\.distributed\.init_process_group"
    ):
        NormalEquations(1, 1).all_reduce()


def test_cuda_without_a_kernel_is_refused_at_once(monkeypatch):
    """The one error that names the op, the device and the remedy; not torch's, rows later."""
    from onestep.ops import _cuda, normal

    monkeypatch.delitem(normal.moments.kernels, "cuda", raising=False)
    monkeypatch.setattr(_cuda, "native", None)
    with pytest.raises(NotImplementedError, match=r"onestep::moments has no kernel for cuda tensors.*ONESTEP_CUDA=ON"):
        NormalEquations(2, 1, device="cuda")
