"""``torch.ops.onestep.compensated_sweep`` against the loops of GPTQ and SparseGPT, column by column in torch."""

import pytest
import torch
from torch.library import opcheck

from onestep.linalg import inverse_cholesky
from onestep.linalg.damping import unit_cholesky

sweep = torch.ops.onestep.compensated_sweep


def unit(U):
    """R with P on its diagonal, of A = R P² Rᵀ, from U of A⁻¹ = UᵀU."""
    R = torch.linalg.inv(U.double())
    return (R / R.diagonal() + (R.diagonal() - 1).diag_embed()).to(U.dtype).triu().contiguous()


def layer(rows, columns, dtype=torch.float64):
    torch.manual_seed(rows + columns)
    X = torch.randn(3 * columns, columns, dtype=dtype) @ (torch.eye(columns, dtype=dtype) + 0.3)
    A = X.mT @ X / len(X)
    return torch.randn(rows, columns, dtype=dtype), A, inverse_cholesky(A, damping=0.01).U


def grid_of(W, bits, symmetric):
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    most = 2**bits - 1
    scale = (high - low) / most
    return scale, torch.full_like(scale, (most + 1) / 2) if symmetric else (-low / scale).round()


def column_loop(W, U, bits, symmetric, group_size):
    """GPTQ without blocks (Frantar et al. 2022, algorithm 1); and the rows in which a code was a tie.

    The smallest weight of a symmetric grid is one: it lies half a step from its ends.
    """
    W = W.clone()
    codes = torch.zeros_like(W)
    error = torch.zeros_like(W[:, 0])
    tied = torch.zeros(len(W), dtype=torch.bool)
    for j in range(W.shape[1]):
        if j % group_size == 0:
            scale, zero = grid_of(W[:, j : j + group_size], bits, symmetric)
        tied |= (((W[:, j] / scale) % 1 - 0.5).abs() < 1e-9) & (W[:, j] < 0)
        codes[:, j] = ((W[:, j] / scale).round() + zero).clamp(0, 2**bits - 1)
        q = scale * (codes[:, j] - zero)
        e = (W[:, j] - q) / U[j, j]
        W[:, j + 1 :] -= e[:, None] * U[j, j + 1 :]
        W[:, j] = q
        error += e**2
    return W, codes.to(torch.uint8), error, tied


@pytest.mark.parametrize("bits,symmetric,group_size", [(4, True, 150), (3, False, 300), (2, False, 40), (8, False, 7)])
def test_quantising_is_the_column_loop(bits, symmetric, group_size):
    W, A, U = layer(70, 300)
    options = (bits, symmetric, group_size)
    swept, codes, scale, zero, error = sweep(W, U, None, None, None, *options)
    expected, expected_codes, expected_error, tied = column_loop(W, U, bits, symmetric, group_size)
    same = ~tied
    assert same.all() if not symmetric else same.sum() > 4
    assert torch.equal(codes[same], expected_codes[same])
    torch.testing.assert_close(swept[same], expected[same])
    torch.testing.assert_close(error[same], expected_error[same])
    torch.testing.assert_close(error.sum(), expected_error.sum(), rtol=0.02, atol=0)
    group = torch.arange(300) // group_size
    torch.testing.assert_close(scale[:, group] * (codes - zero[:, group]), swept)
    if group_size == 300:
        by_unit = sweep(W, unit(U), None, None, None, *options, unit=True)
        for found, before in zip(by_unit, (swept, codes, scale, zero, error), strict=True):
            torch.testing.assert_close(found, before)
    # What it says it costs is what it costs, the damping included.
    damped = A + 0.01 * A.diagonal().mean() * torch.eye(300, dtype=A.dtype)
    torch.testing.assert_close(((W - swept) @ damped * (W - swept)).sum(1), error)


def test_it_loses_less_than_rounding():
    W, A, U = layer(64, 256, torch.float32)
    swept = sweep(W, U, None, None, None, 3, True, 256)[0]
    scale, zero = grid_of(W, 3, True)
    rounded = scale[:, None] * (((W / scale[:, None]).round() + zero[:, None]).clamp(0, 7) - zero[:, None])

    def loss(found):
        return ((W - found) @ A * (W - found)).sum()

    assert loss(swept) < 0.5 * loss(rounded)


def test_grids_that_are_given():
    W, _, U = layer(5, 50)
    group = torch.arange(50) % 3
    scale, zero = torch.rand(5, 3, dtype=W.dtype) + 0.1, torch.full((5, 3), 7.0, dtype=W.dtype)
    swept, codes, *_ = sweep(W, U, scale, zero, group, 4, True)
    torch.testing.assert_close(swept, scale[:, group] * (codes - 7.0))
    assert torch.equal(sweep(W, unit(U), scale, zero, group, 4, True, unit=True)[1], codes)
    with pytest.raises(ValueError, match="group has values outside 0 to 2"):
        sweep(W, U, scale, zero, group + 1, 4, True)


@pytest.mark.parametrize("columns", [60, 300])
def test_half_of_the_weights(columns):
    W, A, U = layer(40, columns)
    swept = sweep(W, U, None, None, None, 0, False, 1, 0.5)[0]
    found = (swept == 0).double().mean().item()
    assert abs(found - 0.5) < 1e-2
    by_size = torch.where(W.abs() > W.abs().flatten().median(), W, 0)

    def loss(found):
        return ((W - found) @ A * (W - found)).sum()

    assert loss(swept) < 0.6 * loss(by_size)


def test_two_of_four_are_kept_and_the_rest_makes_up_for_it():
    W, _, U = layer(33, 264)
    swept, *_, error = sweep(W, U, None, None, None, 0, False, 1, 0.0, 2, 4)
    assert ((swept.reshape(33, 66, 4) != 0).sum(-1) == 2).all()
    expected = W.clone()
    for start in range(0, 264, 4):
        score = (expected[:, start : start + 4] / U.diagonal()[start : start + 4]) ** 2
        gone = torch.zeros_like(score).scatter_(1, score.argsort(1)[:, :2], 1.0)
        for j in range(start, start + 4):
            q = expected[:, j] * (1 - gone[:, j - start])
            expected[:, j + 1 :] -= ((expected[:, j] - q) / U[j, j])[:, None] * U[j, j + 1 :]
            expected[:, j] = q
    torch.testing.assert_close(swept, expected)
    assert error.min() > 0


def test_the_same_bits_for_any_number_of_threads():
    W, _, U = layer(500, 512, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(sweep(W, U, None, None, None, 4, True, 64, 0.3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 31, 97, 450])
def test_the_factor_without_an_inverse(n, dtype):
    _, A, _ = layer(1, n)
    R, info, damping = unit_cholesky(A.to(dtype), damping=0.01)
    assert info == 0
    assert abs(damping - 0.01) < 1e-8
    expected = unit(inverse_cholesky(A, damping=0.01).U)
    torch.testing.assert_close(R.double(), expected, rtol=0, atol=(2e-4 if dtype == torch.float32 else 1e-12))
    assert torch.equal(R, R.triu())


def test_the_factor_says_why_it_failed():
    A = torch.stack([torch.eye(40), torch.ones(40, 40), torch.eye(40), -torch.eye(40)])
    A[2, 3, 1] = torch.nan
    R, info, damping = unit_cholesky(A)
    expected = inverse_cholesky(A)
    assert torch.equal(info, expected.info)
    assert torch.equal(damping.nan_to_num(-1), expected.damping.nan_to_num(-1))
    assert R[[2, 3]].isnan().all()
    assert torch.equal(R[0], torch.eye(40))
    assert R[1].isfinite().all()
    with pytest.raises(NotImplementedError, match="unit_cholesky has no derivative"):
        unit_cholesky(torch.eye(3).requires_grad_())


def test_the_op_as_torch_sees_it():
    W, _, U = layer(4, 12, torch.float32)
    opcheck(torch.ops.onestep.unit_cholesky, (torch.eye(3).expand(2, 3, 3), torch.zeros(2)))
    opcheck(sweep, (W, U, None, None, None, 8, True, 12, 0.5, 2, 4))


def test_bad_input():
    W, R = torch.ones(2, 6), torch.eye(6)
    with pytest.raises(ValueError, match=r"factor has shape \(6, 5\); expected \(6, 6\)"):
        sweep(W, R[:, :5])
    with pytest.raises(ValueError, match="unit was given with pruning"):
        sweep(W, R, None, None, None, 4, False, 3, unit=True)
    with pytest.raises(ValueError, match="bits is 9"):
        sweep(W, R, None, None, None, 9)
    with pytest.raises(ValueError, match=r"sparsity is 1\.5"):
        sweep(W, R, None, None, None, 0, False, 1, 1.5)
    with pytest.raises(ValueError, match="keep=2 and of=4"):
        sweep(W, R, None, None, None, 0, False, 1, 0.0, 2, 4)
    grids = torch.ones(2, 1), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="group is on device meta; expected cpu, like the other operands"):
        sweep(W, R, *grids, torch.zeros(6, dtype=torch.int64, device="meta"), 4)
    with pytest.raises(ValueError, match="group was given without scale"):
        sweep(W, R, None, None, torch.zeros(6, dtype=torch.int64), 4)
