"""What a linear head under cross-entropy is given for all rows, as the multinomial solver reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestep.evaluation.data import Chunk
from onestep.evaluation.errors import NonFiniteError
from onestep.evaluation.layers import columns
from onestep.evaluation.losses import Loss, are_probabilities, scores_and_classes
from onestep.solvers.coordinates import Coordinates
from onestep.solvers.multinomial import DenseRows
from onestep.training.structures.affine_head import Head, features_and_outputs
from onestep.training.structures.base import Mismatch
from onestep.training.structures.kept_rows import KeptRows, most_kept_bytes


class Targets(NamedTuple):
    """Targets of m rows of scores: y (m,) int64 classes or (m, k) probabilities, and weight (m,), None for ones."""

    y: Tensor
    weight: Tensor | None


class SoftmaxRows(NamedTuple):
    """All rows of a head.

    Attributes:
        rows: as the solver reads them; its loss is a mean by weight.
        factor: what the solver's loss is multiplied by, to be the mean that was asked for.
        initial_loss: of the model as it was, without weight decay.
        hard: whether all targets are classes.
    """

    rows: DenseRows
    factor: float
    initial_loss: float
    hard: bool


def unsuitable(loss: Loss, head: Head, outputs: Tensor, target: object) -> Mismatch | None:
    """Why the solver cannot take such outputs and targets, if it cannot."""
    if loss.cross_entropy is None:
        return Mismatch(f"the loss is {loss.name!r}, not a cross-entropy")
    if not isinstance(target, Tensor):
        return Mismatch("the target is not a tensor")
    last = isinstance(head.layer, nn.Linear)
    plain = loss.name == "cross_entropy" and not target.is_floating_point()
    # torch's own has classes in the second dimension, which is the layer's last one if there are two.
    if not plain and last and outputs.dim() != 2:
        return Mismatch(f"the outputs {tuple(outputs.shape)} have classes last, and torch's cross-entropy second")
    return None


def targets_of(loss: Loss, head: Head, outputs: Tensor, target: Tensor) -> Targets:
    """The targets of a chunk, one for each row of scores.

    Class weights and smoothing make of a target the sums q (k,) that its log-probabilities are weighted by: a row of
    weight Σq and probabilities q / Σq, which is the same loss.
    """
    options = loss.cross_entropy
    assert options is not None
    k, dtype = len(head.weight), outputs.dtype
    class_weight = None if options.weight is None else options.weight.to(dtype)
    if are_probabilities(outputs, target):
        q = columns(head.layer, target).to(dtype)
        plain, mass = class_weight is None and not options.label_smoothing, q.new_ones(len(q), 1)
    else:
        classes = scores_and_classes(outputs, target)[1]
        counted = classes != options.ignore_index
        classes = classes.clamp_min(0) if bool(counted.all()) else classes.where(counted, 0)
        weight = None if bool(counted.all()) else counted.to(dtype)
        if not options.label_smoothing:
            if class_weight is not None:
                weight = class_weight[classes] if weight is None else weight * class_weight[classes]
            return Targets(classes, weight)
        q = F.one_hot(classes, k).to(dtype)
        plain, mass = False, q.new_ones(len(q), 1) if weight is None else weight[:, None]
        q *= mass
    if plain and bool(((q.sum(1) - 1).abs() <= 1e-6).all()):
        return Targets(q, None)
    if options.label_smoothing:
        q = (1 - options.label_smoothing) * q + options.label_smoothing / k * mass
    if class_weight is not None:
        q = q * class_weight
    total = q.sum(1)
    uniform = torch.full_like(q, 1 / k)
    return Targets(torch.where(total[:, None] > 0, q / total[:, None], uniform), total)


def gather(head: Head, module: nn.Module, loss: Loss, chunks: Iterable[Chunk]) -> SoftmaxRows | Mismatch:
    """Runs the model once over all rows, and keeps what its head is given.

    Features take a quarter of the free memory at most, and are in a temporary file beyond (`KeptRows`); where the head
    is the whole model, those of a tensor are read where they are.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    most = most_kept_bytes()
    features, targets, weights = KeptRows(most), KeptRows(most), KeptRows(most)
    total, elements, weighted = 0.0, 0.0, False
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            found = features_and_outputs(head, module, chunk)
            if found is None:
                return Mismatch("the outputs are not those of the last layer for some rows")
            inputs, outputs = found
            mismatch = unsuitable(loss, head, outputs, chunk.target)
            if mismatch is not None:
                return mismatch
            value = loss.sum(outputs, chunk.target).item()
            if not math.isfinite(value):
                raise NonFiniteError(f"the loss of batch {number} is {value}")
            total += value
            elements += loss.elements(chunk.target, len(chunk))
            X = columns(head.layer, inputs)
            y, weight = targets_of(loss, head, outputs, chunk.target)
            features.add(X)
            targets.add(y)
            weighted = weighted or weight is not None
            weights.add(X.new_ones(len(X)) if weight is None else weight)
    if not elements:
        raise ValueError("data gives no rows whose target is not ignored; expected at least one")
    X, bias = features.tensor(), head.bias is not None
    own = weights.tensor() if weighted else None
    y = targets.tensor()
    coordinates = Coordinates.of(X, own, intercept=bias)
    rows = DenseRows(X, y, own, coordinates, len(head.weight), as_they_are=True)
    return SoftmaxRows(rows, rows.total / elements, total / elements, y.dim() == 1)
