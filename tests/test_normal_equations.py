"""NormalEquations: against fp64 on all rows at once, chunkings, and what goes in."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from cases import assert_bitwise
from normal_equations_cases import Rows, accumulate, assert_same, exact, problem, relative, tolerance
from torch import Tensor

from onestep.linalg import LinearSolution, Moments, NormalEquations, moments

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
