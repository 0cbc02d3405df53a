"""Runs a plan: steps of its method until a test is met, with history, progress, checkpoints and Ctrl-C."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from onestep._interrupts import TorchState
from onestep.evaluation.distributed import check_equal_passes, from_first, together
from onestep.evaluation.progress import Progress
from onestep.training import checkpoint as checkpoints
from onestep.training.covariance import covariance
from onestep.training.facts import Settings
from onestep.training.methods.base import Run, Taken
from onestep.training.plan import FitPlan
from onestep.training.result import FitResult, Record
from onestep.training.validation import Validation

Checkpoint: TypeAlias = dict[str, Any]
# Losses of the same parameters on the same rows differ by no more than this, relatively or absolutely.
_SAME_LOSS = 1e-4


class Stuck(Exception):
    """The method stopped far from a minimum. It carries what was reached."""

    def __init__(self, result: FitResult) -> None:
        super().__init__(result.reason)
        self.result = result


def run(
    plan: FitPlan,
    *,
    saved: Checkpoint | None = None,
    before: FitResult | None = None,
    identity: dict[str, Any] | None = None,
) -> FitResult:
    """Fits the model as planned.

    Args:
        plan: what to do.
        saved: the checkpoint to go on from.
        before: what another method has reached, whose history goes on.
        identity: the problem's fingerprint, for checkpoints.

    Raises:
        Stuck: no step lowers the loss, and it is not near a minimum.
    """
    settings = plan.settings
    result = FitResult(plan.model, math.nan, False, plan.method.name, plan.why, "", math.nan, reasons=plan.reasons)
    result.make_covariance = partial(covariance, plan)
    if before is not None:
        result.history, result.initial_loss = before.history, before.initial_loss
    running = plan.method.setup(plan)
    validation = None
    if settings.validation is not None:
        validation = Validation(plan, settings.validation, settings.validation_every, settings.patience)
    path = None if plan.method.one_pass else settings.checkpoint
    if path is not None and saved is not None:
        _resume(path, saved, plan, running, result, validation)
    stuck = False
    limits = [limit for limit in (plan.max_steps, plan.method.most_steps) if limit is not None]
    most = min(limits, default=sys.maxsize)
    started = time.perf_counter()
    begin = started - (result.history[-1].seconds if result.history else 0.0)
    recorded, start = len(result.history), plan.parameters.read()
    state = TorchState()
    with Progress(most if limits else None, enabled=settings.progress, done=recorded) as bar:
        try:
            while not result.reason and len(result.history) < most:
                recorded, start = len(result.history), plan.parameters.read()
                taken = running.step(recorded)
                check_equal_passes(plan.source)
                record_step(result, taken, time.perf_counter() - begin)
                result.reason, result.converged, stuck = running.verdict()
                if validation is not None:
                    last = bool(result.reason) or len(result.history) >= most
                    _validate(result, validation, last=last)
                bar.update(1, **_shown(taken, result))
                if path is not None:
                    together(partial(_save, path, plan, running, result, identity, validation))
                asked = from_first(lambda: _asked_to_stop(result, settings, time.perf_counter() - started))
                # A checkpoint does not keep this reason: the fit can go on from it.
                result.reason = result.reason or asked
            if not result.reason:
                limit = f"epochs={settings.epochs:g}" if settings.epochs is not None else f"max_steps={most}"
                why = running.without_minimum() if result.history else ""
                result.reason = f"{limit} reached" + (f"; {why}" if why else "")
        except KeyboardInterrupt as stop:
            state.restore(stop)
            result.reason, result.converged, stuck = "interrupted", False, False
            if len(result.history) == recorded:
                # A step that is not in the history was not taken.
                plan.parameters.write(start)
    result.loss = result.history[-1].loss if result.history else math.nan
    if result.history and (found := running.finish()) is not None:
        result.loss = found
    if validation is not None:
        if result.history and result.history[-1].validation_loss is None and not result.interrupted:
            _validate(result, validation, last=True)
        validation.finish()
    if stuck and len(result.history) < most:
        raise Stuck(result)
    return result


def _validate(result: FitResult, validation: Validation, *, last: bool) -> None:
    """Adds the validation loss to the last record, if it is due, and stops on it."""
    found = validation.after(len(result.history), last=last)
    if found is not None:
        result.history[-1] = replace(result.history[-1], validation_loss=found)
        result.reason = result.reason or validation.verdict


def _shown(taken: Taken, result: FitResult) -> dict[str, float]:
    """What the bar shows of a step."""
    shown = {"loss": taken.loss}
    if taken.damping or taken.cg_iterations:
        shown |= {"damping": taken.damping, "cg": taken.cg_iterations}
    looks = (record.validation_loss for record in reversed(result.history) if record.validation_loss is not None)
    found = next(looks, None)
    return shown if found is None else shown | {"validation": found}


def _asked_to_stop(result: FitResult, settings: Settings, seconds: float) -> str:
    """Why the caller wants no further step; empty if they do."""
    if settings.callback is not None and settings.callback(result.history[-1]):
        return "the callback asked for the end"
    if settings.max_seconds is not None and seconds >= settings.max_seconds:
        return f"max_seconds={settings.max_seconds:g} reached"
    return ""


def record_step(result: FitResult, taken: Taken, seconds: float) -> None:
    """Adds a step to the history."""
    if not result.history:
        result.initial_loss = taken.before
    result.history.append(
        Record(
            step=len(result.history) + 1,
            loss=taken.loss,
            grad_norm=taken.grad_norm,
            step_norm=taken.step_norm,
            damping=taken.damping,
            accepted=taken.accepted,
            cg_iterations=taken.cg_iterations,
            seconds=seconds,
        )
    )


def load_checkpoint(path: Path | None) -> Checkpoint | None:
    """The checkpoint, if there is one already.

    Raises:
        FileNotFoundError: the folder does not exist. ValueError: the file is no regular one, or not a checkpoint.
    """
    if path is None:
        return None
    checkpoints.require_file(path)
    if path.exists():
        return checkpoints.load(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"checkpoint {path}: there is no folder {path.parent}")
    return None


def _save(
    path: Path,
    plan: FitPlan,
    running: Run,
    result: FitResult,
    identity: dict[str, Any] | None,
    validation: Validation | None,
) -> None:
    if plan.source.share.rank != 0:
        return
    checkpoints.save(
        path,
        {
            "format": checkpoints.FORMAT,
            "method": plan.method.name,
            "identity": identity,
            "model": plan.model.state_dict(),
            "source": plan.source.state(),
            "read_hash": plan.source.read_hash,
            "run": running.state(),
            "validation": None if validation is None else validation.state(),
            "tol": plan.settings.tol,
            "progress": {"step": len(result.history)},
            "result": result.state(),
        },
    )


def _resume(
    path: Path, saved: Checkpoint, plan: FitPlan, running: Run, result: FitResult, validation: Validation | None
) -> None:
    """Takes model, place in the data, run and history over from a checkpoint."""
    if saved["method"] != plan.method.name:
        raise ValueError(
            f"checkpoint {path} is of method {saved['method']!r}, this fit is {plan.method.name!r}: pass another file"
        )
    try:
        with checkpoints.whole(path):
            plan.model.load_state_dict(saved["model"])
            running.restore(saved["run"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is of another model: {error}") from error
    plan.source.restore(saved["source"])
    if from_first(lambda: plan.source.hashed and saved.get("read_hash") not in (None, plan.source.read_hash)):
        raise ValueError(
            f"checkpoint {path} is of another problem: the batches that it had read of this pass are others now; pass "
            "another file"
        )
    with checkpoints.whole(path):
        if validation is not None and saved.get("validation") is not None:
            validation.restore(saved["validation"])
        result.restore(saved["result"])
    if result.converged and plan.settings.tol < saved.get("tol", plan.settings.tol):
        result.reason, result.converged = "", False
    loss = result.history[-1].loss if result.history else math.nan
    found = running.loss()
    if found is not None and not math.isclose(found, loss, rel_tol=_SAME_LOSS, abs_tol=_SAME_LOSS):
        raise ValueError(
            f"checkpoint {path} is of another problem: at its parameters the loss was {loss:.6g} and is {found:.6g} on "
            "this data; pass another file"
        )
