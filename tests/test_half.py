"""bfloat16 and float16 rows of the normal equations: widened as they are read, bitwise as their float32 copies."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from onestep.linalg import NormalEquations, gram, moments, solve_normal, solve_normal_ex

HALF = [torch.bfloat16, torch.float16]
over_half = pytest.mark.parametrize("dtype", HALF, ids=str)


def rows(dtype, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(dtype)


@over_half
def test_every_number_is_widened_exactly(dtype):
    """All 65,536 of them; a product with 1 is the number itself."""
    X = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(dtype)
    _, cross = gram(X.reshape(-1, 1, 1), torch.ones(65_536, 1, 1))
    torch.testing.assert_close(cross.flatten(), X.float(), rtol=0, atol=0, equal_nan=True)
    # As whole vectors, too: one row of features.
    _, cross = gram(X.reshape(512, 1, 128), torch.ones(512, 1, 1))
    torch.testing.assert_close(cross.flatten(), X.float(), rtol=0, atol=0, equal_nan=True)


@over_half
@pytest.mark.parametrize("shape", [(9000, 70), (3, 40, 20), (50, 16, 8), (2, 30, 50)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "transposed", "strided"])
def test_bitwise_as_float32(shape, layout, dtype):
    X = rows(dtype, *shape)
    if layout == "transposed":
        X = X.mT.contiguous().mT
    elif layout == "strided":
        X = torch.stack([X, X], -1)[..., 0]
    Y = torch.ones(*shape[:-1], 2).cumsum(-2).sin()
    weight = Y[..., 0].abs()
    wide = X.float()
    results = [
        gram(X, Y, weight=weight),
        solve_normal_ex(X, Y, weight=weight, ridge=0.5),
        (solve_normal(X, Y, ridge=0.5, refine=1),),
    ]
    expected = [
        gram(wide, Y, weight=weight),
        solve_normal_ex(wide, Y, weight=weight, ridge=0.5),
        (solve_normal(wide, Y, ridge=0.5, refine=1),),
    ]
    if X.dim() == 2:
        results.append(moments(X, Y, weight=weight, center=True))
        expected.append(moments(wide, Y, weight=weight, center=True))
    for got, want in zip(results, expected, strict=True):
        for part, other in zip(got, want, strict=True):
            assert part.dtype == other.dtype
            assert torch.equal(part, other)


@over_half
def test_error_against_float64(dtype):
    X = rows(dtype, 20_000, 64)
    products, _ = gram(X)
    exact = X.double().mT @ X.double()
    assert float((products.double() - exact).norm() / exact.norm()) < 1e-5
    y = X.double() @ torch.ones(64, 1).double()
    W = solve_normal(X, y.float(), ridge=1.0)
    expected = torch.linalg.solve(exact + torch.eye(64).double(), X.double().mT @ y.float().double())
    assert float((W.double() - expected).norm() / expected.norm()) < 1e-5


@over_half
def test_streams(dtype):
    X, y = rows(dtype, 1000, 12), torch.ones(1000).cumsum(0).cos()
    equations = NormalEquations(12, 1, intercept=True, dtype=torch.float32)
    in_float = NormalEquations(12, 1, intercept=True, dtype=torch.float32)
    for part in (slice(0, 300), slice(300, 1000)):
        equations.update(X[part], y[part])
        in_float.update(X[part].float(), y[part])
    for got, want in zip(equations.solve(), in_float.solve(), strict=True):
        assert torch.equal(got, want)


@over_half
@pytest.mark.parametrize("function", ["gram", "solve_normal"])
def test_derivatives(function, dtype):
    X, Y = rows(dtype, 20, 5), torch.ones(20, 1).cumsum(0).sin()

    def value(X):
        return gram(X, Y)[1] if function == "gram" else solve_normal(X, Y, ridge=0.1)

    half, wide = X.clone().requires_grad_(), X.float().requires_grad_()
    (got,) = torch.autograd.grad(value(half).square().sum(), half)
    (want,) = torch.autograd.grad(value(wide).square().sum(), wide)
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(value(forward_ad.make_dual(x, torch.ones_like(x)))).tangent for x in (X, X.float())
        ]
    assert torch.equal(*tangents)


@over_half
def test_other_operands_beside_it(dtype):
    X = rows(dtype, 6, 3)
    with pytest.raises(TypeError, match=r"Y has dtype torch\.float64; expected torch\.float32, beside X of"):
        solve_normal(X, torch.ones(6, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float64; expected torch\.float32"):
        gram(X, weight=torch.ones(6, dtype=torch.float64))
    assert solve_normal(X, X[:, 0], weight=X[:, 0].abs(), ridge=X[0].abs()).dtype == torch.float32
