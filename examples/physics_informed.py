"""Solves Poisson's and Burgers' equations with small networks: Levenberg-Marquardt and Gauss-Newton against Adam.

    python examples/physics_informed.py [--quick]

A physics-informed network (Raissi, Perdikaris and Karniadakis 2019) stands for the solution u of a differential
equation. The model's outputs are the equation's residuals at points inside, with derivatives of u inside the model, and
u itself at points on the boundary; the targets are the right-hand sides. So it is a problem of least squares, and
onestep.fit takes it as any other: no setting but the seconds. All is in float64.

- Poisson: -Δu = f on the unit square, u = 0 on its boundary, f such that u = sin πx sin πy.
- Burgers: u_t + u u_x = ν u_xx, u(0, x) = -sin πx, u(t, ±1) = 0, ν = 0.1/π, which grows a front at x = 0. The exact
  solution is Cole and Hopf's integral, by Gauss-Hermite quadrature.

Each method gets the same seconds and the same first weights. Adam goes over all points, with a rate that falls to zero
along a cosine; the best of several first rates is shown. The error is ‖u - exact‖ / ‖exact‖ on a fine grid.

Writes examples/output/physics_informed.png: the error against seconds, and the solutions with their errors.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import Run, adam, draw_runs, print_table, save, solved, styled
from torch import Tensor, nn
from torch.func import jvp

import onestep

VISCOSITY = 0.1 / math.pi
# u on the boundary counts so many times as much as a residual inside.
BOUNDARY = 10.0


@dataclass(frozen=True)
class Problem:
    """An equation, the points where it should hold, and the exact solution on a grid.

    Attributes:
        widths: of the network's hidden layers.
        residual: (network, points) → the equation's residual without its right-hand side (n, 1).
        points, inside, target: (n, 2); (n, 1), False on the boundary; (n, 1), of residuals, and of u on the boundary.
        grid, exact: (m, 2), (m, 1), of ``shape`` as a picture.
    """

    name: str
    widths: tuple[int, ...]
    residual: Callable[[nn.Module, Tensor], Tensor]
    points: Tensor
    inside: Tensor
    target: Tensor
    grid: Tensor
    exact: Tensor
    shape: tuple[int, int]


class Residuals(nn.Module):
    """The equation's residual inside, weighted values of the network on the boundary."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = (2, *problem.widths)
        hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        self.network = nn.Sequential(*hidden, nn.Linear(sizes[-1], 1)).double()
        self.residual = problem.residual

    def forward(self, points: Tensor, inside: Tensor) -> Tensor:
        return torch.where(inside, self.residual(self.network, points), BOUNDARY * self.network(points))


def along(axis: int, points: Tensor) -> Tensor:
    """The unit vector of an axis for each point."""
    direction = torch.zeros_like(points)
    direction[..., axis] = 1.0
    return direction


def first(u: Callable[[Tensor], Tensor], axis: int) -> Callable[[Tensor], Tensor]:
    """∂u/∂axis by forward mode."""
    return lambda points: jvp(u, (points,), (along(axis, points),))[1]


def minus_laplacian(u: nn.Module, points: Tensor) -> Tensor:
    return -first(first(u, 0), 0)(points) - first(first(u, 1), 1)(points)


def burgers(u: nn.Module, points: Tensor) -> Tensor:
    """Points are (t, x)."""
    u_x = first(u, 1)
    return first(u, 0)(points) + u(points) * u_x(points) - VISCOSITY * first(u_x, 1)(points)


def assemble(
    name: str,
    widths: tuple[int, ...],
    residual: Callable[[nn.Module, Tensor], Tensor],
    inside: tuple[Tensor, Tensor],
    boundary: tuple[Tensor, Tensor],
    grid: tuple[Tensor, Tensor],
    exact: Callable[[Tensor], Tensor],
) -> Problem:
    """A problem from points and right-hand sides inside, points and values on the boundary, and the grid's axes."""
    mesh = torch.cartesian_prod(*grid)
    return Problem(
        name,
        widths,
        residual,
        torch.cat([inside[0], boundary[0]]),
        torch.cat([torch.ones_like(inside[1]), torch.zeros_like(boundary[1])]).bool(),
        torch.cat([inside[1], BOUNDARY * boundary[1]]),
        mesh,
        exact(mesh),
        (len(grid[0]), len(grid[1])),
    )


def poisson_problem() -> Problem:
    def exact(points: Tensor) -> Tensor:
        return (math.pi * points).sin().prod(-1, keepdim=True)

    side = torch.linspace(0, 1, 32, dtype=torch.float64)
    inside, edge = torch.cartesian_prod(side[1:-1], side[1:-1]), torch.linspace(0, 1, 31, dtype=torch.float64)[:-1]
    zero, one = torch.zeros_like(edge), torch.ones_like(edge)
    boundary = torch.cat([torch.stack(pair, 1) for pair in ((edge, zero), (edge, one), (zero, edge), (one, edge))])
    return assemble(
        "Poisson",
        (32,),
        minus_laplacian,
        (inside, 2 * math.pi**2 * exact(inside)),
        (boundary, torch.zeros(len(boundary), 1, dtype=torch.float64)),
        (torch.linspace(0, 1, 51, dtype=torch.float64),) * 2,
        exact,
    )


def cole_hopf(points: Tensor) -> Tensor:
    """Burgers' solution at (t, x): a mean of -sin πy over y = x - 2√(νt) z, weighted by exp(-cos(πy)/2πν - z²)."""
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite.hermgauss(120))
    y = math.pi * (points[:, 1:] - 2 * (VISCOSITY * points[:, :1]).sqrt() * nodes)
    mixture = (weights.log() - y.cos() / (2 * math.pi * VISCOSITY)).softmax(1)
    return -(mixture * y.sin()).sum(1, keepdim=True)


def burgers_problem(count: int) -> Problem:
    """``count`` points inside, from a Sobol sequence."""
    unit = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(count, dtype=torch.float64)
    inside = unit * torch.tensor([1.0, 2.0], dtype=torch.float64) - torch.tensor([0.0, 1.0], dtype=torch.float64)
    x, t = torch.linspace(-1, 1, 101, dtype=torch.float64), torch.linspace(0, 1, 51, dtype=torch.float64)[1:]
    boundary = torch.cat([torch.stack(pair, 1) for pair in ((0 * x, x), (t, 0 * t - 1), (t, 0 * t + 1))])
    start = torch.where(boundary[:, :1] == 0, -(math.pi * boundary[:, 1:]).sin(), 0.0)
    return assemble(
        "Burgers",
        (20, 20),
        burgers,
        (inside, torch.zeros(count, 1, dtype=torch.float64)),
        (boundary, start),
        (torch.linspace(0, 1, 52, dtype=torch.float64)[1:], torch.linspace(-1, 1, 101, dtype=torch.float64)),
        cole_hopf,
    )


def error(model: nn.Module, problem: Problem) -> float:
    """‖u - exact‖ / ‖exact‖ on the grid."""
    with torch.no_grad():
        return float((model.network(problem.grid) - problem.exact).norm() / problem.exact.norm())


def compare(problem: Problem, seconds: float, rates: tuple[float, ...]) -> list[Run]:
    """Each method for so many seconds."""
    rows = (problem.points, problem.inside)
    runs = []
    for method, name in (("levenberg_marquardt", "Levenberg-Marquardt"), ("gauss_newton", "Gauss-Newton, matrix-free")):
        model = Residuals(problem)
        run, callback, finish = solved(name, model, lambda model=model: error(model, problem))
        options = {"max_steps": 100_000, "max_seconds": seconds, "tol": 0.0, "progress": False, "callback": callback}
        onestep.fit(model, (rows, problem.target), "mse", method=method, **options)
        finish()
        runs.append(run)
    return [
        *runs,
        adam(
            lambda: Residuals(problem),
            lambda model, _step: nn.functional.mse_loss(model(*rows), problem.target),
            lambda model: error(model, problem),
            rates=rates,
            seconds=seconds,
        ),
    ]


def draw(results: list[tuple[Problem, list[Run]]]) -> None:
    """A row for each problem: errors against seconds, the best solution, and where it is wrong."""
    figure, rows = plt.subplots(len(results), 3, figsize=(13, 3.8 * len(results)), layout="constrained", squeeze=False)
    for (problem, runs), (left, middle, right) in zip(results, rows, strict=True):
        draw_runs(left, runs, title=f"{problem.name}: relative error")
        best = min(runs, key=lambda run: run.last)
        with torch.no_grad():
            u = best.model.network(problem.grid)
        extent = (*problem.grid[[0, -1], 0].tolist(), *problem.grid[[0, -1], 1].tolist())
        for axes, values, title in (
            (middle, u, f"u by {best.method}"),
            (right, (u - problem.exact).abs().clamp_min(1e-16).log10(), "log₁₀ |u - exact|"),
        ):
            image = axes.imshow(
                values.reshape(problem.shape).T, extent=extent, origin="lower", aspect="auto", cmap="viridis"
            )
            figure.colorbar(image, ax=axes)
            styled(axes, title=title).grid(False)
    save(figure, "physics_informed.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds in all")
    quick = parser.parse_args().quick
    rates = (1e-2,) if quick else (1e-2, 3e-2, 1e-1)
    problems = [(poisson_problem(), 1.5)] if quick else [(poisson_problem(), 6.0), (burgers_problem(1000), 16.0)]
    results = []
    for problem, seconds in problems:
        runs = compare(problem, seconds, rates)
        print_table(f"{problem.name}, {len(problem.points):,} points", runs)
        print(f"the lowest error is {runs[-1].last / min(run.last for run in runs):,.0f} times lower than Adam's\n")
        results.append((problem, runs))
    draw(results)


if __name__ == "__main__":
    main()
