"""Ridge on targets that say which class a row is of, ±1 for each class, without these n·k numbers."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from onestep.estimators._arrays import Array
from onestep.estimators._centred import Centred, Primal, blocks
from onestep.estimators._solve import Solution, solve_spd


def solve_indicators(
    X: Tensor, indices: Array, classes: int, weight: Tensor | None, alpha: Tensor, *, fit_intercept: bool
) -> Solution | None:
    """What `solve_ridge` gives for Y = 2·[yᵢ = j] - 1, where n ≥ d and Cholesky is accurate; else None.

    X̃ᵀỸ is 2 Σ w (x - x̄) over the rows of each class where Y is centred, and a sum by class takes n·d operations, not
    n·d·k. All of it in float64.
    """
    primal = Primal(X, X[:, :0], weight, center=fit_intercept)
    centred = primal.centred
    cross = 2 * _class_sums(centred, indices, classes)
    share = np.bincount(indices, None if weight is None else weight.numpy(), classes)
    y_mean = torch.zeros(classes, dtype=torch.float64)
    if fit_intercept:
        y_mean = torch.from_numpy(2 * share / share.sum() - 1)
    else:
        cross -= cross.sum(1, keepdim=True) / 2
    coef = torch.empty(X.shape[1], classes, dtype=torch.float64)
    for penalty in sorted(set(alpha.tolist())):
        targets = (alpha == penalty).nonzero()[:, 0]
        for gram, _, floor in primal.candidates():
            W = solve_spd(gram + torch.full((len(gram),), penalty, dtype=gram.dtype).diag(), cross[:, targets], floor)
            if W is not None:
                break
        else:
            return None
        coef[:, targets] = W
    return Solution(coef, y_mean - centred.x_mean @ coef, "cholesky")


def _class_sums(centred: Centred, indices: Array, classes: int) -> Tensor:
    """Σ w (x - x̄) over the rows of each class, (d, k)."""
    n, d = centred.X.shape
    total = np.zeros((classes, d))
    root = None if centred.weight is None else centred.weight.double().sqrt().numpy()
    # Blocks of more rows than there are classes: each adds up all k·d sums.
    for rows in blocks(n, d, least=max(64, classes)):
        x = centred.x(rows).numpy()
        share = np.ones(len(x)) if root is None else root[rows]
        pattern = csr_array((share, (indices[rows], np.arange(len(x)))), shape=(classes, len(x)))
        total += pattern @ x
    return torch.from_numpy(total).mT.contiguous()
