"""Random vectors whose second moments are the Hessian of a loss in the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from onestep.evaluation.losses import IGNORED, Loss, are_probabilities, scores_and_classes

# generator ↦ s like the outputs (n,…)
Root: TypeAlias = Callable[[torch.Generator], Tensor]


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 and 1, the same on every device."""
    return torch.randint(2, like.shape, generator=generator, dtype=torch.int8).to(like).mul_(2).sub_(1)


def root_of_loss(loss: Loss, outputs: Tensor, target: Any) -> Root | None:
    """What draws s with E ssᵀ = ∂²loss/∂outputs², block by block of the rows; None where no root of that is known.

    s = R z with random signs z and RRᵀ the Hessian: of classes with probabilities p, diag(p) - ppᵀ has
    R = diag(√p) - p√pᵀ.
    """
    if loss.name == "mse":
        return lambda generator: math.sqrt(2.0) * signs(outputs, generator)
    if loss.name == "poisson":
        root = (outputs / 2).exp()
        return lambda generator: root * signs(outputs, generator)
    if loss.name == "bce":
        root = (outputs.sigmoid() * (-outputs).sigmoid()).sqrt()
        return lambda generator: root * signs(outputs, generator)
    if loss.name != "cross_entropy" or are_probabilities(outputs, target):
        return None
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        scores, classes = scores_and_classes(leaf, target)
    p = scores.detach().softmax(1)
    root = p.sqrt()
    counted = (classes != IGNORED)[:, None].to(p)

    def draw(generator: torch.Generator) -> Tensor:
        along = root * signs(p, generator)
        s = counted * (along - p * along.sum(1, keepdim=True))
        return torch.autograd.grad(scores, leaf, s, retain_graph=True)[0]

    return draw
