"""What fit will do: ``look`` gathers facts about data and model, ``make_plan`` makes a plan that does not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sized
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from onestep.evaluation.arrays import from_numpy
from onestep.evaluation.data import Chunk, Source, as_source
from onestep.evaluation.distributed import from_first, share, summed, together
from onestep.evaluation.losses import IGNORED, Loss
from onestep.evaluation.module import chunk_rows
from onestep.evaluation.parameters import ParameterVector
from onestep.training.facts import Facts, FirstPass, Settings, cut
from onestep.training.objective import DataObjective
from onestep.training.structures.base import Mismatch

if TYPE_CHECKING:
    from onestep.training.methods.base import Method


@dataclass(frozen=True)
class FitPlan:
    """What the loop runs.

    Attributes:
        method: of the table ``onestep.training.methods.METHODS``.
        why: why that method.
        reasons: why methods and structures that might have been faster do not apply, each a clause.
        model, parameters, loss, settings: those of the facts, and the arguments of fit.
        source: this process's share of the rows, in pieces and chunks as the method wants them. It keeps the place in
            the data, the only thing in a plan that moves.
        batch_size: rows of a step; None for all.
        chunk_rows: how many rows are computed together.
        max_steps: the greatest number of steps; None for as many as there is time for.
        curvature_rows: over how many rows curvature is taken; None for all of the step.
        objective: makes the objective over some rows: a ``DataObjective``, or that of a structure. Called with the rows
            and what else depends on the step: ``chunks``, ``curvature_chunks``, ``fixed`` and ``trial_chunks``.
        first_pass: gives the rows of the pass over the data that ``look`` has begun, for ``one_pass`` methods, which
            read the data no second time; to be read once.
    """

    method: Method
    why: str
    reasons: tuple[str, ...]
    model: nn.Module
    parameters: ParameterVector
    loss: Loss
    settings: Settings
    source: Source
    batch_size: int | None
    chunk_rows: int
    max_steps: int | None
    curvature_rows: int | None
    objective: Callable[..., DataObjective]
    first_pass: Callable[[], Iterator[Chunk]]


def look(
    model: nn.Module, parameters: ParameterVector, loss: Loss, described: str, data: Any, settings: Settings
) -> Facts:
    """Reads the first rows and runs the model on them, to find how many rows a chunk may have."""
    source, own = rows_of(data, parameters, loss, settings), share()
    # Data may be on the CPU and the model on a GPU: chunks are moved to the model one by one.
    source.device = parameters.device
    _check_equal_batches(data, own.size)
    # The estimate of a softmax head wants rows in random order.
    shuffled = settings.method == "closed_form" and loss.name == "cross_entropy"
    first_pass = together(lambda: FirstPass(source, own, shuffled=shuffled))
    _check_not_shifted(loss, first_pass.first)
    together(lambda: _check_range(loss, first_pass.first.target))
    measured = settings.chunk_size or from_first(lambda: chunk_rows(model, loss, first_pass.first))
    return Facts(model, parameters, loss, described, source, own, first_pass, measured)


def rows_of(data: Any, parameters: ParameterVector, loss: Loss, settings: Settings) -> Source:
    """The rows of data of any kind; with their labels among the inputs where the model computes the loss."""
    return as_source(from_numpy(data, parameters.tensors[0]), settings.seed, with_labels=loss.name == "model")


def _check_range(loss: Loss, target: Any) -> None:
    """Raises where the first rows hold targets for which the loss is no likelihood, and may have no minimum."""
    if loss.name not in ("poisson", "bce") or not isinstance(target, torch.Tensor):
        return
    most = 1 if loss.name == "bce" else math.inf
    wrong = target[(target < 0) | (target > most)]
    if len(wrong):
        expected = "numbers from 0 to 1" if loss.name == "bce" else "counts of 0 or more"
        raise ValueError(f"target holds {wrong[0].item():g}; expected {expected} for loss={loss.name!r}")


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


def _check_equal_batches(data: Any, processes: int) -> None:
    """Raises unless all processes have equally many batches or rows: some rows would not be computed otherwise."""
    if processes == 1 or not isinstance(data, Sized):
        return
    counts = summed(lambda: (torch.empty(0), [len(data), len(data) ** 2]))[1]
    if processes * counts[1] != counts[0] ** 2:
        what = "batches" if isinstance(data, DataLoader) else "items"
        raise ValueError(
            f"data has {len(data)} {what} in this process, and {counts[0] / processes:g} on average over all "
            f"{processes}; expected the same data everywhere, or a DataLoader with a DistributedSampler"
        )


def make_plan(
    facts: Facts, settings: Settings, *, without: Collection[str] = (), resumed: str | None = None
) -> FitPlan:
    """The plan for these facts.

    Args:
        without: methods that "auto" may not take, since they were tried.
        resumed: the method of the checkpoint that the fit goes on from, which "auto" takes again.

    Raises:
        ValueError: the method that was asked for cannot do this.
        LookupError: "auto" has tried all methods that suit.
    """
    # Here, since the methods import this module.
    from onestep.training.methods import METHODS

    name, why, declined = from_first(lambda: _choose(facts, settings, without, resumed))
    method = METHODS[name]
    objective, unstructured = method.objective(facts)
    chunk_rows, curvature_rows, pieces, least = method.cut(facts, settings)
    own = facts.share._replace(pieces=max(pieces, facts.share.size), least=least)
    return FitPlan(
        method=method,
        why=why,
        reasons=(*declined, *unstructured),
        model=facts.model,
        parameters=facts.parameters,
        loss=facts.loss,
        settings=settings,
        source=cut(facts.source, own, chunk_rows),
        batch_size=method.batch_size(facts, settings),
        chunk_rows=chunk_rows,
        max_steps=method.most_steps_of(facts, settings),
        curvature_rows=curvature_rows,
        objective=partial(
            objective or DataObjective,
            facts.model,
            facts.loss,
            pieces=own.pieces,
            kept_rows=chunk_rows,
            sampled=curvature_rows is not None,
        ),
        first_pass=partial(facts.first_pass.chunks, chunk_rows),
    )


def _choose(
    facts: Facts, settings: Settings, without: Collection[str], resumed: str | None
) -> tuple[str, str, tuple[str, ...]]:
    """The name of the method that is taken, why, and why those before it in the table are not (under "auto" alone)."""
    from onestep.training.methods import METHODS

    if settings.method != "auto":
        refusal = METHODS[settings.method].refusal(facts, settings)
        if METHODS[settings.method].needs_outputs and facts.loss.name == "model":
            refusal = f"method={settings.method!r} needs the model's outputs, and loss='model' is all that it is given"
        if refusal:
            raise ValueError(refusal)
        return settings.method, "as asked", ()
    if resumed in METHODS and resumed not in without:
        return resumed, "as in the checkpoint", ()
    declined: list[str] = []
    for name, method in METHODS.items():
        if method.needs_outputs and facts.loss.name == "model":
            declined.append(f"not {name}: the loss is the model's own")
            continue
        suits = method.suits(facts, settings) if name not in without else Mismatch("it could not go on")
        if not isinstance(suits, Mismatch):
            return name, suits, tuple(declined)
        declined.append(f"not {name}: {suits.why}")
    raise LookupError("no method suits")
