"""A look in float64 at where a fit in float32 ended: rounding can hide directions along which the loss falls."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from onestep._torch_private import original_module, tree_map_only
from onestep.evaluation.data import Chunk
from onestep.evaluation.module import call_model, uncompiled
from onestep.evaluation.parameters import ParameterVector
from onestep.optim.decrement import MOST_DENSE, newton_decrement
from onestep.optim.idle import projected
from onestep.training.objective import DataObjective
from onestep.training.plan import FitPlan
from onestep.training.structures.affine import explained

# The preconditioner is damped by rounding alone.
_DAMPING = 1e-30
# Beyond few parameters a look takes no more products than this,
_FEW_PRODUCTS = 20
# or than this part of the products of the fit so far, if that is more.
_SHARE = 0.1
# The parts of the step that are tried.
_FRACTIONS = (1.0, 0.5, 0.25, 0.125)
# A step is good if the loss falls by this part of what the quadratic model promises.
_GOOD = 0.1

# The gradient where the curvature is rounding may be so many ε (float64) of the root of the loss.
_HIDDEN = 100.0
# Rounding the parameters ends a fit if it changes the loss by no more than this part. Else too few digits are left.
MOST_ROUNDED = 1e-2


class Finding(NamedTuple):
    """What a look in float64 tells.

    Attributes:
        converged: whether the loss can be lowered by no more than is asked, or than rounding the parameters changes it.
        rounding: whether it is the latter; float32 then computes the loss itself as exactly as that.
        step: a step (p,) that lowers the loss. In float64 it can end where large parameters cancel.
        newton: Newton's step (p,) at a minimum.
        why: why neither is known, a clause.
        ran: whether the model runs in float64.
    """

    converged: bool = False
    rounding: bool = False
    step: Tensor | None = None
    newton: Tensor | None = None
    why: str = ""
    ran: bool = True


def look(
    plan: FitPlan,
    least: float,
    products: int,
    *,
    hessian: bool,
    loss: Callable[[], float],
    noise: float = 0.0,
    idle: Tensor | None = None,
) -> Finding:
    """Whether the parameters are at a minimum, of the same loss computed in float64.

    Up to 128 parameters it costs a gradient and p products, beyond a gradient, the rows of a preconditioner and a part
    of the products of the fit. The model is copied; where it does not run in float64, nothing is known.

    Args:
        plan: its parameters are at the end, where they are again afterwards.
        least: the part of the loss by which it may still be lowered.
        products: those of the fit so far.
        hessian: whether curvature is the Hessian or the Gauss-Newton matrix.
        loss: computes the fit's own loss at the present parameters, with weight decay. It must not rise.
        noise: a loss that counts as rounding of the outputs.
        idle: parameters (p,) that change the outputs by rounding alone, which stay where they are.
    """
    start = plan.parameters.read()
    try:
        with torch.autocast(start.device.type, enabled=False):
            problem = _Double(plan)
            with uncompiled(problem.objective.module):
                return _look(plan, problem, least, products, hessian=hessian, loss=loss, noise=noise, idle=idle)
    except Exception as error:
        return Finding(why=f"the model or the loss does not run in float64 ({explained(error)})", ran=False)
    finally:
        plan.parameters.write(start)


def _look(
    plan: FitPlan,
    problem: _Double,
    least: float,
    products: int,
    *,
    hessian: bool,
    loss: Callable[[], float],
    noise: float,
    idle: Tensor | None,
) -> Finding:
    start = plan.parameters.read()
    value, gradient = problem.gradient()
    product, enough = projected(problem.curvature(hessian=hessian), idle), least * abs(value)
    gradient = gradient if idle is None else gradient.masked_fill(idle, 0.0)
    few = len(start) <= MOST_DENSE
    precondition = None if few else problem.preconditioner()
    most = max(_FEW_PRODUCTS, int(_SHARE * products))
    found = newton_decrement(
        product,
        gradient,
        None if precondition is None else projected(precondition, idle),
        math.inf,
        stored=start.dtype,
        most_products=most,
    )
    eps, stored = torch.finfo(torch.float64).eps, torch.finfo(start.dtype).eps
    known = found.hidden <= (_HIDDEN * eps) ** 2 * (abs(value) + noise / stored**2)
    if known and found.value <= enough:
        return Finding(converged=True, newton=found.step)
    # A parameter is stored to half an ε of itself.
    off = 0.5 * stored * start.double().abs()
    before = loss()
    if few and known and math.isfinite(found.value):
        resolution = 0.5 * torch.dot(off, problem.diagonal(product) * off).item()
        small = resolution <= max(MOST_ROUNDED * abs(value), noise)
        if small and found.value <= resolution and abs(before - value) <= resolution + enough:
            return Finding(converged=True, rounding=True, newton=found.step)
    if found.step is None:
        return Finding(why="in float64 the matrix has negative curvature there, or directions without curvature")
    promised = -0.5 * torch.dot(gradient, found.step).item()
    if found.flat is not None:
        # Large parameters that cancel in the outputs, as of all classes alike, cost digits: they are left out.
        step = found.step - found.flat @ start.double()
        plan.parameters.write((start + step).to(start.dtype))
        if value - problem.value(plan.parameters.read()) > _GOOD * promised and loss() < before:
            return Finding(step=step)
    for fraction in _FRACTIONS:
        step = (fraction * found.step).to(start.dtype)
        plan.parameters.write(start + step)
        fell = value - problem.value(plan.parameters.read())
        if fell > _GOOD * fraction * promised and loss() < before:
            return Finding(step=step)
    if not known:
        return Finding(why="in float64 the matrix is singular to rounding, and the gradient is not")
    if math.isinf(found.value):
        return Finding(why=f"a look in float64 was given {most} products, which did not settle it")
    part = found.value / abs(value)
    return Finding(why=f"in float64 it could be lowered by {part:.0e} of itself, and steps in float32 do not follow")


class _Double:
    """The fit's problem with a copy of its model, and its rows, in float64, at the fit's parameters."""

    def __init__(self, plan: FitPlan) -> None:
        places = {id(tensor): place for place, tensor in enumerate(plan.model.parameters())}
        model = copy.deepcopy(original_module(plan.model)).double()
        own = list(model.parameters())
        self.parameters = ParameterVector([own[places[id(tensor)]] for tensor in plan.parameters.tensors])
        self.decay = plan.settings.weight_decay

        def chunks() -> Iterator[Chunk]:
            return map(_in_double, plan.source.all())

        self.objective = _DoubleObjective(
            model, plan.loss, chunks, chunks, fixed=True, pieces=plan.source.share.pieces, kept_rows=plan.chunk_rows
        )
        # The rows have been looked at.
        self.objective.row_means = None

    def _penalty(self) -> float:
        return 0.5 * self.decay * self.parameters.read().square().sum().item()

    def value(self, point: Tensor) -> float:
        """The loss at a point (p,), where the parameters stay."""
        self.parameters.write(point.double())
        return self.objective.value(self.parameters) + self._penalty()

    def gradient(self) -> tuple[float, Tensor]:
        """The loss and its gradient (p,)."""
        value, gradient = self.objective.gradient(self.parameters)
        return value + self._penalty(), gradient + self.decay * self.parameters.read()

    def curvature(self, *, hessian: bool) -> Callable[[Tensor], Tensor]:
        """v ↦ Av."""
        product = self.objective.curvature(self.parameters, hessian=hessian)
        return lambda v: product(v).add_(v, alpha=self.decay)

    def preconditioner(self) -> Callable[[Tensor], Tensor] | None:
        """The objective's."""
        made = self.objective.preconditioner(self.parameters)
        return None if made is None else made(max(_DAMPING, self.decay))

    def diagonal(self, product: Callable[[Tensor], Tensor]) -> Tensor:
        """That of A (p,)."""
        eye = torch.eye(len(self.parameters), dtype=torch.float64, device=self.parameters.device)
        return torch.stack([product(column)[place] for place, column in enumerate(eye)]).clamp_min(0)


class _DoubleObjective(DataObjective):
    """Refuses what is not float64."""

    def chunk_loss(self, chunk: Chunk, values: dict[str, Tensor] | None = None) -> Tensor:
        """The loss summed over a chunk."""
        outputs = call_model(self.module, chunk.inputs, values)
        total = self.loss.sum(outputs, chunk.target)
        for name, result in (("outputs", outputs), ("loss", total)):
            if result.dtype != torch.float64:
                raise TypeError(f"its {name} are {result.dtype} there")
        return total


def _in_double(chunk: Chunk) -> Chunk:
    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    inputs, target = tree_map_only(Tensor, cast, (chunk.inputs, chunk.target))
    return Chunk(inputs, target, chunk.piece)
