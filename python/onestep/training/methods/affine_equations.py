"""Models that are affine in what is trained, solved exactly in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import share, summed, together
from onestep.evaluation.losses import like_outputs
from onestep.evaluation.module import call_model
from onestep.evaluation.parameters import ParameterVector
from onestep.linalg import NormalEquations
from onestep.optim import NonFiniteError
from onestep.training.objective import DataObjective
from onestep.training.structures.affine import NOT_AFFINE, explained, is_affine_between, why_not_affine
from onestep.training.structures.affine_head import Head, features_and_outputs, find_head
from onestep.training.structures.base import Mismatch
from onestep.training.structures.layers import columns, spread

# Up to this many parameters a general affine model's normal equations are formed; a linear head has no such limit.
MOST_PARAMETERS = 4096
# Added to the normal equations, relative to their mean diagonal, where features depend on each other.
_RESCUE = 1e-10


class NotAffineError(ValueError):
    """The outputs are not affine in what is trained."""

    def __init__(self, why: str = NOT_AFFINE) -> None:
        self.why = why
        super().__init__(
            f"method='closed_form' needs outputs that are affine in the trained parameters; here {why}: use "
            "method='auto'"
        )


class Solution(NamedTuple):
    """Losses before and after, and what had to be done besides."""

    initial_loss: float
    loss: float
    note: str


class _Equations:
    """Normal equations, and the sums that give the loss at their solution without a second pass."""

    def __init__(self, features: int, targets: int, *, intercept: bool, dtype: torch.dtype) -> None:
        self.equations = NormalEquations(features, targets, intercept=intercept, dtype=dtype)
        self.totals = torch.zeros(targets + 3, dtype=torch.float64)

    def add(self, X: Tensor, Y: Tensor, initial_loss: Tensor, elements: int, number: int) -> None:
        try:
            self.equations.update(X, Y)
        except ValueError as error:
            raise NonFiniteError(f"step 1, batch {number}: {error}") from error
        counted = torch.tensor([initial_loss.item(), elements, len(X)], dtype=torch.float64)
        self.totals += torch.cat([Y.double().square().sum(0), counted])

    def solve(self, weight_decay: float) -> tuple[Tensor, Tensor, Solution]:
        """W, the intercept, and the losses."""
        if share().size > 1:
            self.equations.all_reduce()
        squares, (initial, elements, rows) = summed(lambda: (self.totals[:-3], self.totals[-3:].tolist()))
        ridge, note = 0.5 * weight_decay * elements, ""
        sums = self.equations.sums
        try:
            W, intercept = self.equations.solve(ridge)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            rescue = _RESCUE if self.equations.dtype == torch.float64 else 1e4 * _RESCUE
            ridge += rescue * sums.gram.diagonal().mean().item()
            note = f"; features depend on each other, so a ridge of {ridge:.1e} was added"
            W, intercept = self.equations.solve(ridge)
        # Sums are centred where there is an intercept.
        offset = rows * sums.y_mean.square() if self.equations.intercept else 0.0
        V = W.double()
        error = (squares - offset).sum() + ((sums.gram @ V - 2 * sums.cross) * V).sum()
        loss = error.clamp_min(0).item() / elements + 0.5 * weight_decay * V.square().sum().item()
        return W, intercept, Solution(initial / elements, loss, note)


class _HeadEquations:
    """Features are what the head is given; k targets share one Gram matrix."""

    def __init__(self, head: Head, weight_decay: float) -> None:
        self.head = head
        # Weight decay is on all that is trained, so a decayed bias is one more feature.
        self.augmented = head.bias is not None and weight_decay > 0
        k, d = head.weight.shape[:2]
        intercept = head.bias is not None and not self.augmented
        self.equations = _Equations(d + self.augmented, k, intercept=intercept, dtype=head.weight.dtype)

    def add(self, objective: DataObjective, chunk: Chunk, number: int) -> None:
        found = features_and_outputs(self.head, objective.module, chunk)
        if found is None:
            raise NotAffineError
        features, result = found
        target = like_outputs(result, chunk.target)
        loss = objective.loss.sum(result, target)
        X, Y = columns(self.head.layer, features), columns(self.head.layer, target.to(result.dtype))
        if self.augmented:
            X = torch.cat([X, X.new_ones(len(X), 1)], 1)
        self.equations.add(X, Y, loss, target.numel(), number)

    def solve(self, weight_decay: float) -> Solution:
        W, intercept, solution = self.equations.solve(weight_decay)
        if self.augmented:
            W, intercept = W[:-1], W[-1]
        self.head.weight.copy_(W.mT.reshape(self.head.weight.shape))
        if self.head.bias is not None:
            self.head.bias.copy_(intercept)
        return solution


class _GeneralEquations:
    """Features are the rows of the Jacobian, which is the same everywhere."""

    def __init__(self, parameters: ParameterVector) -> None:
        if len(parameters) > MOST_PARAMETERS:
            raise ValueError(
                f"method='closed_form' for {len(parameters)} parameters that are not one linear head; expected at most "
                f"{MOST_PARAMETERS}: use method='gauss_newton'"
            )
        self.parameters, self.start = parameters, parameters.read()
        size = self.start.square().mean().sqrt().clamp_min(0.1)
        noise = torch.randn(len(self.start), generator=torch.Generator().manual_seed(0)).to(self.start)
        self.elsewhere = self.start + noise * size
        self.equations = _Equations(len(parameters), 1, intercept=False, dtype=parameters.dtype)

    def add(self, objective: DataObjective, chunk: Chunk, number: int) -> None:
        result = call_model(objective.module, chunk.inputs)
        target = like_outputs(result, chunk.target)
        loss = objective.loss.sum(result, target)
        residual = (target - result).reshape(-1)
        self.parameters.write(self.elsewhere)
        try:
            change = (call_model(objective.module, chunk.inputs) - result).reshape(-1)
        except Exception as error:
            raise NotAffineError(f"the model raises at other parameters than its own ({explained(error)})") from error
        finally:
            self.parameters.write(self.start)
        tolerance = 1e3 * torch.finfo(result.dtype).eps * torch.stack([result.abs().max(), change.abs().max()]).max()
        begin = 0
        for rows in objective.root_jacobian(self.parameters, chunk):
            J = rows / math.sqrt(2.0)
            piece, changed = residual[begin : begin + len(J)], change[begin : begin + len(J)]
            # NaN is for the equations to find.
            if ((J @ (self.elsewhere - self.start) - changed).abs() > tolerance).any():
                raise NotAffineError
            self.equations.add(J, (piece + J @ self.start)[:, None], loss * (begin == 0), len(J), number)
            begin += len(J)

    def solve(self, weight_decay: float) -> Solution:
        W, _, solution = self.equations.solve(weight_decay)
        self.parameters.write(W[:, 0])
        return solution


def solve(
    objective: DataObjective, parameters: ParameterVector, chunks: Iterable[Chunk], weight_decay: float
) -> Solution:
    """Writes argmin of the mean squared error + ½ weight_decay ‖θ‖² into the parameters, reading the chunks once.

    Raises:
        NotAffineError: the model is not affine in them after all; they are as before.
        NonFiniteError: a chunk holds NaN or infinity; likewise.
    """
    start = parameters.read()
    try:
        with torch.no_grad():
            equations, first = _added_up(objective, parameters, chunks, weight_decay)
            before = call_model(objective.module, first.inputs)
            solution = equations.solve(weight_decay)
            affine = is_affine_between(objective.module, parameters, first, start, before)
            _agree("" if affine else NOT_AFFINE)
    except BaseException:
        parameters.write(start)
        raise
    return solution


def _added_up(
    objective: DataObjective, parameters: ParameterVector, chunks: Iterable[Chunk], weight_decay: float
) -> tuple[_HeadEquations | _GeneralEquations, Chunk]:
    """The equations of this process's chunks, and a few rows of the first."""

    def local() -> tuple[_HeadEquations | _GeneralEquations, Chunk] | str:
        equations: _HeadEquations | _GeneralEquations | None = None
        first: Chunk | None = None
        try:
            for number, chunk in enumerate(chunks):
                if equations is None:
                    first = spread(chunk)
                    why = why_not_affine(objective.module, parameters, first)
                    if why:
                        return why
                    head = find_head(objective.module, parameters, first)
                    if isinstance(head, Mismatch):
                        equations = _GeneralEquations(parameters)
                    else:
                        equations = _HeadEquations(head, weight_decay)
                equations.add(objective, chunk, number)
        except NotAffineError as error:
            return error.why
        if equations is None or first is None:
            raise ValueError("data gives this process no rows; expected at least one")
        return equations, first

    result = together(local)
    _agree(result if isinstance(result, str) else "")
    assert not isinstance(result, str)
    return result


def _agree(why: str) -> None:
    """Raises in all processes if one has found why outputs are not affine."""
    if summed(lambda: (torch.empty(0), [float(bool(why))]))[1][0]:
        raise NotAffineError(why or NOT_AFFINE)
