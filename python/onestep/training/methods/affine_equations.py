"""Models that are affine in what is trained, solved exactly in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import from_first, summed, together
from onestep.evaluation.layers import columns, spread
from onestep.evaluation.losses import like_outputs
from onestep.evaluation.module import call_model
from onestep.evaluation.parameters import ParameterVector
from onestep.training.methods.least_squares import LOSS_DIGITS, LeastSquares, LostDigitsError, NormalSums, QRFactor
from onestep.training.objective import DataObjective
from onestep.training.structures.affine import NOT_AFFINE, explained, is_affine_between, why_not_affine
from onestep.training.structures.affine_head import Head, features_and_outputs, find_head
from onestep.training.structures.base import Mismatch

# Up to this many parameters a general affine model is solved for; a linear head has no such limit.
MOST_PARAMETERS = 4096


class NotAffineError(ValueError):
    """The outputs are not affine in what is trained."""

    def __init__(self, why: str = NOT_AFFINE) -> None:
        self.why = why
        super().__init__(
            f"method='closed_form' needs outputs that are affine in the trained parameters; here {why}: use "
            "method='auto'"
        )


class Solution(NamedTuple):
    """The losses before and after, and a note for the user on what else had to be done; it may be empty."""

    initial_loss: float
    loss: float
    note: str


class _HeadEquations:
    """For models that end in the trained layer. Features are what it is given; k targets share one Gram matrix."""

    def __init__(self, head: Head, weight_decay: float, kind: type[LeastSquares]) -> None:
        self.head = head
        # Weight decay is on all that is trained, so a decayed bias is one more feature.
        self.augmented = head.bias is not None and weight_decay > 0
        k, d = head.weight.shape[:2]
        intercept = head.bias is not None and not self.augmented
        self.equations = kind(d + self.augmented, k, intercept=intercept, dtype=head.weight.dtype)

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
        fitted = self.equations.solve(weight_decay)
        W, intercept = fitted.W, fitted.intercept
        if self.augmented:
            W, intercept = W[:-1], W[-1]
        self.head.weight.copy_(W.mT.reshape(self.head.weight.shape))
        if self.head.bias is not None:
            self.head.bias.copy_(intercept)
        return Solution(fitted.initial_loss, fitted.loss, fitted.note)


class _GeneralEquations:
    """For any other affine model: features are the rows of the Jacobian, which is the same at all parameters.

    On every chunk it is checked that J (θ' - θ) is the change of the outputs, at one θ' (``elsewhere``).
    """

    def __init__(self, parameters: ParameterVector, kind: type[LeastSquares]) -> None:
        if len(parameters) > MOST_PARAMETERS:
            raise ValueError(
                f"method='closed_form' for {len(parameters)} parameters that are not one linear head; expected at most "
                f"{MOST_PARAMETERS}: use method='gauss_newton'"
            )
        self.parameters, self.start = parameters, parameters.read()
        size = self.start.square().mean().sqrt().clamp_min(0.1)
        noise = torch.randn(len(self.start), generator=torch.Generator().manual_seed(0)).to(self.start)
        self.elsewhere = self.start + noise * size
        self.equations = kind(len(parameters), 1, intercept=False, dtype=parameters.dtype)

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
            # The rows are √2 J, since the Hessian of the squared error is 2 I.
            J = rows / math.sqrt(2.0)
            part, changed = residual[begin : begin + len(J)], change[begin : begin + len(J)]
            # NaN is for the equations to find.
            if ((J @ (self.elsewhere - self.start) - changed).abs() > tolerance).any():
                raise NotAffineError
            self.equations.add(J, (part + J @ self.start)[:, None], loss * (begin == 0), len(J), number)
            begin += len(J)

    def solve(self, weight_decay: float) -> Solution:
        fitted = self.equations.solve(weight_decay)
        self.parameters.write(fitted.W[:, 0])
        return Solution(fitted.initial_loss, fitted.loss, fitted.note)


def solve(
    objective: DataObjective, parameters: ParameterVector, chunks: Iterable[Chunk], weight_decay: float
) -> Solution:
    """Writes argmin of the mean squared error + ½ weight_decay ‖θ‖² into the parameters.

    Args:
        objective: of all rows; its chunks are read if the first pass loses too many digits.
        chunks: all rows, for the first pass.

    Raises:
        NotAffineError: the model is not affine in them after all; they are as before.
        NonFiniteError: a chunk holds NaN or infinity; likewise.
    """
    start = parameters.read()
    try:
        with torch.no_grad():
            equations, first = _added_up(objective, parameters, chunks, weight_decay, NormalSums)
            before = call_model(objective.module, first.inputs)
            try:
                solution = equations.solve(weight_decay)
            except LostDigitsError:
                equations, _ = _added_up(objective, parameters, objective.chunks(), weight_decay, QRFactor)
                solution = equations.solve(weight_decay)
                solution = _as_computed(solution, objective, parameters, first, weight_decay)
            affine = is_affine_between(objective.module, parameters, first, start, before)
            _agree("" if affine else NOT_AFFINE)
    except BaseException:
        parameters.write(start)
        raise
    return solution


def _as_computed(
    solution: Solution, objective: DataObjective, parameters: ParameterVector, first: Chunk, weight_decay: float
) -> Solution:
    """The solution with the loss that the model computes at it, if the two losses differ by more than a hundredth.

    A difference that rounding of the outputs makes does not count.
    """
    own = objective.value(parameters) + 0.5 * weight_decay * parameters.read().double().square().sum().item()
    outputs = from_first(lambda: call_model(objective.module, first.inputs).double().square().mean().item())
    near = LOSS_DIGITS * solution.loss + torch.finfo(parameters.dtype).eps ** 2 * outputs
    return solution if abs(own - solution.loss) <= near else solution._replace(loss=own)


def _added_up(
    objective: DataObjective,
    parameters: ParameterVector,
    chunks: Iterable[Chunk],
    weight_decay: float,
    kind: type[LeastSquares],
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
                        equations = _GeneralEquations(parameters, kind)
                    else:
                        equations = _HeadEquations(head, weight_decay, kind)
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
