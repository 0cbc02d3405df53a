"""``linalg.inverse_cholesky``: values, failures and damping, derivatives, threads."""

import threading

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from onestep.linalg import inverse_cholesky
from onestep.linalg.damping import more_damping, unit_cholesky
from onestep.ops._cuda import EMULATED


def gram_of(n, *batch, rows=None, dtype=torch.float64):
    X = torch.randn(*batch, rows or 2 * n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return (X.mT @ X / X.shape[-2]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch,n", [((), 1), ((), 130), ((2, 3), 7), ((), 450)])
def test_it_is_the_factor_of_the_inverse(batch, n, dtype):
    A = gram_of(n, *batch, dtype=dtype)
    U, info, damping = inverse_cholesky(A)
    expected = torch.linalg.cholesky(torch.linalg.inv(A.double()), upper=True)
    torch.testing.assert_close(U.double(), expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-12)
    assert torch.equal(U, U.triu())
    assert info.dtype == torch.int32
    assert not info.any()
    assert not damping.any()
    assert torch.equal(inverse_cholesky(A, upper=False).U, U.mT)


def test_only_the_lower_triangle_is_read_through_any_strides():
    A = gram_of(40)
    expected = inverse_cholesky(A).U
    assert torch.equal(inverse_cholesky(A.tril()).U, expected)
    wide = torch.full((80, 120), torch.nan, dtype=A.dtype)
    wide[::2, ::3] = A
    assert torch.equal(inverse_cholesky(wide[::2, ::3]).U, expected)
    assert torch.equal(inverse_cholesky(A.mT.contiguous().mT).U, expected)
    assert torch.equal(inverse_cholesky(A.expand(2, 40, 40)).U[1], expected)


def test_damping_goes_up_tenfold_from_noise_to_one():
    """The last one is tried even where tenfold goes past it."""
    tried = torch.tensor([0.0, 1e-9, 1e-6, 3e-2, 0.5, 1.0, 7.0], dtype=torch.float64)
    expected = torch.tensor([1e-6, 1e-6, 1e-5, 0.3, 1.0, torch.nan, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(more_damping(tried, torch.float32), expected, equal_nan=True, rtol=1e-12, atol=0)
    expected[:3] = torch.tensor([1e-12, 1e-8, 1e-5], dtype=torch.float64)
    torch.testing.assert_close(more_damping(tried, torch.float64), expected, equal_nan=True, rtol=1e-12, atol=0)


def test_damping_adds_to_the_diagonal_and_the_units_of_features_do_not_matter():
    A = gram_of(30)
    damped = A + 0.1 * A.diagonal().mean() * torch.eye(30, dtype=A.dtype)
    torch.testing.assert_close(inverse_cholesky(A, damping=0.1).U, inverse_cholesky(damped).U)
    units = torch.logspace(-6, 6, 30, dtype=A.dtype)
    U, info, _ = inverse_cholesky(units[:, None] * A * units)
    assert info == 0
    torch.testing.assert_close(U * units, inverse_cholesky(A).U, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_failures_are_told_apart_and_leave_their_neighbours_alone(dtype):
    A = gram_of(50, 5, dtype=dtype)
    good = inverse_cholesky(A).U
    A[1, 30, 4] = torch.nan
    A[2] = gram_of(50, rows=20, dtype=dtype)  # of rank 20
    A[3] = -torch.eye(50)
    U, info, damping = inverse_cholesky(A)
    assert torch.equal(U[[0, 4]], good[[0, 4]])
    assert info[[0, 1, 4]].tolist() == [0, -1, 0]
    assert 21 <= info[2] <= 50
    assert info[3] == 1
    assert damping[[0, 4]].tolist() == [0, 0]
    assert damping[[1, 3]].isnan().all()
    assert U[[1, 3]].isnan().all()
    # What was reported is what was added.
    assert 0 < damping[2] <= 1e-3
    assert torch.equal(U[2], inverse_cholesky(A[2], damping=damping[2]).U)


@pytest.mark.parametrize("factor", [inverse_cholesky, unit_cholesky])
def test_damping_goes_up_to_1_from_wherever_it_begins(factor):
    # Indefinite by 0.9 of the mean diagonal element: 0.5 is too little, 1 is enough.
    A = torch.full((4, 4), 1.9, dtype=torch.float64).fill_diagonal_(1.0)
    assert torch.linalg.eigvalsh(A).min() == pytest.approx(-0.9)
    for damping in (0.5, 0.2, 0.09):
        result = factor(A, damping=damping)
        # Of 0.09 the tenfold, 0.9, leaves it singular.
        assert result.damping == 1.0
        assert result.info > 0
        assert result[0].isfinite().all()
    for damping in (1.0, 7.0):
        assert factor(A, damping=damping).info == 0
        assert factor(10 * A - 9 * torch.eye(4) * 10, damping=damping).damping.isnan()


def test_derivatives():
    A = gram_of(4, 2).requires_grad_()

    def factor(A):
        return inverse_cholesky((A + A.mT) / 2, damping=0.3).U  # the gradient of a symmetric A is symmetric

    assert gradcheck(factor, A, check_forward_ad=True)
    assert gradgradcheck(factor, A)
    rows, tangent = A.detach(), gram_of(4)
    _, found = torch.func.jvp(torch.vmap(lambda A: inverse_cholesky(A).U), (rows,), (tangent.expand(2, 4, 4),))
    step = 1e-6
    expected = (inverse_cholesky(rows + step * tangent).U - inverse_cholesky(rows - step * tangent).U) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_what_failed_is_zero():
    A = gram_of(4, 2)
    A[0, 1, 0] = torch.nan
    A.requires_grad_()
    inverse_cholesky(A).U[1].sum().backward()
    assert A.grad[0].eq(0).all()
    assert A.grad[1].isfinite().all() and A.grad[1].any()


@pytest.mark.skipif(EMULATED, reason="torch factors large matrices then, whose bits depend on its threads")
def test_the_same_bits_from_four_threads_and_for_any_number_of_them():
    A = gram_of(700, dtype=torch.float32)
    expected = inverse_cholesky(A).U
    found = [None] * 4

    def call(index):
        found[index] = inverse_cholesky(A).U

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(U, expected) for U in found)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(inverse_cholesky(A).U, expected)
    finally:
        torch.set_num_threads(before)


def test_bad_input():
    with pytest.raises(ValueError, match=r"A has shape \(2, 3\); expected square"):
        inverse_cholesky(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"A has shape \(3,\); expected square"):
        inverse_cholesky(torch.ones(3))
    with pytest.raises(TypeError, match=r"A has dtype torch.int64"):
        inverse_cholesky(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="damping=-1"):
        inverse_cholesky(torch.eye(2), damping=-1)
    with pytest.raises(ValueError, match="damping has values that are negative or not finite"):
        inverse_cholesky(torch.eye(2), damping=torch.tensor(torch.nan))
    with pytest.raises(ValueError, match=r"do not broadcast: got \(2,\), \(3,\)"):
        inverse_cholesky(torch.eye(2).expand(2, 2, 2), damping=torch.zeros(3))
    for upper in ("no", 0, None):
        with pytest.raises(TypeError, match=f"upper is {upper!r}; expected True or False"):
            inverse_cholesky(torch.eye(2), upper=upper)
    assert inverse_cholesky(torch.ones(0, 3, 3)).U.shape == (0, 3, 3)
    assert inverse_cholesky(torch.ones(2, 0, 0)).info.tolist() == [0, 0]
    with pytest.raises(NotImplementedError, match="rounding has none"):
        torch.ops.onestep.compensated_sweep(torch.ones(2, 2, requires_grad=True), torch.eye(2))


def test_half_precision_is_computed_in_float32():
    A = torch.eye(3, dtype=torch.bfloat16) * 4
    assert torch.equal(inverse_cholesky(A).U, torch.eye(3) / 2)


def dependent(kind, n, dtype, generator):
    """Rows of n features of which some depend on each other, and the order of the trailing minor that has them."""
    X = torch.randn(3 * n, n, dtype=torch.float64, generator=generator)
    weights = torch.randn(n, dtype=torch.float64, generator=generator)
    order = n
    if kind == "one is a sum of the others":
        X[:, n // 3] = 0
        X[:, n // 3] = X.sum(1)
    elif kind == "the last is a mean of the others, which have means":
        X += 10
        X[:, -1] = X[:, :-1].mean(1)
    elif kind == "any combination of the second half":
        order = n - n // 2
        X[:, -1] = X[:, n // 2 : -1] @ weights[n // 2 : -1].sign()
    elif kind == "of many scales":
        X *= torch.logspace(-4, 4, n, dtype=torch.float64)
        X[:, 0] = X[:, 1:] @ (torch.logspace(4, -4, n, dtype=torch.float64) * weights.sign())[1:]
    return X.to(dtype), order


KINDS = [
    "one is a sum of the others",
    "the last is a mean of the others, which have means",
    "any combination of the second half",
    "of many scales",
]


@pytest.mark.parametrize("factor", [inverse_cholesky, unit_cholesky])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_one_dependence_among_many_features_is_told(kind, dtype, factor):
    """About half of these have a last pivot above 8 ε, of rounding alone, which was taken for a feature of its own."""
    generator = torch.Generator().manual_seed(0)
    for n in (6, 30, 150):
        rows, orders = zip(*(dependent(kind, n, dtype, generator) for _ in range(12)), strict=True)
        X = torch.stack(rows)
        A = X.mT @ X
        A[5] = gram_of(n, dtype=dtype)
        found, info, damping = factor(A)
        assert info[5] == damping[5] == 0 and torch.equal(found[5], factor(A[5])[0])
        others = [*range(5), *range(6, 12)]
        assert (info[others] > 0).all() and (info[others] <= orders[0]).all()
        # The kernel names the last of a sum's features where it meets a pivot of noise.
        assert (info[others] >= 2).all()
        assert (damping[others] > 0).all() and (damping[others] <= 1e-3).all()
        assert found.isfinite().all()
        # Inside a transform nothing is damped.
        found, info, damping = torch.vmap(factor)(A)
        assert (info[others] > 0).all() and damping[others].isnan().all() and found[others].isnan().all()
        assert info[5] == 0 and found[5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_far_from_singular_is_not_told(dtype):
    """Many small eigenvalues, and a condition number a little below 1 / (8 ε), are no dependence."""
    n, eps = 200, torch.finfo(dtype).eps
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    for small in (1, n // 2):
        values = torch.ones(n, dtype=torch.float64)
        values[:small] = 40 * eps
        A = (Q * values) @ Q.mT
        scale = A.diagonal().rsqrt()
        A = (scale[:, None] * A * scale).to(dtype)
        for factor in (inverse_cholesky, unit_cholesky):
            assert factor((A + A.mT) / 2).info == 0


@pytest.mark.parametrize("factor", [inverse_cholesky, unit_cholesky])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_range(dtype, factor):
    """Powers of two change no bit; matrices beside them in a batch are left as they are."""
    A, top = gram_of(20, dtype=dtype), torch.finfo(dtype).max
    plain = factor(A)[0]
    power = torch.ones(20, 20, dtype=dtype)
    for exponent in (120 if dtype == torch.float32 else 1020, -100 if dtype == torch.float32 else -960):
        far = A * 2.0**exponent
        found, info, damping = factor(torch.stack([A, far]))
        assert info.tolist() == [0, 0] and damping.tolist() == [0, 0]
        half = power * 2.0 ** (-exponent // 2)
        if factor is unit_cholesky:
            half = torch.where(torch.eye(20).bool(), 1 / half, 1.0)
        assert torch.equal(found[0], plain) and torch.equal(found[1], plain * half)
    eye = torch.eye(3, dtype=dtype)
    for scale in (top, top / 2, torch.finfo(dtype).tiny, torch.finfo(dtype).tiny / 2**10):
        found, info, _ = factor(scale * eye, damping=0.5)
        expected = 1.5**-0.5 * scale**-0.5
        got = float(found[0, 0]) if factor is inverse_cholesky else 1 / float(found[0, 0])
        assert info == 0 and got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factor", [inverse_cholesky, unit_cholesky])
@pytest.mark.parametrize("dtype,sizes", [(torch.float32, (1e38, 1e-10)), (torch.float64, (1e308, 1e-300))])
def test_both_ends_of_the_range_in_one_matrix(dtype, sizes, factor):
    A = torch.diag(torch.tensor(sizes, dtype=dtype))
    for order in (A, A.flip(0, 1)):
        found, info, damping = factor(order)
        power = -0.5 if factor is inverse_cholesky else 0.5
        expected = torch.tensor([float(a) ** power for a in order.diagonal().double()], dtype=dtype)
        assert info == 0 and damping == 0
        torch.testing.assert_close(found.diagonal(), expected)
    # Much damping of a large matrix, whose factor has values in the range although the damped matrix has not.
    found = factor(torch.full((1, 1), sizes[0], dtype=dtype), damping=1e4)[0]
    torch.testing.assert_close(found[0, 0], torch.tensor(sizes[0], dtype=dtype) ** power * 10001.0**power)
