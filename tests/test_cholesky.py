"""cholesky, cholesky_solve, solve_spd: residuals, failures, and which triangle is read."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from cases import ORDERS, assert_as_accurate, assert_bitwise
from torch import Tensor

from onestep.linalg import cholesky, cholesky_ex, cholesky_solve, solve_spd, solve_spd_ex, spd

# A batch for small orders, so that packs are filled with and without a tail; single matrices are blocked from 65 on.
SIZES = [(d, batch) for d in ORDERS for batch in ((), (11,)) if not (batch and d > 100)]


def over_sizes(sizes: list[tuple[int, tuple[int, ...]]] = SIZES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("d", "batch"), sizes, ids=[f"{d}-{len(batch)}" for d, batch in sizes])


def right(d: int, k: int, dtype: torch.dtype, batch: tuple[int, ...] = ()) -> Tensor:
    return torch.randn((*batch, d, k), dtype=torch.float64, generator=cases.seeded(f"B {d} {k} {batch}")).to(dtype)


def exact_cholesky(A: Tensor) -> Tensor:
    """The factor, column by column in extended precision, rounded to fp64."""
    L = cases.extended(A.tril())
    for j in range(A.shape[-1]):
        L[..., j:, j] -= (L[..., j:, :j] @ L[..., j, :j, None])[..., 0]
        L[..., j:, j] /= np.sqrt(L[..., j, j])[..., None]
    return cases.rounded(L)


def exact_solve(A: Tensor, B: Tensor) -> Tensor:
    """A⁻¹B to fp64 accuracy: refined with residuals in extended precision."""
    L = torch.linalg.cholesky(A.double())
    A_wide, B_wide = cases.extended(A), cases.extended(B)
    solution = np.zeros_like(B_wide)
    for _ in range(3):
        residual = cases.rounded(B_wide - A_wide @ solution)
        solution = solution + torch.cholesky_solve(residual, L).numpy()
    return cases.rounded(solution)


def torch_solve(A: Tensor, B: Tensor) -> Tensor:
    return torch.cholesky_solve(B, torch.linalg.cholesky_ex(A).L)


def norm1(A: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(A, 1)


@over_sizes()
def test_residual_as_lapack_tests_it(d, batch, dtype):
    """‖A − LLᵀ‖₁ / (n ‖A‖₁ ε) < 30, the bound of LAPACK's xPOT01."""
    A = cases.spd(d, dtype, batch)
    L, info = cholesky_ex(A)
    assert not info.any()
    assert not L.triu(1).any()
    assert bool((L.diagonal(dim1=-2, dim2=-1) > 0).all())
    residual = norm1(A.double() - L.double() @ L.double().mT)
    assert bool((residual / (d * norm1(A.double()) * torch.finfo(dtype).eps) < 30).all())


@over_sizes()
def test_factor_is_as_accurate_as_torch(d, batch, dtype):
    A = cases.spd(d, dtype, batch)
    assert_as_accurate(cholesky(A), torch.linalg.cholesky(A), exact_cholesky(A))


@over_sizes([(d, batch) for d, batch in SIZES if d in (1, 3, 8, 17, 32, 33, 65, 97, 256, 289)])
def test_upper_triangle_is_never_read(d, batch, dtype):
    A = cases.spd(d, dtype, batch)
    poisoned = torch.where(torch.ones(d, d).triu(1).bool(), torch.nan, A)
    assert_bitwise(cholesky(poisoned), cholesky(A))
    B = right(d, 3, dtype, batch)
    assert_bitwise(solve_spd(poisoned, B), solve_spd(A, B))


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
@pytest.mark.parametrize(("d", "batch"), [(7, (11,)), (40, (3,)), (100, (2,)), (260, (1,))])
def test_strided_is_bitwise_contiguous(d, batch, layout, dtype):
    A = cases.lay_out(cases.spd(d, dtype, batch), layout)
    B = cases.lay_out(right(d, 5, dtype, batch), layout)
    L = cases.lay_out(cholesky(A).contiguous(), layout)
    assert_bitwise(cholesky(A), cholesky(A.contiguous()))
    assert_bitwise(solve_spd(A, B), solve_spd(A.contiguous(), B.contiguous()))
    assert_bitwise(cholesky_solve(B, L), cholesky_solve(B.contiguous(), L.contiguous()))


# ------------------------------------------------------------------------------------------------------ cholesky_solve


@over_sizes()
def test_solve_is_as_accurate_as_torch(d, batch, dtype):
    A, B = cases.spd(d, dtype, batch), right(d, 3, dtype, batch)
    L = torch.linalg.cholesky(A)
    expected = exact_solve(A, B)
    theirs = torch.cholesky_solve(B, L)
    assert_as_accurate(cholesky_solve(B, L), theirs, expected)
    assert_as_accurate(cholesky_solve(B, cholesky(A)), theirs, expected)
    assert_as_accurate(solve_spd(A, B), theirs, expected)


@pytest.mark.parametrize("k", [0, 1, 2, 15, 16, 17, 24, 95, 96, 97, 200])
@pytest.mark.parametrize(("d", "batch"), [(5, (9,)), (5, (7, 10)), (24, (65,)), (32, ()), (33, ()), (100, (2,))])
def test_many_right_hand_sides(d, batch, k, dtype):
    A, B = cases.spd(d, dtype, batch), right(d, k, dtype, batch)
    expected, theirs = exact_solve(A, B), torch_solve(A, B)
    assert_as_accurate(cholesky_solve(B, cholesky(A)), theirs, expected)
    assert_as_accurate(solve_spd(A, B), theirs, expected)


@pytest.mark.parametrize(("d", "batch"), [(1, (3,)), (8, (11,)), (40, (3,)), (130, ())])
def test_row_major_factor_with_garbage_above_the_diagonal(d, batch, dtype):
    """A factor may come from anywhere, in either order, with anything in the other triangle."""
    A, B = cases.spd(d, dtype, batch), right(d, 4, dtype, batch)
    L = cholesky(A)
    expected = cholesky_solve(B, L)
    garbage = torch.where(torch.ones(d, d).triu(1).bool(), torch.nan, L)
    row_major = garbage.contiguous()
    column_major = garbage.mT.contiguous().mT
    assert row_major.stride(-1) == 1
    assert_bitwise(cholesky_solve(B, row_major), expected)
    assert_bitwise(cholesky_solve(B, column_major), expected)
    assert_bitwise(cholesky_solve(B.mT.contiguous().mT, row_major), expected)


@pytest.mark.parametrize("d", [4, 40])
def test_vectors(d, dtype):
    A, B = cases.spd(d, dtype, (5,)), right(d, 1, dtype, (5,))
    L = cholesky(A)
    assert_bitwise(cholesky_solve(B[..., 0], L), cholesky_solve(B, L)[..., 0])
    assert_bitwise(solve_spd(A, B[..., 0]), solve_spd(A, B)[..., 0])
    assert_bitwise(solve_spd(A[0], B[0, :, 0]), solve_spd(A[:1], B[:1])[0, :, 0])


@pytest.mark.parametrize(
    ("d", "batch_a", "batch_b"),
    [
        (4, (), (7,)),
        (4, (7,), ()),
        (4, (3, 1), (5,)),
        (40, (2, 1), (3,)),
        # More than eight dimensions.
        (3, (1, 2, 1, 1, 2, 1, 1, 1, 2), (2, 1)),
        (3, (2,), (1, 2, 1, 1, 2, 1, 1, 1, 1)),
    ],
)
def test_batches_broadcast(d, batch_a, batch_b, dtype):
    A, B = cases.spd(d, dtype, batch_a), right(d, 2, dtype, batch_b)
    batch = torch.broadcast_shapes(batch_a, batch_b)
    whole_a = A.expand(*batch, d, d).reshape(-1, d, d)
    whole_b = B.expand(*batch, d, 2).reshape(-1, d, 2)
    expected = solve_spd(whole_a, whole_b).reshape(*batch, d, 2)
    assert_bitwise(solve_spd(A, B), expected)
    solved = cholesky_solve(B, cholesky(A))
    assert solved.shape == (*batch, d, 2)
    assert_bitwise(solved, cholesky_solve(whole_b, cholesky(whole_a)).reshape(*batch, d, 2))


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
@pytest.mark.parametrize("d", [3, 40])
def test_empty_batch(d, batch, dtype):
    A, B = torch.zeros(*batch, d, d, dtype=dtype), torch.zeros(*batch, d, 2, dtype=dtype)
    assert cholesky(A).shape == A.shape
    assert cholesky_solve(B, A).shape == B.shape
    assert solve_spd(A, B).shape == B.shape


def test_order_zero(dtype):
    A, B = torch.zeros(2, 0, 0, dtype=dtype), torch.zeros(2, 0, 3, dtype=dtype)
    L, info = cholesky_ex(A)
    assert L.shape == (2, 0, 0)
    assert info.tolist() == [0, 0]
    assert solve_spd(A, B).shape == (2, 0, 3)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(half):
    A, B = cases.spd(5, torch.float32, (3,)).to(half), right(5, 2, torch.float32, (3,)).to(half)
    assert_bitwise(cholesky(A), cholesky(A.float()))
    assert_bitwise(solve_spd(A, B), solve_spd(A.float(), B.float()))
    assert_bitwise(cholesky_solve(B, cholesky(A)), cholesky_solve(B.float(), cholesky(A)))


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("d", [1, 2, 5, 8, 20, 32, 33, 50, 97, 130, 260])
def test_info_equals_torchs_on_indefinite_matrices(d, dtype):
    """The first minor that is not positive, at every order in turn, decided by a pivot of -1."""
    orders = sorted({1, 2, d // 3 + 1, d // 2 + 1, max(d - 1, 1), d} & set(range(1, d + 1)))
    A = cases.spd(d, dtype).repeat(len(orders) + 1, 1, 1)
    for problem, order in enumerate(orders):
        A[problem, order - 1, order - 1] = -1
    L, info = cholesky_ex(A)
    assert info.tolist() == [*orders, 0]
    assert_bitwise(info, torch.linalg.cholesky_ex(A).info)
    assert bool(L[:-1].isnan().all())
    assert_bitwise(L[-1], cholesky(A[-1:])[0])


def test_info_equals_torchs_on_random_symmetric_matrices(dtype):
    M = torch.randn(500, 6, 6, dtype=dtype, generator=cases.seeded("symmetric"))
    A = M + M.mT + 4 * torch.eye(6, dtype=dtype)
    _, info = cholesky_ex(A)
    assert_bitwise(info, torch.linalg.cholesky_ex(A).info)
    assert 0 < (info == 0).sum() < 500
    assert len(info.unique()) > 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("d", "batch"), [(6, 9), (40, 5), (130, 3)])
def test_nan_and_inf_fail_alone(d, batch, value, dtype):
    A = cases.spd(d, dtype, (batch,))
    B = right(d, 2, dtype, (batch,))
    clean_factor, clean_solution = cholesky(A), solve_spd(A, B)
    A[1, d - 1, 2] = value
    A[2, 3, 3] = value
    kept = [problem for problem in range(batch) if problem not in (1, 2)]
    L, info = cholesky_ex(A)
    assert info.tolist() == [{1: d, 2: 4}.get(problem, 0) for problem in range(batch)]
    assert bool(L[[1, 2]].isnan().all())
    assert_bitwise(L[kept], clean_factor[kept])
    solution, info = solve_spd_ex(A, B)
    assert info.tolist() == [{1: d, 2: 4}.get(problem, 0) for problem in range(batch)]
    assert bool(solution[[1, 2]].isnan().all())
    assert_bitwise(solution[kept], clean_solution[kept])


@pytest.mark.parametrize(("d", "k", "batch"), [(6, 2, 5), (40, 2, 5), (6, 40, 70)])
def test_nan_in_right_hand_side_is_one_past_the_order(d, k, batch, dtype):
    A, B = cases.spd(d, dtype, (batch,)), right(d, k, dtype, (batch,))
    clean = solve_spd(A, B)
    B[3, 1, -1] = torch.nan
    solution, info = solve_spd_ex(A, B)
    assert info.tolist() == [d + 1 if problem == 3 else 0 for problem in range(batch)]
    assert bool(solution[3].isnan().all())
    kept = [problem for problem in range(batch) if problem != 3]
    assert_bitwise(solution[kept], clean[kept])


@pytest.mark.parametrize("d", [6, 40])
def test_failed_gradients_are_zero_and_others_untouched(d, dtype):
    A, B = cases.spd(d, dtype, (9,)), right(d, 2, dtype, (9,))
    bad = A.clone()
    bad[4, 2, 2] = -1
    kept = [problem for problem in range(9) if problem != 4]

    def gradients(matrix: Tensor) -> tuple[Tensor, ...]:
        leaves = [part.clone().requires_grad_() for part in (matrix, B)]
        factor, _ = cholesky_ex(leaves[0])
        solution, _ = solve_spd_ex(*leaves)
        weight = right(d, d, dtype)
        (of_factor,) = torch.autograd.grad(factor, leaves[0], weight.expand(9, d, d))
        return of_factor, *torch.autograd.grad(solution, leaves, right(d, 2, dtype).expand(9, d, 2))

    for ours, clean in zip(gradients(bad), gradients(A), strict=True):
        assert not ours[4].any()
        assert_bitwise(ours[kept], clean[kept])


@pytest.mark.parametrize("d", [4, 40])
def test_errors_name_the_matrices(d, dtype):
    A, B = cases.spd(d, dtype, (3, 4)), right(d, 2, dtype, (3, 4))
    A[1, 2, 3, 3] = -1
    shown = r"^1 of 12 matrices could not be solved \(\[1, 2\]: info=4\)"
    with pytest.raises(torch.linalg.LinAlgError, match=shown):
        cholesky(A)
    with pytest.raises(torch.linalg.LinAlgError, match=shown):
        solve_spd(A, B)
    with pytest.raises(torch.linalg.LinAlgError, match=shown):
        cholesky(A.requires_grad_())


def test_inputs_are_not_modified(dtype):
    for d in (6, 40, 130):
        A, B = cases.spd(d, dtype, (2,)), right(d, 3, dtype, (2,))
        A_before, B_before = A.clone(), B.clone()
        L = cholesky(A)
        L_before = L.clone()
        solve_spd(A, B)
        cholesky_solve(B, L)
        assert_bitwise(A, A_before)
        assert_bitwise(B, B_before)
        assert_bitwise(L, L_before)


# ------------------------------------------------------------------------------------------- one solve with a fall-back


def test_spd_factor_scales_solves_and_tells_what_is_singular():
    """One rule for all callers: a pivot of 8 ε of the rows' dtype, after scaling to a unit diagonal."""
    root = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    units = torch.tensor([1e-9, 1.0, 1e7, 1.0, 1e-3, 1e4], dtype=torch.float64)
    A = (root @ root.T + 6 * torch.eye(6, dtype=torch.float64)) * units * units[:, None]
    B = torch.randn(6, 2, dtype=torch.float64)
    good = spd.factor(A)
    assert good.succeeded
    assert good.first_singular(torch.float64) == -1
    torch.testing.assert_close(good.solve(B), torch.linalg.solve(A, B), rtol=1e-9, atol=0.0)
    # Column 3 repeats column 1 up to a part δ of its square: noise for float32 rows, not for float64 ones.
    for delta, found in ((1e-7, {torch.float32: 3, torch.float64: -1}), (1e-16, {torch.float32: 3, torch.float64: 3})):
        near = torch.eye(5, dtype=torch.float64)
        near[3, 1] = near[1, 3] = 1.0
        near[3, 3] = 1.0 + delta
        assert {dtype: spd.factor(near).first_singular(dtype) for dtype in found} == found
    zero = torch.eye(3, dtype=torch.float64)
    zero[1, 1] = 0.0
    assert (spd.factor(zero).zero, spd.factor(zero).succeeded) == (1, False)
    assert spd.factor(-zero + 2 * torch.ones(3, 3)).first_singular(torch.float64) == 1
