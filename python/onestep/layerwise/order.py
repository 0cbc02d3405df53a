"""Layers one group after the other, in the order in which the model calls them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onestep import linalg
from onestep._fork import one_thread_after_fork
from onestep._restored import replaced
from onestep.evaluation.progress import Progress
from onestep.layerwise.chain import Passes, without_caches
from onestep.layerwise.layers import Layer, Patterns, batches_of, check_on_cpu, evaluating, find_layers
from onestep.layerwise.report import LayerReport
from onestep.layerwise.statistics import LayerStatistics
from onestep.linalg.damping import unit_cholesky
from onestep.ops.operands import LinAlgError

_NO_BATCH = object()


@one_thread_after_fork()
def solve_in_order(
    model: nn.Module,
    data: Any,
    layers: Patterns,
    solve: Callable[[Layer, LayerStatistics], None],
    *,
    teacher: nn.Module | None = None,
    needs_teacher: bool = False,
    sequential: bool,
    dtype: torch.dtype,
    progress: bool,
    what: str,
) -> None:
    """Calls ``solve`` for each layer with the statistics of its inputs.

    Sequential: layers that share their inputs are a group, and a group's statistics are taken when all groups before
    it are solved, so that later layers see, and mend, what earlier ones have become; where the model is a chain of
    blocks, by passes through the group's block (``Passes``). Otherwise all statistics are taken in one pass over the
    data, of the model as it was.
    """
    chosen = find_layers(model, layers)
    check_on_cpu(chosen.values())
    # Before any of them is changed.
    for layer in chosen.values():
        if not bool(layer.weight.isfinite().all()):
            raise ValueError(f"the weight of layer {layer.name!r} holds NaN or infinity; expected finite values")
    batches = batches_of(data)
    first = next(iter(batches), _NO_BATCH)
    if first is _NO_BATCH:
        raise ValueError("data has no batches; expected at least one")
    both = [model] if teacher is None else [model, teacher]
    bar = partial(Progress, len(chosen), enabled=progress, what=what, unit="layer")
    with evaluating(*both), torch.no_grad(), replaced(without_caches(both)):
        if not sequential:
            statistics = LayerStatistics(model, list(chosen), teacher=teacher, dtype=dtype)
            statistics.collect(batches, progress=progress)
            with bar() as shown:
                for layer in chosen.values():
                    solve(layer, statistics)
                    shown.update()
            return
        passes = Passes(both, batches, chosen)
        with bar() as shown:
            for group, once in _called(model, chosen, first):
                # The two models send stacked experts other rows, which cannot be compared one by one.
                alone = not needs_teacher and any(chosen[name].stack is not None for name in group)
                statistics = LayerStatistics(model, group, teacher=None if alone else teacher, dtype=dtype)
                for mask, runs in passes.of(group):
                    statistics.update_by(runs, mask, stop_early=once)
                for name in group:
                    solve(chosen[name], statistics)
                    shown.update()


def _called(model: nn.Module, chosen: dict[str, Layer], batch: Any) -> list[tuple[list[str], bool]]:
    """Groups of layers with the same inputs in the order of their first calls, and whether each is called once."""
    calls = LayerStatistics(model, list(chosen)).trace(batch)
    groups: dict[tuple[Any, ...], list[str]] = {}
    # What one expert becomes does not change what the others beside it are given.
    beside = {name: (id(layer.module), layer.stack) for name, layer in chosen.items() if layer.stack is not None}
    for name, keys in calls.items():
        groups.setdefault(beside.get(name) or tuple(keys), []).append(name)
    # Those that the first batch does not reach, such as experts that it has no rows for, come last, each by itself.
    last: list[str] = []
    for name in chosen:
        if name not in calls:
            (groups[beside[name]] if beside.get(name) in groups else last).append(name)
    called = [(names, all(len(calls.get(name, [])) == 1 for name in names)) for names in groups.values()]
    return called + [([name], False) for name in last]


class Factor(NamedTuple):
    """A triangular factor, the status of its matrix with the damping that was asked for, and the damping it took."""

    matrix: Tensor
    info: int
    damping: float


class Sums:
    """The Gram matrix of a layer's inputs, ready to be solved with: means over the rows, dead inputs set apart.

    Attributes:
        gram: (d,d), of mean diagonal 1 where there are rows.
        dead: (d,), inputs that were 0 in all rows; their diagonal elements are 1.
        rows: how many there were.
    """

    def __init__(self, statistics: LayerStatistics, name: str, bias: Tensor | None = None) -> None:
        sums = statistics[name]
        self.rows = sums.count
        # With a teacher: Σx(t − b)ᵀ, (d,k), Σ‖t − b‖² and Σ‖t‖², for the layer's bias b.
        self._cross: Tensor | None = None
        if statistics.has_targets(name):
            targets = statistics.targets(name)
            self._cross, self._square, self._whole = targets.cross, float(targets.square), float(targets.square)
            if bias is not None:
                b = bias.to(sums.gram.dtype)
                self._cross = self._cross - sums.total[:, None] * b
                self._square += float(self.rows * b.double().square().sum() - 2 * (b.double() @ targets.total.double()))
        self.raw = sums.gram
        diagonal = sums.gram.diagonal()
        self.dead = diagonal == 0
        live = int((~self.dead).sum())
        self._scale = diagonal.sum() / live if live else torch.ones_like(diagonal[:1]).squeeze(0)
        self.gram = sums.gram / self._scale + torch.diag(self.dead.to(sums.gram.dtype))

    def without_dead(self, weight: Tensor) -> Tensor:
        """The weights with 0 for dead inputs, which costs nothing and leaves more to the others (SparseGPT, GPTQ)."""
        some = bool(self.dead.any()) and not bool(self.dead.all())
        return weight.masked_fill(self.dead, 0.0) if some else weight

    def _loss(self, change: Tensor) -> float:
        """Σ‖change · x‖² over the rows, for change (k,d)."""
        return float(((change @ self.raw) * change).sum(dtype=torch.float64).clamp(min=0.0))

    def error(self, weight: Tensor, solved: Tensor) -> float:
        """What ``solved`` (k,d) loses of what ``weight`` puts out, or the teacher where there is one; 0 to about 1."""
        if self._cross is None:
            return self._loss(weight - solved) / (self._loss(weight) or 1.0)
        linear = float((solved * self._cross.mT).sum(dtype=torch.float64))
        return max(self._loss(solved) - 2 * linear + self._square, 0.0) / (self._whole or 1.0)

    def aim(self, weight: Tensor, damping: float) -> Tensor:
        """The weights that come closest to the teacher's outputs, argmin Σ‖Wx + b − t‖² + a pull towards ``weight``.

        Any Ŵ is as far from the teacher's outputs as it is from these weights' outputs, but for a constant.
        Without a teacher, or from fewer rows than there are features: ``weight`` itself.

        Args:
            weight: (k,d), as it is.
            damping: of the pull, in means of the Gram matrix's diagonal.
        """
        if self._cross is None or self.rows < len(self.gram):
            return weight
        system = self.gram + damping * torch.eye(len(self.gram), dtype=self.gram.dtype)
        change, info = linalg.solve_spd_ex(system, (self._cross - self.raw @ weight.mT) / self._scale)
        return weight if int(info) else weight + change.mT

    def factor(self, damping: float, order: Tensor | None = None, *, unit: bool) -> Factor:
        """U of the inverse of the damped Gram matrix, or R of the matrix itself (``unit``), in another order if asked.

        Raises:
            LinAlgError: there is none with any damping.
        """
        gram = self.gram if order is None else self.gram[order][:, order]
        factor, info, used = (unit_cholesky if unit else linalg.inverse_cholesky)(gram, damping=damping)
        result = Factor(factor, int(info), float(used))
        if math.isnan(result.damping):
            raise LinAlgError("the Gram matrix of a layer's inputs has no factor with any damping")
        return result

    def report(self, name: str, weight: Tensor, plain: Tensor, solved: Tensor, result: Factor) -> LayerReport:
        """What ``solved`` and, without the solve, ``plain`` lose of what ``weight``, or the teacher, puts out."""
        return LayerReport(
            name=name,
            rows=self.rows,
            features=weight.shape[1],
            dead=int(self.dead.sum()),
            info=result.info,
            damping=result.damping,
            error_before=self.error(weight, plain),
            error=self.error(weight, solved),
        )
