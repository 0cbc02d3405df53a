"""The nonlinear least-squares problems of Moré, Garbow and Hillstrom, as data.

J. J. Moré, B. S. Garbow, K. E. Hillstrom, "Testing Unconstrained Optimization Software", ACM Transactions on
Mathematical Software 7(1), 1981, 17-41: all 35 problems, under the paper's numbers, with its standard starts. Where the
paper leaves n or m open, they are those for which it gives a minimum; else those of the MINPACK least-squares tests for
the linear functions and Brown almost-linear, m = 99 for Gulf, n = 12 for the extended Powell and n = 10 for the rest.

The paper prints six digits of a minimum that is not a simple number and cuts the rest. The minima here are these values
refined to at least twelve digits by Newton's method in 90-digit arithmetic; the comment on a problem repeats the six.
Stationary points that the paper does not list are in comments only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Problem:
    """Minimise the sum of the squares of residuals(x) from start. The lowest of minima is the first."""

    name: str
    start: tuple[float, ...]
    residuals: Callable[[Tensor], Tensor]
    minima: tuple[float, ...]


def _count(x: Tensor, stop: int) -> Tensor:
    """1, 2, ..., stop in the type of x."""
    return torch.arange(1, stop + 1, dtype=x.dtype, device=x.device)


def _data(x: Tensor, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device)


def rosenbrock(x: Tensor) -> Tensor:
    """1, and 21 for more than two unknowns."""
    odd, even = x[0::2], x[1::2]
    return torch.stack((10 * (even - odd**2), 1 - odd), dim=1).flatten()


def freudenstein_roth(x: Tensor) -> Tensor:
    """2."""
    a, b = x
    return torch.stack((-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b))


def powell_badly_scaled(x: Tensor) -> Tensor:
    """3."""
    a, b = x
    return torch.stack((1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001))


def brown_badly_scaled(x: Tensor) -> Tensor:
    """4."""
    a, b = x
    return torch.stack((a - 1e6, b - 2e-6, a * b - 2))


def beale(x: Tensor) -> Tensor:
    """5."""
    a, b = x
    return torch.stack((1.5 - a * (1 - b), 2.25 - a * (1 - b**2), 2.625 - a * (1 - b**3)))


def jennrich_sampson(x: Tensor, m: int = 10) -> Tensor:
    """6."""
    i = _count(x, m)
    return 2 + 2 * i - (torch.exp(i * x[0]) + torch.exp(i * x[1]))


def helical_valley(x: Tensor) -> Tensor:
    """7. The angle of (x1, x2) in turns is in [-1/4, 3/4] as in the paper, the cut on the negative x2 axis."""
    a, b, c = x
    theta = 0.25 + torch.atan2(-a, b) / (2 * math.pi)
    return torch.stack((10 * (c - 10 * theta), 10 * (torch.hypot(a, b) - 1), c))


def bard(x: Tensor) -> Tensor:
    """8."""
    y = _data(x, (0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39))
    u = _count(x, 15)
    v = 16 - u
    return y - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


def gaussian(x: Tensor) -> Tensor:
    """9."""
    half = (0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521)
    y = _data(x, (*half, 0.3989, *half[::-1]))
    t = (8 - _count(x, 15)) / 2
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


def meyer(x: Tensor) -> Tensor:
    """10."""
    y = _data(
        x, (34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872)
    )
    t = 45 + 5 * _count(x, 16)
    return x[0] * torch.exp(x[1] / (t + x[2])) - y


def gulf(x: Tensor, m: int = 99) -> Tensor:
    """11. The paper's |y_i m i x_2| is a misprint for |y_i - x_2|."""
    t = _count(x, m) / 100
    y = 25 + (-50 * torch.log(t)) ** (2 / 3)
    return torch.exp(-(torch.abs(y - x[1]) ** x[2]) / x[0]) - t


def box(x: Tensor, m: int = 10) -> Tensor:
    """12."""
    t = _count(x, m) / 10
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def powell_singular(x: Tensor) -> Tensor:
    """13, and 22 for more than four unknowns."""
    a, b, c, d = x[0::4], x[1::4], x[2::4], x[3::4]
    rows = (a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2)
    return torch.stack(rows, dim=1).flatten()


def wood(x: Tensor) -> Tensor:
    """14."""
    a, b, c, d = x
    return torch.stack(
        (
            10 * (b - a**2),
            1 - a,
            math.sqrt(90) * (d - c**2),
            1 - c,
            math.sqrt(10) * (b + d - 2),
            (b - d) / math.sqrt(10),
        )
    )


def kowalik_osborne(x: Tensor) -> Tensor:
    """15."""
    y = _data(x, (0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246))
    u = _data(x, (4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625))
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Tensor, m: int = 20) -> Tensor:
    """16."""
    t = _count(x, m) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


_OSBORNE_1 = (
    *(0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603),
    *(0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411),
    0.406,
)


def osborne_1(x: Tensor) -> Tensor:
    """17."""
    t = 10 * (_count(x, 33) - 1)
    return _data(x, _OSBORNE_1) - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


def biggs_exp6(x: Tensor, m: int = 13) -> Tensor:
    """18."""
    t = _count(x, m) / 10
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


_OSBORNE_2 = (
    *(1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606),
    *(0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423),
    *(0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668),
    *(0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098),
    0.054,
)


def osborne_2(x: Tensor) -> Tensor:
    """19."""
    t = (_count(x, 65) - 1) / 10
    peaks = x[1:4] * torch.exp(-x[5:8] * (t[:, None] - x[8:11]) ** 2)
    return _data(x, _OSBORNE_2) - (x[0] * torch.exp(-t * x[4]) + peaks.sum(1))


def watson(x: Tensor) -> Tensor:
    """20."""
    n = x.shape[0]
    j = _count(x, n)
    powers = (_count(x, 29)[:, None] / 29) ** (j - 1)
    polynomial = powers @ x
    slope = powers[:, :-1] @ (j[:-1] * x[1:])
    return torch.cat((slope - polynomial**2 - 1, torch.stack((x[0], x[1] - x[0] ** 2 - 1))))


def penalty_1(x: Tensor) -> Tensor:
    """23."""
    return torch.cat((math.sqrt(1e-5) * (x - 1), (x @ x - 0.25)[None]))


def penalty_2(x: Tensor) -> Tensor:
    """24."""
    n = x.shape[0]
    j = _count(x, n)
    a = math.sqrt(1e-5)
    e = torch.exp(x / 10)
    y = torch.exp(j / 10)
    return torch.cat(
        (
            (x[0] - 0.2)[None],
            a * (e[1:] + e[:-1] - (y[1:] + y[:-1])),
            a * (e[1:] - math.exp(-0.1)),
            ((n - j + 1) @ x**2 - 1)[None],
        )
    )


def variably_dimensioned(x: Tensor) -> Tensor:
    """25."""
    weighted = _count(x, x.shape[0]) @ (x - 1)
    return torch.cat((x - 1, torch.stack((weighted, weighted**2))))


def trigonometric(x: Tensor) -> Tensor:
    """26."""
    n = x.shape[0]
    return n - torch.cos(x).sum() + _count(x, n) * (1 - torch.cos(x)) - torch.sin(x)


def brown_almost_linear(x: Tensor) -> Tensor:
    """27."""
    n = x.shape[0]
    return torch.cat((x[:-1] + x.sum() - (n + 1), (x.prod() - 1)[None]))


def discrete_boundary_value(x: Tensor) -> Tensor:
    """28."""
    n = x.shape[0]
    h = 1 / (n + 1)
    padded = pad(x, (1, 1))
    return 2 * x - padded[:-2] - padded[2:] + h**2 * (x + _count(x, n) * h + 1) ** 3 / 2


def discrete_integral_equation(x: Tensor) -> Tensor:
    """29. Both sums of the paper are one product with the Green's function min(s, t) (1 - max(s, t))."""
    n = x.shape[0]
    h = 1 / (n + 1)
    t = _count(x, n) * h
    green = torch.minimum(t, t[:, None]) * (1 - torch.maximum(t, t[:, None]))
    return x + h * (green @ (x + t + 1) ** 3) / 2


def broyden_tridiagonal(x: Tensor) -> Tensor:
    """30."""
    padded = pad(x, (1, 1))
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def broyden_banded(x: Tensor) -> Tensor:
    """31. Five unknowns before and one after the i-th are in the i-th residual."""
    n = x.shape[0]
    ones = torch.ones(n, n, dtype=x.dtype, device=x.device)
    others = ones.tril(1).triu(-5) - torch.eye(n, dtype=x.dtype, device=x.device)
    return x * (2 + 5 * x**2) + 1 - others @ (x * (1 + x))


def linear_full_rank(x: Tensor, m: int) -> Tensor:
    """32."""
    return pad(x, (0, m - x.shape[0])) - 2 / m * x.sum() - 1


def linear_rank_1(x: Tensor, m: int) -> Tensor:
    """33."""
    return _count(x, m) * (_count(x, x.shape[0]) @ x) - 1


def linear_rank_1_zeros(x: Tensor, m: int) -> Tensor:
    """34. The first and the last column and row are zero."""
    inner = (_count(x, x.shape[0])[1:-1] * x[1:-1]).sum()
    return pad(_count(x, m - 2) * inner, (1, 1)) - 1


def chebyquad(x: Tensor) -> Tensor:
    """35, with m = n. The mean of the i-th shifted Chebyshev polynomial less its integral over [0, 1]."""
    n = x.shape[0]
    shifted = 2 * x - 1
    polynomials = [torch.ones_like(x), shifted]
    for _ in range(n - 1):
        polynomials.append(2 * shifted * polynomials[-1] - polynomials[-2])
    integrals = _data(x, tuple(0.0 if i % 2 else -1 / (i**2 - 1) for i in range(1, n + 1)))
    return torch.stack(polynomials[1:]).mean(1) - integrals


def _grid(n: int) -> tuple[float, ...]:
    return tuple(j / (n + 1) for j in range(1, n + 1))


_BOUNDARY = tuple(t * (t - 1) for t in _grid(10))
_POWELL = (3.0, -1.0, 0.0, 1.0)

PROBLEMS: tuple[Problem, ...] = (
    # 1: 0 at (1, 1).
    Problem("rosenbrock", (-1.2, 1.0), rosenbrock, (0.0,)),
    # 2: 0 at (5, 4); local 48.9842... at (11.41..., -0.8968...).
    Problem("freudenstein-roth", (0.5, -2.0), freudenstein_roth, (0.0, 48.98425367924)),
    # 3: 0 at (1.098...e-5, 9.106...).
    Problem("powell-badly-scaled", (0.0, 1.0), powell_badly_scaled, (0.0,)),
    # 4: 0 at (1e6, 2e-6).
    Problem("brown-badly-scaled", (1.0, 1.0), brown_badly_scaled, (0.0,)),
    # 5: 0 at (3, 0.5).
    Problem("beale", (1.0, 1.0), beale, (0.0,)),
    # 6: 124.362... at (0.2578..., 0.2578...) for m = 10.
    Problem("jennrich-sampson", (0.3, 0.4), jennrich_sampson, (124.3621823556,)),
    # 7: 0 at (1, 0, 0).
    Problem("helical-valley", (-1.0, 0.0, 0.0), helical_valley, (0.0,)),
    # 8: 8.21487...e-3; local 17.4286... at (0.8406..., -inf, -inf), which is the sum of squares of y less its mean.
    Problem("bard", (1.0, 1.0, 1.0), bard, (8.214877306579e-3, 17.42869333333)),
    # 9: 1.12793...e-8.
    Problem("gaussian", (0.4, 1.0, 0.0), gaussian, (1.127932769619e-8,)),
    # 10: 87.9458...
    Problem("meyer", (0.02, 4000.0, 250.0), meyer, (87.94585517085,)),
    # 11: 0 at (50, 25, 1.5), which is ten times the start.
    Problem("gulf", (5.0, 2.5, 0.15), gulf, (0.0,)),
    # 12: 0 at (1, 10, 1), at (10, 1, -1) and wherever x1 = x2 and x3 = 0.
    Problem("box", (0.0, 10.0, 20.0), box, (0.0,)),
    # 13: 0 at the origin, where the Jacobian has rank 2.
    Problem("powell-singular", _POWELL, powell_singular, (0.0,)),
    # 14: 0 at (1, 1, 1, 1).
    Problem("wood", (-3.0, -1.0, -3.0, -1.0), wood, (0.0,)),
    # 15: 3.07505...e-4; local 1.02734...e-3 at (inf, -14.07..., -inf, -inf).
    Problem("kowalik-osborne", (0.25, 0.39, 0.415, 0.39), kowalik_osborne, (3.075056038492e-4, 1.027343048695e-3)),
    # 16: 85822.2... for m = 20.
    Problem("brown-dennis", (25.0, 5.0, -5.0, -1.0), brown_dennis, (85822.20162636,)),
    # 17: 5.46489...e-5.
    Problem("osborne-1", (0.5, 1.5, -1.0, 0.01, 0.02), osborne_1, (5.464894697483e-5,)),
    # 18: 0 at (1, 10, 1, 5, 4, 3), from which y is made; 5.65565...e-3 for m = 13, which is a saddle: a minimum only
    # among x1 = x5, x3 = x6. The start is there too, so that only rounding leads a descent method away from it.
    Problem("biggs-exp6", (1.0, 2.0, 1.0, 1.0, 1.0, 1.0), biggs_exp6, (0.0, 5.655649925500e-3)),
    # 19: 4.01377...e-2.
    Problem("osborne-2", (1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5), osborne_2, (4.013773629355e-2,)),
    # 20: 2.28767...e-3 for n = 6, 1.39976...e-6 for n = 9, 4.72238...e-10 for n = 12.
    Problem("watson-6", (0.0,) * 6, watson, (2.287670053552e-3,)),
    Problem("watson-9", (0.0,) * 9, watson, (1.399760138099e-6,)),
    Problem("watson-12", (0.0,) * 12, watson, (4.722381105892e-10,)),
    # 21: 0 at ones.
    Problem("extended-rosenbrock", (-1.2, 1.0) * 5, rosenbrock, (0.0,)),
    # 22: 0 at the origin.
    Problem("extended-powell-singular", _POWELL * 3, powell_singular, (0.0,)),
    # 23: 2.24997...e-5 for n = 4, 7.08765...e-5 for n = 10.
    Problem("penalty-1-4", tuple(float(j) for j in range(1, 5)), penalty_1, (2.249977500900e-5,)),
    Problem("penalty-1-10", tuple(float(j) for j in range(1, 11)), penalty_1, (7.087651467090e-5,)),
    # 24: 9.37629...e-6 for n = 4, 2.93660...e-4 for n = 10.
    Problem("penalty-2-4", (0.5,) * 4, penalty_2, (9.376293007355e-6,)),
    Problem("penalty-2-10", (0.5,) * 10, penalty_2, (2.936605374567e-4,)),
    # 25: 0 at ones.
    Problem("variably-dimensioned", tuple(1 - j / 10 for j in range(1, 11)), variably_dimensioned, (0.0,)),
    # 26: 0. MINPACK's method ends at the local minimum 2.795056121879e-5, which the paper does not list.
    Problem("trigonometric", (0.1,) * 10, trigonometric, (0.0,)),
    # 27: 0 at (a, ..., a, a^(1-n)) with n a^n - (n + 1) a^(n-1) + 1 = 0, a = 1 among them; 1 at (0, ..., 0, n + 1).
    Problem("brown-almost-linear-10", (0.5,) * 10, brown_almost_linear, (0.0, 1.0)),
    Problem("brown-almost-linear-30", (0.5,) * 30, brown_almost_linear, (0.0, 1.0)),
    Problem("brown-almost-linear-40", (0.5,) * 40, brown_almost_linear, (0.0, 1.0)),
    # 28 and 29: 0.
    Problem("discrete-boundary-value", _BOUNDARY, discrete_boundary_value, (0.0,)),
    Problem("discrete-integral-equation", _BOUNDARY, discrete_integral_equation, (0.0,)),
    # 30 and 31: 0.
    Problem("broyden-tridiagonal", (-1.0,) * 10, broyden_tridiagonal, (0.0,)),
    Problem("broyden-banded", (-1.0,) * 10, broyden_banded, (0.0,)),
    # 32: m - n at (-1, ..., -1).
    Problem("linear-full-rank-10", (1.0,) * 5, partial(linear_full_rank, m=10), (5.0,)),
    Problem("linear-full-rank-50", (1.0,) * 5, partial(linear_full_rank, m=50), (45.0,)),
    # 33: m (m - 1) / (2 (2 m + 1)) wherever the sum of j x_j is 3 / (2 m + 1).
    Problem("linear-rank-1-10", (1.0,) * 5, partial(linear_rank_1, m=10), (45 / 21,)),
    Problem("linear-rank-1-50", (1.0,) * 5, partial(linear_rank_1, m=50), (1225 / 101,)),
    # 34: (m^2 + 3 m - 6) / (2 (2 m - 3)) wherever the sum of j x_j over 1 < j < n is 3 / (2 m - 3).
    Problem("linear-rank-1-zeros-10", (1.0,) * 5, partial(linear_rank_1_zeros, m=10), (62 / 17,)),
    Problem("linear-rank-1-zeros-50", (1.0,) * 5, partial(linear_rank_1_zeros, m=50), (1322 / 97,)),
    # 35: 3.51687...e-3 for n = 8, 0 for n = 9, 6.50395...e-3 for n = 10 (but 4.772713...e-3 is lower).
    Problem("chebyquad-8", _grid(8), chebyquad, (3.516873725678e-3,)),
    Problem("chebyquad-9", _grid(9), chebyquad, (0.0,)),
    Problem("chebyquad-10", _grid(10), chebyquad, (6.503954800882e-3,)),
)
