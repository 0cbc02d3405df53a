"""Ridge for every penalty at once from one eigendecomposition, with leave-one-out errors and degrees of freedom.

With X̃ = √w (X - x_mean), Ỹ likewise and H = X̃(X̃ᵀX̃ + aI)⁻¹X̃ᵀ (plus √w√wᵀ/Σw for an intercept), the error of row i
under a fit without it is rᵢ/(1 - hᵢᵢ), r = Ỹ - HY (Allen 1974; Golub, Heath and Wahba 1979). All of it in float64, and
all errors are times √w. a stands for the penalty.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from onestep._serial_torch import eigh, serial_for
from onestep.estimators._centred import EPS, MIN_RCOND, Centred, Primal, blocks, wide
from onestep.estimators._solve import from_dual, kernel, triangular
from onestep.linalg.spd import eigenvalues_are_accurate

# Columns, one for each target and penalty, whose errors are computed at once.
_COLUMNS = 4096
# A product with so few columns takes about the time of one pass over the rows.
_NARROW = 4

# Errors (rows, A, targets) of some rows and some targets.
Errors = Iterator[tuple[slice, slice, Tensor]]


class Spectrum(Protocol):
    """What a decomposition answers. Errors come in blocks of rows and targets, whatever n and k."""

    path: str
    centred: Centred

    def coef(self, alpha: Tensor) -> Tensor:
        """W (d, k) for a penalty, or one per target (k,)."""

    def freedom(self, alphas: Tensor) -> Tensor:
        """tr(I - H) (A,) over the rows with weight, for penalties (A,)."""

    def residuals(self, alphas: Tensor) -> Errors:
        """r for penalties (A,)."""

    def leave_one_out(self, alphas: Tensor) -> Errors:
        """r / (1 - h) for penalties (A,)."""


def decompose(X: Tensor, Y: Tensor, weight: Tensor | None, smallest_alpha: float, *, fit_intercept: bool) -> Spectrum:
    """The decomposition of the smaller of Gram and kernel, accurate for penalties from `smallest_alpha` up."""
    if X.shape[0] < X.shape[1]:
        return DualSpectrum(wide(X, Y, weight, center=fit_intercept), smallest_alpha, fit_intercept=fit_intercept)
    return PrimalSpectrum(Primal(X, Y, weight, center=fit_intercept), smallest_alpha, fit_intercept=fit_intercept)


class PrimalSpectrum:
    """X̃ᵀX̃ = V diag(λ) Vᵀ (d x d): from the Gram, or from a QR of the rows where squaring X would cost too much."""

    def __init__(self, primal: Primal, smallest_alpha: float, *, fit_intercept: bool) -> None:
        self.centred = primal.centred
        self._fit_intercept = fit_intercept
        self._intercept = _intercept_leverage(self.centred, fit_intercept)
        for gram, cross, floor in primal.candidates():
            values, V = eigh(gram)
            if eigenvalues_are_accurate(values, smallest_alpha, floor):
                self.path = "eigh"
                self._values, self._V, self._target = values.clamp_(min=0), V, V.mT @ cross
                break
        else:
            self.path = "svd"
            R, Z = triangular(self.centred)
            U, S, Vh = torch.linalg.svd(R, full_matrices=False)
            self._values, self._V, self._target = S.square(), Vh.mT, (U * S).mT @ Z

    def coef(self, alpha: Tensor) -> Tensor:
        W: Tensor = self._V @ (self._target / (self._values[:, None] + alpha))
        return W

    def freedom(self, alphas: Tensor) -> Tensor:
        surplus = rows_with_weight(self.centred) - len(self._values) - int(self._fit_intercept)
        return surplus + _kept(self._values, alphas).sum(dim=0)

    def residuals(self, alphas: Tensor) -> Errors:
        d, k = self._target.shape
        for targets in _targets(k, len(alphas)):
            parts = self._target[:, None, targets] / (self._values[:, None] + alphas)[:, :, None]
            W = self._V @ parts.reshape(len(self._V), -1)
            for rows, x in self.centred.x_by_blocks(max(d, W.shape[1])):
                yield rows, targets, self._errors(rows, targets, x @ W)

    def leave_one_out(self, alphas: Tensor) -> Errors:
        d, k = self._target.shape
        shrink = 1.0 / (self._values[:, None] + alphas)
        room = torch.empty(0)
        for rows, x in self.centred.x_by_blocks(max(d, min(len(alphas) * k, _COLUMNS))):
            if rows.start == 0:  # the largest block
                room = torch.empty_like(x)
            rotated = torch.mm(x, self._V, out=room[: len(x)])
            with serial_for(x.numel() * -(-len(alphas) // _NARROW)):
                # x is not needed any more: its memory takes the squares.
                leverage = torch.square(rotated, out=x) @ shrink
            left = (1.0 - self._intercept[rows, None] - leverage).clamp_(min=EPS)[:, :, None]
            for targets in _targets(k, len(alphas)):
                parts = (self._target[:, None, targets] * shrink[:, :, None]).reshape(d, -1)
                with serial_for(x.numel() * -(-parts.shape[1] // _NARROW)):
                    errors = self._errors(rows, targets, rotated @ parts).div_(left)
                yield rows, targets, errors

    def _errors(self, rows: slice, targets: slice, predicted: Tensor) -> Tensor:
        """Targets less predictions (rows, A · targets) of them."""
        y = self.centred.y(rows, targets)
        return y[:, None, :] - predicted.view(len(y), -1, y.shape[1])


class DualSpectrum:
    """X̃X̃ᵀ = U diag(λ) Uᵀ (n x n), for n < d: from the kernel, or an SVD of X̃ where squaring would cost too much.

    Here r = aC and 1 - h = a diag(G⁻¹), G = X̃X̃ᵀ + aI, C = G⁻¹Ỹ, which do not cancel (Rifkin and Lippert 2007). An
    intercept makes q = √w/‖√w‖ a null vector, whose part of 1 - h would swamp the rest: it is moved to the mean
    eigenvalue, and what it adds there is taken off.
    """

    def __init__(self, centred: Centred, smallest_alpha: float, *, fit_intercept: bool) -> None:
        self.centred = centred
        self._null = _intercept_leverage(centred, fit_intercept)
        q = self._null.sqrt()
        K = kernel(centred)
        self._moved = K.diagonal().mean() if fit_intercept else torch.zeros((), dtype=torch.float64)
        values, U = eigh(K.addr_(q, q, alpha=self._moved.item()))
        if eigenvalues_are_accurate(values, smallest_alpha, MIN_RCOND):
            self.path = "dual_eigh"
            self._values, self._U = values.clamp_(min=0), U
        else:
            self.path = "dual_svd"
            moved = torch.cat([centred.x(), self._moved.sqrt() * q[:, None]], dim=1)
            self._U, S, _ = torch.linalg.svd(moved, full_matrices=False)
            self._values = S.square()
        self._target = self._U.mT @ centred.y()

    def coef(self, alpha: Tensor) -> Tensor:
        return from_dual(self.centred, self._U @ (self._target / (self._values[:, None] + alpha)))

    def freedom(self, alphas: Tensor) -> Tensor:
        weightless = len(self._values) - rows_with_weight(self.centred)
        return _kept(self._values, alphas).sum(dim=0) - self._null.sum() * self._null_kept(alphas) - weightless

    def residuals(self, alphas: Tensor) -> Errors:
        n, k = self._target.shape
        keep = _kept(self._values, alphas)
        for targets in _targets(k, len(alphas)):
            some = self._target[:, targets]
            parts = (keep[:, :, None] * some[:, None, :]).reshape(n, -1)
            for rows in blocks(n, parts.shape[1]):
                yield rows, targets, (self._U[rows] @ parts).reshape(-1, len(alphas), some.shape[1])

    def leave_one_out(self, alphas: Tensor) -> Errors:
        keep, null = _kept(self._values, alphas), self._null_kept(alphas)
        for rows, targets, errors in self.residuals(alphas):
            left = self._U[rows].square() @ keep - self._null[rows, None] * null
            yield rows, targets, errors.div_(left.clamp_(min=torch.finfo(left.dtype).tiny)[:, :, None])

    def _null_kept(self, alphas: Tensor) -> Tensor:
        return _kept(self._moved.reshape(1), alphas)[0]


def _targets(count: int, alphas: int) -> Iterator[slice]:
    """Slices of the targets, each of a target or of so many that they have `_COLUMNS` columns."""
    step = max(1, _COLUMNS // alphas)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _kept(values: Tensor, alphas: Tensor) -> Tensor:
    """a / (λ + a) for all pairs: what I - H leaves of each direction, where 1 - λ / (λ + a) would cancel."""
    kept: Tensor = alphas / (values[:, None] + alphas)
    return kept


def rows_with_weight(centred: Centred) -> int:
    """How many rows count."""
    return centred.X.shape[0] if centred.weight is None else int((centred.weight > 0).sum())


def _intercept_leverage(centred: Centred, fit_intercept: bool) -> Tensor:
    n = centred.X.shape[0]
    if not fit_intercept:
        return torch.zeros(n, dtype=torch.float64)
    if centred.weight is None:
        return torch.full((n,), 1.0 / n, dtype=torch.float64)
    return centred.weight.double() / centred.weight.sum(dtype=torch.float64)
