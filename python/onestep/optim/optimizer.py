"""Damped steps, taken back when they fail: what the three optimisers share."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from onestep._interrupts import undisturbed
from onestep._processes import place
from onestep.evaluation.errors import NonFiniteError
from onestep.evaluation.parameters import ParameterVector, flatten
from onestep.optim._saddle import FEW_ITERATIONS, MOST_ITERATIONS, concave_direction
from onestep.optim.idle import projected
from onestep.optim.objective import ClosureObjective, Objective
from onestep.optim.quadratic_model import QuadraticModel
from onestep.optim.step_report import StepReport

# A step is kept if the loss falls at all. Its gain is that fall over the one that the quadratic model promised; damping
# follows it (Marquardt 1963; Moré 1978). It falls already at a gain of 0.3 and hardly ever rises while steps succeed:
# kinks (relu) keep gains that low all the way, and the usual thresholds (3/4, 1/4) would damp a fit to a standstill.
_GOOD_GAIN = 0.3
# Before a step is solved for anew with more damping, half of it is tried: behind a kink that helps, and it is cheap.
_FRACTIONS = (1.0, 0.5)
# A closure gives the same loss again to this many ε.
_SAME_ROUNDINGS = 100
# So often a step along negative curvature may be doubled.
_DOUBLINGS = 40
# Steps away from a saddle that are tried, relative to the parameters' size.
_SADDLE_STEPS = (1.0, 0.1, 1e-2, 1e-3)
# A predicted reduction under this part of the loss is near the end.
_NEAR = 1e-4
# Damping stays between these two.
LEAST_DAMPING = 1e-15
MOST_DAMPING = 1e15


class DampedOptimizer(torch.optim.Optimizer):
    """θ ← θ - (B + damping·D)⁻¹∇loss with damping by gain ratio; subclasses choose B and D.

    Param groups may differ in ``weight_decay``. All other settings are one for all groups, since a step is solved for
    in all parameters together: ``lr``, a factor of each step, for torch's schedulers; ``damping``, and by what it falls
    after a good step (``damping_decrease``) and rises after one of which half was kept (``damping_increase``).
    """

    # Whether the matrix is the Hessian, which tells a saddle from a minimum.
    hessian = False
    # Whether closures return the bare loss.
    takes_scalar = False
    # The reduction, as a part of the loss, under which it is worth its cost to know the decrement.
    settled = 1e-9
    # Trials of one step, each with more damping, before it is given up.
    trials = 12
    # False while the first param groups are added.
    _ready = True

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        rules = {"lr": 1.0, "damping_decrease": 1 / 3, "damping_increase": 1.3}
        self._ready = False
        super().__init__(params, rules | defaults)
        self._ready = True
        self.report: StepReport | None = None
        # What steps leave to later ones, besides the state of each parameter. "inverse" is too large for a checkpoint:
        # ``form_again`` makes it of the vectors that are kept with it.
        self.kept: dict[str, Tensor] = {}
        self._repeatable: bool | None = None
        # Whether rounding cannot have made the decrement of the last step look small.
        self.certain = True
        # Newton's step (p,) at the start of the last step, where its decrement took it.
        self.newton: Tensor | None = None
        self._flat: Tensor | None = None
        # Parameters (p,) that change the outputs by rounding alone, as far as the last step found some.
        self.idle: Tensor | None = None
        self._ahead: tuple[Objective, tuple[int, ...], float, Tensor] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any torch optimiser; the group's settings are checked, and are the others' if not given.

        Args:
            param_group: "params", and settings.

        Raises:
            ValueError: a setting is not what it should be, or differs from the first group's, other than weight_decay.
        """
        if self.param_groups:
            first = self.param_groups[0]
            shared = {name: first[name] for name in self.defaults if name != "weight_decay"}
            for name, value in shared.items():
                # A group that is there from the start has the optimiser's default; one that is added later, what the
                # others have reached.
                other = param_group.get(name, value if self._ready else self.defaults[name])
                if other != value:
                    raise ValueError(
                        f"{name}={other} in a param group, {value} in the first; expected one value for all, since a "
                        f"step is solved for in all parameters together: give {name} as an argument of the optimiser"
                    )
            param_group = shared | param_group
        settings = self.defaults | param_group
        for name, (allowed, expected) in self.ALLOWED.items():
            if name in settings and not allowed(settings[name]):
                raise ValueError(f"{name}={settings[name]}; expected {expected}")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Settings that an older checkpoint lacks are the defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def setting(self, name: str) -> Any:
        """What all groups say.

        Raises:
            ValueError: they differ.
        """
        values = [group[name] for group in self.param_groups]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} is {values} in the param groups; expected the same value in all of them")
        return values[0]

    def parameters(self) -> ParameterVector:
        """What is trained, in the order of the param groups."""
        return ParameterVector([p for group in self.param_groups for p in group["params"] if p.requires_grad])

    def read_state(self, name: str, parameters: ParameterVector) -> Tensor | None:
        """A vector (p,) that ``write_state`` kept with the parameters, if there is one."""
        parts = [self.state[p].get(name) for p in parameters.tensors]
        if any(part is None for part in parts):
            return None
        return flatten(parts)

    def write_state(self, name: str, parameters: ParameterVector, vector: Tensor) -> None:
        """Keeps a vector (p,) in the optimiser's state, each parameter's part with it, in the parameters' dtype.

        torch casts state to that dtype when it loads it: in any other a resumed run would go on with other bits.
        """
        for tensor, part in zip(parameters.tensors, parameters.split(vector), strict=True):
            self.state[tensor][name] = part.to(parameters.dtype, copy=True)

    # What settings may be.
    ALLOWED: ClassVar[dict[str, tuple[Callable[[Any], bool], str]]] = {
        "damping": (lambda value: 0 < value < math.inf, "a finite number > 0"),
        "weight_decay": (lambda value: 0 <= value < math.inf, "a finite number >= 0"),
        "lr": (lambda value: 0 <= value < math.inf, "a finite number >= 0"),
        "damping_decrease": (lambda value: 0 < value <= 1, "a number from 0, at most 1"),
        "damping_increase": (lambda value: 1 <= value < math.inf, "a finite number >= 1"),
        "momentum": (lambda value: 0 <= value < 1, "a number from 0, less than 1"),
        "cg_iterations": (lambda value: value >= 1, "at least 1"),
        "cg_tolerance": (lambda value: 0 <= value < 1, "a number from 0, less than 1"),
    }

    @property
    def damping(self) -> float:
        """The damping of the next step."""
        return float(self.setting("damping"))

    @damping.setter
    def damping(self, value: float) -> None:
        for group in self.param_groups:
            group["damping"] = min(max(value, LEAST_DAMPING), MOST_DAMPING)

    @abstractmethod
    def quadratic_model(
        self, objective: Objective, parameters: ParameterVector, loss: float, gradient: Tensor, decay: Tensor | None
    ) -> QuadraticModel:
        """The model at the present parameters; loss and gradient include weight decay, whose Hessian is ``decay``."""

    def form_again(self, objective: Objective, parameters: ParameterVector) -> None:
        """Makes ``kept["inverse"]`` of the rest of ``kept``, after a checkpoint."""

    def never_used(self, parameters: ParameterVector) -> Tensor:
        """Which parameters (p,) outputs have not depended on at any step, of those without influence at the last."""
        if self._flat is None:
            return torch.zeros(len(parameters), dtype=torch.bool, device=parameters.device)
        return self._flat & (self.kept["greatest_slope"] == 0)

    def accepted(self, parameters: ParameterVector, step: Tensor, gradient: Tensor) -> None:
        """Called with each step that is kept."""

    # torch types step() loosely; a closure is not optional here.
    @undisturbed
    def step(self, closure: Callable[[], Any] | Objective | None = None) -> float:  # type: ignore[override]
        """Takes one damped step; the parameters stay as they are if none lowers the loss.

        Args:
            closure: computes what the class docstring says from the parameters, without calling backward(). It is
                called several times and must be deterministic.

        Returns:
            The loss before the step. ``report`` has the rest.

        Raises:
            TypeError: no closure, or it returns something else.
            NonFiniteError: the loss or its gradient is NaN or infinite; nothing has changed.
        """
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step() needs a closure: a function that computes the loss anew, for trial "
                "steps and products. A trainer that calls step() without one cannot drive a second-order method"
            )
        objective = closure if isinstance(closure, Objective) else self._closure_objective(closure)
        parameters = self.parameters()
        start, decay = parameters.read(), self._decay(parameters)
        settings, kept = [group["damping"] for group in self.param_groups], dict(self.kept)
        state = {tensor: dict(of_tensor) for tensor, of_tensor in self.state.items()}
        loss, gradient = self._evaluate(objective, parameters, start, decay)
        if not (math.isfinite(loss) and bool(gradient.isfinite().all())):
            what = "gradient" if math.isfinite(loss) else f"loss is {loss}, and its gradient"
            raise NonFiniteError(f"the {what} has NaN or infinite elements at the present parameters")
        self._warn_if_random(objective, parameters, start, decay, loss)
        try:
            self.report = self._step(objective, parameters, start, decay, loss, gradient)
        except BaseException:
            # An interrupt or an error during a trial must not leave what the trial has changed behind.
            parameters.write(start)
            self.state.clear()
            self.state.update(state)
            self.kept = kept
            for group, damping in zip(self.param_groups, settings, strict=True):
                group["damping"] = damping
            raise
        return loss

    def _warn_if_random(
        self, objective: Objective, parameters: ParameterVector, point: Tensor, decay: Tensor | None, loss: float
    ) -> None:
        """Once, of a closure that gives another loss at the same parameters, as with dropout in training mode."""
        if self._repeatable is not None or not isinstance(objective, ClosureObjective):
            return
        again = objective.value(parameters) + (0.0 if decay is None else _penalty(decay, point))
        close = _SAME_ROUNDINGS * torch.finfo(parameters.dtype).eps
        self._repeatable = math.isfinite(again) and abs(again - loss) <= close * max(abs(again), abs(loss))
        if not self._repeatable:
            warnings.warn(
                f"the closure's loss is {loss:g}, then {again:g} at the same parameters: trial steps and products are "
                f"of different functions, and {type(self).__name__} cannot tell a better step from luck. Call "
                "model.eval() where dropout or batch statistics are the cause; draw other random numbers outside of "
                "the closure",
                stacklevel=5,
            )

    def _closure_objective(self, closure: Callable[[], Any]) -> Objective:
        return ClosureObjective(closure, scalar=self.takes_scalar, optimizer=type(self).__name__)

    def _decay(self, parameters: ParameterVector) -> Tensor | None:
        """The weight decay of each parameter (p,), or None."""
        if not any(group["weight_decay"] for group in self.param_groups):
            return None
        parts = [
            torch.full((p.numel(),), group["weight_decay"], dtype=parameters.dtype, device=parameters.device)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        return torch.cat(parts)

    def _evaluate(
        self, objective: Objective, parameters: ParameterVector, point: Tensor, decay: Tensor | None
    ) -> tuple[float, Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is objective and ahead[1] == parameters.versions():
            return ahead[2], ahead[3]
        loss, gradient = objective.gradient(parameters)
        if decay is not None:
            loss, gradient = loss + _penalty(decay, point), gradient.addcmul(decay, point)
        return loss, gradient

    def _step(
        self,
        objective: Objective,
        parameters: ParameterVector,
        start: Tensor,
        decay: Tensor | None,
        loss: float,
        gradient: Tensor,
    ) -> StepReport:
        model = self.quadratic_model(objective, parameters, loss, gradient, decay)
        self._remember_slopes(gradient)
        self.newton = None
        rejected = products = 0
        damping, predicted, promised_first = self.damping, math.nan, math.nan
        lr = float(self.setting("lr"))

        def report(new_loss: float, step_norm: float, gain: float, *, accepted: bool) -> StepReport:
            # Only near the end is it worth a factorisation to know how near.
            near = not accepted or max(predicted, model.promise) <= _NEAR * abs(loss)
            decrement = math.inf
            if near:
                # Products are taken where the model was made.
                reached = parameters.read()
                parameters.write(start)
                decrement = model.decrement(self.settled * abs(loss), final=not accepted)
                self._flat, self.certain, self.newton = model.flat, model.certain, model.newton
                parameters.write(reached)
            return StepReport(
                loss=loss,
                new_loss=new_loss,
                grad_norm=gradient.norm().item(),
                step_norm=step_norm,
                predicted=predicted if accepted else promised_first,
                decrement=decrement,
                resolution=model.resolution(start) if near else 0.0,
                damping=damping,
                gain=gain,
                accepted=accepted,
                rejected=rejected,
                cg_iterations=products,
                without_influence=model.without_influence + (0 if model.flat is None else int(model.flat.sum())),
            )

        if lr == 0:
            return report(loss, 0.0, math.nan, accepted=False)
        judged = objective.before(parameters)
        before = loss if judged is None else judged + (0.0 if decay is None else _penalty(decay, start))

        def leave_saddle() -> StepReport | None:
            found = self._leave_saddle(objective, parameters, decay, start, before)
            if found is None:
                return None
            step, new_loss, ahead = found
            # A failed step has raised it for trials along the gradient.
            self.damping = first_damping
            self.accepted(parameters, step, gradient)
            if ahead is not None:
                self._ahead = (objective, parameters.versions(), new_loss, ahead)
            return report(new_loss, step.norm().item(), math.nan, accepted=True)

        first_damping = damping
        if not bool(gradient.any()):
            promised_first = 0.0
            return leave_saddle() or report(before, 0.0, math.nan, accepted=False)
        while rejected < self.trials:
            damping = self.damping
            proposal = model.propose(damping)
            products += 0 if proposal is None else proposal.products
            while proposal is not None:
                predicted = proposal.predicted
                promised_first = predicted if math.isnan(promised_first) else promised_first
                slope = -torch.dot(gradient, proposal.step).item()
                for fraction in _FRACTIONS:
                    factor = lr * fraction
                    promised = factor * slope - factor**2 * (slope - predicted)
                    step = proposal.step if factor == 1 else factor * proposal.step
                    parameters.write(start + step)
                    new_loss, ahead = self._trial(objective, parameters, decay)
                    gain = (before - new_loss) / promised if promised > 0 else -math.inf
                    if new_loss < before and gain > 0:
                        if proposal.concave and fraction == 1:
                            step, new_loss, ahead = self._farther(
                                objective, parameters, decay, start, step, new_loss, ahead
                            )
                        if fraction < 1:
                            self.damping = damping * self.setting("damping_increase")
                        elif gain > _GOOD_GAIN:
                            self.damping = damping * self.setting("damping_decrease")
                        self.accepted(parameters, step, gradient)
                        taken = report(new_loss, step.norm().item(), gain, accepted=True)
                        if ahead is not None:
                            self._ahead = (objective, parameters.versions(), new_loss, ahead)
                        return taken
                proposal = proposal.shorter
            parameters.write(start)
            rejected += 1
            # Ever faster: a start far away may need damping many orders of magnitude larger.
            self.damping = damping * 2.0**rejected
        taken = report(before, 0.0, math.nan, accepted=False)
        # Where it is no minimum, as far as the Hessian tells, and the same rows make and judge steps.
        left = leave_saddle() if self.hessian and judged is None and math.isinf(taken.decrement) else None
        if left is not None:
            return left
        if objective.fixed:
            self._ahead = (objective, parameters.versions(), loss, gradient)
        return taken

    def way_down(self, objective: Objective) -> Tensor | None:
        """A step along negative curvature that lowers the loss, if a few products find one; nothing is changed.

        Args:
            objective: the loss, at the present parameters.

        Returns:
            (p,), or None.
        """
        parameters = self.parameters()
        start, decay = parameters.read(), self._decay(parameters)
        loss = objective.value(parameters) + (0.0 if decay is None else _penalty(decay, start))
        try:
            found = self._leave_saddle(objective, parameters, decay, start, loss, FEW_ITERATIONS)
        finally:
            parameters.write(start)
        return None if found is None else found[0]

    def _leave_saddle(
        self,
        objective: Objective,
        parameters: ParameterVector,
        decay: Tensor | None,
        start: Tensor,
        loss: float,
        iterations: int = MOST_ITERATIONS,
    ) -> tuple[Tensor, float, Tensor | None] | None:
        """A step along a direction of negative curvature that lowers the loss, where no gradient tells of one."""
        try:
            hessian = projected(objective.curvature(parameters, hessian=True), self.idle)
            direction = concave_direction(
                lambda v: hessian(v) if decay is None else hessian(v) + decay * v, start, iterations, self.idle
            )
        except (RuntimeError, NotImplementedError):
            # A model without second derivatives.
            return None
        if direction is None:
            return None
        direction *= start.square().mean().sqrt().clamp_min(1.0) * float(self.setting("lr"))
        for size in _SADDLE_STEPS:
            for step in (size * direction, -size * direction):
                parameters.write(start + step)
                new_loss, ahead = self._trial(objective, parameters, decay)
                if new_loss < loss - _SAME_ROUNDINGS * torch.finfo(start.dtype).eps * abs(loss):
                    return self._farther(objective, parameters, decay, start, step, new_loss, ahead)
        parameters.write(start)
        return None

    def _remember_slopes(self, gradient: Tensor) -> None:
        """The greatest slope that each parameter has had: one that lost it, as on a plateau, is not one of no use."""
        before, slopes = self.kept.get("greatest_slope"), gradient.abs()
        if before is not None and len(before) == len(slopes):
            slopes = torch.maximum(before, slopes)
        self.kept["greatest_slope"] = slopes

    def _farther(
        self,
        objective: Objective,
        parameters: ParameterVector,
        decay: Tensor | None,
        start: Tensor,
        step: Tensor,
        loss: float,
        gradient: Tensor | None,
    ) -> tuple[Tensor, float, Tensor | None]:
        """The step doubled while the loss falls: of negative curvature the model does not tell where it ends."""
        for _ in range(_DOUBLINGS):
            longer = 2 * step
            parameters.write(start + longer)
            longer_loss, longer_gradient = self._trial(objective, parameters, decay)
            if not longer_loss < loss:
                break
            step, loss, gradient = longer, longer_loss, longer_gradient
        parameters.write(start + step)
        return step, loss, gradient

    def _trial(
        self, objective: Objective, parameters: ParameterVector, decay: Tensor | None
    ) -> tuple[float, Tensor | None]:
        """The loss at a trial point, NaN counting as a failure; with its gradient where the next step can use it."""
        penalty = 0.0 if decay is None else _penalty(decay, parameters.read())
        # A model that checks its parameters may refuse those of a trial: it took those of the start. Of several
        # processes one alone may refuse, for which the others would wait. Errors of a closure are its caller's.
        alone = place()[1] == 1 and not isinstance(objective, ClosureObjective)
        refusals = (NonFiniteError, ValueError, ArithmeticError) if alone else (NonFiniteError,)
        try:
            if not objective.fixed:
                value = objective.value(parameters) + penalty
                return (value if math.isfinite(value) else math.inf), None
            value, gradient = objective.gradient(parameters)
        except refusals:
            return math.inf, None
        if decay is not None:
            gradient = gradient.addcmul(decay, parameters.read())
        if not (math.isfinite(value) and bool(gradient.isfinite().all())):
            return math.inf, None
        return value + penalty, gradient


def _penalty(decay: Tensor, point: Tensor) -> float:
    return 0.5 * torch.dot(decay * point, point).item()
