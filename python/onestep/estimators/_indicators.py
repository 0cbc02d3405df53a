"""Ridge on targets that say which class a row is of, ±1 for each class, without these n·k numbers."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from onestep.estimators._arrays import Array
from onestep.estimators._centred import MIN_RCOND, Centred, Primal, blocks
from onestep.estimators._solve import Solution, solve_spd
from onestep.linalg.narrow import widened

# Rows that are added up in float32, and how far from zero a column may be, in deviations, for that.
_ROWS = 32
_FAR = 4.0
# Elements whose rows are gathered by class at once: 256 MiB of X as it is, or 4 MiB that are converted for it.
_WINDOW = 1 << 26
_CONVERTED = 1 << 20


def solve_indicators(
    X: Tensor, indices: Array, classes: int, weight: Tensor | None, alpha: Tensor, *, fit_intercept: bool
) -> Solution | None:
    """What `solve_ridge` gives for Y = 2·[yᵢ = j] - 1, where n ≥ d and Cholesky is accurate; else None.

    X̃ᵀỸ is 2 Σ w (x - x̄) over the rows of each class where Y is centred, and a sum by class takes n·d operations, not
    n·d·k. All of it is in float64 but for what stands beside a Gram matrix that float32 was good enough for.
    """
    primal = Primal(X, widened(X[:, :0]), weight, center=fit_intercept)
    centred = primal.centred
    share = torch.from_numpy(np.bincount(indices, None if weight is None else weight.numpy(), classes)).double()
    y_mean = 2 * share / share.sum() - 1 if fit_intercept else torch.zeros(classes, dtype=torch.float64)
    coef = torch.empty(X.shape[1], classes, dtype=torch.float64)
    crosses: dict[bool, Tensor] = {}
    for penalty in sorted(set(alpha.tolist())):
        targets = (alpha == penalty).nonzero()[:, 0]
        for gram, _, floor in primal.candidates():
            rough = floor > MIN_RCOND and _near(centred, gram)
            if rough not in crosses:
                sums = _float_sums(centred, indices, share) if rough else _class_sums(centred, indices, classes)
                crosses[rough] = 2 * sums if fit_intercept else 2 * sums - sums.sum(1, keepdim=True)
            cross = crosses[rough][:, targets]
            W = solve_spd(gram + torch.full((len(gram),), penalty, dtype=gram.dtype).diag(), cross, floor)
            if W is not None:
                break
        else:
            return None
        coef[:, targets] = W
    return Solution(coef, y_mean - centred.x_mean @ coef, "cholesky")


def _near(centred: Centred, gram: Tensor) -> bool:
    """Whether rows may be added up before the mean is taken off: no column is far from zero against its spread."""
    spread = gram.diagonal() / max(len(centred.X), 1)
    return bool((centred.x_mean.square() <= _FAR**2 * spread).all()) and centred.X.stride(1) == 1


def _float_sums(centred: Centred, indices: Array, share: Tensor) -> Tensor:
    """Σ w (x - x̄) over the rows of each class, (d, k): float32 rows in place, a few at a time, and those in float64."""
    n, d = centred.X.shape
    total = torch.zeros(len(share), d, dtype=torch.float64)
    # Rows of a file are gathered within a window of it that stays in memory; others are converted.
    width = _WINDOW if centred.X.dtype == torch.float32 else _CONVERTED
    for rows in blocks(n, d, least=max(2 * len(share), width // d)):
        weight = None if centred.weight is None else centred.weight[rows]
        total += _sums_by_class(widened(centred.X[rows]), indices[rows], weight, len(share))
    total -= share[:, None] * centred.x_mean
    return total.mT.masked_fill(centred.constant[:, None], 0.0).contiguous()


def _sums_by_class(X: Tensor, indices: Array, weight: Tensor | None, classes: int) -> Tensor:
    """Σ wx over the rows of each class, (k, d) float64."""
    order = np.argsort(indices, kind="stable")
    counts = np.bincount(indices, minlength=classes)
    pieces = -(-counts // _ROWS)
    # Where in its class each piece begins, and where that class begins.
    within = (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * _ROWS
    offsets = within + np.repeat(np.cumsum(counts) - counts, pieces)
    rows = torch.from_numpy(order)
    sums = torch.nn.functional.embedding_bag(
        rows, X, torch.from_numpy(offsets), mode="sum", per_sample_weights=None if weight is None else weight[rows]
    )
    starts = np.append(0, np.cumsum(pieces))
    pattern = csr_array((np.ones(starts[-1]), np.arange(starts[-1]), starts), shape=(classes, starts[-1]))
    return torch.from_numpy(pattern @ sums.double().numpy())


def _class_sums(centred: Centred, indices: Array, classes: int) -> Tensor:
    """Σ w (x - x̄) over the rows of each class, (d, k)."""
    total = np.zeros((classes, centred.X.shape[1]))
    root = None if centred.weight is None else centred.weight.double().sqrt().numpy()
    # Blocks of more rows than there are classes: each adds up all k·d sums.
    for rows, x in centred.x_by_blocks(least=max(64, classes)):
        share = np.ones(len(x)) if root is None else root[rows]
        pattern = csr_array((share, (indices[rows], np.arange(len(x)))), shape=(classes, len(x)))
        total += pattern @ x.numpy()
    return torch.from_numpy(total).mT.contiguous()
