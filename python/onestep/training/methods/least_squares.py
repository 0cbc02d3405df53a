"""Least squares from rows that are seen once: by normal equations, or by QR where those lose too many digits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from onestep.evaluation.distributed import share, summed
from onestep.linalg import NormalEquations, spd
from onestep.optim import NonFiniteError

# With up to this many features, rows are read a second time for a QR factorisation where the first pass lost digits.
MOST_FEATURES = 4096
# With more features, this ridge is added where features depend on each other, relative to the mean of the diagonal.
_RESCUE = 1e-10
# The relative error of coefficients is about ε over the smallest pivot of the normal equations, of features of unit
# length. More than this is too much: a hundredth in float32, and in float64 more than the last ten of sixteen digits.
_MOST_LOST = {torch.float32: 1e-2, torch.float64: 1e-6}
# The loss is a difference of sums of squares, each of which may be off by this many ε.
_FEW = 10
# The loss must not be wrong by more than this part of itself.
LOSS_DIGITS = 1e-2
# Singular values under this many ε of the largest count as zero, or under d ε if that is more.
_ROUNDINGS = 10
# Centring leaves noise of about so many ε (float64) of a column's mean, or √n of them if that is more.
_CENTRING = 64
# So many ε of the outputs may be lost where rows are multiplied by large weights that cancel.
_MOST_ROUNDED = 100.0


class LostDigitsError(ArithmeticError):
    """The normal equations do not determine the solution to the accuracy that is asked."""


class Fitted(NamedTuple):
    """A solution and its losses.

    Attributes:
        W: (d,k), intercept: (k,).
        initial_loss: the mean loss before, without weight decay.
        loss: that of W and intercept as they are here, weight decay included.
        note: what had to be done besides, for the user; may be empty.
    """

    W: Tensor
    intercept: Tensor
    initial_loss: float
    loss: float
    note: str


class LeastSquares(ABC):
    """argmin over W, b of the mean over all elements of (XW + b - Y)², plus ½ weight_decay ‖W‖².

    Args:
        features, targets: columns of X and Y.
        intercept: whether there is a b.
        dtype: of X, Y and the solution.
    """

    def __init__(self, features: int, targets: int, *, intercept: bool, dtype: torch.dtype) -> None:
        self.features, self.targets, self.intercept, self.dtype = features, targets, intercept, dtype
        # The loss before, and the elements and rows that it is of.
        self.counted = torch.zeros(3, dtype=torch.float64)

    def add(self, X: Tensor, Y: Tensor, initial_loss: Tensor, elements: int, number: int) -> None:
        """Adds rows (n,d) and (n,k) of batch ``number``."""
        try:
            self._add(X.to("cpu"), Y.to("cpu"))
        except ValueError as error:
            raise NonFiniteError(f"step 1, batch {number}: {error}") from error
        self.counted += torch.tensor([initial_loss.item(), elements, len(X)], dtype=torch.float64)

    def solve(self, weight_decay: float) -> Fitted:
        """The solution from the rows of all processes."""
        initial, elements, rows = summed(lambda: (torch.empty(0), self.counted.tolist()))[1]
        W, intercept, error, note = self._solve(0.5 * weight_decay * elements, rows)
        loss = error / elements + 0.5 * weight_decay * W.double().square().sum().item()
        return Fitted(W, intercept, initial / elements, loss, note)

    @abstractmethod
    def _add(self, X: Tensor, Y: Tensor) -> None: ...

    @abstractmethod
    def _solve(self, ridge: float, rows: float) -> tuple[Tensor, Tensor, float, str]:
        """W and b for the penalty ridge·‖W‖², the sum of their squared errors, and a note."""


class NormalSums(LeastSquares):
    """XᵀX and XᵀY are summed; the loss follows from the sums.

    Raises (``solve``):
        LostDigitsError: too many digits are lost. ``QRFactor`` has them.
    """

    def __init__(self, features: int, targets: int, *, intercept: bool, dtype: torch.dtype) -> None:
        super().__init__(features, targets, intercept=intercept, dtype=dtype)
        self.equations = NormalEquations(features, targets, intercept=intercept, dtype=dtype)
        self.squares = torch.zeros(targets, dtype=torch.float64)

    def _add(self, X: Tensor, Y: Tensor) -> None:
        self.equations.update(X, Y)
        self.squares += Y.double().square().sum(0)

    def _solve(self, ridge: float, rows: float) -> tuple[Tensor, Tensor, float, str]:
        if share().size > 1:
            self.equations.all_reduce()
        squares, note = summed(lambda: (self.squares, []))[0], ""
        sums, replaceable = self.equations.sums, self.features <= MOST_FEATURES
        try:
            W, intercept = self.equations.solve(ridge)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            if replaceable:
                raise LostDigitsError(str(error)) from error
            rescue = _RESCUE if self.dtype == torch.float64 else 1e4 * _RESCUE
            ridge += rescue * sums.gram.diagonal().mean().item()
            note = f" in one pass; features depend on each other, so a ridge of {ridge:.1e} was added"
            W, intercept = self.equations.solve(ridge)
        # Sums are centred where there is an intercept.
        shift = rows * sums.y_mean.square() if self.intercept else torch.zeros_like(squares)
        V = W.double()
        error_sum = ((squares - shift).sum() + ((sums.gram @ V - 2 * sums.cross) * V).sum()).clamp_min(0).item()
        if replaceable:
            # Squares of targets are summed in float64; products of rows in their own type.
            own = ((sums.gram.abs() @ V.abs() + 2 * sums.cross.abs()) * V.abs()).sum().item()
            noise = torch.finfo(self.dtype).eps * own + torch.finfo(torch.float64).eps * (squares + shift).sum().item()
            self._check_digits(ridge, noise, error_sum)
        return W, intercept, error_sum, note

    def _check_digits(self, ridge: float, noise: float, error: float) -> None:
        if _FEW * noise > LOSS_DIGITS * error:
            raise LostDigitsError("the squared error is rounding noise beside the squares that it is a difference of")
        eps = torch.finfo(self.dtype).eps
        gram = self.equations.sums.gram
        least_pivot = spd.factor(gram + ridge * torch.eye(len(gram), dtype=gram.dtype)).least_pivot()
        if eps > _MOST_LOST[self.dtype] * least_pivot:
            raise LostDigitsError("features are nearly dependent on each other")


class QRFactor(LeastSquares):
    """The triangular factor R of the rows [1 X Y] in float64, updated chunk by chunk (Golub and Van Loan, section 6.5).

    Its condition is that of X, not the square of it. Where features depend on each other, to the rounding of their
    dtype, the solution is the one with the smallest ‖W‖. The loss is that of the W that is returned.
    """

    def __init__(self, features: int, targets: int, *, intercept: bool, dtype: torch.dtype) -> None:
        super().__init__(features, targets, intercept=intercept, dtype=dtype)
        self.width = intercept + features + targets
        self.R = torch.zeros(0, self.width, dtype=torch.float64)

    def _add(self, X: Tensor, Y: Tensor) -> None:
        for name, value in (("X", X), ("Y", Y)):
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinity; expected finite values")
        ones = [torch.ones(len(X), 1, dtype=torch.float64)] if self.intercept else []
        self._append(torch.cat([*ones, X.double(), Y.double()], 1))

    def _append(self, rows: Tensor) -> None:
        # Blocks much taller than R spend little on factoring R again.
        for block in rows.split(max(1024, 4 * self.width)):
            self.R = torch.linalg.qr(torch.cat([self.R, block]), mode="r").R

    def _merge(self) -> None:
        """Takes in the factors of all processes, in their order."""
        rank, size = share()[:2]
        if size == 1:
            return
        factors = torch.zeros(size, self.width, self.width, dtype=torch.float64)
        factors[rank, : len(self.R)] = self.R
        self.R = self.R[:0]
        self._append(summed(lambda: (factors, []))[0].flatten(0, 1))

    def _solve(self, ridge: float, rows: float) -> tuple[Tensor, Tensor, float, str]:
        self._merge()
        i, d = int(self.intercept), self.features
        R = torch.zeros(self.width, self.width, dtype=torch.float64)
        R[: len(self.R)] = self.R
        # Below the row of the intercept is the factor of the centred columns.
        A, B = R[i : i + d, i : i + d], R[i : i + d, i + d :]
        if ridge:
            A = torch.cat([A, math.sqrt(ridge) * torch.eye(d, dtype=R.dtype)])
            B = torch.cat([B, B.new_zeros(d, B.shape[1])])
        # What centring took from each column: of one that is constant, rounding noise is left.
        noise = max(_CENTRING, math.sqrt(rows)) * torch.finfo(R.dtype).eps * R[:i, i : i + d].norm(dim=0)
        V, note = self._smallest(A, B, noise)
        W = V.to(self.dtype)
        intercept = torch.zeros(self.targets, dtype=self.dtype)
        if self.intercept:
            intercept = ((R[0, 1 + d :] - R[0, 1 : 1 + d] @ W.double()) / R[0, 0]).to(self.dtype)
        if not (bool(W.isfinite().all()) and bool(intercept.isfinite().all())):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"the solution overflows {self.dtype}: rescale the features or the target, or pass weight_decay > 0"
            )
        bias = [intercept[None].double()] if self.intercept else []
        solution = torch.cat([*bias, W.double(), -torch.eye(self.targets, dtype=R.dtype)])
        return W, intercept, (R @ solution).square().sum().item(), note

    def _smallest(self, A: Tensor, B: Tensor, noise: Tensor) -> tuple[Tensor, str]:
        """argmin ‖AV - B‖, the smallest of them if there are several; and a note on its accuracy.

        Columns that depend on each other do so no more when they are rounded to float32. So singular values that such
        rounding may have made count as zero, unless that costs more than the rounding of a product with W does. Those
        that ``noise`` (d,), the error of each column of A, may have made count as zero always.
        """
        length = A.norm(dim=0)
        constant = length <= noise
        A = A.masked_fill(constant, 0.0)
        length = torch.where(constant, 1.0, length)
        U, S, Vh = torch.linalg.svd(A / length, full_matrices=False)
        d, least = self.features, self.features * torch.finfo(A.dtype).eps
        sound = (Vh * (noise / length).masked_fill(constant, 0.0)).norm(dim=1) < S
        kept = [sound & (cutoff * S[0] < S) for cutoff in (max(least, _ROUNDINGS * self._eps), least)]
        V, rank = self._within(kept[0], (U, S, Vh), B, length), int(kept[0].sum())
        if not torch.equal(*kept):
            other = self._within(kept[1], (U, S, Vh), B, length)
            if self._loss_of(A, B, other) < (1 - LOSS_DIGITS) * self._loss_of(A, B, V):
                V, rank = other, int(kept[1].sum())
        note = " in a second pass, by QR in float64"
        if rank < d:
            norm = "the least norm of weights, the bias left out," if self.intercept else "the least norm"
            note += f"; {d - rank} of {d} features depend on others: of all solutions the one with {norm} is taken"
            return V, note
        lost = torch.finfo(A.dtype).eps * (S[0] / S[-1]).item()
        if lost > LOSS_DIGITS**2:
            note += f"; features are so nearly dependent that about {max(0, int(-math.log10(lost)))} digits are right"
        return V, note

    @property
    def _eps(self) -> float:
        return float(torch.finfo(self.dtype).eps)

    def _within(self, kept: Tensor, svd: tuple[Tensor, Tensor, Tensor], B: Tensor, length: Tensor) -> Tensor:
        """The solution in those singular vectors of A / length that are kept."""
        U, S, Vh = svd
        V: Tensor = (Vh[kept].mT @ ((U[:, kept].mT @ B) / S[kept, None])) / length[:, None]
        if kept.all() and len(Vh) == self.features:
            return V
        # What V has of directions that change no output.
        free: Tensor = torch.linalg.qr(Vh[~kept].mT / length[:, None]).Q
        return V - free @ (free.mT @ V)

    def _loss_of(self, A: Tensor, B: Tensor, V: Tensor) -> float:
        """The squared error of V as it will be stored, and about what rounding adds to it where rows are multiplied.

        Infinity where little is left of the outputs: they would not even seem to be affine in the weights.
        """
        W = V.to(self.dtype).double()
        outputs = A @ W
        rounding = 0.5 * self._eps * (A.square().sum(0)[:, None] * W.square()).sum().sqrt()
        if rounding > _MOST_ROUNDED * self._eps * outputs.norm():
            return math.inf
        return ((outputs - B).square().sum() + rounding.square()).item()
