"""Levenberg-Marquardt: the Gauss-Newton matrix itself, factored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import onestep.linalg as linalg
from onestep._cached import cached_property
from onestep._serial_torch import eigh, serial_for
from onestep.curvature.conjugate_gradient import conjugate_gradient
from onestep.evaluation.parameters import ParameterVector
from onestep.linalg import spd
from onestep.optim.idle import RootWithout, made_of_rounding, without
from onestep.optim.objective import CurvatureRoot, Objective
from onestep.optim.optimizer import DampedOptimizer
from onestep.optim.quadratic_model import Proposal, QuadraticModel
from onestep.optim.step_report import StepReport

# Without damping the factor may not exist: this much, relative to a unit diagonal, stands in for none.
_UNDAMPED = 1e-12
# A test for a minimum in float32 that seems to be met within this factor is repeated with a matrix summed in float64.
_LIKELY = 1e3
# Up to so many parameters: beyond, its eigenvalues take too long.
_MOST_DECOMPOSED = 512
# The rows of a Jacobian are right to about so many ε.
_ROUNDED_ROWS = 4
# With momentum, damping that follows every gain leads into poor minima. A good step multiplies it by this,
_FALLS = 0.6
# and one of which half was kept by this.
_RISES = 1.6
# Steps on a sample's curvature are solved for to this part of the gradient, by no more products than cost as much as
# the matrix and its inverse, which is taken with so much damping at least to exist in float32.
_TOLERANCE = 0.1
_MOST_PRODUCTS = 15
_LEAST_INVERTED = 1e-3


class LevenbergMarquardt(DampedOptimizer):
    """θ ← θ - (A + damping·D)⁻¹∇loss with A = JᵀHJ the Gauss-Newton matrix and D = diag A, in float64 by Cholesky.

    For least squares, A = 2/m JᵀJ (Levenberg 1944; Marquardt 1963); for other convex losses H is the loss's Hessian in
    the outputs. D never falls (Moré, Lecture Notes in Mathematics 630, 1978), which makes the method indifferent to the
    units of the parameters. Dⱼⱼ is at least (∇ⱼloss)² / 2 loss, since losses other than squares may lose curvature
    far from a minimum. Parameters whose derivatives are but rounding, such as the bias of attention's keys, stay where
    they are. Memory p², time m p² + p³ a step: for thousands of parameters.

    The closure returns the residuals, whose mean square is minimised, or (outputs, loss_of_outputs).

    Args:
        params: parameters or param groups, as for any torch optimiser; of one floating dtype and device.
        damping: initial damping, relative to D. It is then set by the gain ratio.
        weight_decay: adds ½ weight_decay ‖θ‖² to the loss.
        momentum: the part of the last step that is added to each (heavy ball, Polyak 1964). It carries a fit on where
            curvature comes from a sample of the rows or the model has kinks; damping then follows the gain more
            slowly. 0 is the classical method.

    Raises:
        ValueError: a setting is out of its range.
        TypeError, NonFiniteError: (``step``) the closure returns something else, or NaN or infinity; nothing has
            changed then.

    Examples:
        >>> import torch
        >>> from onestep.optim import LevenbergMarquardt
        >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = LevenbergMarquardt([x])
        >>> for _ in range(30):
        ...     loss = optimizer.step(lambda: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]))
        >>> x.detach().round(decimals=6)
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(
        self, params: Iterable[Any], *, damping: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.0
    ) -> None:
        settings = {"damping": damping, "weight_decay": weight_decay, "momentum": momentum}
        if momentum:
            settings |= {"damping_decrease": _FALLS, "damping_increase": _RISES}
        super().__init__(params, settings)

    def quadratic_model(
        self, objective: Objective, parameters: ParameterVector, loss: float, gradient: Tensor, decay: Tensor | None
    ) -> QuadraticModel:
        """A, assembled in chunks of rows by the Gram kernel, or where it is of a sample of them, products with it."""
        momentum = self.setting("momentum")
        last = self.read_state("direction", parameters) if momentum else None
        carried = None if last is None else last * momentum
        # Without weight decay, whose derivatives are exact.
        slope = gradient if decay is None else gradient - decay * parameters.read()
        root = objective.curvature_root(parameters)
        if root is None:
            A = objective.gauss_newton_matrix(parameters, precise="precise" in self.kept)
            diagonal = A.diagonal()
        else:
            diagonal = root.diagonal.double()
        floor = _floor(slope, loss)
        known = self.read_state("known", parameters)
        with serial_for(len(diagonal)):
            sizes = torch.maximum(diagonal, floor).sqrt()
        idle, known = made_of_rounding(objective, parameters, sizes, known)
        if known is not None:
            self.write_state("known", parameters, known)
        self.idle = idle
        if idle is not None:
            gradient = torch.where(idle, 0.0 if decay is None else gradient - slope, gradient)
        floor = _floor(gradient, loss)
        if root is not None:
            root = root if idle is None else RootWithout(root, idle)
            diagonal = root.diagonal if decay is None else root.diagonal + decay
            scale = self._scale(parameters, diagonal.double(), floor).to(parameters.dtype)
            return _SampledModel(root, diagonal, decay, gradient, scale, carried, self.kept, parameters)
        if idle is not None:
            A = without(A, idle)
        if decay is not None:
            A = A + torch.diag(decay.double())
        scale = self._scale(parameters, A.diagonal(), floor)
        return _FactoredModel(A, gradient.double(), scale, parameters.dtype, carried, self.kept)

    def _step(self, *given: Any) -> StepReport:
        """Once more with a precise matrix and without damping, where no step succeeds and this one is but rounding."""
        precise = "precise" in self.kept
        report = super()._step(*given)
        if report.accepted or precise or "precise" not in self.kept:
            return report
        self.damping = _UNDAMPED
        return super()._step(*given)

    def accepted(self, parameters: ParameterVector, step: Tensor, gradient: Tensor) -> None:
        """Remembers the step for the momentum."""
        if self.setting("momentum"):
            self.write_state("direction", parameters, step)

    def _scale(self, parameters: ParameterVector, diagonal: Tensor, floor: Tensor) -> Tensor:
        """D: the greatest diagonal of A so far, or the floor where that is greater now.

        The root of the former is kept, which cannot overflow the parameters' type.
        """
        before = self.read_state("scale", parameters)
        if before is not None:
            diagonal = torch.maximum(diagonal, before.double().square())
        with serial_for(len(diagonal)):
            self.write_state("scale", parameters, diagonal.sqrt())
        return torch.maximum(diagonal, floor)

    def form_again(self, objective: Objective, parameters: ParameterVector) -> None:
        """Forms the kept inverse again, to the bit, from the vectors kept with it.

        The parameters are at ``kept["point"]``, and the objective is that of the step that formed the inverse.
        """
        root = objective.curvature_root(parameters)
        if root is None:
            raise ValueError("the curvature of a sample is no longer by products")
        kept = self.kept
        # Older checkpoints tell of no parameters that are idle.
        root = RootWithout(root, kept["idle"]) if "idle" in kept else root
        matrix = _decayed(root.matrix(), self._decay(parameters))
        inverse = _inverse(matrix, kept["inverse_root"], kept["inverse_damping"].item())
        if inverse is not None:
            kept["inverse"] = inverse

    def never_used(self, parameters: ParameterVector) -> Tensor:
        """Which parameters (p,) the outputs have not depended on at any step."""
        scale = self.read_state("scale", parameters)
        if scale is None:
            return torch.zeros(len(parameters), dtype=torch.bool, device=parameters.device)
        return scale == 0


class _MatrixModel(QuadraticModel):
    """gradient, diagonal: of the loss and of A now."""

    def __init__(
        self, gradient: Tensor, diagonal: Tensor, scale: Tensor, dtype: torch.dtype, carried: Tensor | None
    ) -> None:
        self.gradient, self.diagonal, self.dtype, self.carried = gradient, diagonal, dtype, carried
        least = torch.finfo(torch.float64).eps * scale.double()
        self.without_influence = int((diagonal.double() <= least).sum())

    def undamped(self) -> _Scaled:
        """The system in the scale that A has now."""
        raise NotImplementedError

    def decrement(self, enough: float, *, final: bool) -> float:
        """½gᵀA⁻¹g, which is certain where no pivot is so small that rounding may have made it."""
        system = self.undamped()
        step, pivot = system.solve_undamped()
        if self.dtype != torch.float64:
            self.certain = pivot > len(self.gradient) * torch.finfo(self.dtype).eps
        self.newton = None if step is None else step * system.inverse_root
        return math.inf if step is None else -0.5 * torch.dot(system.gradient, step).item()

    def resolution(self, point: Tensor) -> float:
        """With each parameter off by ε of itself, and outputs no more than linear in it."""
        off = torch.finfo(self.dtype).eps * point.double().abs()
        slope = torch.dot(self.gradient.double().abs(), off)
        return (slope + 0.5 * torch.dot(self.diagonal.double().sqrt(), off).square()).item()

    def with_momentum(self, step: Tensor) -> Tensor:
        """The step in the parameters' own precision, as it will be added."""
        step = step.to(self.dtype)
        # If this trial fails, the next one should not run on with the same momentum.
        carried, self.carried = self.carried, None
        return step if carried is None else step + carried


class _FactoredModel(_MatrixModel):
    """Steps by Cholesky.

    Args:
        kept: gets "precise" where the matrix turns out to be made of rounding, so that the next one is summed in
            float64.
    """

    def __init__(
        self,
        A: Tensor,
        gradient: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        carried: Tensor | None,
        kept: dict[str, Tensor],
    ) -> None:
        super().__init__(gradient, A.diagonal(), scale, dtype, carried)
        self.system = _Scaled(A, gradient, scale)
        self.matrix, self.kept = A, kept

    def decrement(self, enough: float, *, final: bool) -> float:
        """½gᵀA⁻¹g, or infinity where that seems small and A may be too inaccurate to tell.

        Products in float32 leave eigenvalues under ε of the largest to rounding, and directions of small curvature look
        flat. Summed in float64, A tells which are.
        """
        found = super().decrement(enough, final=final)
        eps = torch.finfo(self.dtype).eps
        p = len(self.gradient)
        likely = final or found <= _LIKELY * enough
        if self.dtype == torch.float64 or p > _MOST_DECOMPOSED or not likely:
            return found
        if self.certain:
            return found
        if "precise" not in self.kept:
            self.kept["precise"] = torch.ones(())
            return math.inf
        system, self.certain = self.undamped(), True
        values, vectors = eigh(system.matrix)
        # The rows of the Jacobian are rounded, too: what they say of a direction under this is nothing.
        bent = values > (_ROUNDED_ROWS * eps) ** 2 * values[-1]
        along = (vectors.mT @ system.gradient)[bent]
        return float(0.5 * (along.square() / values[bent]).sum())

    def undamped(self) -> _Scaled:
        return _Scaled(self.matrix, self.gradient, self.diagonal)

    def propose(self, damping: float) -> Proposal | None:
        solution = self.system.solve(damping)
        if solution is None:
            return None
        added = self.with_momentum(solution * self.system.inverse_root)
        step = added.double() / self.system.inverse_root
        predicted = -torch.dot(self.system.gradient + 0.5 * (self.system.matrix @ step), step).item()
        return Proposal(added, predicted)


class _SampledModel(_MatrixModel):
    """Steps by conjugate gradients, in coordinates in which D is the identity.

    They are preconditioned by the inverse of an earlier step's damped matrix, until that takes too many iterations:
    then the present one is formed and inverted. Products with the sample's rows are far cheaper than their Gram matrix.

    Args:
        kept: where the inverse is kept from step to step, by the name "inverse", with what it was made of.
        parameters: at the point of the model whenever a step is proposed.
    """

    def __init__(
        self,
        root: CurvatureRoot,
        diagonal: Tensor,
        decay: Tensor | None,
        gradient: Tensor,
        scale: Tensor,
        carried: Tensor | None,
        kept: dict[str, Tensor],
        parameters: ParameterVector,
    ) -> None:
        super().__init__(gradient, diagonal, scale, gradient.dtype, carried)
        self.root, self.decay, self.kept, self.parameters = root, decay, kept, parameters
        self.inverse_root = _inverse_root(scale)
        self.scaled_gradient = gradient * self.inverse_root

    def multiply(self, v: Tensor) -> Tensor:
        """A v, scaled."""
        v = v * self.inverse_root
        product = self.root.multiply(v)
        if self.decay is not None:
            product.addcmul_(self.decay, v)
        return product.mul_(self.inverse_root)

    @cached_property
    def matrix(self) -> Tensor:
        return _decayed(self.root.matrix(), self.decay)

    def undamped(self) -> _Scaled:
        return _Scaled(self.matrix.double(), self.gradient.double(), self.diagonal.double())

    def propose(self, damping: float) -> Proposal | None:
        solution, products = self._solve(damping)
        if solution is None:
            return None
        self.promise = max(self.promise, -0.5 * torch.dot(self.scaled_gradient, solution).item())
        added = self.with_momentum(solution * self.inverse_root)
        step = added / self.inverse_root
        predicted = -torch.dot(self.scaled_gradient + 0.5 * self.multiply(step), step).item()
        return Proposal(added, predicted, products + 1)

    def _solve(self, damping: float) -> tuple[Tensor | None, int]:
        solution, products = self._conjugate_gradients(damping)
        if solution is not None:
            return solution, products
        damping_of_inverse = max(damping, _LEAST_INVERTED)
        inverse = _inverse(self.matrix, self.inverse_root, damping_of_inverse)
        if inverse is None:
            return None, products
        root = self.root
        self.kept.update(
            inverse=inverse,
            idle=root.idle if isinstance(root, RootWithout) else torch.zeros_like(self.gradient, dtype=torch.bool),
            point=self.parameters.read(),
            inverse_root=self.inverse_root,
            inverse_damping=torch.tensor(damping_of_inverse, dtype=torch.float64),
        )
        solution, more = self._conjugate_gradients(damping)
        return solution, products + more

    def _conjugate_gradients(self, damping: float) -> tuple[Tensor | None, int]:
        """The solution to the accuracy that a sample is worth, or None if that takes too many products."""
        inverse: Tensor | None = self.kept.get("inverse")
        if inverse is not None and len(inverse) != len(self.scaled_gradient):
            # Other parameters are trained now.
            inverse = None
        b = -self.scaled_gradient
        solve = conjugate_gradient(
            lambda v: self.multiply(v).add_(v, alpha=damping),
            b,
            precondition=None if inverse is None else inverse.mv,
            tolerance=_TOLERANCE,
            max_iterations=_MOST_PRODUCTS,
            least_progress=0.0,
        )
        ended = bool(solve.residual.norm() <= _TOLERANCE * b.norm())
        return solve.x if ended else None, solve.iterations


class _Scaled:
    """A and the gradient in coordinates in which D is the identity."""

    def __init__(self, A: Tensor, gradient: Tensor, scale: Tensor) -> None:
        self.inverse_root = _inverse_root(scale)
        self.matrix = A * self.inverse_root[:, None] * self.inverse_root
        self.gradient = gradient * self.inverse_root

    def _damped(self, damping: float) -> Tensor:
        damped = self.matrix.clone()
        damped.diagonal().add_(damping)
        return damped

    def solve(self, damping: float) -> Tensor | None:
        solution, info, *_ = linalg.solve_spd_ex(self._damped(damping), self.gradient[:, None])
        return None if info.item() != 0 else -solution[:, 0]

    def solve_undamped(self) -> tuple[Tensor | None, float]:
        """The step without damping, and the least pivot of the factor that gives it, 0 where there is none."""
        factor = spd.factor(self._damped(_UNDAMPED))
        if not factor.succeeded:
            return None, 0.0
        step = -factor.solve(self.gradient[:, None])[:, 0]
        return step if bool(step.isfinite().all()) else None, factor.least_pivot()


def _floor(gradient: Tensor, loss: float) -> Tensor:
    """∂ⱼ² / 2 loss, at least which D is.

    It is no more than Aⱼⱼ for least squares (Cauchy and Schwarz). Where a loss has lost its curvature, as cross-entropy
    has at scores in the hundreds, it stands in: with damping 2, each parameter by itself would take a loss that falls
    in a straight line to zero.
    """
    gradient = gradient.double()
    return gradient.square() / (2 * abs(loss)) if loss else torch.zeros_like(gradient)


def _decayed(A: Tensor, decay: Tensor | None) -> Tensor:
    if decay is not None:
        A.diagonal().add_(decay)
    return A


def _inverse(A: Tensor, inverse_root: Tensor, damping: float) -> Tensor | None:
    """(A + damping I)⁻¹ (p,p) in the scaled coordinates; None if the matrix is not positive definite."""
    damped = A * inverse_root[:, None] * inverse_root
    damped.diagonal().add_(damping)
    L, info = linalg.cholesky_ex(damped)
    return None if info.item() != 0 else torch.cholesky_inverse(L)


def _inverse_root(scale: Tensor) -> Tensor:
    # A parameter that nothing depends on has no gradient either: any scale will do.
    return torch.where(scale > 0, scale, 1.0).rsqrt()
