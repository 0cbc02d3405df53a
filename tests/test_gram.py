"""gram and moments: against fp64, symmetry, offsets, strides, and the edges."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from cases import CASES, Case, assert_as_accurate, assert_bitwise, named, over
from torch import Tensor

from onestep.linalg import gram, moments, solve_normal


def exact_gram(X: Tensor, Y: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """XᵀDX and XᵀDY, summed in extended precision and rounded to fp64."""
    batch = torch.broadcast_shapes(X.shape[:-2], Y.shape[:-2], () if weight is None else weight.shape[:-1])
    D = X.new_ones(X.shape[-2]) if weight is None else weight
    X_wide, Y_wide = cases.extended(X), cases.extended(Y)
    scaled = np.swapaxes(X_wide * cases.extended(D)[..., None], -1, -2)
    products, cross = cases.rounded(scaled @ X_wide), cases.rounded(scaled @ Y_wide)
    return products.expand(*batch, *products.shape[-2:]), cross.expand(*batch, *cross.shape[-2:])


# Penalties and the factor's edges do not matter here.
SHAPES = [case for case in CASES if not case.name.startswith(("ridge-", "factor-2"))]


@over(SHAPES)
def test_gram_is_as_accurate_as_torch(case, dtype):
    X, Y, weight, _ = cases.inputs(case, dtype)
    scaled = X if weight is None else X * weight.unsqueeze(-1)
    products, cross = gram(X, Y, weight=weight)
    expected, expected_cross = exact_gram(X, Y, weight)
    assert products.is_contiguous()
    assert cross.is_contiguous()
    assert_as_accurate(products, X.mT @ scaled, expected)
    assert_as_accurate(cross, scaled.mT @ Y, expected_cross)


@over(named("packed-d7-k7", "panel-d73-k1", "factor-290", "rows-8193", "rows-8200-wide", "strided-blocked", "batch-9d"))
def test_gram_is_exactly_symmetric(case, dtype):
    X, Y, weight, _ = cases.inputs(case, dtype)
    products, _ = gram(X, Y, weight=weight)
    assert_bitwise(products, products.mT)


@over([case for case in CASES if case.layout in ("transposed", "strided", "offset")])
def test_strided_is_bitwise_contiguous(case, dtype):
    given = cases.inputs(case, dtype)
    for part, plain in zip(
        gram(given.X, given.Y, weight=given.weight),
        gram(*given.contiguous()[:2], weight=given.contiguous().weight),
        strict=True,
    ):
        assert_bitwise(part, plain)


@pytest.mark.parametrize(("n", "d"), [(20, 3), (90, 40), (9000, 5)])
def test_gram_without_targets(n, d, dtype):
    X, Y, _, _ = cases.inputs(Case("alone", n=n, d=d, batch=(2,)), dtype)
    products, cross = gram(X)
    assert cross.shape == (2, d, 0)
    assert_as_accurate(products, X.mT @ X, exact_gram(X, Y, None)[0])


@pytest.mark.parametrize("d", [3, 40])
def test_gram_with_vector_targets(d, dtype):
    X, Y, weight, _ = cases.inputs(Case("vector", n=3 * d, d=d, k=1, batch=(4,), weighted=True), dtype)
    products, cross = gram(X, Y[..., 0], weight=weight)
    matrix, column = gram(X, Y, weight=weight)
    assert cross.shape == (4, d)
    assert_bitwise(products, matrix)
    assert_bitwise(cross, column[..., 0])


def test_gram_of_integers_is_exact(dtype):
    """Small integers leave nothing to round, whatever the order of summation; weights are squares of integers."""
    generator = cases.seeded("integers")
    X = torch.randint(-3, 4, (3, 500, 37), generator=generator).to(dtype)
    Y = torch.randint(-3, 4, (3, 500, 5), generator=generator).to(dtype)
    weight = torch.randint(0, 3, (3, 500), generator=generator).to(dtype).square()
    expected = exact_gram(X, Y, weight)
    products, cross = gram(X, Y, weight=weight)
    assert_bitwise(products.double(), expected[0])
    assert_bitwise(cross.double(), expected[1])


# From 16 panels on, columns are summed in groups: in the inputs' type up to 4096 rows, in double beyond. Targets lie in
# groups of their own, or share one with features.
@pytest.mark.parametrize(("n", "d", "k"), [(140, 390, 130), (4100, 401, 2)])
def test_groups_of_columns_are_exact(n, d, k, dtype):
    generator = cases.seeded("groups of columns")
    X = torch.randint(-3, 4, (2, n, d), generator=generator).to(dtype)
    Y = torch.randint(-3, 4, (2, n, k), generator=generator).to(dtype)
    expected = X.double().mT @ X.double(), X.double().mT @ Y.double()
    for found, right in zip(gram(X, Y), expected, strict=True):
        assert_bitwise(found.double(), right)
    found = moments(X[0], Y[0])
    assert_bitwise(found.gram, expected[0][0])
    assert_bitwise(found.cross, expected[1][0])
    # [A | R] goes on to be solved: R of A's own columns, so the solution is known.
    W = torch.randint(-3, 4, (2, d, k), generator=generator).to(dtype)
    if n > d:
        torch.testing.assert_close(solve_normal(X, X @ W), W, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [(), (19,)])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_gram_of_half_precision_is_float32(half, batch):
    X, Y, weight, _ = cases.inputs(Case("half", n=20, d=5, batch=batch, weighted=True), torch.float32)
    ours = gram(X.to(half), Y.to(half), weight=weight.to(half))
    wide = gram(X.to(half).float(), Y.to(half).float(), weight=weight.to(half).float())
    for part, expected in zip(ours, wide, strict=True):
        assert part.dtype == torch.float32
        assert_bitwise(part, expected)


# Many problems are computed one in each vector lane, one alone is not; up to 4096 rows, 32 features and 16 targets.
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 1, 0), (5, 9, 2), (40, 8, 1), (130, 3, 5), (300, 32, 16), (4096, 2, 1), (4097, 2, 1)]
)
def test_a_gram_matrix_depends_on_its_own_rows_alone(n, d, k, weighted, dtype):
    """Bitwise the same alone, in any place of a batch, and in a batch of any size."""
    X, Y, weight, _ = cases.inputs(Case("apart", n=n, d=d, k=k, batch=(37,), weighted=weighted), dtype)

    def problems(some: slice) -> tuple[Tensor, ...]:
        return gram(X[some], Y[some], weight=None if weight is None else weight[some])

    together = problems(slice(None))
    for some in (slice(0, 1), slice(36, 37), slice(3, 20), slice(5, 13), slice(1, 37, 3)):
        for part, apart in zip(together, problems(some), strict=True):
            assert_bitwise(part[some], apart)


def test_gram_of_nothing(dtype):
    """No rows give zeros, no features an empty matrix."""
    products, cross = gram(torch.zeros(2, 0, 5, dtype=dtype), torch.zeros(2, 0, 3, dtype=dtype))
    assert_bitwise(products, torch.zeros(2, 5, 5, dtype=dtype))
    assert_bitwise(cross, torch.zeros(2, 5, 3, dtype=dtype))
    products, cross = gram(torch.ones(4, 0, dtype=dtype), torch.ones(4, 3, dtype=dtype))
    assert products.shape == (0, 0)
    assert cross.shape == (0, 3)


def test_float32_gram_of_many_rows_does_not_drift():
    """Slabs are added up in fp64: a million rows of ones count exactly, where float32 alone could drift."""
    products, cross = gram(torch.full((1_000_000, 1), 1.1), torch.ones(1_000_000, 1))
    exact = float(torch.tensor(1.1)) ** 2 * 1e6
    assert products.item() == pytest.approx(exact, rel=1e-6)
    assert cross.item() == pytest.approx(float(torch.tensor(1.1)) * 1e6, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- moments


def table(n: int, d: int, k: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = cases.seeded(f"table {n} {d} {k}")
    Z = torch.randn(n, d + k, dtype=torch.float64, generator=generator)
    Z += offset * (1 + torch.arange(d + k) / (d + k))
    weight = 0.5 + torch.rand(n, dtype=torch.float64, generator=generator)
    return Z[:, :d].to(dtype), Z[:, d:].to(dtype), weight.to(dtype)


def exact_moments(X: Tensor, Y: Tensor, weight: Tensor | None, center: bool) -> tuple[Tensor, ...]:
    """The definition, in fp64 and two passes."""
    X, Y = X.double(), Y.double()
    w = torch.ones(len(X), dtype=torch.float64) if weight is None else weight.double()
    x_mean, y_mean = X.new_zeros(X.shape[1]), Y.new_zeros(Y.shape[1])
    if center:
        x_mean, y_mean = w @ X / w.sum(), w @ Y / w.sum()
        X, Y = X - x_mean, Y - y_mean
        # The mean of what is left repairs the rounding of the means.
        x_mean, y_mean = x_mean + w @ X / w.sum(), y_mean + w @ Y / w.sum()
        X, Y = X - w @ X / w.sum(), Y - w @ Y / w.sum()
    scaled = w.unsqueeze(-1) * X
    return X.T @ scaled, scaled.T @ Y, x_mean, y_mean, w.sum()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (2, 3, 1), (100, 5, 2), (129, 11, 1), (130, 12, 1), (500, 47, 3),
                                           (4097, 6, 1), (8193, 23, 2), (20_011, 24, 24)])  # fmt: skip
def test_moments(n, d, k, weighted, center, dtype):
    X, Y, weight = table(n, d, k, dtype, offset=1.0)
    weight = weight if weighted else None
    ours = moments(X, Y, weight=weight, center=center)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    expected = exact_moments(X, Y, weight, center)
    scale = float(expected[0].norm()) if n > 1 else float(X.double().norm() ** 2)
    for name, actual, exact in zip(ours._fields, ours, expected, strict=True):
        assert actual.dtype == torch.float64
        assert actual.shape == exact.shape
        size = scale if name in ("gram", "cross") else max(float(exact.norm()), 1e-30)
        error = float((actual - exact).norm())
        bound = tolerance * size if name != "x_mean" else tolerance * max(size, 1.0)
        assert error <= bound, f"{name}: {error / size:.2e}"
    assert_bitwise(ours.gram, ours.gram.T)
    if not center:
        assert not ours.x_mean.any()
        assert not ours.y_mean.any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1000, 30_000])
def test_a_large_offset_does_not_cancel(n, weighted):
    """Means 1e4 times the spread: float32 sums of squares keep nothing, the shifted ones five digits and more."""
    X, Y, weight = table(n, 7, 2, torch.float32, offset=1e4)
    weight = weight if weighted else None
    ours = moments(X, Y, weight=weight, center=True)
    products, cross, x_mean, y_mean, _ = exact_moments(X, Y, weight, True)
    assert relative(ours.gram, products) < 1e-5
    assert float((ours.cross - cross).norm() / products.norm()) < 1e-5
    assert relative(ours.x_mean, x_mean) < 1e-9
    assert relative(ours.y_mean, y_mean) < 1e-9
    # What the offset does to a formula that does not shift.
    w = torch.ones(n) if weight is None else weight
    naive = X.T @ (w.unsqueeze(-1) * X) - w.sum() * torch.outer(w @ X / w.sum(), w @ X / w.sum())
    assert relative(naive.double(), products) > 1e-2


def test_a_large_offset_in_float64():
    X, Y, _ = table(5000, 7, 2, torch.float64, offset=1e8)
    ours = moments(X, Y, center=True)
    products, _, x_mean, _, _ = exact_moments(X, Y, None, True)
    assert relative(ours.gram, products) < 1e-12
    assert relative(ours.x_mean, x_mean) < 1e-15


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("n", [300, 9000])
def test_moments_read_any_layout(n, center, layout, dtype):
    """Fortran order (transposed), every third column, an unaligned start: bitwise as the contiguous copy."""
    X, Y, weight = table(n, 13, 2, dtype, offset=3.0)
    expected = moments(X.contiguous(), Y.contiguous(), weight=weight, center=center)
    ours = moments(
        cases.lay_out(X, layout), cases.lay_out(Y, layout), weight=cases.lay_out(weight, layout, 1), center=center
    )
    for part, plain in zip(ours, expected, strict=True):
        assert_bitwise(part, plain)


@pytest.mark.parametrize("center", [False, True])
def test_moments_without_rows(center, dtype):
    ours = moments(torch.zeros(0, 3, dtype=dtype), torch.zeros(0, 2, dtype=dtype), center=center)
    assert [part.shape for part in ours] == [(3, 3), (3, 2), (3,), (2,), ()]
    assert not any(part.any() for part in ours)


@pytest.mark.parametrize("center", [False, True])
def test_moments_without_targets(center, dtype):
    X, _, weight = table(700, 5, 0, dtype)
    ours = moments(X, X[:, :0], weight=weight, center=center)
    with_targets = moments(X, X[:, :2], weight=weight, center=center)
    assert ours.cross.shape == (5, 0)
    assert ours.y_mean.shape == (0,)
    torch.testing.assert_close(ours.gram, with_targets.gram, rtol=1e-6, atol=1e-3)
    assert ours.weight_sum.item() == pytest.approx(weight.double().sum().item(), rel=1e-6)


def test_constant_column_has_zero_spread(dtype):
    """A column of one value centres to exact zeros, and the weights of 0 leave rows out of the means."""
    X, Y, _ = table(1000, 3, 1, dtype)
    X[:, 1] = 12345.678
    weight = torch.ones(1000, dtype=dtype)
    weight[::2] = 0
    X[::2, 1] = -1e6
    ours = moments(X, Y, weight=weight, center=True)
    spread = ours.gram[1].abs().max() / ours.gram[0, 0]
    assert spread < (1e-6 if dtype == torch.float32 else 1e-14)
    assert ours.x_mean[1].item() == pytest.approx(float(X[1, 1]), rel=1e-7)
    assert ours.weight_sum == 500


def test_zero_weights_give_zeros(dtype):
    X, Y, _ = table(50, 3, 1, dtype)
    ours = moments(X, Y, weight=torch.zeros(50, dtype=dtype), center=True)
    assert ours.weight_sum == 0
    assert not ours.gram.any()


def test_moments_show_nan_where_it_is(dtype):
    """A NaN reaches its own row and column of the Gram matrix, and no other."""
    X, Y, _ = table(300, 4, 1, dtype)
    X[17, 2] = torch.nan
    ours = moments(X, Y)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2] = expected[:, 2] = True
    assert torch.equal(ours.gram.isnan(), expected)


def test_moments_of_half_precision(dtype):
    half = torch.bfloat16 if dtype == torch.float32 else torch.float16
    X, Y, weight = (part.to(half) for part in table(100, 4, 1, dtype))
    ours = moments(X, Y, weight=weight, center=True)
    expected = moments(X.float(), Y.float(), weight=weight.float(), center=True)
    for part, wide in zip(ours, expected, strict=True):
        assert_bitwise(part, wide)


def test_moments_refuse_to_be_differentiated():
    """No silent zero gradient."""
    X, Y, _ = table(9, 2, 1, torch.float64)
    with pytest.raises(NotImplementedError, match="no derivative"):
        moments(X.requires_grad_(), Y)
