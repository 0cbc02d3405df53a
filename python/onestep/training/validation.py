"""The loss on data that is not trained on: when it is taken, and when to stop on it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from onestep.evaluation.distributed import share, summed
from onestep.evaluation.module import call_model
from onestep.training.facts import cut
from onestep.training.look import rows_of
from onestep.training.plan import FitPlan

# With mini-batches, the loss is taken this many times in a fit,
_TIMES = 20
# or every so many steps, where it is not known how many there will be.
_EVERY = 50


class Validation:
    """The mean loss over held-out rows, taken every so many steps and after the last one.

    Args:
        plan: the fit's.
        data: held-out rows, of the kinds that fit takes.
        every: steps between two looks; None to choose.
        patience: after so many looks in a row without a lower loss than the lowest, stop, and go back to the
            parameters that had it. None never to.
    """

    def __init__(self, plan: FitPlan, data: Any, every: int | None, patience: int | None) -> None:
        self.plan, self.patience = plan, patience
        try:
            source = rows_of(data, plan.parameters, plan.loss, plan.settings)
        except TypeError as error:
            raise TypeError(f"validation: {error}") from None
        source.device = plan.parameters.device
        own = share()
        self.source = cut(source, own._replace(pieces=own.size), plan.settings.chunk_size or plan.chunk_rows)
        if every is None:
            of_batches = plan.batch_size is not None
            every = 1 if not of_batches else _EVERY if plan.max_steps is None else max(1, plan.max_steps // _TIMES)
        self.every = every
        self.lowest, self.looks_since = math.inf, 0
        self._best: Tensor | None = None

    def loss(self) -> float:
        """The mean loss, in eval mode, at the present parameters."""

        def local() -> tuple[Tensor, list[float]]:
            total, count = 0.0, 0.0
            with torch.no_grad():
                for chunk in self.source.all():
                    total += self.plan.loss.sum(call_model(self.plan.model, chunk.inputs), chunk.target).item()
                    count += self.plan.loss.elements(chunk.target, len(chunk))
            return torch.empty(0), [total, count]

        total, count = summed(local)[1]
        if not count:
            raise ValueError("validation holds no target that counts; expected at least one")
        return total / count

    def after(self, step: int, *, last: bool) -> float | None:
        """The loss after the step of this number, from 1, if it is looked at then."""
        if step % self.every and not last:
            return None
        value = self.loss()
        if value < self.lowest:
            self.lowest, self.looks_since = value, 0
            if self.patience is not None:
                self._best = self.plan.parameters.read()
        else:
            self.looks_since += 1
        return value

    @property
    def verdict(self) -> str:
        """Why to stop; empty to go on."""
        if self.patience is None or self.looks_since < self.patience:
            return ""
        return f"the validation loss has not fallen for {self.looks_since} looks"

    def finish(self) -> None:
        """Puts the parameters of the lowest loss back, if there is a patience."""
        if self._best is not None and self.looks_since:
            self.plan.parameters.write(self._best)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"lowest": self.lowest, "looks_since": self.looks_since, "best": self._best}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``."""
        self.lowest, self.looks_since, self._best = state["lowest"], state["looks_since"], state["best"]
