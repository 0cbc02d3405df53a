"""Methods whose step is one of a damped optimiser: Levenberg-Marquardt, Newton, Gauss-Newton, gradient descent."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from onestep.evaluation.module import call_model
from onestep.optim import GaussNewton, LevenbergMarquardt, NewtonCG
from onestep.optim.gradient_descent import GradientDescent
from onestep.optim.optimizer import DampedOptimizer
from onestep.training.facts import Facts, Settings
from onestep.training.methods.base import Cut, Method, Run
from onestep.training.methods.damped_run import CONVEX, DampedRun
from onestep.training.plan import FitPlan
from onestep.training.structures.base import Mismatch

# Up to this many parameters "auto" forms the Gauss-Newton matrix.
MOST_DENSE = 2048
# Levenberg-Marquardt takes curvature over this many rows of the Jacobian for each parameter, or over more, as long as
# forming the matrix takes no more than this many operations.
_ROWS_PER_PARAMETER = 4
_CHEAP_FLOPS = 1e9
# With curvature of a sample of the rows: the part of the last step that a step keeps.
_MOMENTUM = 0.7
# With curvature of a sample of the rows: the damping of the first step.
_DAMPING = 1.0
# Forward over reverse mode keeps about this many times the memory of a gradient.
_HESSIAN_MEMORY = 4
# Matrix-free methods cut each batch into this many pieces, so that the number of processes does not change a bit.
_PIECES = 4
# A piece has at least a chunk's rows over this: fewer are not worth a call of their own.
_LEAST_PIECE = 32


class DampedMethod(Method):
    """Steps of an optimiser until the loss can be lowered no further."""

    optimizer: ClassVar[type[DampedOptimizer]]
    # How many times the memory of a gradient the method needs for a chunk; its chunks are smaller by it.
    memory: ClassVar[int] = 1
    takes_cg_iterations: ClassVar[bool] = False
    # Whether a convex loss that is far lower there may be minimised from parameters of zero.
    starts_from_zeros: ClassVar[bool] = True

    def cut(self, facts: Facts, settings: Settings) -> Cut:
        """Pieces whose sums do not depend on the number of processes."""
        chunk_rows = settings.chunk_size or facts.chunk_rows
        pieces, least = max(_PIECES, facts.share.size), max(1, chunk_rows // _LEAST_PIECE)
        if settings.chunk_size is None:
            chunk_rows = max(1, chunk_rows // self.memory)
        return Cut(chunk_rows, settings.curvature_batch_size, pieces, least)

    def options(self, plan: FitPlan) -> dict[str, Any]:
        """The optimiser's arguments."""
        settings = plan.settings
        options: dict[str, Any] = {"weight_decay": settings.weight_decay}
        if settings.damping is not None:
            options["damping"] = settings.damping
        if settings.cg_iterations is not None and self.takes_cg_iterations:
            options["cg_iterations"] = settings.cg_iterations
        return options

    def setup(self, plan: FitPlan) -> Run:
        """A run before its first step."""
        return DampedRun(plan, self.optimizer(plan.parameters.tensors, **self.options(plan)))


class LevenbergMarquardtMatrix(DampedMethod):
    """The Gauss-Newton matrix, formed and factored."""

    name: ClassVar[str] = "levenberg_marquardt"
    optimizer: ClassVar[type[DampedOptimizer]] = LevenbergMarquardt

    def suits(self, facts: Facts, settings: Settings) -> str | Mismatch:
        """While there are few parameters."""
        p = len(facts.parameters)
        if p > MOST_DENSE:
            return Mismatch(f"{p} parameters are too many for a matrix")
        if facts.no_jacobian:
            return Mismatch(facts.no_jacobian)
        return f"{p} parameters: their Gauss-Newton matrix can be factored"

    def refusal(self, facts: Facts, settings: Settings) -> str:
        """Where rows of the Jacobian cannot be had."""
        if not facts.no_jacobian:
            return ""
        return f"method='levenberg_marquardt' {facts.no_jacobian}: use method='gauss_newton'"

    def cut(self, facts: Facts, settings: Settings) -> Cut:
        """All rows in one piece for each process, or pieces of a sample."""
        rows = settings.curvature_batch_size or self._enough_rows(facts, settings)
        if rows is None:
            return Cut(settings.chunk_size or facts.chunk_rows, None, facts.share.size)
        return super().cut(facts, settings)._replace(curvature_rows=rows)

    def _enough_rows(self, facts: Facts, settings: Settings) -> int | None:
        """How many rows the matrix needs, or None for all."""
        with torch.no_grad():
            outputs = call_model(facts.model, facts.first.rows(slice(0, 1)).inputs).numel()
        p, rows = len(facts.parameters), settings.batch_size or facts.source.known_rows
        enough = max(_ROWS_PER_PARAMETER * p // outputs, int(_CHEAP_FLOPS / (p * p * outputs)), 1)
        return None if rows is not None and rows <= enough else enough

    def options(self, plan: FitPlan) -> dict[str, Any]:
        """With momentum where curvature is of a sample."""
        sampled = {} if plan.curvature_rows is None else {"momentum": _MOMENTUM, "damping": _DAMPING}
        return sampled | super().options(plan)


class NewtonCGSteps(DampedMethod):
    """Newton steps by conjugate gradients."""

    name: ClassVar[str] = "newton_cg"
    optimizer: ClassVar[type[DampedOptimizer]] = NewtonCG
    memory: ClassVar[int] = _HESSIAN_MEMORY
    takes_cg_iterations: ClassVar[bool] = True

    def suits(self, facts: Facts, settings: Settings) -> str | Mismatch:
        """For convex losses of affine outputs, whose Hessian is the Gauss-Newton matrix."""
        if facts.loss.name not in CONVEX:
            return Mismatch(f"the loss is {facts.loss.name!r}, not one of {', '.join(map(repr, CONVEX))}")
        if facts.not_affine:
            return Mismatch(facts.not_affine)
        return "outputs are affine in the parameters and the loss is convex"


class GaussNewtonCG(DampedMethod):
    """Gauss-Newton steps by conjugate gradients."""

    name: ClassVar[str] = "gauss_newton"
    optimizer: ClassVar[type[DampedOptimizer]] = GaussNewton
    takes_cg_iterations: ClassVar[bool] = True

    def suits(self, facts: Facts, settings: Settings) -> str | Mismatch:
        """It suits every model."""
        p = len(facts.parameters)
        if p > MOST_DENSE:
            return f"{p} parameters: too many for a matrix"
        return f"levenberg_marquardt {facts.no_jacobian}" if facts.no_jacobian else "it takes any model"


class GradientDescentBaseline(DampedMethod):
    """The baseline."""

    name: ClassVar[str] = "gradient_descent"
    needs_outputs: ClassVar[bool] = False
    starts_from_zeros: ClassVar[bool] = False
    optimizer: ClassVar[type[DampedOptimizer]] = GradientDescent

    def suits(self, facts: Facts, settings: Settings) -> str | Mismatch:
        """Never by itself."""
        return Mismatch("it is there for comparisons")
