"""Looks at data and model before a plan is made: ``look`` reads the first rows and gathers the facts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onestep._torch_private import tree_leaves
from onestep.evaluation.arrays import from_numpy
from onestep.evaluation.data import Chunk, Source, as_source
from onestep.evaluation.distributed import check_equal_batches, from_first, share, together
from onestep.evaluation.losses import IGNORED, Loss, check_range
from onestep.evaluation.module import check_first_rows, chunk_rows
from onestep.evaluation.parameters import ParameterVector
from onestep.training.facts import Facts, FirstPass, Settings


def look(
    model: nn.Module, parameters: ParameterVector, loss: Loss, described: str, data: Any, settings: Settings
) -> Facts:
    """Reads the first rows and runs the model on them, to find how many rows a chunk may have."""
    source, own = rows_of(data, parameters, loss, settings), share()
    # Data may be on the CPU and the model on a GPU: chunks are moved to the model one by one.
    source.device = parameters.device
    check_equal_batches(data, source)
    # The estimate of a softmax head wants rows in random order.
    shuffled = settings.method == "closed_form" and loss.name == "cross_entropy"
    first_pass = together(lambda: FirstPass(source, own, shuffled=shuffled))
    _check_not_shifted(loss, first_pass.first)
    together(lambda: _check_not_empty(parameters, loss, first_pass.first))
    together(lambda: check_range(loss, first_pass.first.target))
    measured = settings.chunk_size or from_first(lambda: chunk_rows(model, loss, first_pass.first))
    together(lambda: check_first_rows(model, loss, first_pass.first.rows(slice(0, measured))))
    return Facts(model, parameters, loss, described, source, own, first_pass, measured)


def rows_of(data: Any, parameters: ParameterVector, loss: Loss, settings: Settings) -> Source:
    """The rows of data of any kind; with their labels among the inputs where the model computes the loss."""
    return as_source(from_numpy(data, parameters.tensors[0]), settings.seed, with_labels=loss.name == "model")


def _check_not_empty(parameters: ParameterVector, loss: Loss, first: Chunk) -> None:
    """Raises where a layer takes no feature, or a target holds no number: kernels would name their own arguments.

    A model that has no such layer may take its number of rows alone from inputs, and a function as loss from targets.
    """
    asked = []
    if any(tensor.numel() == 0 for tensor in parameters.tensors):
        asked.append(("inputs", first.inputs))
    if loss.name not in ("function", "model"):
        asked.append(("targets", first.target))
    for name, tree in asked:
        shapes = [leaf.shape[1:] for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        if shapes and all(0 in shape for shape in shapes):
            shape = ", ".join(("n", *map(str, shapes[0])))
            raise ValueError(f"data: the {name} of n rows have shape ({shape}); expected a number or more in each row")


def _check_not_shifted(loss: Loss, first: Chunk) -> None:
    """Raises where a language model would be trained to repeat its input: its labels are for itself to shift."""
    ids = first.inputs.get("input_ids") if isinstance(first.inputs, dict) else None
    if loss.name != "cross_entropy" or ids is None or not isinstance(first.target, torch.Tensor):
        return
    counted = first.target != IGNORED
    if first.target.shape == ids.shape and bool(counted.any()) and torch.equal(first.target[counted], ids[counted]):
        raise ValueError(
            "the labels are the input_ids themselves, which a language model of transformers shifts in its own loss: "
            "pass loss='model'"
        )
