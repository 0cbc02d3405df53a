"""What goes wrong stays where it is: failed problems in a batch, jitter, and arguments that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cases
import pytest
import torch
from cases import Case, assert_bitwise
from torch import Tensor

from onestep.linalg import (
    solve_normal,
    solve_normal_ex,
)

# ------------------------------------------------------------------------------------------------ failures in a batch


class Bad(NamedTuple):
    """A batch with failures, the same without, and what ``info`` should say."""

    X: Tensor
    Y: Tensor
    weight: Tensor
    good: tuple[Tensor, Tensor, Tensor]
    info: Tensor


def _dependent(X: Tensor) -> None:
    """The last column becomes the sum of the first two, all of them so simple that the last pivot is exactly 0."""
    d = X.shape[-1]
    X.zero_()
    X[:d, :d] = torch.eye(d)
    X[:, d - 1] = X[:, 0] + X[:, 1]


# What is done to one problem (X, Y, weight), and the info that it must give for d features.
FAULTS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], Callable[[int], int]]] = {
    "nan_in_first_column": (lambda X, Y, weight: X[3, 0].fill_(torch.nan), lambda d: 1),
    "nan_in_x": (lambda X, Y, weight: X[3, 2].fill_(torch.nan), lambda d: 3),
    "nan_in_last_column": (lambda X, Y, weight: X[-1, -1].fill_(torch.nan), lambda d: d),
    "inf_in_x": (lambda X, Y, weight: X[5, 4].fill_(torch.inf), lambda d: 5),
    "minus_inf_in_x": (lambda X, Y, weight: X[0, 1].fill_(-torch.inf), lambda d: 2),
    "overflow_in_x": (lambda X, Y, weight: X[0, 1].fill_(torch.finfo(X.dtype).max), lambda d: 2),
    "zero_column": (lambda X, Y, weight: X[:, 3].zero_(), lambda d: 4),
    "duplicated_column": (lambda X, Y, weight: X[:, 1].copy_(X[:, 0]), lambda d: 2),
    "dependent_columns": (lambda X, Y, weight: (_dependent(X), weight.fill_(1)), lambda d: d),
    "zero_weights": (lambda X, Y, weight: weight.zero_(), lambda d: 1),
    "nan_in_weight": (lambda X, Y, weight: weight[2].fill_(torch.nan), lambda d: 1),
    "inf_in_weight": (lambda X, Y, weight: weight[-1].fill_(torch.inf), lambda d: 1),
    "nan_in_y": (lambda X, Y, weight: Y[1, 0].fill_(torch.nan), lambda d: d + 1),
    "inf_in_y": (lambda X, Y, weight: Y[2, -1].fill_(torch.inf), lambda d: d + 1),
}


def batch_with_faults(d: int, dtype: torch.dtype, problems: int = 2011) -> Bad:
    """Every fault several times, at different lanes of a pack and twice side by side."""
    case = Case(f"faults-{d}", n=2 * d + 3, d=d, batch=(problems,), weighted=True)
    good = cases.inputs(case, dtype)
    X, Y, weight = good.X.clone(), good.Y.clone(), good.weight.clone()
    info = torch.zeros(problems, dtype=torch.int32)
    for at, (fault, order) in enumerate(FAULTS.values()):
        for place in (37 * at, 37 * at + 1, 700 + 41 * at, problems - 1 - 3 * at):
            fault(X[place], Y[place], weight[place])
            info[place] = order(d)
    return Bad(X, Y, weight, (good.X, good.Y, good.weight), info)


SIZES = pytest.mark.parametrize("d", [8, 40], ids=["packed", "blocked"])


@SIZES
def test_info_says_which_failed_and_neighbours_are_bitwise_untouched(d, dtype):
    bad = batch_with_faults(d, dtype)
    result = solve_normal_ex(bad.X, bad.Y, weight=bad.weight)
    clean = solve_normal_ex(*bad.good[:2], weight=bad.good[2])
    failed = bad.info != 0
    assert failed.sum() == 4 * len(FAULTS)
    assert_bitwise(result.info, bad.info)
    assert not clean.info.any()
    assert bool(result.solution[failed].isnan().all())
    assert_bitwise(result.solution[~failed], clean.solution[~failed])
    assert_bitwise(result.rcond[~failed], clean.rcond[~failed])
    assert not result.rcond[failed & (bad.info <= d)].any()
    assert not result.jitter.any()


@SIZES
def test_refinement_keeps_failures_apart(d, dtype):
    bad = batch_with_faults(d, dtype, problems=1301)
    result = solve_normal_ex(bad.X, bad.Y, weight=bad.weight, refine=1)
    clean = solve_normal_ex(*bad.good[:2], weight=bad.good[2], refine=1)
    failed = bad.info != 0
    assert_bitwise(result.info, bad.info)
    assert bool(result.solution[failed].isnan().all())
    assert_bitwise(result.solution[~failed], clean.solution[~failed])


@SIZES
def test_gradients_are_zero_where_it_failed_and_bitwise_untouched_elsewhere(d, dtype):
    bad = batch_with_faults(d, dtype)
    failed = bad.info != 0
    ridge = torch.full((len(failed), d), 0.0, dtype=dtype)

    def gradients(X: Tensor, Y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        leaves = [part.clone().requires_grad_() for part in (X, Y, weight, ridge)]
        solution = solve_normal_ex(*leaves[:2], weight=leaves[2], ridge=leaves[3]).solution
        cotangent = torch.randn(solution.shape, dtype=dtype, generator=cases.seeded("cotangent"))
        return torch.autograd.grad(solution, leaves, cotangent)

    for ours, clean in zip(gradients(*bad[:3]), gradients(*bad.good), strict=True):
        assert not ours[failed].any()
        assert bool(clean.isfinite().all())
        assert_bitwise(ours[~failed], clean[~failed])


@SIZES
def test_failed_problem_adds_nothing_to_a_shared_gradient(d, dtype):
    """X is shared by the batch, and its gradient is a sum over it: a NaN in one Y must not get into the sum."""
    given = cases.inputs(Case("shared", n=2 * d, d=d, batch=(), y_batch=(6,)), dtype)
    Y = given.Y.clone()
    Y[4, 0, 0] = torch.nan
    X = given.X.clone().requires_grad_()
    result = solve_normal_ex(X, Y)
    assert result.info.tolist() == [0, 0, 0, 0, d + 1, 0]
    (gradient,) = torch.autograd.grad(result.solution[[0, 1, 2, 3, 5]].sum(), X)
    (expected,) = torch.autograd.grad(solve_normal(X, Y[[0, 1, 2, 3, 5]]).sum(), X)
    torch.testing.assert_close(gradient, expected)


def test_dual_form_keeps_failures_apart(dtype):
    given = cases.inputs(Case("dual", n=10, d=40, batch=(9,), ridge=0.5, weighted=True), dtype)
    X, Y, weight = given.X.clone(), given.Y.clone(), given.weight.clone()
    X[1, 3, 5] = torch.nan
    X[2, 0, 0] = torch.inf
    Y[4, 2, 1] = torch.nan
    weight[7, 9] = torch.nan
    failed = torch.tensor([1, 2, 4, 7])
    kept = torch.tensor([0, 3, 5, 6, 8])
    result = solve_normal_ex(X, Y, weight=weight, ridge=0.5)
    clean = solve_normal_ex(given.X, given.Y, weight=given.weight, ridge=0.5)
    assert bool((result.info[failed] > 0).all())
    assert result.info[4] == 41
    assert bool(result.solution[failed].isnan().all())
    for name in ("solution", "info", "rcond", "jitter"):
        assert_bitwise(getattr(result, name)[kept], getattr(clean, name)[kept])


def test_a_nan_ridge_fails_its_problem_alone(dtype):
    given = cases.inputs(Case("nan-ridge", n=9, d=4, batch=(5,)), dtype)
    ridge = torch.full((5, 1), 0.5, dtype=dtype)
    clean = solve_normal(given.X, given.Y, ridge=ridge)
    ridge[2] = torch.nan
    result = solve_normal_ex(given.X, given.Y, ridge=ridge)
    assert result.info.tolist() == [0, 0, 1, 0, 0]
    kept = [0, 1, 3, 4]
    assert_bitwise(result.solution[kept], clean[kept])


@SIZES
def test_any_position_of_a_nan_is_found(d, dtype):
    """A NaN anywhere in X gives the order of its column; in the last rows and columns of every tile too."""
    n = d + 5
    given = cases.inputs(Case("positions", n=n, d=d, batch=(d,)), dtype)
    X = given.X.clone()
    for problem in range(d):
        X[problem, (7 * problem) % n, problem] = torch.nan
    assert solve_normal_ex(X, given.Y).info.tolist() == list(range(1, d + 1))


@pytest.mark.parametrize(("n", "d", "k", "batch"), [(60, 6, 2, 7), (90, 40, 2, 3), (60, 33, 17, 3)])
def test_a_nan_in_any_target_fails_the_whole_problem(n, d, k, batch, dtype):
    given = cases.inputs(Case("target", n=n, d=d, k=k, batch=(batch,)), dtype)
    Y = given.Y.clone()
    Y[1, n - 1, k - 1] = torch.nan
    result = solve_normal_ex(given.X, Y)
    assert result.info.tolist() == [d + 1 if problem == 1 else 0 for problem in range(batch)]
    assert bool(result.solution[1].isnan().all())


@pytest.mark.parametrize(("n", "d"), [(5, 8), (10, 32), (10, 33), (30, 40), (60, 100)])
def test_rank_deficiency_is_found_although_rounding_hides_it(n, d, dtype):
    """n < d without a ridge: what is left of a pivot after n steps is noise, of either sign, and not a solution."""
    given = cases.inputs(Case("deficient", n=n, d=d, batch=(50,)), dtype)
    info = solve_normal_ex(given.X, given.Y).info
    assert bool((info > n - 3).all())
    assert bool((info <= n + 8).all())


def test_rank_deficiency_is_found_in_the_dual_form_too(dtype):
    """A row that stands twice and next to no ridge: the pivot of its second place is noise, of either sign."""
    given = cases.inputs(Case("dual-deficient", n=10, d=40, batch=(20,)), dtype)
    X = given.X.clone()
    X[:-1, 7] = X[:-1, 3]
    result = solve_normal_ex(X, given.Y, ridge=1e-30)
    assert result.info.tolist() == [8] * 19 + [0]
    assert bool(result.solution[:-1].isnan().all())
    smallest = torch.linalg.pinv(X[-1].double()) @ given.Y[-1].double()
    torch.testing.assert_close(result.solution[-1].double(), smallest, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


def test_overflow_of_the_solution_is_a_failure():
    """A solution beyond the range of float32 is not returned as Inf."""
    X = torch.full((3, 2, 1), 1e-15)
    Y = torch.ones(3, 2, 1)
    Y[1] = 1e25
    result = solve_normal_ex(X, Y)
    assert result.info.tolist() == [0, 2, 0]
    assert bool(result.solution[1].isnan().all())
    torch.testing.assert_close(result.solution[0], torch.full((1, 1), 1e15))


def test_three_of_a_million(dtype):
    X = torch.randn(1_000_000, 4, 2, dtype=dtype, generator=cases.seeded("million"))
    X[:, :2] += 4 * torch.eye(2, dtype=dtype)
    X[:, 2:] *= 0.25
    Y = X[..., :1] + 1
    clean = solve_normal(X, Y)
    X[5, 0, 0] = torch.nan
    X[123_456, :, 1] = 0
    Y[999_999, 3] = torch.inf
    result = solve_normal_ex(X, Y)
    places = [5, 123_456, 999_999]
    assert result.info.nonzero().flatten().tolist() == places
    assert result.info[places].tolist() == [1, 2, 3]
    assert bool(result.solution[places].isnan().all())
    kept = result.info == 0
    assert_bitwise(result.solution[kept], clean[kept])
    with pytest.raises(torch.linalg.LinAlgError, match=r"^3 of 1000000 problems .*\[5\]: info=1, \[123456\]: info=2"):
        solve_normal(X, Y)


# ------------------------------------------------------------------------------------------------------------ messages


@SIZES
def test_error_names_how_many_and_the_first_few(d, dtype):
    given = cases.inputs(Case("message", n=2 * d, d=d, batch=(4, 5)), dtype)
    X, Y = given.X.clone(), given.Y.clone()
    X[0, 3, :, 1] = 0
    X[2, 1, 0, 0] = torch.nan
    Y[2, 2, 0, 0] = torch.nan
    Y[3, 4, 0, 0] = torch.nan
    places = rf"\[0, 3\]: info=2, \[2, 1\]: info=1, \[2, 2\]: info={d + 1}, \.\.\."
    shown = rf"^4 of 20 problems could not be solved \({places}\)"
    with pytest.raises(torch.linalg.LinAlgError, match=shown) as raised:
        solve_normal(X, Y)
    for advice in ("ridge", "dependent", "_ex"):
        assert advice in str(raised.value)


def test_error_of_a_single_problem():
    with pytest.raises(torch.linalg.LinAlgError, match=r"^1 of 1 problems could not be solved \(info=2\)"):
        solve_normal(torch.ones(5, 2), torch.ones(5))


def test_error_with_gradients_wanted():
    """The differentiable path raises as well."""
    with pytest.raises(torch.linalg.LinAlgError, match="1 of 1 problems"):
        solve_normal(torch.ones(5, 2, requires_grad=True), torch.ones(5))


def test_ex_never_raises_for_a_bad_problem():
    result = solve_normal_ex(torch.full((5, 2), torch.nan), torch.ones(5))
    assert result.info.item() == 1
    assert bool(result.solution.isnan().all())


# -------------------------------------------------------------------------------------------------------------- jitter


@SIZES
def test_jitter_repairs_the_singular_alone(d, dtype):
    bad = batch_with_faults(d, dtype)
    jitter = 1e-6 if dtype == torch.float32 else 1e-12
    plain = solve_normal_ex(bad.X, bad.Y, weight=bad.weight)
    result = solve_normal_ex(bad.X, bad.Y, weight=bad.weight, jitter=jitter)
    names = list(FAULTS)
    repaired = torch.zeros(len(bad.info), dtype=torch.bool)
    for name in ("zero_column", "duplicated_column", "dependent_columns"):
        at = names.index(name)
        repaired[[37 * at, 37 * at + 1, 700 + 41 * at, len(bad.info) - 1 - 3 * at]] = True
    assert not result.info[repaired].any()
    assert bool((result.jitter[repaired] > 0).all())
    assert bool(result.solution[repaired].isfinite().all())
    assert bool((result.rcond[repaired] > 0).all())
    assert not result.jitter[~repaired].any()
    for name in ("solution", "info", "rcond", "jitter"):
        assert_bitwise(getattr(result, name)[~repaired], getattr(plain, name)[~repaired])


@SIZES
def test_jitter_is_what_was_added_to_the_diagonal(d, dtype):
    """The repaired solution is that of a ridge of the reported size."""
    given = cases.inputs(Case("jitter", n=2 * d, d=d, batch=(9,)), dtype)
    X = given.X.clone()
    X[4, :, 3] = 0
    result = solve_normal_ex(X, given.Y, jitter=1e-3)
    added = result.jitter[4]
    mean = X[4].double().square().sum() / d
    assert added == pytest.approx(1e-3 * mean.item(), rel=1e-5)
    as_ridge = solve_normal(X[4], given.Y[4], ridge=added)
    torch.testing.assert_close(result.solution[4], as_ridge)
    assert bool((result.solution[4, 3] == 0).all())


@SIZES
def test_jitter_escalates_tenfold(d):
    """A start far below rounding is raised until the factor exists, by powers of ten."""
    given = cases.inputs(Case("escalate", n=2 * d, d=d), torch.float64)
    X = given.X.clone()
    X[:, 1] = X[:, 0]
    mean = X.square().sum() / d
    result = solve_normal_ex(X, given.Y, jitter=1e-19)
    steps = torch.log10(result.jitter / mean).item() + 19
    assert result.info == 0
    assert steps == pytest.approx(round(steps), abs=1e-6)
    assert 1 <= round(steps) <= 7


def test_jitter_of_the_dual_form_escalates_tenfold():
    """Fewer rows than features, two of them alike, with a ridge that is nothing next to them."""
    torch.manual_seed(0)
    X = torch.randn(6, 40, dtype=torch.float64)
    X[1] = X[0]
    Y = X @ torch.randn(40, 2, dtype=torch.float64)
    assert solve_normal_ex(X, Y, ridge=1e-20).info == 2
    result = solve_normal_ex(X, Y, ridge=1e-20, jitter=1e-19)
    exponent = torch.log10(result.jitter / X.square().sum(0).mean()).item()
    assert result.info == 0
    assert exponent == pytest.approx(round(exponent), abs=1e-6)
    assert -18 <= round(exponent) <= -12
    torch.testing.assert_close(X @ result.solution, Y)


def test_jitter_cannot_repair_zeros():
    """The mean of a zero diagonal is zero, and so is every multiple of it."""
    result = solve_normal_ex(torch.zeros(2, 5, 3), torch.zeros(2, 5, 1), jitter=1e-3)
    assert result.info.tolist() == [1, 1]
    assert result.jitter.tolist() == [0, 0]


def test_jitter_with_refinement(dtype):
    """Refinement solves the jittered system, not the singular one."""
    given = cases.inputs(Case("jitter-refine", n=20, d=5, batch=(3,)), dtype)
    X = given.X.clone()
    X[1, :, 2] = X[1, :, 0]
    result = solve_normal_ex(X, given.Y, jitter=1e-2, refine=2)
    assert not result.info.any()
    expected = cases.reference_solve(X[1], given.Y[1], None, result.jitter[1].double())
    torch.testing.assert_close(result.solution[1].double(), expected, rtol=1e-5, atol=1e-5)


def test_jitter_repairs_wide_problems(dtype):
    """Fewer rows than features, two of them equal, and no ridge to speak of."""
    given = cases.inputs(Case("jitter-wide", n=10, d=40, batch=(3,)), dtype)
    X = given.X.clone()
    X[1, 4] = X[1, 7]
    assert solve_normal_ex(X, given.Y, ridge=1e-30).info.count_nonzero() == 1
    result = solve_normal_ex(X, given.Y, ridge=1e-30, jitter=0.1)
    assert not result.info.any()
    assert (result.jitter > 0).tolist() == [False, True, False]
    expected = solve_normal(X[1], given.Y[1], ridge=result.jitter[1])
    torch.testing.assert_close(result.solution[1], expected, rtol=1e-3, atol=1e-5)


def test_jitter_leaves_wide_problems_that_do_not_fail(dtype):
    """Asking for jitter does not change a problem that can do without, whichever form solves it."""
    given = cases.inputs(Case("jitter-dual", n=10, d=40, batch=(3,)), dtype)
    ridge = 1e-5 if dtype == torch.float32 else 1e-13
    plain = solve_normal_ex(given.X, given.Y, ridge=ridge)
    result = solve_normal_ex(given.X, given.Y, ridge=ridge, jitter=1e-6)
    assert not plain.info.any()
    assert not result.info.any()
    assert not result.jitter.any()
    torch.testing.assert_close(result.solution, plain.solution)
