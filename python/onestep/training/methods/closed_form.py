"""Models that one pass over the data solves for, or estimates."""

from __future__ import annotations

import math
from typing import ClassVar

from onestep.evaluation.distributed import share
from onestep.evaluation.errors import NonFiniteError
from onestep.training.facts import Facts, Settings
from onestep.training.methods import affine_equations, softmax_estimate
from onestep.training.methods.affine_equations import NotAffineError, Solution
from onestep.training.methods.base import Method, Run, Taken, Verdict
from onestep.training.methods.quasi_newton import HeadFit, head_of
from onestep.training.methods.separation import SEPARATED
from onestep.training.objective import DataObjective
from onestep.training.plan import FitPlan
from onestep.training.structures.base import Mismatch, ObjectiveType

# An estimate takes at most four passes over the features, the one that computes them included, and some over samples.
_PASSES = 4.25
# It takes more passes as long as they have no more than this many operations in all.
_CHEAP_OPERATIONS = 2e9
# It ends where the loss can be lowered by less than this part of itself.
_ESTIMATE = 1e-5
_ESTIMATED = "estimated in one pass over the data; method='quasi_newton' from here ends at the minimum"


class ClosedForm(Method):
    """Squared error exactly, where outputs are affine in the parameters; a head under cross-entropy by an estimate."""

    name: ClassVar[str] = "closed_form"
    most_steps: ClassVar[int | None] = 1
    one_pass: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False

    def suits(self, facts: Facts, settings: Settings) -> str | Mismatch:
        """Only where the result is exact."""
        if facts.loss.name != "mse":
            return Mismatch(f"the loss is {facts.loss.name!r}, not 'mse'")
        if settings.batch_size is not None:
            return Mismatch("batch_size is given")
        if facts.not_affine:
            return Mismatch(facts.not_affine)
        # The model may end in the one linear layer that is trained. Otherwise rows of the Jacobian are the features:
        # they must be possible to compute, and few enough to solve for.
        few = len(facts.parameters) <= affine_equations.MOST_PARAMETERS
        if (not few or facts.no_jacobian) and isinstance(facts.head, Mismatch):
            return facts.head if not few else Mismatch(facts.no_jacobian)
        return "outputs are affine in the parameters and the loss is quadratic"

    def refusal(self, facts: Facts, settings: Settings) -> str:
        """For losses that it does not know, and for mini-batches."""
        # A cross-entropy with options, such as class weights, has a name of its own.
        if facts.loss.cross_entropy is not None and facts.loss.name != "cross_entropy":
            head = head_of(facts)
            if isinstance(head, Mismatch):
                return f"method='closed_form' estimates a linear head under cross-entropy: {head.why}"
        elif facts.loss.name not in ("mse", "cross_entropy"):
            return (
                "method='closed_form' solves loss='mse' and estimates a head for 'cross_entropy'; for "
                f"{facts.loss.name!r} use method='newton_cg'"
            )
        if settings.batch_size is not None:
            return "method='closed_form' reads all data once; batch_size must be None"
        return ""

    def objective(self, facts: Facts) -> tuple[ObjectiveType | None, tuple[str, ...]]:
        """The general one, whose Jacobian is the model's."""
        return None, ()

    def setup(self, plan: FitPlan) -> Run:
        """The one step."""
        return _OnePass(plan)


def _keeps_features(plan: FitPlan) -> bool:
    """Whether the estimate keeps what the head is given, and iterates over it; otherwise it is made of sums.

    It does on one process and a CPU where the number of rows is known. There is no other way for losses with options.
    """
    if share().size > 1 or plan.parameters.device.type != "cpu":
        return False
    return plan.source.known_rows is not None or plan.loss.name != "cross_entropy"


class _OnePass(Run):
    def __init__(self, plan: FitPlan) -> None:
        self.plan = plan
        self.exact = plan.loss.name == "mse"
        self.note = ""
        self.separated = False

    def step(self, number: int) -> Taken:
        """Solves; the loss before is that of the same pass."""
        plan = self.plan
        start = plan.parameters.read()
        objective, decay = plan.objective(plan.source.all, plan.source.all, fixed=True), plan.settings.weight_decay
        if self.exact:
            solution = affine_equations.solve(objective, plan.parameters, plan.first_pass(), decay)
        else:
            solution = self._estimate(objective)
        self.note = solution.note
        step_norm = (plan.parameters.read() - start).norm().item()
        return Taken(solution.initial_loss, solution.loss, float("nan"), step_norm)

    def _estimate(self, objective: DataObjective) -> Solution:
        """By a few iterations on features that are kept, or from sums over one pass."""
        plan = self.plan
        if not _keeps_features(plan):
            decay, seed = plan.settings.weight_decay, plan.settings.seed
            return softmax_estimate.solve(objective, plan.parameters, plan.first_pass(), decay, seed)
        try:
            fit = HeadFit.of(plan, plan.first_pass(), tol=_ESTIMATE)
        except NonFiniteError as error:
            raise NonFiniteError(f"step 1: NaN or infinity: {error}") from error
        if isinstance(fit, Mismatch):
            raise NotAffineError
        fit.begin()
        rows = fit.kept.rows
        most = max(_PASSES, _CHEAP_OPERATIONS / (4.0 * rows.operations * rows.classes))
        while not fit.descent.ended and fit.descent.passes + 1 <= most:
            fit.descent.step()
        if not math.isfinite(fit.loss):
            raise NonFiniteError(f"step 1: the loss is {fit.loss}: NaN or infinity, or features too large")
        fit.write()
        self.separated = plan.settings.weight_decay == 0 and fit.separates()
        return Solution(fit.initial_loss, fit.loss, "")

    def verdict(self) -> Verdict:
        """It is solved for, or estimated."""
        if self.exact:
            return Verdict(f"solved exactly{self.note or ' in one pass'}", converged=True)
        return Verdict(f"estimated in one pass over the data; {SEPARATED}" if self.separated else _ESTIMATED)
