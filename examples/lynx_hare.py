"""Fits Lotka and Volterra's equations to the Hudson Bay Company's lynx and hares, with confidence intervals.

    python examples/lynx_hare.py

21 years of pelts, 1900 to 1920, in thousands (Howard 2009; the data of Carpenter's Stan case study, 2018):
ḣ = (α - βl) h for the hares, l̇ = (-γ + δh) l for the lynx. The model gives log h and log l at each year, from the six
logarithms of the rates and of the first populations, by Runge and Kutta's method; errors are taken as normal in the
logarithms. onestep.fit solves for all six by Levenberg-Marquardt, through the integrator, and FitResult.covariance()
is the Gauss-Newton covariance σ²(JᵀJ)⁻¹: standard deviations of the logarithms, so that intervals of the rates are
exp(log rate ± 1.96 deviations).

Writes examples/output/lynx_hare.png: the pelts, the solution, and a band of 95 % of the solutions that the covariance
allows.
"""

import matplotlib.pyplot as plt
import torch
from common import COLORS, save, styled
from torch import Tensor, nn

import onestep

YEARS = range(1900, 1921)
HARES = (30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1, 40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6)
HARES += (16.2, 24.7)
LYNX = (4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4, 8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6)
NAMES = ("α", "β", "γ", "δ", "hares in 1900", "lynx in 1900")
# What an ecologist might guess: hares double in a year and a half, lynx halve in one, cycles of ten years.
START = (0.5, 0.025, 0.8, 0.025, 30.0, 4.0)
# Steps of the integrator a year: the logarithms are then off by less than 2e-4.
SUBSTEPS = 4


def rows() -> tuple[Tensor, Tensor]:
    """The year since 1900 (21,), and the logarithms of hares and lynx (21, 2)."""
    return torch.arange(len(YEARS)), torch.tensor([HARES, LYNX], dtype=torch.float64).log().T


class LotkaVolterra(nn.Module):
    """Years since 1900 (n,) ↦ log hares and log lynx (n, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor(START, dtype=torch.float64).log())

    def trajectory(self) -> Tensor:
        """All years (21, 2), by the classical method of fourth order on the logarithms."""
        alpha, beta, gamma, delta = self.logs[:4].exp()

        def slope(state: Tensor) -> Tensor:
            hares, lynx = state.exp()
            return torch.stack([alpha - beta * lynx, delta * hares - gamma])

        step, state = 1 / SUBSTEPS, self.logs[4:]
        states = [state]
        for _ in YEARS[1:]:
            for _ in range(SUBSTEPS):
                k1 = slope(state)
                k2 = slope(state + step / 2 * k1)
                k3 = slope(state + step / 2 * k2)
                state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + slope(state + step * k3))
            states.append(state)
        return torch.stack(states)

    def forward(self, years: Tensor) -> Tensor:
        return self.trajectory()[years]


def fit() -> tuple[LotkaVolterra, onestep.FitResult]:
    """Solves for the six parameters."""
    model = LotkaVolterra()
    return model, onestep.fit(model, rows(), "mse", progress=False)


def band(model: LotkaVolterra, covariance: Tensor, draws: int = 200) -> Tensor:
    """The 2.5 and 97.5 % quantiles (2, 21, 2) of solutions with parameters drawn from the fit's normal distribution."""
    centre = model.logs.detach().clone()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(draws, len(centre), dtype=torch.float64, generator=generator)
    drawn = centre + noise @ torch.linalg.cholesky(covariance).T
    with torch.no_grad():

        def solution(logs: Tensor) -> Tensor:
            return torch.func.functional_call(model, {"logs": logs}, (rows()[0],))

        solutions = torch.func.vmap(solution)(drawn).exp()
    return solutions.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)


def draw(model: LotkaVolterra, covariance: Tensor) -> None:
    with torch.no_grad():
        fitted = model(rows()[0]).exp()
    low, high = band(model, covariance)
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for animal, (name, pelts) in enumerate((("hares", HARES), ("lynx", LYNX))):
        axes.fill_between(YEARS, low[:, animal], high[:, animal], color=COLORS[animal], alpha=0.2, linewidth=0)
        axes.plot(YEARS, fitted[:, animal], color=COLORS[animal], label=f"{name}, fitted")
        axes.plot(YEARS, pelts, "o", color=COLORS[animal], markersize=4, label=f"{name}, pelts")
    styled(axes, title="Lynx and hares of the Hudson Bay, 95 % of solutions", ylabel="pelts, thousands")
    axes.legend(frameon=False, ncols=2)
    save(figure, "lynx_hare.png")


def main() -> None:
    model, result = fit()
    covariance = result.covariance()
    deviations = covariance.diagonal().sqrt()
    seconds = result.history[-1].seconds
    print(f"{result.method}: {result.steps} steps, {seconds:.1f} s, converged: {result.converged}")
    print(f"σ of the logarithms {(result.loss * 42 / 36) ** 0.5:.3f}\n")
    print(f"{'':<16}{'estimate':>10}{'95 % interval':>20}")
    for name, log, deviation in zip(NAMES, model.logs.tolist(), deviations.tolist(), strict=True):
        low, middle, high = (torch.tensor(log + z * deviation).exp().item() for z in (-1.96, 0, 1.96))
        print(f"{name:<16}{middle:>10.4f}{f'{low:.4f} to {high:.4f}':>20}")
    draw(model, covariance)


if __name__ == "__main__":
    main()
