"""Corrected semi-normal equations: NIST's hard least-squares problems, and float32 beyond its normal equations.

The data are those of the NIST Statistical Reference Datasets (linear regression, https://www.itl.nist.gov/div898/strd).
Certified coefficients are recomputed in rational arithmetic from the very numbers that the kernel is given.
"""

from __future__ import annotations

import math
from fractions import Fraction

import cases
import pytest
import torch
from cases import Case, assert_bitwise
from torch import Tensor

from onestep.linalg import solve_normal, solve_normal_ex

# Employment; prices, GNP, unemployment, armed forces, population, year (Longley 1967).
LONGLEY = """
60323  83.0 234289 2356 1590 107608 1947
61122  88.5 259426 2325 1456 108632 1948
60171  88.2 258054 3682 1616 109773 1949
61187  89.5 284599 3351 1650 110929 1950
63221  96.2 328975 2099 3099 112075 1951
63639  98.1 346999 1932 3594 113270 1952
64989  99.0 365385 1870 3547 115094 1953
63761 100.0 363112 3578 3350 116219 1954
66019 101.2 397469 2904 3048 117388 1955
67857 104.6 419180 2822 2857 118734 1956
68169 108.4 442769 2936 2798 120445 1957
66513 110.8 444546 4681 2637 121950 1958
68655 112.6 482704 3813 2552 123366 1959
69564 114.2 502601 3931 2514 125368 1960
69331 115.7 518173 4806 2572 127852 1961
70551 116.9 554894 4007 2827 130081 1962
"""
LONGLEY_CERTIFIED = (-3482258.63459582, 15.0618722713733, -0.358191792925910e-01, -2.02022980381683,
                     -1.03322686717359, -0.511041056535807e-01, 1829.15146461355)  # fmt: skip

WAMPLER_RESIDUALS = (759, -2048, 2048, -2048, 2523, -2048, 2048, -2048, 1838, -2048, 2048, -2048, 1838, -2048, 2048,
                     -2048, 2523, -2048, 2048, -2048, 759)  # fmt: skip
WAMPLER_NOISE = {"Wampler1": 0, "Wampler3": 1, "Wampler4": 100, "Wampler5": 10_000}

NAMES = ("Longley", "Wampler1", "Wampler2", "Wampler3", "Wampler4", "Wampler5")


def dataset(name: str) -> tuple[Tensor, Tensor]:
    """X (with its column of ones) and y."""
    if name == "Longley":
        rows = [[float(v) for v in line.split()] for line in LONGLEY.strip().split("\n")]
        table = torch.tensor(rows, dtype=torch.float64)
        y = table[:, 0].clone()
        table[:, 0] = 1
        return table, y
    powers = [[x**j for j in range(6)] for x in range(21)]
    if name == "Wampler2":
        y = [float(sum(Fraction(power, 10**j) for j, power in enumerate(row))) for row in powers]
    else:
        noise = WAMPLER_NOISE[name]
        y = [float(sum(row) + noise * e) for row, e in zip(powers, WAMPLER_RESIDUALS, strict=True)]
    return torch.tensor(powers, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)


def exact_least_squares(X: Tensor, y: Tensor) -> list[Fraction]:
    """The solution of the normal equations, by elimination in rational arithmetic: no rounding at all."""
    rows = [[Fraction(v) for v in row] for row in X.tolist()]
    right = [Fraction(v) for v in y.tolist()]
    d = X.shape[1]
    system = [
        [sum(row[i] * row[j] for row in rows) for j in range(d)]
        + [sum(row[i] * v for row, v in zip(rows, right, strict=True))]
        for i in range(d)
    ]
    for i in range(d):
        for j in range(i + 1, d):
            factor = system[j][i] / system[i][i]
            system[j] = [a - factor * b for a, b in zip(system[j], system[i], strict=True)]
    solution = [Fraction(0)] * d
    for i in reversed(range(d)):
        known = sum(system[i][j] * solution[j] for j in range(i + 1, d))
        solution[i] = (system[i][d] - known) / system[i][i]
    return solution


def digits(actual: Tensor, exact: list[Fraction]) -> float:
    """Correct digits (log relative error) of the worst coefficient, at most 17."""
    errors = [abs((Fraction(a) - e) / e) for a, e in zip(actual.tolist(), exact, strict=True)]
    worst = max(errors)
    return 17.0 if worst == 0 else min(17.0, -math.log10(worst))


# ---------------------------------------------------------------------------------------------------------- the data


def test_longley_is_as_published():
    exact = exact_least_squares(*dataset("Longley"))
    for ours, published in zip(exact, LONGLEY_CERTIFIED, strict=True):
        assert float(ours) == pytest.approx(published, rel=1e-14)


@pytest.mark.parametrize("name", NAMES[1:])
def test_wampler_is_as_published(name):
    """Certified: all coefficients 1, or powers of 1/10. Wampler2's y is rounded to fp64, which shows from 1e-14 on."""
    exact = exact_least_squares(*dataset(name))
    if name == "Wampler2":
        for power, ours in enumerate(exact):
            assert float(ours) == pytest.approx(10.0**-power, rel=2e-14)
    else:
        assert exact == [1] * 6


# ------------------------------------------------------------------------------------------------------------- float64


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("refine", [1, 2, 3])
def test_nist_problems_to_eight_digits(name, refine):
    """At least eight digits of every coefficient, where the normal equations alone have six or seven, or nine."""
    X, y = dataset(name)
    exact = exact_least_squares(X, y)
    refined, plain = digits(solve_normal(X, y, refine=refine), exact), digits(solve_normal(X, y), exact)
    assert refined >= 8
    assert refined > plain


@pytest.mark.parametrize("name", NAMES)
def test_nist_problems_as_good_as_qr(name):
    """Two steps come near LAPACK's QR (xGELS); half a digit either way is chance."""
    X, y = dataset(name)
    exact = exact_least_squares(X, y)
    qr = torch.linalg.lstsq(X, y.unsqueeze(-1), driver="gels").solution[:, 0]
    assert digits(solve_normal(X, y, refine=2), exact) >= digits(qr, exact) - 0.5


def test_nist_problems_in_a_batch():
    """The Wampler problems share X; refined together each is bitwise what it is alone."""
    X, _ = dataset("Wampler1")
    Y = torch.stack([dataset(name)[1] for name in NAMES[1:]]).unsqueeze(-1)
    together = solve_normal(X, Y, refine=2)
    for problem in range(5):
        assert_bitwise(together[problem], solve_normal(X, Y[problem], refine=2))


@pytest.mark.parametrize("times", [1, 4])
def test_nist_problems_as_columns(times):
    """As five targets of one problem each column still has eight digits; twenty are too many for a vector lane."""
    X, _ = dataset("Wampler1")
    Y = torch.stack([dataset(name)[1] for name in NAMES[1:]], -1).repeat(1, times)
    refined = solve_normal(X, Y, refine=2)
    for column, name in enumerate(NAMES[1:] * times):
        assert digits(refined[:, column], exact_least_squares(*dataset(name))) >= 8


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_refinement_reads_any_layout(layout):
    X, y = dataset("Longley")
    y = y.unsqueeze(-1)
    strided = solve_normal(cases.lay_out(X, layout), cases.lay_out(y, layout), refine=2)
    assert_bitwise(strided, solve_normal(X, y, refine=2))


def test_refinement_converges_to_the_weighted_and_penalised_solution():
    """Weights and penalties are part of the residual that is refined."""
    X, y = dataset("Wampler4")
    # Squares, so that nothing is rounded when the same problem is written as plain least squares.
    weight = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64).repeat(7)
    ridge = torch.tensor([0.0, 0.25, 0.25, 0.0, 16.0, 1.0], dtype=torch.float64)
    augmented = torch.cat((weight.sqrt().unsqueeze(-1) * X, torch.diag(ridge.sqrt())))
    exact = exact_least_squares(augmented, torch.cat((weight.sqrt() * y, torch.zeros(6).double())))
    plain = digits(solve_normal(X, y, weight=weight, ridge=ridge), exact)
    refined = digits(solve_normal(X, y, weight=weight, ridge=ridge, refine=2), exact)
    assert refined >= 8
    assert refined > plain


# ------------------------------------------------------------------------------------------------------------- float32


def ill_conditioned(n: int, d: int, k: int, batch: tuple[int, ...], condition: float) -> tuple[Tensor, Tensor]:
    """Float32 rows with singular values from 1 down to 1/condition, and targets with noise of a tenth."""
    generator = cases.seeded(f"{n} {d} {batch}")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, dtype=torch.float64, generator=generator)

    U, V = torch.linalg.qr(normal(n, d)).Q, torch.linalg.qr(normal(d, d)).Q
    X = U * torch.logspace(0, -math.log10(condition), d, dtype=torch.float64) @ V.mT
    Y = X @ normal(d, k)
    Y = Y + 0.1 * Y.norm() / normal(n, k).norm() * normal(n, k)
    return X.float(), Y.float()


HARD = pytest.mark.parametrize(
    ("n", "d", "k", "batch"),
    [(60, 6, 1, (20,)), (200, 20, 3, (5,)), (200, 32, 16, (33,)), (300, 40, 2, (3,)), (9000, 10, 17, ())],
)


@HARD
def test_two_steps_reach_float32_precision(n, d, k, batch):
    """While cond(X)² is well below 1/ε each step gains orders of magnitude: all that float32 can hold after two."""
    X, Y = ill_conditioned(n, d, k, batch, 300)
    expected = cases.reference_solve(X, Y)
    plain, refined = (cases.relative_error(solve_normal(X, Y, refine=steps), expected) for steps in (0, 2))
    assert plain > 1e-4
    assert refined < torch.finfo(torch.float32).eps


@HARD
def test_two_steps_are_as_good_as_qr_in_float32(n, d, k, batch):
    """At cond(X) = 1e3, cond(X)² ε is 0.1 and a step gains a digit or two; two are worth a QR factorisation."""
    X, Y = ill_conditioned(n, d, k, batch, 1e3)
    expected = cases.reference_solve(X, Y)
    errors = [cases.relative_error(solve_normal(X, Y, refine=steps), expected) for steps in (0, 1, 2, 6)]
    qr = cases.relative_error(torch.linalg.lstsq(X, Y).solution, expected)
    assert errors[0] > 30 * qr
    assert errors[2] < errors[1] < errors[0] / 5
    assert errors[2] < 2 * qr
    assert errors[3] < torch.finfo(torch.float32).eps


@pytest.mark.parametrize("ridge", [1e-5, torch.tensor(1e-5)], ids=["float", "tensor"])
def test_float32_with_ridge(ridge):
    X, Y = ill_conditioned(200, 20, 2, (4,), 1e3)
    expected = cases.reference_solve(X, Y, None, ridge)
    assert cases.relative_error(solve_normal(X, Y, ridge=ridge, refine=3), expected) < 2e-7


# ------------------------------------------------------------------------------------------------------ what it leaves


def test_refinement_does_not_spoil_the_dual_form(dtype):
    given = cases.inputs(Case("refine-dual", n=12, d=60, k=2, batch=(3,), weighted=True, ridge=1e-3), dtype)
    expected = cases.reference_solve(given.X, given.Y, given.weight, given.ridge)
    plain = cases.relative_error(solve_normal(given.X, given.Y, **given.keywords()), expected)
    refined = cases.relative_error(solve_normal(given.X, given.Y, **given.keywords(), refine=2), expected)
    assert refined <= max(plain, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("d", [20, 40])
def test_refinement_leaves_the_status_as_it_is(dtype, d):
    given = cases.inputs(Case("refine-status", n=90, d=d, batch=(4,)), dtype)
    X = given.X.clone()
    X[2, :, 7] = 0
    plain, refined = (solve_normal_ex(X, given.Y, refine=steps) for steps in (0, 2))
    assert_bitwise(refined.info, plain.info)
    assert_bitwise(refined.rcond, plain.rcond)
    assert refined.info.tolist() == [0, 0, 8, 0]


@pytest.mark.parametrize("d", [5, 40])
def test_derivatives_are_those_of_the_solution(d):
    """Refinement does not enter the graph: gradients are the analytic ones at the refined solution."""
    given = cases.inputs(Case("refine-grad", n=2 * d, d=d, batch=(3,), weighted=True), torch.float64)

    def gradients(steps: int) -> tuple[Tensor, ...]:
        leaves = [part.clone().requires_grad_() for part in given[:3]]
        solution = solve_normal(*leaves[:2], weight=leaves[2], refine=steps)
        return torch.autograd.grad(solution.sin().sum(), leaves)

    for refined, plain in zip(gradients(2), gradients(0), strict=True):
        torch.testing.assert_close(refined, plain, rtol=1e-10, atol=1e-12)
