"""Losses by name, as sums that add up over chunks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


class Loss(NamedTuple):
    """A mean over elements, taken apart.

    Attributes:
        name: as given to fit, or "function".
        sum: (outputs, target) → the sum of the loss, a scalar.
        elements: (target, rows) → over how many elements the mean is taken.
    """

    name: str
    sum: Callable[[Tensor, Any], Tensor]
    elements: Callable[[Any, int], int]


def like_outputs(outputs: Tensor, target: Tensor) -> Tensor:
    """The target in the outputs' shape: (n,) for (n,1), which torch's own losses would broadcast to (n,n)."""
    if target.shape != outputs.shape and target.numel() == outputs.numel():
        target = target.reshape(outputs.shape)
    if target.shape != outputs.shape:
        raise ValueError(
            f"the model's outputs have shape {tuple(outputs.shape)}, the target {tuple(target.shape)}; expected the "
            "same"
        )
    return target


def _mse(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - like_outputs(outputs, target)).square().sum()


def _poisson(outputs: Tensor, target: Tensor) -> Tensor:
    return F.poisson_nll_loss(outputs, like_outputs(outputs, target), log_input=True, reduction="sum")


def _cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    outputs, target = scores_and_classes(outputs, target)
    return F.cross_entropy(outputs, target, ignore_index=IGNORED, reduction="sum")


def scores_and_classes(outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Class scores (m,C) and indices (m,) from outputs (n,…,C) or (n,C,…) and targets (n,…)."""
    classes_last = target.shape == outputs.shape[:-1]
    classes_second = outputs.dim() > 1 and target.shape == (outputs.shape[0], *outputs.shape[2:])
    if classes_last and classes_second and outputs.dim() > 2:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} may have classes in the second or in the last dimension: pass a "
            "function as loss"
        )
    if not (classes_last or classes_second) or target.is_floating_point():
        raise ValueError(
            f"outputs have shape {tuple(outputs.shape)}, the target {tuple(target.shape)} and {target.dtype}; expected "
            "class indices (n,...) for outputs (n,...,classes) or (n,classes,...)"
        )
    if not classes_last:
        outputs = outputs.movedim(1, -1)
    return outputs.reshape(-1, outputs.shape[-1]), target.reshape(-1)


def drawn_slope(loss: Loss, outputs: Tensor, target: Any, generator: torch.Generator) -> Tensor:
    """The gradient in the outputs of the loss of targets drawn from the model: its covariance is the loss's Hessian.

    For a function as loss, whose model is not known, of the targets that there are.
    """
    if loss.name == "mse":
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        return math.sqrt(2.0) * noise
    if loss.name == "poisson":
        rate = outputs.detach().exp()
        return rate - torch.poisson(rate, generator)
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        if loss.name == "cross_entropy":
            scores, classes = scores_and_classes(leaf, target)
            drawn = torch.multinomial(scores.detach().softmax(1), 1, generator=generator)[:, 0]
            drawn = torch.where(classes == IGNORED, IGNORED, drawn)
            value = F.cross_entropy(scores, drawn, ignore_index=IGNORED, reduction="sum")
        else:
            value = loss.sum(leaf, target)
        return torch.autograd.grad(value, leaf)[0]


LOSSES = {
    "mse": Loss("mse", _mse, lambda target, rows: target.numel()),
    "cross_entropy": Loss("cross_entropy", _cross_entropy, lambda target, rows: int((target != IGNORED).sum())),
    "poisson": Loss("poisson", _poisson, lambda target, rows: target.numel()),
}


def as_loss(loss: str | Callable[[Tensor, Any], Tensor]) -> Loss:
    """A named loss, or a function (outputs, target) → mean over its rows."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}; expected one of {', '.join(map(repr, LOSSES))}, or a function")
        return LOSSES[loss]
    if not callable(loss):
        raise TypeError(f"loss is {type(loss).__name__}; expected a name or a function (outputs, target) -> scalar")
    function = loss
    reduction = getattr(function, "reduction", "mean")
    if reduction != "mean":
        raise ValueError(f"loss is {type(function).__name__} with reduction={reduction!r}; expected reduction='mean'")
    reduction = getattr(function, "reduction", "mean")
    if reduction != "mean":
        raise ValueError(f"loss is {type(function).__name__} with reduction={reduction!r}; expected reduction='mean'")

    def total(outputs: Tensor, target: Any) -> Tensor:
        mean = function(outputs, target)
        if not isinstance(mean, Tensor) or mean.numel() != 1:
            raise TypeError(f"the loss function returned {mean!r}; expected a scalar tensor")
        return mean.reshape(()) * len(outputs)

    return Loss("function", total, lambda target, rows: rows)
