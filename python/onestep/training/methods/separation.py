"""Cross-entropies without a minimum: planes separate the classes, so that larger parameters always lower the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import summed
from onestep.evaluation.losses import Loss, like_outputs, scores_and_classes
from onestep.evaluation.module import call_model
from onestep.training.plan import FitPlan

SEPARATED = (
    "planes separate the classes, or some of them, so that the loss falls for ever as the parameters grow, and has no "
    "minimum; "
    "weight_decay > 0 gives it one"
)


def may_be_separated(plan: FitPlan) -> bool:
    """Whether the loss is one that planes can leave without a minimum, and nothing else holds the parameters."""
    entropy = plan.loss.cross_entropy is not None and plan.loss.cross_entropy.label_smoothing == 0
    return (entropy or plan.loss.name == "bce") and plan.settings.weight_decay == 0


def is_separated(plan: FitPlan) -> bool:
    """Whether every row's own class has the largest score, of outputs that are affine in the parameters.

    Of the outputs counts what growing parameters multiply: what they are more than with parameters of zero.
    """

    def by_parameters(chunk: Chunk) -> Tensor:
        outputs, point = call_model(plan.model, chunk.inputs), plan.parameters.read()
        plan.parameters.write(torch.zeros_like(point))
        try:
            return outputs - call_model(plan.model, chunk.inputs)
        finally:
            plan.parameters.write(point)

    def terms() -> tuple[Tensor, list[float]]:
        wrong = any(_some_are_wrong(plan.loss, by_parameters(chunk), chunk.target) for chunk in plan.source.all())
        return torch.empty(0), [wrong]

    with torch.no_grad():
        return not summed(terms)[1][0]


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
    scores, classes = scores_and_classes(outputs, target)
    counted = classes != options.ignore_index
    if options.weight is not None:
        counted &= options.weight.to(classes.device)[classes.where(counted, 0)] > 0
    others, classes = scores[counted].clone(), classes[counted, None]
    own = others.gather(1, classes)
    return bool((others.scatter_(1, classes, -math.inf).amax(1) >= own[:, 0]).any())
