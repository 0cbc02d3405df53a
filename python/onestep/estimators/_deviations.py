"""Standard deviations of what ridge regression predicts: noise, and what the rows leave open of the coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.estimators._centred import Centred, blocks
from onestep.estimators._solve import Solution, triangular
from onestep.linalg.narrow import working_dtype

# With more features the d x d numbers that they need, over 8 MiB, are not kept.
MOST_FEATURES = 1024
# Where less than this part of the targets' squares is left as residual, the difference of sums has too few digits of
# it, and the residuals are computed from the rows.
_LEAST_RESIDUAL = {torch.float32: 1e-3, torch.float64: 1e-8}


class Deviations:
    """σ²(1 + 1/Σw + x̃ᵀ(X̃ᵀX̃ + alpha I)⁻¹x̃) for each target, X̃ the centred rows, 1/Σw where there is an intercept.

    σ² is the weighted sum of squared residuals over the degrees of freedom that the fit leaves.
    """

    def __init__(self, solution: Solution, Y: Tensor, alpha: Tensor, *, fit_intercept: bool) -> None:
        assert solution.centred is not None
        centred = solution.centred
        self.alpha, self.x_mean = alpha, centred.x_mean
        self.weight_sum = float(len(centred.X) if centred.weight is None else centred.weight.double().sum())
        self.fit_intercept, self.path = fit_intercept, solution.path
        self.gram = None if solution.sums is None else solution.sums[0]
        self.root = triangular(centred)[0] if solution.sums is None else None
        self.residual = self._residual(solution, centred, Y)

    def _residual(self, solution: Solution, centred: Centred, Y: Tensor) -> Tensor:
        """Σw(y - ŷ)², (k,)."""
        W = solution.coef
        total = torch.zeros(W.shape[1], dtype=torch.float64)
        for rows in blocks(*Y.shape):
            total += centred.y(rows).square_().sum(0)
        if solution.sums is not None:
            gram, cross = solution.sums
            explained = (2 * cross - gram @ W).mul_(W).sum(0)
            left: Tensor = total - explained
            if bool((left > _LEAST_RESIDUAL[working_dtype(centred.X)] * total).all()):
                return left
        left = torch.zeros_like(total)
        for rows, x in centred.x_by_blocks():
            left += centred.y(rows).addmm_(x, W, alpha=-1).square_().sum(0)
        return left

    def of(self, X: Tensor) -> Tensor:
        """The standard deviation of a new observation at each row, (n,k) in float64.

        Raises:
            ValueError: the coefficients are not unique, or no degree of freedom is left to tell the noise by.
        """
        if "minimum_norm" in self.path:
            raise ValueError(
                "return_std=True, but X has a lower rank than it has features and alpha is 0: the coefficients are not "
                "unique; expected alpha > 0"
            )
        result = torch.empty(len(X), len(self.alpha), dtype=torch.float64)
        for penalty in sorted(set(self.alpha.tolist())):
            targets = (self.alpha == penalty).nonzero()[:, 0]
            T, used = self._root(penalty)
            left = self.weight_sum - used - self.fit_intercept
            if left <= 0.5:
                raise ValueError(
                    f"return_std=True, but the weights add up to {self.weight_sum:g} rows, of which the fit uses "
                    f"{used + self.fit_intercept:.4g}: nothing is left to tell the noise by; expected more rows"
                )
            for rows in blocks(len(X), len(self.x_mean)):
                x = (X[rows] - self.x_mean).mT
                leverage = torch.linalg.solve_triangular(T.mT, x, upper=False).square_().sum(0)
                leverage += 1 + (1 / self.weight_sum if self.fit_intercept else 0.0)
                result[rows, targets] = (leverage[:, None] * (self.residual[targets] / left)).sqrt()
        return result

    def _root(self, penalty: float) -> tuple[Tensor, float]:
        """Upper triangular T with TᵀT = X̃ᵀX̃ + alpha I, and the trace of the hat matrix."""
        d = len(self.x_mean)
        shift = penalty**0.5 * torch.eye(d, dtype=torch.float64)
        if self.root is not None:
            T = torch.linalg.qr(torch.cat([self.root, shift]), mode="r")[1]
        else:
            assert self.gram is not None
            T = torch.linalg.cholesky(self.gram + shift * shift, upper=True)
        if penalty == 0:
            return T, float(d)
        inverse = torch.linalg.solve_triangular(T, torch.eye(d, dtype=torch.float64), upper=True)
        used = d - penalty * inverse.square().sum().item()
        return T, used
