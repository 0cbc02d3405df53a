"""Melting points from molecular structure: ridge, kernel ridge and a small network, solved for, against scikit-learn.

    pip install rdkit chemicals        # the extra "molecules"
    python examples/molecules.py [--quick]

The data are Bradley's open melting points (11,500 molecules, CC0), which the package chemicals ships with structures.
RDKit tells of each molecule how often each of 1,024 kinds of circular neighbourhoods occurs (Morgan counts, radius 2)
and 33 properties, such as surface area and hydrogen bonds. Held-out molecules have other scaffolds (Bemis and Murcko's
ring systems with their links) than those to fit on, as a chemist's next series would.

- Ridge regression, its penalty by leave-one-out errors: `onestep.RidgeCV`, scikit-learn's `RidgeCV`.
- Kernel ridge with Gaussians: `onestep.linalg`. With A = K + λI, A⁻¹ = UᵀU and α = A⁻¹y, the error at row i of a fit
  without row i is αᵢ / (A⁻¹)ᵢᵢ exactly, so that one factorisation tells the worth of a width and a λ; scikit-learn's
  `GridSearchCV` of `KernelRidge` fits five times for each.
- A network, 43 inputs (the properties, ten principal components of the counts) → 24 tanh → 1, by Levenberg-Marquardt,
  and scikit-learn's `MLPRegressor`: the weight decay is chosen on held-back scaffolds.
- Gradient-boosted trees (scikit-learn), what one would try otherwise.

Writes examples/output/molecules.png.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import COLORS, save, styled
from melting_points import Molecules, load
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import RidgeCV as SklearnRidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, GroupShuffleSplit
from sklearn.neural_network import MLPRegressor
from torch import Tensor, nn

import onestep
from onestep.linalg import inverse_cholesky, solve_spd

try:
    from rdkit.Chem import Draw
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed: pip install rdkit chemicals") from error

WIDTHS, PENALTIES, DECAYS = (0.01, 0.03, 0.1, 0.3), (0.03, 0.1, 0.3), (1e-4, 1e-3, 1e-2)
ALPHAS = np.logspace(0, 4, 9)


@dataclass
class Fitted:
    """What a method foretells of the held-out rows, and the seconds it took, with the choice of its settings."""

    method: str
    seconds: float
    foretold: np.ndarray


def gaussian(X: Tensor, Y: Tensor, width: float) -> Tensor:
    """exp(-width ‖x - y‖²), width counted against the mean squared length of X's rows."""
    # In place, as a matrix of all rows takes 700 MB.
    distances = (X @ Y.T).mul_(-2).add_(X.square().sum(1)[:, None]).add_(Y.square().sum(1))
    return distances.clamp_min_(0).mul_(-width).exp_()


def left_out_errors(kernel: Tensor, y: Tensor, penalty: float) -> Tensor:
    """yᵢ minus what kernel ridge regression on all other rows foretells of row i."""
    U = inverse_cholesky(kernel + penalty * torch.eye(len(y), dtype=y.dtype)).U
    return (U.T @ (U @ y)) / U.square().sum(0)


def kernel_ridge(X: np.ndarray, y: np.ndarray, X_held: np.ndarray, rows: int) -> np.ndarray:
    """Width and λ by leave-one-out errors of ``rows`` rows, then one solve with all."""
    points, values, new = (torch.from_numpy(a) for a in (X, y - y.mean(), X_held))
    few = points[:rows]

    def error(setting: tuple[float, float]) -> float:
        return left_out_errors(gaussian(few, few, setting[0]), values[:rows], setting[1]).square().mean().item()

    width, penalty = min(product(WIDTHS, PENALTIES), key=error)
    kernel = gaussian(points, points, width)
    kernel.diagonal().add_(penalty)
    return (gaussian(new, points, width) @ solve_spd(kernel, values)).numpy() + y.mean()


def sklearn_kernel_ridge(X: np.ndarray, y: np.ndarray, X_held: np.ndarray, rows: int) -> np.ndarray:
    """The same by five-fold cross-validation."""
    grid = {"gamma": WIDTHS, "alpha": PENALTIES}
    search = GridSearchCV(KernelRidge(kernel="rbf"), grid, cv=5, scoring="neg_mean_squared_error", refit=False)
    search.fit(X[:rows], y[:rows] - y.mean())
    return KernelRidge(kernel="rbf", **search.best_params_).fit(X, y - y.mean()).predict(X_held) + y.mean()


def network(data: Molecules, fit: np.ndarray, checked: np.ndarray, decays: tuple[float, ...]) -> np.ndarray:
    """By Levenberg-Marquardt from the same first weights for each weight decay; the steps by held-back rows too."""
    X, y = torch.from_numpy(data.narrow), torch.from_numpy((data.melting - 350) / 100)[:, None]
    best, found = float("inf"), None
    for decay in decays:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(X.shape[1], 24), nn.Tanh(), nn.Linear(24, 1)).double()
        result = onestep.fit(
            model,
            (X[fit], y[fit]),
            "mse",
            method="levenberg_marquardt",
            weight_decay=decay,
            max_steps=30,
            validation=(X[checked], y[checked]),
            patience=5,
            progress=False,
        )
        loss = min(record.validation_loss for record in result.history if record.validation_loss is not None)
        if loss < best:
            best = loss
            with torch.no_grad():
                found = model(X[data.held])[:, 0].numpy() * 100 + 350
    return found


def sklearn_network(data: Molecules, fit: np.ndarray, checked: np.ndarray, decays: tuple[float, ...]) -> np.ndarray:
    """The same network by the better of scikit-learn's solvers."""
    X, y = data.narrow, (data.melting - 350) / 100
    options = {"hidden_layer_sizes": (24,), "activation": "tanh", "max_iter": 200, "random_state": 0}
    pairs = product(("adam", "lbfgs"), decays)
    models = [MLPRegressor(solver=solver, alpha=decay * len(fit) / 2, **options) for solver, decay in pairs]
    with warnings.catch_warnings():
        # Some end at max_iter, or where they overfit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = [model.fit(X[fit], y[fit]).score(X[checked], y[checked]) for model in models]
    return models[int(np.argmax(scores))].predict(X[data.held]) * 100 + 350


def timed(method: str, foretell: Callable[[], np.ndarray]) -> Fitted:
    began = time.perf_counter()
    foretold = foretell()
    return Fitted(method, time.perf_counter() - began, foretold)


def compare(data: Molecules, rows: int, quick: bool) -> list[Fitted]:
    """Every method; ``rows`` rows choose the kernel's settings."""
    X, y, X_held = data.wide[data.train], data.melting[data.train], data.wide[data.held]
    lengths = np.sqrt(np.square(X).sum(1).mean())
    scaled, scaled_held = X / lengths, X_held / lengths
    inside = GroupShuffleSplit(1, test_size=0.2, random_state=1).split(data.train, groups=data.scaffolds[data.train])
    fit, checked = (data.train[part] for part in next(inside))
    decays = DECAYS[:1] if quick else DECAYS
    trees = HistGradientBoostingRegressor(max_iter=10 if quick else 150, early_stopping=True, random_state=0)
    return [
        timed("onestep.RidgeCV", lambda: onestep.RidgeCV(ALPHAS).fit(X, y).predict(X_held)),
        timed("scikit-learn's RidgeCV", lambda: SklearnRidgeCV(ALPHAS).fit(X, y).predict(X_held)),
        timed("kernel ridge by onestep.linalg", lambda: kernel_ridge(scaled, y, scaled_held, rows)),
        timed("scikit-learn's KernelRidge", lambda: sklearn_kernel_ridge(scaled, y, scaled_held, rows)),
        timed("network by Levenberg-Marquardt", lambda: network(data, fit, checked, decays)),
        timed("scikit-learn's MLPRegressor", lambda: sklearn_network(data, fit, checked, decays)),
        timed("gradient-boosted trees", lambda: trees.fit(X, y).predict(X_held)),
    ]


def draw(data: Molecules, results: list[Fitted]) -> None:
    """The best method's melting points, all methods' errors against seconds, and where the best is most wrong."""
    y, best = data.melting[data.held], results[0]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    left.scatter(y, best.foretold, s=5, alpha=0.4, color=COLORS[1], linewidths=0)
    left.plot([150, 600], [150, 600], color="0.6", linewidth=1)
    styled(left, title=f"Melting points: {best.method}", xlabel="measured, K", ylabel="foretold, K")
    for row, result in enumerate(results):
        error = np.abs(result.foretold - y).mean()
        middle.barh(row, error, color=COLORS[0] if row == 0 else COLORS[2])
        middle.text(1, row, f"{result.method}, {result.seconds:.1f} s", va="center", color="white", fontsize=9)
    middle.invert_yaxis()
    middle.set_yticks([])
    styled(middle, title="Mean absolute error of each method, in how many seconds", xlabel="K")
    order = np.abs(best.foretold - y).argsort()
    shown = [*order[:3], *order[-3:]]
    legends = [f"{y[i]:.0f} K, foretold {best.foretold[i]:.0f}" for i in shown]
    molecules = [data.structures[data.held[i]] for i in shown]
    right.imshow(Draw.MolsToGridImage(molecules, molsPerRow=3, subImgSize=(300, 260), legends=legends))
    right.set_title("Three of the best foretold, three of the worst")
    right.set_axis_off()
    save(figure, "molecules.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer molecules")
    quick = parser.parse_args().quick
    data = load(400 if quick else None)
    results = compare(data, 200 if quick else 1000, quick)
    y = data.melting[data.held]
    results.sort(key=lambda result: np.abs(result.foretold - y).mean())
    print(f"melting points of {len(data.train):,} molecules, and of {len(y):,} with other scaffolds, held out")
    print(f"{'':<34}{'mean error, K':>14}{'R²':>8}{'seconds':>10}")
    for result in results:
        error = np.abs(result.foretold - y).mean()
        print(f"{result.method:<34}{error:>14.1f}{r2_score(y, result.foretold):>8.3f}{result.seconds:>10.2f}")
    draw(data, results)


if __name__ == "__main__":
    main()
