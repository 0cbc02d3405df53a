"""The mathematics of examples/physics_informed.py and lynx_hare.py, and that physics_informed runs and draws."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap

pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import common  # noqa: E402
import lynx_hare  # noqa: E402
import physics_informed  # noqa: E402

import onestep  # noqa: E402


class Exact(nn.Module):
    """A function of points as a network."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, points):
        return self.function(points)


def test_exact_solutions_solve_the_equations():
    """The derivatives inside the model, and Cole and Hopf's integral, are right: residuals vanish."""
    problem = physics_informed.poisson_problem()
    sines = Exact(lambda z: (torch.pi * z).sin().prod(-1, keepdim=True))
    residual = problem.residual(sines, problem.points)
    assert (residual - problem.target)[problem.inside].abs().max() < 1e-12
    assert sines(problem.points)[~problem.inside].abs().max() < 1e-15
    # At t = 0 the integral is singular; near the front, u_xx is large.
    points = physics_informed.burgers_problem(50).points[:50].clamp_min(0.05)
    u = Exact(physics_informed.cole_hopf)
    scale = vmap(jacrev(lambda z: u(z[None])[0, 0]))(points).abs().sum(1).clamp_min(1)
    assert (physics_informed.burgers(u, points)[:, 0] / scale).abs().max() < 1e-8
    start = torch.tensor([[1e-12, 0.3], [1e-12, -0.7]], dtype=torch.float64)
    torch.testing.assert_close(u(start), -(torch.pi * start[:, 1:]).sin(), rtol=1e-5, atol=0)


def test_fit_without_a_setting_solves_poisson():
    problem = physics_informed.poisson_problem()
    model = physics_informed.Residuals(problem)
    result = onestep.fit(model, ((problem.points, problem.inside), problem.target), max_steps=30, progress=False)
    assert result.method == "levenberg_marquardt"
    assert physics_informed.error(model, problem) < 3e-3


@pytest.mark.long
def test_lynx_and_hares():
    """The integrator against scipy's, and the fit and its deviations against scipy's least squares."""
    integrate, optimize = pytest.importorskip("scipy.integrate"), pytest.importorskip("scipy.optimize")
    years, logs = lynx_hare.rows()

    def residual(parameters):
        a, b, c, d = torch.tensor(parameters[:4]).exp().tolist()

        def slope(_t, state):
            hares, lynx = state
            return [(a - b * lynx) * hares, (d * hares - c) * lynx]

        begin = torch.tensor(parameters[4:]).exp().tolist()
        found = integrate.solve_ivp(slope, (0, 20), begin, t_eval=range(21), rtol=1e-9, atol=1e-9)
        return (torch.tensor(found.y.T).log() - logs).flatten().numpy()

    model = lynx_hare.LotkaVolterra()
    result = onestep.fit(model, (years, logs), progress=False, max_steps=12)
    found = model.logs.detach()
    expected = optimize.least_squares(residual, found.numpy() + 0.01, x_scale="jac")
    torch.testing.assert_close(found, torch.from_numpy(expected.x), rtol=0, atol=1e-3)
    J = torch.from_numpy(expected.jac)
    covariance = (J.T @ J).inverse() * (2 * expected.cost / 36)
    torch.testing.assert_close(result.covariance(), covariance, rtol=1e-2, atol=1e-6)


@pytest.mark.long
def test_the_quick_path_prints_the_winner_first_and_draws(monkeypatch, capsys):
    picture = common.OUTPUT / "physics_informed.png"
    picture.unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["physics_informed.py", "--quick"])
    physics_informed.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = [line for line in capsys.readouterr().out.splitlines() if line[:4] in ("Leve", "Gaus", "Adam")]
    # The method may be of several words; then come the last error, the seconds, and the seconds to the worst one.
    errors = [float(line.split()[-3]) for line in table]
    assert len(errors) == 3 and errors == sorted(errors)
