"""onestep.linalg.polar against the singular value decomposition: spread, direction, shapes, failures, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, func

from onestep.linalg import polar, polar_ex
from onestep.ops.polar.schema import coefficients


def random(*shape: int, dtype: torch.dtype = torch.float64, smallest: float = 0.05) -> Tensor:
    """Matrices whose singular values are spread evenly between ``smallest`` and 1."""
    generator = torch.Generator().manual_seed(sum(shape))
    *batch, n, m = shape
    values = torch.linspace(smallest, 1.0, min(n, m), dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(*batch, n, min(n, m), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(*batch, m, min(n, m), generator=generator, dtype=torch.float64))[0]
    return (3.0 * (left * values) @ right.mT).to(dtype)


def factor(M: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(M.double(), full_matrices=False)
    return U @ V


# What rounding the operands of products to 16 bits costs on a GPU; elsewhere they are widened.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 40, 33), (2, 1, 130, 150), (300, 290)], ids=str)
def test_singular_values_go_to_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    M = random(*shape, dtype=dtype)
    U = polar(M, iterations=4, lower=1e-3)
    assert U.shape == M.shape
    assert U.dtype == (dtype if dtype in (torch.float32, torch.float64) else torch.float32)
    expected = factor(M)
    error = (U.double() - expected).norm() / expected.norm()
    # Directions of small singular values amplify rounding.
    assert error < 20 * TOLERANCES[dtype]
    values = torch.linalg.svdvals(U.double())
    assert (values - 1).abs().max() < TOLERANCES[dtype]


def test_two_iterations_leave_half_a_percent() -> None:
    values = torch.linalg.svdvals(polar(random(40, 60)))
    assert values.min() > 0.995
    assert values.max() < 1 + 1e-12


def test_the_iteration_is_the_scalar_function() -> None:
    # With one singular value the bound on the norm is the norm.
    M = torch.diag(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    (a, b, c), (d, e, f) = coefficients(2, 1e-2)
    x = (a + b) / (1 + c)
    assert x == pytest.approx(1.0)
    assert polar(M)[0, 0].item() == pytest.approx(x * (d + e * x * x) / (1 + f * x * x), rel=1e-14)
    assert polar(M)[1:].abs().max() == 0


def test_float32_by_gram_matrices_is_the_scalar_function_too() -> None:
    """In both orientations, and bitwise the same for any number of threads."""
    values = torch.tensor([3.0, 2.0, 1.0, 0.3, 0.05, 0.01, 1e-3, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(300, 8, generator=generator, dtype=torch.float64))[0]
    M = ((left * values) @ right.mT).float().expand(3, 8, 300).clone()
    x = values / values.square().square().sum().sqrt().sqrt()  # over the root of the Gram matrix's norm
    for a, b, c in coefficients(2, 1e-2):
        x = x * (a + b * x * x) / (1 + c * x * x)
    for matrices in (M, M.mT):
        found = torch.linalg.svdvals(polar(matrices).double())
        torch.testing.assert_close(found[0], x.sort(descending=True).values, rtol=1e-3, atol=1e-4)
    large = values > 1e-2 * values.norm()
    assert (x[large] - 1).abs().max() < 0.006


def test_threads_change_no_bit(restore_threads: None) -> None:
    for shape in ((6, 96, 200), (1, 200, 190), (2, 300, 260), (1, 300, 700)):
        M = random(*shape, dtype=torch.float32)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(polar(M))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_small_singular_values_grow_and_stay_below_one() -> None:
    values = torch.linalg.svdvals(polar(random(30, 30, smallest=1e-7)))
    assert values.max() < 1 + 1e-12
    assert values.min() > 1e-7 * 30


def test_scales_do_not_matter() -> None:
    M = random(20, 31, dtype=torch.float32)
    expected = polar(M)
    for scale in (2.0**-100, 2.0**110):
        assert torch.equal(polar(M * scale), expected)
    assert torch.equal(polar(M * 0), M * 0)


def test_layouts() -> None:
    M = random(2, 6, 9)
    expected = polar(M)
    assert torch.equal(polar(M.mT).mT, expected) or torch.allclose(polar(M.mT).mT, expected, atol=1e-13)
    strided = torch.zeros(2, 6, 18, dtype=M.dtype)[..., ::2].copy_(M)
    assert torch.allclose(polar(strided), expected, atol=1e-13)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert polar(M.new_zeros(shape)).shape == shape


def test_a_bad_matrix_does_not_touch_its_neighbours() -> None:
    M = random(4, 7, 9, dtype=torch.float32)
    expected = polar(M)
    for bad in (torch.nan, torch.inf):
        broken = M.clone()
        broken[2, 6, 3] = bad
        U, info = polar_ex(broken)
        assert (info > 0).tolist() == [False, False, True, False]
        assert U[2].isnan().all()
        for index in (0, 1, 3):
            assert torch.equal(U[index], expected[index])
        with pytest.raises(torch.linalg.LinAlgError, match=r"1 of 4 matrices could not be solved .*NaN or Inf"):
            polar(broken)


def test_lists_of_unlike_shapes() -> None:
    """Each result is that of its matrix alone (bitwise where the kernel is ours); failures are told by matrix."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    matrices = [
        random(5, 9, dtype=float32),
        random(2, 3, 9, 5, dtype=float32),
        random(9, 5, dtype=float32),
        random(5, 9, dtype=bfloat16),
        random(4, 4),
        random(0, 5, 9, dtype=float32),
        random(0, 4),
        random(3, 0, dtype=float32),
    ]
    for M, U in zip(matrices, polar(matrices), strict=True):
        torch.testing.assert_close(U, polar(M), rtol=0, atol=1e-14 if M.dtype == torch.float64 else 0)
    assert torch.equal(polar(matrices[3]), polar(matrices[3].float()))
    matrices[1][1, 2, 0, 0] = torch.nan
    assert [int((info != 0).sum()) for _, info in polar_ex(matrices)] == [0, 1, 0, 0, 0, 0, 0, 0]
    assert polar_ex(matrices)[1].info[1, 2] > 0
    with pytest.raises(torch.linalg.LinAlgError, match="1 of 12 matrices"):
        polar(matrices)
    with pytest.raises(ValueError, match=r"M\[1\] has shape \(3,\)"):
        polar([matrices[0], torch.ones(3)])
    assert polar([]) == []


def test_derivatives_are_refused() -> None:
    M = random(3, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="polar has no derivative"):
        polar(M)
    with pytest.raises(NotImplementedError, match="polar has no derivative"):
        func.jvp(polar, (M.detach(),), (M.detach(),))
    polar(M.detach())


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.onestep.polar.default, (random(2, 3, 4), 2, 1e-2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda M: polar(M[0, 0]), ValueError, r"M has shape \(4,\); expected \(\.\.\., n, m\)"),
        (lambda M: polar(M.to(torch.int64)), TypeError, "M has dtype torch.int64"),
        (lambda M: polar(M, iterations=0), ValueError, "iterations is 0; expected 1 or more"),
        (lambda M: polar(M, lower=0.0), ValueError, "lower is 0.0; expected"),
        (lambda M: polar(M, lower=1.5), ValueError, "lower is 1.5; expected"),
        (lambda M: polar(M.tolist()), TypeError, r"M\[0\] is list; expected torch.Tensor"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(random(2, 3, 4))
