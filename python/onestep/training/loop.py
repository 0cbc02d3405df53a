"""Runs a plan: steps of its method until a test is met, with history, progress, checkpoints and Ctrl-C."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

from onestep.evaluation.distributed import from_first, together
from onestep.evaluation.progress import Progress
from onestep.training import checkpoint as checkpoints
from onestep.training.methods.base import Run, Taken
from onestep.training.plan import FitPlan
from onestep.training.result import FitResult, Record


def run(plan: FitPlan) -> FitResult:
    """Fits the model as planned, from the checkpoint if there is one."""
    settings = plan.settings
    result = FitResult(plan.model, math.nan, False, plan.method.name, plan.why, "", math.nan, reasons=plan.reasons)
    running = plan.method.setup(plan)
    path = None if plan.method.one_pass else settings.checkpoint
    if path is not None:
        saved = from_first(lambda: _load(path))
        if saved is not None:
            _resume(path, saved, plan, running, result)
    most = min(settings.max_steps, plan.method.most_steps or settings.max_steps)
    begin = time.perf_counter() - (result.history[-1].seconds if result.history else 0.0)
    recorded, start = len(result.history), plan.parameters.read()
    with Progress(most, enabled=settings.progress, done=recorded) as bar:
        try:
            while not result.reason and len(result.history) < most:
                recorded, start = len(result.history), plan.parameters.read()
                taken = running.step(recorded)
                record_step(result, taken, time.perf_counter() - begin)
                result.reason, result.converged = running.verdict()
                bar.update(loss=taken.loss, damping=taken.damping, cg=taken.cg_iterations)
                if path is not None:
                    together(partial(_save, path, plan, running, result))
            result.reason = result.reason or f"max_steps={settings.max_steps} reached"
        except KeyboardInterrupt:
            result.reason, result.converged = "interrupted", False
            if len(result.history) == recorded:
                # A step that is not in the history was not taken.
                plan.parameters.write(start)
    result.loss = result.history[-1].loss if result.history else math.nan
    return result


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


def _load(path: Path) -> dict[str, Any] | None:
    """The checkpoint, if there is one already."""
    if path.exists():
        return checkpoints.load(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"checkpoint {path}: there is no folder {path.parent}")
    return None


def _save(path: Path, plan: FitPlan, running: Run, result: FitResult) -> None:
    if plan.source.share.rank != 0:
        return
    checkpoints.save(
        path,
        {
            "format": checkpoints.FORMAT,
            "method": plan.method.name,
            "model": plan.model.state_dict(),
            "source": plan.source.state(),
            "run": running.state(),
            "progress": {"step": len(result.history)},
            "result": result.state(),
        },
    )


def _resume(path: Path, saved: dict[str, Any], plan: FitPlan, running: Run, result: FitResult) -> None:
    """Takes model, place in the data, run and history over from a checkpoint."""
    if saved["method"] != plan.method.name:
        raise ValueError(
            f"checkpoint {path} is of method {saved['method']!r}, this fit is {plan.method.name!r}: pass another file"
        )
    try:
        plan.model.load_state_dict(saved["model"])
        running.restore(saved["run"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is of another model: {error}") from error
    plan.source.restore(saved["source"])
    result.restore(saved["result"])
