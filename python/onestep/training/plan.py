"""What fit will do: ``make_plan`` makes a plan from the facts, which does not change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from onestep.evaluation.data import Chunk, Source
from onestep.evaluation.distributed import from_first
from onestep.evaluation.losses import Loss
from onestep.evaluation.parameters import ParameterVector
from onestep.training.facts import Facts, Settings, cut
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
            the data, which moves; nothing else in a plan does.
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


def make_plan(
    facts: Facts,
    settings: Settings,
    *,
    without: Collection[str] = (),
    resumed: str | None = None,
    hashed: bool = False,
) -> FitPlan:
    """The plan for these facts.

    Args:
        without: methods that "auto" may not take, since they were tried.
        resumed: the method of the checkpoint that the fit goes on from, which "auto" takes again.
        hashed: whether batches are hashed as they are read, for a checkpoint.

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
        source=cut(facts.source, own, chunk_rows, hashed=hashed),
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
        refusal = _too_coarse(facts, settings.method) or METHODS[settings.method].refusal(facts, settings)
        if METHODS[settings.method].needs_outputs and facts.loss.name == "model":
            refusal = f"method={settings.method!r} needs the model's outputs, and loss='model' is all that it is given"
        if not refusal and METHODS[settings.method].needs_gradient and facts.no_gradient:
            refusal = f"method={settings.method!r} differentiates the model, and {facts.no_gradient}"
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
        if _too_coarse(facts, name):
            declined.append(f"not {name}: parameters of 16 bits")
            continue
        suits = method.suits(facts, settings) if name not in without else Mismatch("it could not go on")
        if not isinstance(suits, Mismatch) and method.needs_gradient and facts.no_gradient:
            declined = [f"no method suits: {facts.no_gradient}", *(why for why in declined if "closed_form" in why)]
            raise ValueError("; ".join(declined))
        if not isinstance(suits, Mismatch):
            return name, suits, tuple(declined)
        declined.append(f"not {name}: {suits.why}")
    if _too_coarse(facts, "auto") and not without:
        raise ValueError(_too_coarse(facts, "auto"))
    raise LookupError("no method suits")


def _too_coarse(facts: Facts, name: str) -> str:
    """Why parameters are too coarse for a method, or for all that "auto" may take; empty if they are not."""
    from onestep.training.methods import METHODS

    dtype = facts.parameters.dtype
    if torch.finfo(dtype).bits >= 32 or (name in METHODS and METHODS[name].takes_halves):
        return ""
    return (
        f"method={name!r}, but the trained parameters are {dtype}: steps and what they gain are rounded away; expected "
        "float32 or float64, as after model.float(), or method='polar'"
    )
