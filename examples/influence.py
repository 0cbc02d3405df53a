"""Finds mislabelled digits by influence functions: (H + λI)⁻¹g for all rows and all held-out digits at once.

    python examples/influence.py

The data are scikit-learn's digits, 1,500 to fit on, of which one in ten gets a wrong label, and 297 held out. The model
is multinomial logistic regression, solved for by onestep.fit. onestep.curvature.Laplace gives its exact Hessian H + λI,
650 x 650, and solves with it. Without row i the parameters would move by (H + λI)⁻¹gᵢ, gᵢ the gradient of the row's
loss, so the sum of the held-out losses would change by Gᵀ(H + λI)⁻¹gᵢ, G the sum of their gradients (Cook and Weisberg
1982; Koh and Liang, ICML 2017). Rows whose removal would lower the held-out loss most are looked at first.

The table says how many wrong labels are among the first rows that one looks at, the best order first: for
finding wrong labels a row's own loss, which costs nothing, does as well or better. What influence functions alone tell
is by how much a prediction rests on a row: six rows are really left out, and the change that was foretold is compared
with the change that there is.

Writes examples/output/influence.png: wrong labels found against rows looked at, foretold against true changes, and the
digits that are looked at first.
"""

import time

import matplotlib.pyplot as plt
import torch
from common import COLORS, save, styled
from sklearn.datasets import load_digits
from torch import Tensor, nn

import onestep
from onestep.curvature import Laplace

ROWS, WRONG, CLASSES = 1500, 150, 10
# On the mean loss; λ is so many times the rows.
WEIGHT_DECAY = 1e-3


def load() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 64) and labels to fit on, which of these are wrong, and images and labels held out."""
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    X, y = images[order] / 16, labels[order]
    wrong = torch.arange(ROWS) < WRONG
    shift = torch.randint(1, CLASSES, (WRONG,), generator=torch.Generator().manual_seed(1))
    given = y[:ROWS].clone()
    given[wrong] = (given[wrong] + shift) % CLASSES
    return X[:ROWS], given, wrong, X[ROWS:], y[ROWS:]


def fit(X: Tensor, y: Tensor, start: nn.Linear | None = None, rows: int = ROWS) -> nn.Linear:
    """The minimum of Σ loss + ½ λ‖θ‖², whose λ stays the same where a row is left out."""
    model = nn.Linear(64, CLASSES).double()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start.parameters() if start else (), strict=False):
            parameter.copy_(value)
    decay = WEIGHT_DECAY * rows / len(X)
    onestep.fit(model, (X, y), "cross_entropy", method="newton_cg", weight_decay=decay, tol=1e-6, progress=False)
    return model


def gradients(model: nn.Linear, X: Tensor, y: Tensor) -> Tensor:
    """Of each row's loss (n, 650), in torch's order: (p - y) ⊗ x of the weight, p - y of the bias."""
    with torch.no_grad():
        slope = model(X).softmax(1) - nn.functional.one_hot(y, CLASSES)
        return torch.cat([(slope[:, :, None] * X[:, None]).flatten(1), slope], 1)


def held_out_loss(model: nn.Linear, X: Tensor, y: Tensor) -> float:
    """Summed over the rows."""
    with torch.no_grad():
        return nn.functional.cross_entropy(model(X), y, reduction="sum").item()


def influences(model: nn.Linear, X: Tensor, y: Tensor, X_held: Tensor, y_held: Tensor) -> tuple[Tensor, Tensor]:
    """By how much each held-out loss would change without each row, (rows, held-out), and the rows' own losses."""
    posterior = Laplace(model, (X, y), "cross_entropy", prior_precision=WEIGHT_DECAY * ROWS)
    solved = posterior.solve(gradients(model, X_held, y_held).mT)
    with torch.no_grad():
        own = nn.functional.cross_entropy(model(X), y, reduction="none")
    return gradients(model, X, y) @ solved, own


def left_out(model: nn.Linear, X: Tensor, y: Tensor, X_held: Tensor, y_held: Tensor, rows: Tensor) -> Tensor:
    """By how much the held-out loss really changes without each of these rows."""
    before, kept = held_out_loss(model, X_held, y_held), torch.ones(len(X), dtype=torch.bool)
    changes = []
    for row in rows.tolist():
        kept[row] = False
        without = fit(X[kept], y[kept], start=model)
        changes.append(held_out_loss(without, X_held, y_held) - before)
        kept[row] = True
    return torch.tensor(changes, dtype=torch.float64)


def draw(orders: dict[str, Tensor], wrong: Tensor, changes: tuple[Tensor, Tensor], X: Tensor, y: Tensor) -> None:
    figure = plt.figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subfigures(1, 3)
    axes = styled(left.subplots(), xlabel="rows looked at", ylabel="wrong labels found")
    for color, (name, order) in zip(COLORS, orders.items(), strict=False):
        axes.plot(wrong[order].cumsum(0), color=color, label=name)
    axes.legend(frameon=False)
    foretold, true = changes
    axes = styled(middle.subplots(), xlabel="foretold change of the held-out loss", ylabel="true change")
    axes.axline((0, 0), slope=1, color="0.8")
    axes.plot(foretold, true, "o", color=COLORS[0])
    first = next(iter(orders.values()))[:15]
    for cell, row in zip(right.subplots(3, 5).flat, first.tolist(), strict=True):
        cell.imshow(X[row].reshape(8, 8), cmap="gray_r")
        cell.set_title(f"labelled {y[row]}", fontsize=8, color=COLORS[0] if wrong[row] else "black")
        cell.axis("off")
    save(figure, "influence.png")


def main() -> None:
    X, y, wrong, X_held, y_held = load()
    model = fit(X, y)
    began = time.perf_counter()
    influence, own = influences(model, X, y, X_held, y_held)
    seconds = time.perf_counter() - began
    print(f"{ROWS} rows x {len(X_held)} held-out digits: all influences in {seconds:.2f} s\n")
    total = influence.sum(1)
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))
    orders = {"influence on held-out loss": total.argsort(), "own loss": (-own).argsort(), "by chance": shuffled}
    orders = dict(sorted(orders.items(), key=lambda item: -int(wrong[item[1][:WRONG]].sum())))
    print(f"{'rows looked at first, by':<32}{'wrong of the first 75':>24}{'of the first 150':>20}")
    for name, order in orders.items():
        print(f"{name:<32}{int(wrong[order[:75]].sum()):>24}{int(wrong[order[:WRONG]].sum()):>20}")
    rows = torch.cat([total.argsort()[:3], total.argsort()[-3:]])
    true = left_out(model, X, y, X_held, y_held, rows)
    print(f"\nheld-out loss {held_out_loss(model, X_held, y_held):.3f}, changes without a row:")
    for row, foretold, change in zip(rows.tolist(), total[rows].tolist(), true.tolist(), strict=True):
        print(f"  row {row:<6} foretold {foretold:+.4f}   true {change:+.4f}")
    draw(orders, wrong, (total[rows], true), X, y)


if __name__ == "__main__":
    main()
