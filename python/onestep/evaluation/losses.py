"""Losses by name, as sums that add up over chunks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestep._torch_private import tree_leaves

IGNORED = -100


class CrossEntropy(NamedTuple):
    """The options of torch's cross-entropy: a weight (C,) for each class, and the others by their names there."""

    weight: Tensor | None = None
    ignore_index: int = IGNORED
    label_smoothing: float = 0.0


class Loss(NamedTuple):
    """A mean over elements, taken apart.

    Attributes:
        name: as given to fit; "weighted_cross_entropy" for cross-entropy with class weights or other options;
            "function" for a function of the user's.
        sum: (outputs, target) → the sum of the loss, a scalar.
        elements: (target, rows) → what the sum is divided by: how many elements there are, or their weight.
        cross_entropy: the options of a cross-entropy of scores; None for other losses.
    """

    name: str
    sum: Callable[[Tensor, Any], Tensor]
    elements: Callable[[Any, int], float]
    cross_entropy: CrossEntropy | None = None


def widened(outputs: Tensor) -> Tensor:
    """Outputs of 16 bits as float32: what autocast gives is too coarse for losses and rows of a Jacobian.

    A function as loss gets outputs as they are, since its targets or weights may be of their dtype.
    """
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def like_outputs(outputs: Tensor, target: Tensor) -> Tensor:
    """The target in the outputs' shape: (n,) for (n,1), which torch's own losses would broadcast to (n,n)."""
    if target.is_complex() or outputs.is_complex():
        raise TypeError(f"the model's outputs are {outputs.dtype}, the target is {target.dtype}; expected real numbers")
    if target.shape != outputs.shape and target.numel() == outputs.numel():
        target = target.reshape(outputs.shape)
    if target.shape != outputs.shape:
        raise ValueError(
            f"the model's outputs have shape {tuple(outputs.shape)}, the target {tuple(target.shape)}; expected the "
            "same"
        )
    # torch does not subtract booleans.
    return target.to(outputs.dtype) if target.dtype == torch.bool else target


def check_range(loss: Loss, target: Any) -> None:
    """Raises where a target is one for which the loss is no likelihood, and may have no minimum."""
    if loss.name not in ("poisson", "bce") or not isinstance(target, Tensor):
        return
    most = 1 if loss.name == "bce" else math.inf
    wrong = target[(target < 0) | (target > most)]
    if len(wrong):
        expected = "numbers from 0 to 1" if loss.name == "bce" else "counts of 0 or more"
        raise ValueError(f"target holds {wrong[0].item():g}; expected {expected} for loss={loss.name!r}")


def _mse(outputs: Tensor, target: Tensor) -> Tensor:
    outputs = widened(outputs)
    return (outputs - like_outputs(outputs, target)).square().sum()


def _poisson(outputs: Tensor, target: Tensor) -> Tensor:
    outputs = widened(outputs)
    return F.poisson_nll_loss(outputs, like_outputs(outputs, target), log_input=True, reduction="sum")


def _bce(outputs: Tensor, target: Tensor) -> Tensor:
    outputs = widened(outputs)
    target = like_outputs(outputs, target).to(outputs.dtype)
    return F.binary_cross_entropy_with_logits(outputs, target, reduction="sum")


def _cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    outputs = widened(outputs)
    if are_probabilities(outputs, target):
        return F.cross_entropy(outputs, target, reduction="sum")
    outputs, target = scores_and_classes(outputs, target)
    with _classes_named(outputs):
        return F.cross_entropy(outputs, target, ignore_index=IGNORED, reduction="sum")


@contextmanager
def _classes_named(outputs: Tensor) -> Iterator[None]:
    """torch's "Target 7 is out of bounds" as a ValueError that says of what."""
    try:
        yield
    except IndexError as error:
        classes = outputs.shape[1] if outputs.dim() > 1 else len(outputs)
        hint = " Two classes with one output are loss='bce'" if classes == 1 else ""
        raise ValueError(
            f"target holds a class that the outputs, of {classes} classes, do not have: {error}{hint}"
        ) from None


def are_probabilities(outputs: Tensor, target: Any) -> bool:
    """Whether the target of a cross-entropy is a probability of each class instead of a class."""
    return isinstance(target, Tensor) and target.is_floating_point() and target.shape == outputs.shape


def _counted(target: Tensor) -> int:
    """Targets that count: those of classes that are not ignored, or of probabilities (n,C,…)."""
    if target.is_floating_point():
        return target.numel() // (target.shape[1] if target.dim() > 1 else len(target))
    return int((target != IGNORED).sum())


def _weighted_cross_entropy(
    function: Callable[..., Tensor], weight: Tensor | None, ignore_index: int, **options: Any
) -> Loss:
    """Cross-entropy or negative log-likelihood as torch's, of (n,C,…) and (n,…): weighted by the targets' classes."""

    def total(outputs: Tensor, target: Tensor) -> Tensor:
        outputs = widened(outputs)
        own = None if weight is None else weight.to(outputs)
        with _classes_named(outputs):
            return function(outputs, target, weight=own, ignore_index=ignore_index, reduction="sum", **options)

    def elements(target: Tensor, rows: int) -> float:
        if target.is_floating_point():
            return _counted(target)
        counted = target[target != ignore_index]
        return len(counted) if weight is None else float(weight.to(target.device, torch.float64)[counted].sum())

    own = CrossEntropy(weight, ignore_index, **options) if function is F.cross_entropy else None
    return Loss("weighted_cross_entropy", total, elements, own)


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
            "class indices (n,...) for outputs (n,...,classes) or (n,classes,...), or probabilities like the outputs"
        )
    if not classes_last:
        outputs = outputs.movedim(1, -1)
    if outputs.shape[-1] == 0:
        raise ValueError(f"outputs have shape {tuple(outputs.shape)}: no score for a class; expected one or more")
    # torch takes classes of two integer types alone.
    return outputs.reshape(-1, outputs.shape[-1]), target.reshape(-1).long()


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
    if loss.name == "bce":
        chance = outputs.detach().sigmoid()
        return chance - torch.bernoulli(chance, generator=generator)
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        if loss.name == "cross_entropy" and not are_probabilities(outputs, target):
            scores, classes = scores_and_classes(leaf, target)
            drawn = torch.multinomial(scores.detach().softmax(1), 1, generator=generator)[:, 0]
            drawn = torch.where(classes == IGNORED, IGNORED, drawn)
            value = F.cross_entropy(scores, drawn, ignore_index=IGNORED, reduction="sum")
        else:
            value = loss.sum(leaf, target)
        return torch.autograd.grad(value, leaf)[0]


def _labels_that_count(target: Any, rows: int) -> float:
    return _counted(target) if isinstance(target, Tensor) and not target.is_floating_point() else rows


def _own(outputs: Tensor, target: Any) -> Tensor:
    if outputs.numel() != 1:
        raise TypeError(
            "loss='model', but the model returned no loss; expected outputs that have one when given labels"
        )
    return outputs.reshape(()) * _labels_that_count(target, len(target))


LOSSES = {
    # The model's own, a mean over the labels that are not ignored.
    "model": Loss("model", _own, _labels_that_count),
    "mse": Loss("mse", _mse, lambda target, rows: target.numel()),
    "cross_entropy": Loss("cross_entropy", _cross_entropy, lambda target, rows: _counted(target), CrossEntropy()),
    "poisson": Loss("poisson", _poisson, lambda target, rows: target.numel()),
    "bce": Loss("bce", _bce, lambda target, rows: target.numel()),
}

# torch's functions and modules, each with the options that it may have, and their defaults.
_CROSS_ENTROPY_OPTIONS = {"weight": None, "ignore_index": IGNORED, "label_smoothing": 0.0}
_NLL_OPTIONS = {"weight": None, "ignore_index": IGNORED}
_POISSON_OPTIONS = {"log_input": True, "full": False}
_BCE_OPTIONS = {"weight": None, "pos_weight": None}
_OF_TORCH: dict[Any, tuple[str, dict[str, Any]]] = {
    F.mse_loss: ("mse", {}),
    nn.MSELoss: ("mse", {}),
    F.cross_entropy: ("cross_entropy", _CROSS_ENTROPY_OPTIONS),
    nn.CrossEntropyLoss: ("cross_entropy", _CROSS_ENTROPY_OPTIONS),
    F.nll_loss: ("nll", _NLL_OPTIONS),
    nn.NLLLoss: ("nll", _NLL_OPTIONS),
    F.poisson_nll_loss: ("poisson", _POISSON_OPTIONS),
    nn.PoissonNLLLoss: ("poisson", _POISSON_OPTIONS),
    F.binary_cross_entropy_with_logits: ("bce", _BCE_OPTIONS),
    nn.BCEWithLogitsLoss: ("bce", _BCE_OPTIONS),
}


def as_loss(loss: str | Callable[[Tensor, Any], Tensor], *, of_model: bool = False) -> Loss:
    """A named loss; one of torch's: a function, a ``functools.partial`` of it or a module; or any mean over rows.

    ``of_model``: whether it may be "model".

    Raises:
        ValueError, TypeError: none of these, or a reduction other than "mean".
    """
    if isinstance(loss, str):
        names = [name for name in LOSSES if of_model or name != "model"]
        if loss not in names:
            raise ValueError(f"loss={loss!r}; expected one of {', '.join(map(repr, names))}, or a function")
        return LOSSES[loss]
    if not callable(loss):
        raise TypeError(
            f"loss is {type(loss).__name__}; expected a name or a function (outputs, target) -> scalar. Inputs and "
            "target are one argument, (inputs, target)"
        )
    function, options = loss, dict(vars(loss)) if isinstance(loss, nn.Module) else {}
    kind: Any = type(loss) if isinstance(loss, nn.Module) else loss
    if isinstance(loss, partial) and not loss.args:
        kind, options = loss.func, dict(loss.keywords)
    if isinstance(loss, nn.Module):
        options |= dict(loss.named_buffers(recurse=False))
    reduction = options.get("reduction", "mean")
    if reduction != "mean":
        raise ValueError(f"loss is {_name(kind)} with reduction={reduction!r}; expected reduction='mean'")
    try:
        name, defaults = _OF_TORCH.get(kind, ("", {}))
    except TypeError:
        # Not every callable can be looked up.
        name, defaults = "", {}
    given = {option: options.get(option, default) for option, default in defaults.items()}
    changed = {option for option, value in given.items() if value is not defaults[option] and value != defaults[option]}
    others = isinstance(loss, partial) and bool(options.keys() - defaults.keys() - {"reduction"})
    if name in ("cross_entropy", "nll") and not others and (changed or name == "nll"):
        return _weighted_cross_entropy(F.cross_entropy if name == "cross_entropy" else F.nll_loss, **given)
    if name and not others and not changed:
        return LOSSES[name]

    def total(outputs: Tensor, target: Any) -> Tensor:
        mean = function(outputs, target)
        if not isinstance(mean, Tensor) or mean.numel() != 1:
            got = f"a tensor of shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else repr(mean)
            raise TypeError(f"the loss function returned {got}; expected a scalar, the mean over the rows")
        if mean.is_complex():
            raise TypeError(f"the loss function returned {mean.dtype}; expected a real number")
        return mean.reshape(()) * rows_of(outputs, target)

    return Loss("function", total, lambda target, rows: rows)


def rows_of(outputs: Tensor, target: Any) -> int:
    """Rows of the data: those of the target, since a model may put a row's outputs, one for each token, in many."""
    first = next((leaf for leaf in tree_leaves(target) if isinstance(leaf, Tensor) and leaf.dim() > 0), outputs)
    return len(first)


def _name(kind: Any) -> str:
    return str(getattr(kind, "__name__", type(kind).__name__))
