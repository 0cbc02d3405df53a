"""The compensated sweep and its factors by their CUDA kernels: on a GPU, or by ONESTEP_CUDA_EMULATE=1 on the emulator.

What tests/test_device.py holds of every device is not repeated: here are the paths that only CUDA has, and whether its
results are those of the CPU's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from onestep.linalg import inverse_cholesky
from onestep.linalg.damping import unit_cholesky
from onestep.ops import _cuda
from onestep.ops.compensated import cpu

ON_GPU = _cuda.native is not None and not _cuda.EMULATED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = pytest.mark.skipif(not (ON_GPU or _cuda.EMULATED), reason="needs a GPU, or ONESTEP_CUDA_EMULATE=1")

sweep = torch.ops.onestep.compensated_sweep


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(5)
    yield


def layer(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """W and a Gram matrix, on the CPU."""
    X = torch.randn(3 * columns, columns, dtype=dtype) @ (torch.eye(columns, dtype=dtype) + 0.3)
    return torch.randn(rows, columns, dtype=dtype), X.mT @ X / len(X)


def to_device(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.to(DEVICE) for tensor in tensors)


# bits, symmetric, group_size, sparsity, keep, of, unit; and whether grids are given.
OPTIONS: dict[str, tuple[tuple[Any, ...], bool]] = {
    "a scale a row": ((4, False, 300, 0.0, 0, 0, False), False),
    "a scale a row, R": ((4, False, 300, 0.0, 0, 0, True), False),
    "groups": ((3, False, 20, 0.0, 0, 0, False), False),
    "long groups": ((2, False, 200, 0.0, 0, 0, False), False),
    "grids given": ((4, False, 1, 0.0, 0, 0, False), True),
    "grids given, R": ((4, True, 1, 0.0, 0, 0, True), True),
    "half": ((0, False, 1, 0.5, 0, 0, False), False),
    "2 of 4": ((0, False, 1, 0.0, 2, 4, False), False),
    "100 of 150": ((0, False, 1, 0.0, 100, 150, False), False),
    "2 of 4 in groups": ((4, False, 12, 0.0, 2, 4, False), False),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_cpus_results(name: str) -> None:
    """In float64, where no tie is near: its codes and masks, and its numbers to rounding."""
    options, given = OPTIONS[name]
    W, A = layer(37, 300)
    factor = (unit_cholesky if options[-1] else inverse_cholesky)(A, damping=0.01)[0]
    grids: tuple[Any, ...] = (None, None, None)
    if given:
        grids = torch.rand(37, 3, dtype=W.dtype) + 0.1, torch.full((37, 3), 7.0, dtype=W.dtype), torch.arange(300) % 3
    expected = cpu._compensated_sweep(W, factor, *grids, *options)
    found = sweep(*to_device(W, factor, *grids), *options)
    assert torch.equal(found[1].cpu(), expected[1])
    assert torch.equal(found[0].cpu() == 0, expected[0] == 0)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_the_cpus_factors(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    for n in (1, 20, 60, 150, 180):
        A = torch.stack([layer(1, n, dtype)[1] for _ in range(6 if batch else 1)]).reshape(*batch, n, n)
        damping = torch.rand(batch, dtype=dtype) / 10
        for mine, theirs in (
            (torch.ops.onestep.inverse_cholesky, cpu._inverse_cholesky),
            (torch.ops.onestep.unit_cholesky, cpu._unit_cholesky),
        ):
            (found, info), (expected, other) = mine(*to_device(A, damping)), theirs(A, damping)
            assert torch.equal(info.cpu(), other)
            tolerance = 1e-4 if dtype == torch.float32 else 1e-11
            torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


def test_ranges_and_dependence_are_told_without_a_wait() -> None:
    """A batch of matrices that are fine, near both ends of the range, dependent, indefinite, and not finite."""
    good, n = layer(1, 30, torch.float32)[1], 30
    rows = torch.randn(90, n)
    rows[:, 10] = rows[:, 11:].sum(1)
    bad = good.clone()
    bad[20, 3] = torch.inf
    A = torch.stack([good, good * 2.0**120, good * 2.0**-100, rows.mT @ rows, -good, bad, torch.zeros(n, n)])
    zero = torch.zeros(())
    for mine, theirs in (
        (torch.ops.onestep.inverse_cholesky, cpu._inverse_cholesky),
        (torch.ops.onestep.unit_cholesky, cpu._unit_cholesky),
    ):
        found, info = mine(*to_device(A, zero))
        expected, other = theirs(A, zero)
        assert (info.cpu()[[0, 1, 2, 4, 5, 6]] == other[[0, 1, 2, 4, 5, 6]]).all()
        assert info[3] > 0 and other[3] > 0
        assert info[5] == -1
        assert found[3:].isnan().all()
        for got, wanted in zip(found[:3].cpu().double(), expected[:3].double(), strict=True):
            assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_noise_before_a_pivot_that_fails_is_the_status() -> None:
    """The sixth feature from the end is the fifth, and one far before makes the matrix indefinite."""
    for _ in range(12):
        X = torch.randn(900, 300, dtype=torch.float64)
        X[:, -6] = X[:, -5]
        A = X.mT @ X / 900
        A[200, 200] = -1.0
        for op in (torch.ops.onestep.inverse_cholesky, torch.ops.onestep.unit_cholesky):
            # Of one matrix of this order, the factor is torch's.
            factor, info = op(*to_device(A, torch.zeros((), dtype=A.dtype)))
            assert info == 6 and factor.isnan().all()


def test_groups_that_there_are_no_grids_of() -> None:
    W, A = layer(5, 40)
    U = inverse_cholesky(A).U
    group = torch.arange(40) % 3
    scale, zero = torch.rand(5, 3, dtype=W.dtype) + 0.1, torch.full((5, 3), 7.0, dtype=W.dtype)
    group[30] = 3
    operands = to_device(W, U, scale, zero, group)
    if not ON_GPU:
        with pytest.raises(ValueError, match="group has values outside 0 to 2"):
            sweep(*operands, 4)
        return
    swept, *_, error = sweep(*operands, 4)
    assert swept[:, :30].isfinite().all() and swept[:, 30].isnan().all() and error.isnan().all()


def test_strided_operands_and_no_rows() -> None:
    W, A = layer(6, 50)
    U = inverse_cholesky(A).U
    expected = sweep(*to_device(W, U), None, None, None, 4, False, 10)
    wide = torch.full((6, 100), torch.nan, dtype=W.dtype)
    wide[:, ::2] = W
    found = sweep(*(t[:, ::2] if t.shape[1] == 100 else t.mT.contiguous().mT for t in to_device(wide, U)),
                  None, None, None, 4, False, 10)  # fmt: skip
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
    empty = sweep(*to_device(W[:0], U), None, None, None, 4, False, 10)
    assert [tuple(part.shape) for part in empty] == [(0, 50), (0, 50), (0, 5), (0, 5), (0,)]
    assert sweep(*to_device(W[:, :0], U[:0, :0]), None, None, None, 4, False, 10)[4].tolist() == [0.0] * 6
