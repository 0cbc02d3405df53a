"""solve_normal: accuracy, layouts, penalties, the dual form, the condition estimate, and threads."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import CASES, Case, assert_as_accurate, assert_bitwise, named, over
from torch import Tensor

from onestep.linalg import cholesky, gram, moments, solve_normal, solve_normal_ex

RIDGED = [case for case in CASES if case.ridge_form != "float"]


def solve(given: cases.Inputs, **options: int) -> Tensor:
    return solve_normal(given.X, given.Y, **given.keywords(), **options)


@over(CASES)
def test_as_accurate_as_torch(case, dtype):
    given = cases.inputs(case, dtype)
    ridge = cases.penalties(case, given.ridge, dtype)
    expected = cases.reference_solve(given.X, given.Y, given.weight, ridge)
    torchs = cases.torch_solve(given.X, given.Y, given.weight, ridge)
    assert_as_accurate(solve(given), torchs, expected)


@over([case for case in CASES if case.layout not in ("contiguous", "expanded")])
def test_strided_is_bitwise_contiguous(case, dtype):
    given = cases.inputs(case, dtype)
    assert not given.X.is_contiguous() or case.layout == "offset"
    assert_bitwise(solve(given), solve(given.contiguous()))


@over([case for case in CASES if case.layout == "expanded" and case.d <= 32])
def test_expanded_is_bitwise_contiguous(case, dtype):
    given = cases.inputs(case, dtype)
    assert 0 in given.X.stride()
    assert_bitwise(solve(given), solve(given.contiguous()))


@over(named("packed-d7-k7", "panel-d37-k1", "rows-8193", "wide-dual-features", "broadcast-all", "batch-9d"))
def test_inputs_are_not_modified(case, dtype):
    given = cases.inputs(case, dtype)
    before = [part.clone() if isinstance(part, Tensor) else part for part in given]
    solve(given)
    solve(given, refine=1)
    for part, copy in zip(given, before, strict=True):
        assert torch.equal(part, copy) if isinstance(part, Tensor) else part == copy


@over(named("packed-d7-k7", "blocked-tall", "panel-d37-k1", "rows-8193", "wide-dual-features", "factor-290"))
def test_ex_solution_is_the_same(case, dtype):
    """The variant that also keeps the factor and estimates the condition takes the same path to the solution."""
    given = cases.inputs(case, dtype)
    result = solve_normal_ex(given.X, given.Y, **given.keywords())
    assert_bitwise(result.solution, solve(given))
    assert result.info.shape == result.rcond.shape == result.jitter.shape == case.full_batch
    assert result.info.dtype == torch.int32
    assert not result.info.any()
    assert not result.jitter.any()


# ---------------------------------------------------------------------------------------------------- shapes and types


@pytest.mark.parametrize("d", [3, 40])
def test_vector_targets(d, dtype):
    given = cases.inputs(Case("vector", n=2 * d, d=d, k=1, batch=(4,)), dtype)
    vector = solve_normal(given.X, given.Y[..., 0])
    assert vector.shape == (4, d)
    assert_bitwise(vector, solve(given)[..., 0])


def test_one_vector_for_a_batch(dtype):
    """As in torch.linalg.solve, Y with one dimension is a vector, shared by the batch."""
    given = cases.inputs(Case("shared-vector", n=9, d=3, k=1, batch=(4,), y_batch=()), dtype)
    assert_bitwise(solve_normal(given.X, given.Y[:, 0]), solve(given)[..., 0])


def test_result_is_contiguous(dtype):
    for case in named("transposed-packed", "transposed-blocked", "transposed-dual", "broadcast-all"):
        assert solve(cases.inputs(case, dtype)).is_contiguous()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [4, 40])
def test_half_precision_is_computed_in_float32(d, half):
    given = cases.inputs(Case("half", n=3 * d, d=d, batch=(3,), weighted=True), torch.float32)
    X, Y, weight = given.X.to(half), given.Y.to(half), given.weight.to(half)
    solution = solve_normal(X, Y, weight=weight, ridge=torch.tensor(0.5, dtype=half))
    assert solution.dtype == torch.float32
    assert_bitwise(solution, solve_normal(X.float(), Y.float(), weight=weight.float(), ridge=0.5))


@pytest.mark.parametrize("d", [3, 40])
def test_no_rows_with_ridge_gives_zeros(d, dtype):
    X, Y = torch.zeros(2, 0, d, dtype=dtype), torch.zeros(2, 0, 3, dtype=dtype)
    assert_bitwise(solve_normal(X, Y, ridge=0.5), torch.zeros(2, d, 3, dtype=dtype))


@pytest.mark.parametrize("d", [3, 40])
def test_no_rows_without_ridge_is_singular(d, dtype):
    X, Y = torch.zeros(2, 0, d, dtype=dtype), torch.zeros(2, 0, 3, dtype=dtype)
    assert solve_normal_ex(X, Y).info.tolist() == [1, 1]


@pytest.mark.parametrize("batch", [(0,), (3, 0), (0, 2)])
@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("ridge", [0.5, 0.0])
def test_empty_batch(batch, d, ridge, dtype):
    X, Y = torch.zeros(*batch, 5, d, dtype=dtype), torch.zeros(*batch, 5, 2, dtype=dtype)
    result = solve_normal_ex(X, Y, ridge=ridge, weight=torch.ones(5, dtype=dtype))
    assert result.solution.shape == (*batch, d, 2)
    assert result.info.shape == result.rcond.shape == batch


def test_more_than_eight_batch_dims_equal_fewer(dtype):
    """Ten batch dimensions, broadcast against each other, take a path of their own through a copy."""
    case = Case("ten", n=9, d=3, batch=(1, 2, 1, 2, 1, 1, 2, 1, 1, 1), y_batch=(2, 1, 1), weighted=True,
                weight_batch=(2, 1))  # fmt: skip
    given = cases.inputs(case, dtype)
    flat = solve_normal(
        given.X.expand(*case.full_batch, 9, 3).reshape(-1, 9, 3),
        given.Y.expand(*case.full_batch, 9, 2).reshape(-1, 9, 2),
        weight=given.weight.expand(*case.full_batch, 9).reshape(-1, 9),
    )
    assert_bitwise(solve(given), flat.reshape(*case.full_batch, 3, 2))


# --------------------------------------------------------------------------------------------------------------- ridge


@pytest.mark.parametrize("d", [5, 38])
def test_ridge_forms_agree_bitwise(d, dtype):
    """One penalty for all, in every form in which it may be given."""
    given = cases.inputs(Case("forms", n=2 * d, d=d, batch=(3, 4)), dtype)
    expected = solve_normal(given.X, given.Y, ridge=0.25)
    for shape in ((), (1,), (3, 4), (3, 4, 1), (1, 4, 1), (d,), (3, 4, d), (4, d), (1, 1, d), (3, 1, 1)):
        assert_bitwise(solve_normal(given.X, given.Y, ridge=torch.full(shape, 0.25, dtype=dtype)), expected)
    assert_bitwise(solve_normal(given.X, given.Y, ridge=torch.tensor(0.25, dtype=torch.float64)), expected)


def test_ridge_integer_is_a_number(dtype):
    given = cases.inputs(Case("integer-ridge", n=9, d=4), dtype)
    assert_bitwise(solve_normal(given.X, given.Y, ridge=2), solve_normal(given.X, given.Y, ridge=2.0))


@over(RIDGED)
def test_ridge_per_problem_is_a_loop_over_problems(case, dtype):
    """Each problem uses its own penalty and no other's."""
    given = cases.inputs(case, dtype)
    ridge = cases.penalties(case, given.ridge, dtype).expand(*case.full_batch, case.d)
    solution = solve(given)
    X, Y = given.X.expand(*case.full_batch, -1, -1), given.Y.expand(*case.full_batch, -1, -1)
    weight = given.weight.expand(*case.full_batch, -1) if given.weight is not None else None
    for place in ((0,) * len(case.full_batch), tuple(size - 1 for size in case.full_batch)):
        own = None if weight is None else weight[place]
        expected = cases.reference_solve(X[place], Y[place], own, ridge[place])
        assert_as_accurate(solution[place], cases.torch_solve(X[place], Y[place], own, ridge[place]), expected)


def test_ridge_of_ambiguous_shape_raises():
    """(3,) may be a penalty per problem or per feature when there are 3 of both; unsqueezing says which."""
    given = cases.inputs(Case("ambiguous", n=9, d=3, batch=(3,)), torch.float64)
    ridge = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"ridge has shape \(3,\), which may mean .* per problem or one per feature"):
        solve_normal(given.X, given.Y, ridge=ridge)
    by_problem = solve_normal(given.X, given.Y, ridge=ridge.unsqueeze(-1))
    by_feature = solve_normal(given.X, given.Y, ridge=ridge.unsqueeze(0))
    for i in range(3):
        assert_bitwise(
            by_problem[i : i + 1], solve_normal(given.X[i : i + 1], given.Y[i : i + 1], ridge=float(ridge[i]))
        )
    torch.testing.assert_close(by_feature, cases.reference_solve(given.X, given.Y, None, ridge))


@pytest.mark.parametrize(
    "batch",
    [(3, 1), (1, 3), (1,), (1, 1)],
)
@pytest.mark.parametrize("d", [4, 40])
def test_ridge_of_the_batch_shape_is_per_problem(d, batch, dtype):
    """Where the batch ends in 1, its shape may be read as (…,1) too; it must not add dimensions then."""
    given = cases.inputs(Case("batch-shape", n=2 * d, d=d, batch=batch), dtype)
    ridge = torch.rand(batch, dtype=dtype, generator=cases.seeded("batch-shape"))
    solution = solve_normal(given.X, given.Y, ridge=ridge)
    assert_bitwise(solution, solve_normal(given.X, given.Y, ridge=ridge.unsqueeze(-1)))
    assert solution.shape == (*batch, d, 2)


@pytest.mark.parametrize("d", [4, 40])
def test_ridge_adds_batch_dimensions(d, dtype):
    """A sweep of penalties over one X broadcasts like every other operand."""
    given = cases.inputs(Case("sweep", n=2 * d, d=d), dtype)
    ridge = torch.tensor([0.1, 1.0, 10.0], dtype=dtype).unsqueeze(-1)
    swept = solve_normal(given.X, given.Y, ridge=ridge)
    expected = cases.reference_solve(given.X, given.Y, None, ridge)
    assert_as_accurate(swept, cases.torch_solve(given.X, given.Y, None, ridge), expected)


# -------------------------------------------------------------------------------------------------------------- weight


@pytest.mark.parametrize("d", [5, 40])
def test_weight_is_repetition(d, dtype):
    """A weight of 2 is the row twice, and one of 0 is no row, which may then be anything finite."""
    given = cases.inputs(Case("repeat", n=3 * d, d=d, k=2), dtype)
    times = torch.arange(3 * d) % 3
    X = given.X.clone()
    X[times == 0] = 1e3
    repeated = given.X.repeat_interleave(times, 0), given.Y.repeat_interleave(times, 0)
    expected = cases.reference_solve(*repeated)
    assert_as_accurate(solve_normal(X, given.Y, weight=times.to(dtype)), cases.torch_solve(*repeated), expected)


@pytest.mark.parametrize("d", [5, 40])
def test_unit_weight_is_no_weight(d, dtype):
    given = cases.inputs(Case("unit", n=2 * d, d=d, batch=(5,)), dtype)
    assert_bitwise(solve_normal(given.X, given.Y, weight=torch.ones(2 * d, dtype=dtype)), solve(given))


# ----------------------------------------------------------------------------------------------------------- dual form


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ridge_form", ["float", "feature", "column", "features"])
@pytest.mark.parametrize(("n", "d"), [(1, 33), (7, 34), (32, 33), (20, 120)])
def test_dual_solves_the_augmented_least_squares(n, d, ridge_form, weighted, dtype):
    """n < d with a ridge: as accurate as the primal form would be, per-feature penalties and zero weights included."""
    case = Case("dual", n=n, d=d, k=3, batch=(2,), weighted=weighted, ridge=0.3, ridge_form=ridge_form)
    given = cases.inputs(case, dtype)
    if weighted:
        given.weight[..., ::3] = 0
    ridge = cases.penalties(case, given.ridge, dtype)
    expected = cases.reference_solve(given.X, given.Y, given.weight, ridge)
    torchs = cases.torch_solve(given.X, given.Y, given.weight, ridge)
    assert_as_accurate(solve(given), torchs, expected)
    assert_as_accurate(solve(given, refine=2), torchs, expected)


def test_dual_reads_penalties_of_different_size(dtype):
    """Penalties over six orders of magnitude do not spoil the dual form's scaling."""
    given = cases.inputs(Case("dual-scales", n=10, d=50), dtype)
    ridge = torch.logspace(-3, 3, 50, dtype=dtype)
    expected = cases.reference_solve(given.X, given.Y, None, ridge)
    torchs = cases.torch_solve(given.X, given.Y, None, ridge)
    assert_as_accurate(solve_normal(given.X, given.Y, ridge=ridge), torchs, expected)


def test_zero_penalty_for_one_feature_is_not_dual(dtype):
    """With a feature that is not penalised only the primal form exists."""
    given = cases.inputs(Case("partly", n=20, d=40), dtype)
    ridge = torch.full((40,), 0.5, dtype=dtype)
    ridge[7] = 0
    expected = cases.reference_solve(given.X, given.Y, None, ridge)
    assert_as_accurate(
        solve_normal(given.X, given.Y, ridge=ridge), cases.torch_solve(given.X, given.Y, None, ridge), expected
    )


@pytest.mark.parametrize("ridge", [1e-50, torch.tensor(1e-50, dtype=torch.float64)], ids=["float", "tensor"])
def test_penalty_that_underflows_is_zero(ridge):
    """In float32 1e-50 is no penalty at all: 5 rows then leave 40 features singular."""
    given = cases.inputs(Case("underflow", n=5, d=40), torch.float32)
    with pytest.raises(torch.linalg.LinAlgError, match="1 of 1 problems"):
        solve_normal(given.X, given.Y, ridge=ridge)


# --------------------------------------------------------------------------------------------------------------- rcond


def true_rcond(A: Tensor) -> Tensor:
    return 1 / (torch.linalg.matrix_norm(A, 1) * torch.linalg.matrix_norm(torch.linalg.inv(A), 1))


def assert_estimates(rcond: Tensor, A: Tensor) -> None:
    """The estimate of ‖A⁻¹‖₁ is a lower bound, so that of rcond is an upper one; within a factor of 3."""
    ratio = rcond.double() / true_rcond(A)
    assert bool((ratio >= 1 - 1e-3).all())
    assert bool((ratio <= 3).all())


@pytest.mark.parametrize(("n", "d", "batch"), [(9, 1, 5), (14, 6, 40), (70, 31, 9), (90, 41, 6), (500, 30, 1),
                                               (250, 120, 1), (600, 290, 1)])  # fmt: skip
def test_rcond(n, d, batch, dtype):
    given = cases.inputs(Case("rcond", n=n, d=d, k=1, batch=(batch,), weighted=True), dtype)
    X = given.X * torch.logspace(0, -1, d, dtype=dtype)
    result = solve_normal_ex(X, given.Y, weight=given.weight, ridge=0.01)
    wide = X.double()
    assert_estimates(result.rcond, wide.mT @ (wide * given.weight.double().unsqueeze(-1)) + 0.01 * torch.eye(d))


def test_rcond_of_the_dual_system(dtype):
    given = cases.inputs(Case("rcond-dual", n=12, d=50, batch=(4,)), dtype)
    wide = given.X.double()
    result = solve_normal_ex(given.X, given.Y, ridge=0.01)
    assert_estimates(result.rcond, wide @ wide.mT + 0.01 * torch.eye(12))


@pytest.mark.parametrize("d", [8, 40])
def test_rcond_of_ill_conditioned_problems(d):
    """Singular values from 1 down to 1e-5: cond(XᵀX) = 1e10, and the solution has lost its digits accordingly."""
    generator = cases.seeded("ill")
    U = torch.linalg.qr(torch.randn(20, 3 * d, d, dtype=torch.float64, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(20, d, d, dtype=torch.float64, generator=generator)).Q
    X = U * torch.logspace(0, -5, d, dtype=torch.float64) @ V.mT
    rcond = solve_normal_ex(X, X[..., :1]).rcond
    ratio = rcond / true_rcond(X.mT @ X)
    assert bool((ratio > 0.9).all())  # the true value is itself only known to cond · ε
    assert bool((ratio < 3.3).all())


# ------------------------------------------------------------------------------------------------------------- threads


def solve_backward(case: Case, dtype: torch.dtype, **options: int) -> tuple[Tensor, ...]:
    given = cases.inputs(case, dtype)
    leaves = [part.requires_grad_() for part in given if isinstance(part, Tensor)]
    solution = solve(given, **options)
    cotangent = torch.randn(solution.shape, dtype=dtype, generator=cases.seeded("cotangent"))
    return solution.detach(), *torch.autograd.grad(solution, leaves, cotangent)


def threaded_work(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Results of everything that shares work among threads."""
    long = Case("threads-long", n=50_000, d=20, k=2, weighted=True)
    if name == "packed":
        return tuple(solve_normal_ex(*cases.inputs(Case("threads-packed", n=20, d=7, batch=(3000,)), dtype)[:2]))
    if name == "blocked":
        return tuple(solve_normal_ex(*cases.inputs(Case("threads-blocked", n=80, d=37, batch=(50,)), dtype)[:2]))
    if name == "dual":
        given = cases.inputs(Case("threads-dual", n=30, d=70, batch=(20,), ridge=0.5), dtype)
        return tuple(solve_normal_ex(given.X, given.Y, **given.keywords()))
    if name == "refined":
        given = cases.inputs(long, dtype)
        return tuple(solve_normal_ex(given.X, given.Y, **given.keywords(), refine=2))
    if name == "long":
        given = cases.inputs(long, dtype)
        return tuple(solve_normal_ex(given.X, given.Y, **given.keywords()))
    if name == "large-factor":
        return tuple(solve_normal_ex(*cases.inputs(Case("threads-factor", n=700, d=300, k=3), dtype)[:2]))
    if name == "gram":
        given = cases.inputs(long, dtype)
        return gram(given.X, given.Y, weight=given.weight)
    if name == "moments":
        given = cases.inputs(long, dtype)
        return tuple(moments(given.X, given.Y, weight=given.weight, center=True))
    if name == "cholesky":
        return cholesky(cases.spd(300, dtype)), cholesky(cases.spd(100, dtype, (7,)))
    if name == "backward-packed":
        return solve_backward(Case("threads-packed-grad", n=20, d=7, batch=(500,), weighted=True), dtype)
    assert name == "backward-long"
    return solve_backward(long, dtype)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("name", ["packed", "blocked", "dual", "refined", "long", "large-factor", "gram", "moments",
                                  "cholesky", "backward-packed", "backward-long"])  # fmt: skip
def test_bitwise_for_any_number_of_threads(name, dtype):
    torch.set_num_threads(1)
    expected = threaded_work(name, dtype)
    assert all(part.double().isfinite().all() for part in expected)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for part, one in zip(threaded_work(name, dtype), expected, strict=True):
            assert_bitwise(part, one)


@pytest.mark.parametrize("batch", [(), (5,)])
def test_the_bare_op_takes_no_features(batch, dtype):
    """The public functions refuse them; where the op is called bare, a division by zero had ended the process."""
    X, Y = torch.ones(*batch, 4, 0, dtype=dtype, requires_grad=True), torch.ones(*batch, 4, 3, dtype=dtype)
    solution, info = torch.ops.onestep.solve_normal(X, Y)
    assert solution.shape == (*batch, 0, 3)
    assert not info.any()
    assert torch.autograd.grad(solution.sum(), X)[0].shape == X.shape
