"""The same results, statuses and derivatives on every device: on a GPU, and by the CUDA kernels in emulation.

`ONESTEP_CUDA_EMULATE=1 pytest tests/test_device.py` runs the CUDA kernels on the CPU; see tests/cpp/simt.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from onestep import linalg
from onestep.linalg.damping import unit_cholesky
from onestep.ops._cuda import EMULATED

# Sizes of each kernel instance; those beyond belong to a GPU.
SMALL = (1, 5, 8, 13, 24, 32)
MIDDLE = (33, 64, 100)
LARGE = (84, 128, 150, 168, 169, 300)

# The shapes of the GPU MODE Cholesky contest are batches of orders 32 to 4096, among them ill-conditioned ones.
CONTEST = ((32, 1024), (64, 512), (128, 128), (256, 64), (512, 16), (1024, 4), (2048, 2), (4096, 1))


def sizes(device: torch.device) -> tuple[int, ...]:
    return (*SMALL, *MIDDLE, *LARGE) if device.type == "cuda" else (*SMALL, *MIDDLE)


def tolerance(dtype: torch.dtype) -> float:
    return 3e-4 if dtype == torch.float32 else 1e-10


def problem(
    device: torch.device, dtype: torch.dtype, batch: int, n: int, d: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(d)
    X, Y = torch.randn(batch, n, d, generator=generator), torch.randn(batch, n, k, generator=generator)
    weight = torch.rand(batch, n, generator=generator) + 0.1
    return X.to(device, dtype), Y.to(device, dtype), weight.to(device, dtype)


def relative(got: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def expected_solution(X: Tensor, Y: Tensor, weight: Tensor, ridge: float) -> Tensor:
    X, Y, weight = X.double(), Y.double(), weight.double()
    A = X.mT @ (X * weight.unsqueeze(-1)) + ridge * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    return torch.linalg.solve(A, X.mT @ (Y * weight.unsqueeze(-1)))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_solve_normal_and_gram(device: torch.device, dtype: torch.dtype, k: int) -> None:
    for d in sizes(device):
        X, Y, weight = problem(device, dtype, 3, d + 20, d, k)
        gram, cross = linalg.gram(X, Y, weight=weight)
        assert relative(gram, X.double().mT @ (X * weight.unsqueeze(-1)).double()) < tolerance(dtype), d
        assert relative(cross, X.double().mT @ (Y * weight.unsqueeze(-1)).double()) < tolerance(dtype), d
        assert torch.equal(gram, gram.mT)
        expected = expected_solution(X, Y, weight, 0.5)
        result = linalg.solve_normal_ex(X, Y, weight=weight, ridge=0.5)
        assert relative(result.solution, expected) < tolerance(dtype), d
        assert not result.info.any()
        A = gram.double() + 0.5 * torch.eye(d, dtype=torch.float64, device=device)
        true_rcond = 1 / (torch.linalg.matrix_norm(A, 1) * torch.linalg.matrix_norm(A.inverse(), 1))
        assert ((result.rcond.double() / true_rcond).log().abs() < 1.2).all(), d
        refined = linalg.solve_normal(X, Y, weight=weight, ridge=0.5, refine=1)
        # In float64 the expected solution has rounding errors of the same size.
        assert relative(refined, expected) < (2e-7 if dtype == torch.float32 else 1e-12), d
        assert torch.equal(result.solution, linalg.solve_normal_ex(X, Y, weight=weight, ridge=0.5).solution)


def test_layouts(device: torch.device, dtype: torch.dtype) -> None:
    """Broadcast batches, transposed and strided operands are read in place."""
    for d in (7, 40):
        X, Y, weight = problem(device, dtype, 6, d + 10, d, 2)
        expected = expected_solution(X, Y, weight, 1.0).reshape(2, 3, d, 2)
        X, Y, weight = X.reshape(2, 3, -1, d), Y.reshape(2, 3, -1, 2), weight.reshape(2, 3, -1)
        padded = torch.full((2, 3, d + 10, 2 * d), torch.nan, device=device, dtype=dtype)
        padded[..., ::2] = X
        for view in (X.mT.contiguous().mT, padded[..., ::2]):
            assert relative(linalg.solve_normal(view, Y, weight=weight, ridge=1.0), expected) < tolerance(dtype)
        ridge = torch.full((2, 1, d), 1.0, device=device, dtype=dtype)
        shared = linalg.solve_normal(X[:1, :1], Y, weight=weight, ridge=ridge)
        one = expected_solution(X[:1, :1].expand_as(X), Y, weight, 1.0)
        assert relative(shared, one) < tolerance(dtype)


@pytest.mark.parametrize("d", [6, 40, 200])
def test_failures_stay_apart(device: torch.device, dtype: torch.dtype, d: int) -> None:
    if d == 200 and (device.type == "cpu" and not EMULATED):
        pytest.skip("the blocked form is the GPU's")
    X, Y, _ = problem(device, dtype, 5, d + 10, d, 2)
    good = linalg.solve_normal_ex(X, Y)
    assert not good.info.any()
    bad_x, bad_y = X.clone(), Y.clone()
    bad_x[1, :, d - 1] = bad_x[1, :, 0]  # dependent columns: the last pivot is rounding noise
    bad_x[2, 3, d // 2] = torch.inf
    bad_y[3, 0, 1] = torch.nan
    result = linalg.solve_normal_ex(bad_x, bad_y)
    info = result.info.tolist()
    assert info[0] == 0 and info[4] == 0
    assert info[1] == d
    assert 1 <= info[2] <= d
    assert info[3] == d + 1
    for index in (0, 4):
        assert torch.equal(result.solution[index], good.solution[index])
    for index in (1, 2, 3):
        assert result.solution[index].isnan().all()
    with pytest.raises(torch.linalg.LinAlgError, match="3 of 5 problems"):
        linalg.solve_normal(bad_x, bad_y)
    healed = linalg.solve_normal_ex(bad_x, bad_y, jitter=1e-6)
    assert healed.info.tolist()[1] == 0 and healed.jitter[1] > 0
    assert healed.jitter[0] == 0


def test_cholesky_family(device: torch.device, dtype: torch.dtype) -> None:
    for d in sizes(device):
        X, Y, _ = problem(device, dtype, 3, d + 5, d, 4)
        A = X.mT @ X + torch.eye(d, device=device, dtype=dtype)
        B = Y[:, :d]
        L, info = linalg.cholesky_ex(A)
        assert not info.any()
        assert relative(L @ L.mT, A) < tolerance(dtype), d
        assert torch.equal(L, L.tril())
        expected = torch.linalg.solve(A.double(), B.double())
        assert relative(linalg.cholesky_solve(B, L), expected) < tolerance(dtype), d
        assert relative(linalg.solve_spd(A, B), expected) < tolerance(dtype), d
        by_columns = A.mT.contiguous().mT
        assert relative(linalg.solve_spd(by_columns, B), expected) < tolerance(dtype), d
        assert relative(linalg.cholesky(by_columns), L) < tolerance(dtype), d
        A[1, d // 2, d // 2] = -1.0
        broken, info = linalg.cholesky_ex(A)
        assert info.tolist() == [0, d // 2 + 1, 0], d
        assert broken[1].isnan().all()
        assert torch.equal(broken[2], L[2])


@pytest.mark.parametrize("d", [8, 40, 100, 168, 200, 1024])
def test_a_matrix_alone_has_the_factor_that_it_has_among_others(device: torch.device, d: int) -> None:
    """Beyond d = 1024 (in float64: 168) a GPU's factor is torch's where it is alone, and the bits may differ."""
    if device.type == "cpu" and d > 200:
        pytest.skip("for a GPU")
    X, _, _ = problem(device, torch.float32, 3, 2 * d, d, 1)
    A = X.mT @ X
    among, alone = linalg.cholesky(A), torch.cat([linalg.cholesky(A[i : i + 1]) for i in range(3)])
    assert torch.equal(among, alone)
    assert torch.equal(among[1], linalg.cholesky(A[1]))


@pytest.mark.skipif(not EMULATED, reason="the emulator's blocks are taken for smaller ones")
def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype) -> None:
    """Where a block cannot hold a matrix, torch's factorisation and solves take the kernels' place."""
    from onestep.ops.cholesky import cuda
    from onestep.ops.normal import cuda as normal

    def refused(name: str, dtype: torch.dtype) -> object:
        raise AssertionError(name)

    assert cuda.most_features(torch.empty(0, dtype=dtype)) == 168
    assert cuda.most_columns(44, dtype) == 4
    monkeypatch.setattr(cuda, "most_features", lambda tensor: 40)
    monkeypatch.setattr(cuda, "_MOST_BLOCKED_ALONE", 40)
    monkeypatch.setattr(cuda, "entry", refused)
    monkeypatch.setattr(normal, "entry", refused)
    X, Y, weight = problem(device, dtype, 1, 60, 44, 2)
    expected = expected_solution(X, Y, weight, 0.5)
    assert relative(linalg.solve_normal(X, Y, weight=weight, ridge=0.5), expected) < tolerance(dtype)
    A, B = X.mT @ X, Y[:, :44]
    L = linalg.cholesky(A)
    assert relative(L @ L.mT, A) < tolerance(dtype)
    assert relative(linalg.cholesky_solve(B, L), torch.linalg.solve(A.double(), B.double())) < tolerance(dtype)


@pytest.mark.parametrize(("d", "batch"), CONTEST)
@pytest.mark.parametrize("condition", [10.0, 1e6])
def test_contest_shapes(device: torch.device, d: int, batch: int, condition: float) -> None:
    """LAPACK's residual ‖A − LLᵀ‖₁ / (n ‖A‖₁ ε) stays under 30, for ill-conditioned matrices, too."""
    if device.type == "cpu":
        if d > 64:
            pytest.skip("for a GPU")
        batch = 2
    generator = torch.Generator().manual_seed(d)
    few = min(batch, 4)
    Q = torch.linalg.qr(torch.randn(few, d, d, generator=generator, dtype=torch.float64)).Q.to(device)
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), d, dtype=torch.float64, device=device)
    A = (Q * values) @ Q.mT
    A = ((A + A.mT) / 2).float().repeat(-(-batch // few), 1, 1)[:batch]
    L, info = linalg.cholesky_ex(A)
    assert not info.any()
    rest = torch.linalg.matrix_norm(A.double() - L.double() @ L.double().mT, 1)
    assert (rest / (d * torch.linalg.matrix_norm(A.double(), 1) * torch.finfo(torch.float32).eps)).max() < 30


def test_derivatives(device: torch.device) -> None:
    X, Y, weight = problem(device, torch.float64, 2, 9, 4, 2)
    ridge = torch.rand(4, dtype=torch.float64, device=device) + 0.5
    operands = tuple(t.requires_grad_() for t in (X, Y, weight, ridge))

    def solve(X: Tensor, Y: Tensor, weight: Tensor, ridge: Tensor) -> Tensor:
        return linalg.solve_normal(X, Y, weight=weight, ridge=ridge)

    assert torch.autograd.gradcheck(solve, operands, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, operands)


def test_refused_before_or_reported_after(device: torch.device) -> None:
    X, Y, weight = problem(device, torch.float32, 2, 9, 4, 1)
    weight[1, 3] = -1.0
    with pytest.raises(ValueError, match="weight"):
        linalg.solve_normal(X, Y, weight=weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("d", [16, 100, 300])
def test_cuda_graph(d: int) -> None:
    """Nothing waits for the device: calls can be captured, and a replay follows its data."""
    device = torch.device("cuda")
    X, Y, _ = problem(device, torch.float32, 70, d + 8, d, 1)
    A = X.mT @ X

    def call() -> tuple[Tensor, ...]:
        return (*torch.ops.onestep.solve_normal(X, Y), *torch.ops.onestep.cholesky(A))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    X.copy_(torch.randn_like(X))
    A.copy_(X.mT @ X)
    graph.replay()
    for got, expected in zip(captured, call(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_other_stream_and_many_problems() -> None:
    """More problems than a grid dimension holds elsewhere (65,535), on a stream of one's own."""
    X, Y, weight = problem(torch.device("cuda"), torch.float32, 70_000, 12, 4, 1)
    with torch.cuda.stream(torch.cuda.Stream()):
        solution = linalg.solve_normal(X, Y, weight=weight, ridge=0.5)
    torch.cuda.synchronize()
    assert relative(solution, expected_solution(X, Y, weight, 0.5)) < 1e-4


def test_factors_of_inverses(device: torch.device, dtype: torch.dtype) -> None:
    for d in sizes(device):
        X, _, _ = problem(device, dtype, 3, 2 * d + 5, d, 1)
        A = X.mT @ X / d
        expected = torch.linalg.cholesky(torch.linalg.inv(A.double()), upper=True)
        U, info, damping = linalg.inverse_cholesky(A)
        assert not info.any() and not damping.any()
        assert relative(U, expected) < tolerance(dtype), d
        assert torch.equal(U, U.triu())
        assert torch.equal(linalg.inverse_cholesky(A.tril().mT.contiguous().mT).U, U)
        R = unit_cholesky(A).R
        P = R.diagonal(dim1=-2, dim2=-1)
        unit = R - P.diag_embed() + torch.eye(d, device=device, dtype=dtype)
        assert relative(unit * P.square()[:, None, :] @ unit.mT, A) < tolerance(dtype), d
        A[1, d // 2, d // 2] = torch.nan
        broken, info, damping = linalg.inverse_cholesky(A)
        assert info.tolist() == [0, -1, 0]
        assert broken[1].isnan().all() and damping[1].isnan()
        assert torch.equal(broken[::2], U[::2])


SWEEPS = {
    "a scale a row": (4, True, 150),
    "groups": (3, False, 40),
    "half": (0, False, 1, 0.5),
    "half in groups": (4, False, 30, 0.5),
    "2 of 4": (0, False, 1, 0.0, 2, 4),
    "100 of 150": (0, False, 1, 0.0, 100, 150),
}


def swept_by_columns(W: Tensor, U: Tensor, options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """GPTQ and SparseGPT without blocks but for where they judge; the weights, and the errors."""
    bits, symmetric, group_size, sparsity, keep, of = (*options, *(0, False, 1, 0.0, 0, 0)[len(options) :])
    W, error = W.clone(), W.new_zeros(len(W))
    block = 128 // group_size * group_size if bits and group_size <= 128 else of or 128
    gone = torch.zeros_like(W, dtype=torch.bool)
    for j in range(W.shape[1]):
        if sparsity and j % block == 0:
            scores = (W[:, j : j + block] / U.diagonal()[j : j + block]).square()
            gone[:, j : j + block] = scores <= scores.flatten().sort().values[round(scores.numel() * sparsity) - 1]
        if of and j % of == 0:
            order = (W[:, j : j + of] / U.diagonal()[j : j + of]).square().argsort(1)
            gone[:, j : j + of].scatter_(1, order[:, : of - keep], True)
        if bits and j % group_size == 0:
            part = W[:, j : j + group_size]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            if symmetric:
                high = torch.maximum(high, -low)
                low = -high
            scale = (high - low) / (2**bits - 1)
            zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
        q = W[:, j].masked_fill(gone[:, j], 0.0)
        if bits:
            q = scale * (((q / scale).round() + zero).clamp(0, 2**bits - 1) - zero)
        e = (W[:, j] - q) / U[j, j]
        W[:, j + 1 :] -= e[:, None] * U[j, j + 1 :]
        W[:, j] = q
        error += e.square()
    return W, error


@pytest.mark.parametrize("name", SWEEPS)
def test_compensated_sweep(device: torch.device, dtype: torch.dtype, name: str) -> None:
    X, Y, _ = problem(device, dtype, 1, 700, 300, 35)
    W, U = Y[0].mT @ X[0] / 30, linalg.inverse_cholesky(X[0].mT @ X[0] / 300).U
    found = torch.ops.onestep.compensated_sweep(W, U, None, None, None, *SWEEPS[name])
    expected, error = swept_by_columns(W, U, SWEEPS[name])
    # A tie may go the other way, as the least weight of a symmetric grid is one, and all that follows in its row.
    if dtype == torch.float64 and "row" not in name:
        assert relative(found[0], expected) < 1e-9
        assert relative(found[4], error) < 1e-9
    else:
        assert ((found[0] - expected).abs() < 1e-3).double().mean() > (0.6 if "row" in name else 0.97)
        assert abs(found[4].sum() / error.sum() - 1) < 0.02
    assert all(
        torch.equal(one, two)
        for one, two in zip(
            found, torch.ops.onestep.compensated_sweep(W, U, None, None, None, *SWEEPS[name]), strict=True
        )
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_wait_for_nothing_and_are_captured() -> None:
    device = torch.device("cuda")
    X, Y, _ = problem(device, torch.float32, 1, 700, 300, 35)
    A, W, damping = X[0].mT @ X[0], Y[0].mT @ X[0], torch.zeros((), device=device)
    group = torch.arange(300, device=device) % 2
    scale, zero = torch.full((35, 2), 0.5, device=device), torch.full((35, 2), 7.0, device=device)
    ops = torch.ops.onestep

    def call() -> tuple[Tensor, ...]:
        U, info = ops.inverse_cholesky(A, damping)
        R, _ = ops.unit_cholesky(A, damping)
        results = [U, info, R]
        results += ops.compensated_sweep(W, R, scale, zero, group, 4, unit=True)[:2]
        for options in SWEEPS.values():
            results += ops.compensated_sweep(W, U, None, None, None, *options)
        return tuple(results)

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    W.mul_(1.5)
    A.diagonal().mul_(1.1)
    graph.replay()
    for got, expected in zip(captured, call(), strict=True):
        assert torch.equal(got, expected)
