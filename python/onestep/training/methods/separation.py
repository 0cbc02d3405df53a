"""Losses without a minimum: planes separate classes, or counts are all zero, and larger parameters lower the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import summed
from onestep.evaluation.losses import CrossEntropy, Loss, like_outputs, scores_and_classes
from onestep.evaluation.module import call_model
from onestep.training.plan import FitPlan

SEPARATED = (
    "planes separate the classes, or some of them, so that the loss falls for ever as the parameters grow, and has no "
    "minimum; weight_decay > 0 gives it one"
)
# What is said where only some rows move on: their classes, or counts that are all zero.
WITHOUT_MINIMUM = (
    "the loss falls for ever as some parameters grow, and has no minimum (planes separate some of the classes, or all "
    "counts of a group are zero); weight_decay > 0 gives it one"
)
# A step that still moves the outputs of some row so far, where the loss can hardly be lowered.
RUNAWAY = 0.1


def may_be_separated(plan: FitPlan) -> bool:
    """Whether the loss is one that planes can leave without a minimum, and nothing else holds the parameters."""
    entropy = plan.loss.cross_entropy is not None and plan.loss.cross_entropy.label_smoothing == 0
    return (entropy or plan.loss.name == "bce") and plan.settings.weight_decay == 0


def is_separated(plan: FitPlan) -> bool:
    """Whether every row's own class has the largest score, of outputs that are affine in the parameters.

    Outputs are taken less those at parameters of zero: the rest alone grows with the parameters.
    """

    zeros = torch.zeros_like(plan.parameters.read())

    def terms() -> tuple[Tensor, list[float]]:
        try:
            wrong = any(
                _some_are_wrong(plan.loss, _change(plan, chunk, zeros), chunk.target) for chunk in plan.source.all()
            )
        except Exception:
            # A model that checks its parameters may refuse zeros, which nobody asked for: nothing is known then.
            wrong = True
        return torch.empty(0), [wrong]

    with torch.no_grad():
        return not summed(terms)[1][0]


def may_run_away(plan: FitPlan) -> bool:
    """Whether the loss is one that may fall for ever along a direction, and nothing else holds the parameters."""
    return may_be_separated(plan) or (plan.loss.name == "poisson" and plan.settings.weight_decay == 0)


def moves_on(plan: FitPlan, before: Tensor) -> bool:
    """Whether the outputs of some row that counts have moved by much from those with the parameters ``before``.

    Near a minimum a Newton step moves them little. Where there is none the loss falls like e⁻ᵗ, and every step moves
    some outputs by about 1, however little is left to be gained.
    """

    def terms() -> tuple[Tensor, list[float]]:
        moved = any(_movement(plan, chunk, before) > RUNAWAY for chunk in plan.source.all())
        return torch.empty(0), [moved]

    with torch.no_grad():
        return bool(summed(terms)[1][0])


def _change(plan: FitPlan, chunk: Chunk, other: Tensor) -> Tensor:
    """The outputs, less those with other parameters."""
    outputs, point = call_model(plan.model, chunk.inputs), plan.parameters.read()
    plan.parameters.write(other)
    try:
        return outputs - call_model(plan.model, chunk.inputs)
    finally:
        plan.parameters.write(point)


def _movement(plan: FitPlan, chunk: Chunk, before: Tensor) -> float:
    change = _change(plan, chunk, before)
    if plan.loss.cross_entropy is not None and not chunk.target.is_floating_point():
        scores, classes = _counted(plan.loss.cross_entropy, change, chunk.target)
        # What all classes have in common changes nothing.
        change = scores - scores.gather(1, classes[:, None])
    return change.abs().max().item() if change.numel() else 0.0


def _some_are_wrong(loss: Loss, outputs: Tensor, target: Tensor) -> bool:
    """Whether a row that counts has no class, or another one has as large a score."""
    if loss.name == "bce":
        target = like_outputs(outputs, target)
        right = torch.where(target == 1, outputs > 0, (target == 0) & (outputs < 0))
        return not bool(right.all())
    if target.is_floating_point():
        # Probabilities of classes, which no plane separates.
        return True
    options = loss.cross_entropy
    assert options is not None
    scores, classes = _counted(options, outputs, target)
    own = scores.gather(1, classes[:, None])[:, 0]
    return bool((scores.scatter(1, classes[:, None], -math.inf).amax(1) >= own).any())


def _counted(options: CrossEntropy, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (m,C) and classes (m,) of what is not ignored and has a weight."""
    scores, classes = scores_and_classes(outputs, target)
    counted = classes != options.ignore_index
    if options.weight is not None:
        counted &= options.weight.to(classes.device)[classes.where(counted, 0)] > 0
    return scores[counted], classes[counted]
