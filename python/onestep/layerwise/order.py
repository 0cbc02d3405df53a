"""Layers one group after the other, in the order in which the model calls them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onestep import linalg
from onestep._interrupts import undisturbed
from onestep._restored import replaced
from onestep.evaluation.progress import Progress
from onestep.layerwise.before import Before
from onestep.layerwise.chain import Passes, without_caches
from onestep.layerwise.layers import (
    Layer,
    Patterns,
    batches_of,
    check_devices,
    check_finite,
    check_untied,
    evaluating,
    find_layers,
    padded,
)
from onestep.layerwise.masked import solve_masked
from onestep.layerwise.pairs import is_at, paired
from onestep.layerwise.report import LayerReport
from onestep.layerwise.routing import routed, shapes_of
from onestep.layerwise.statistics import LayerStatistics
from onestep.linalg.damping import unit_cholesky
from onestep.ops.operands import LinAlgError

_NO_BATCH = object()


@dataclass(frozen=True)
class Teaching:
    """Whose outputs layers are solved towards.

    Attributes:
        teacher: a model; True: the model as it was before; None: each layer's own outputs.
        names: what the model's modules are called in the teacher (``pairs.paired``).
        needed: layers without a teacher's outputs are refused.
    """

    teacher: nn.Module | bool | None
    names: Mapping[str, str | None] | None = None
    needed: bool = False


@undisturbed
def solve_in_order(
    model: nn.Module,
    data: Any,
    layers: Patterns,
    solve: Callable[[Layer, LayerStatistics], None],
    *,
    teaching: Teaching,
    sequential: bool,
    dtype: torch.dtype,
    progress: bool,
    what: str,
) -> None:
    """Calls ``solve`` for each layer with the statistics of its inputs.

    Sequential: layers that share their inputs are a group, and a group's statistics are taken when all groups before
    it are solved, so that later layers see, and mend, what earlier ones have become; where the model is a chain of
    blocks, by passes through the group's block (``Passes``). Otherwise all statistics are taken in one pass over the
    data, of the model as it was. All that can be refused is refused before anything is changed.
    """
    chosen = find_layers(model, layers)
    check_devices(chosen.values())
    check_finite(chosen)
    check_untied(chosen)
    batches = batches_of(data)
    first = next(iter(batches), _NO_BATCH)
    if first is _NO_BATCH:
        raise ValueError("data has no batches; expected at least one")
    # In one pass over the data the model as it was puts out what the model puts out.
    own = teaching.teacher is True
    teacher = None if own and not sequential else model if own else teaching.teacher
    both = [model] if not isinstance(teacher, nn.Module) else [model, teacher]
    names = dict(teaching.names or {})
    before = Before(model)
    different = both if teacher is not model else [model]
    bar = partial(Progress, len(chosen), enabled=progress, what=what, unit="layer")
    with evaluating(*different), torch.no_grad(), replaced(without_caches(different) + padded(different)):
        whole = False
        if isinstance(teacher, nn.Module):
            pairs = paired(model, chosen, teacher, names)
            check_finite(pairs, "teacher's ")
            if teaching.needed and len(pairs) < len(chosen):
                name = next(name for name in chosen if name not in pairs)
                raise ValueError(
                    f"names says that layer {name!r} has no counterpart in the teacher: leave it out, "
                    f"layers=['*', '!{name}']"
                )
            whole = any(layer.name != name for name, layer in pairs.items())
            names |= dict.fromkeys(_apart(model, chosen, teacher, pairs, first, teaching.needed, sequential))
        options: dict[str, Any] = {"teacher": teacher, "names": names, "dtype": dtype}
        if not sequential:
            statistics = Lacks(model, list(chosen), **options)
            statistics.collect(batches, progress=progress)
            with bar() as shown:
                for layer in chosen.values():
                    solve(layer, statistics)
                    shown.update()
            return
        passes = Passes(both, batches, chosen, within=[nullcontext, before.there][: len(both)], whole=whole)
        with bar() as shown:
            for group, once in _called(model, chosen, batches):
                # Of the names those that these layers are matched by.
                options["names"] = {name: names[name] for name in names if any(is_at(each, name) for each in group)}
                statistics = Lacks(model, group, **options)
                for masks, runs in passes.of(group) if once is not None else ():
                    statistics.update_by(runs, masks, stop_early=bool(once))
                for name in group:
                    if own:
                        before.keep(chosen[name])
                    solve(chosen[name], statistics)
                    shown.update()


def _apart(
    model: nn.Module,
    chosen: Mapping[str, Layer],
    teacher: nn.Module,
    pairs: Mapping[str, Layer],
    batch: Any,
    needed: bool,
    sequential: bool,
) -> list[str]:
    """Layers that are solved without the teacher, because the two models send them other rows.

    Raises:
        ValueError: ``needed``, and there are some; or others get other rows in the teacher.
    """
    mine = shapes_of(model, chosen, batch)
    theirs = mine if teacher is model else shapes_of(teacher, pairs, batch)
    parted = set(routed(model, chosen, batch, mine)) if sequential or not needed else set()
    if not needed:
        parted |= {name for name, layer in chosen.items() if layer.stack is not None}
    for name, layer in chosen.items():
        rows = [math.prod(shape) for shape in mine.get(name, [])]
        others = [math.prod(shape) for shape in theirs.get(name, [])]
        if name in pairs and name not in parted and rows != others[: len(rows)]:
            raise ValueError(
                f"layer {name!r} is given {_listed(rows)} rows by the first batch, and {_listed(others)} in the "
                f"teacher: the two models send rows to it differently. {_remedy(layer)}"
            )
    if needed and parted:
        name = sorted(parted)[0]
        raise ValueError(
            f"layer {name!r} is given rows that other layers choose, as experts of a mixture are, so that the model "
            f"and the teacher send it different ones once those layers change. {_remedy(chosen[name])}, or solve such "
            "layers by themselves, block by block"
        )
    return sorted(parted)


def _remedy(layer: Layer) -> str:
    pattern = "*.experts.*" if layer.stack is not None or ".experts." in f".{layer.name}" else layer.name
    return f"Leave such layers out: layers=['*', '!{pattern}']"


def _listed(counts: list[int]) -> str:
    return " and ".join(str(count) for count in counts[:3]) + (" ..." if len(counts) > 3 else "") or "no"


def _called(model: nn.Module, chosen: dict[str, Layer], batches: Iterable[Any]) -> list[tuple[list[str], bool | None]]:
    """Groups of layers with the same inputs in the order of their first calls, and whether each is called once.

    All batches are looked at: a model may call a layer once for one of them, and three times for another. None of those
    that are never called, because another module uses their weights: they come first, since they are solved without
    rows, and the layers that are called can mend what they lose.
    """
    apart = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    statistics = LayerStatistics(model, list(chosen))
    order: list[str] = []
    most = dict.fromkeys(chosen, 0)
    # Layers of one number have been given the same inputs so far.
    numbers: dict[str, int] = dict.fromkeys(chosen, 0)
    for index, batch in enumerate(batches):
        calls = statistics.trace(batch)
        order = order if index else list(calls)
        parts: dict[tuple[int, tuple[int, ...]], int] = {}
        for name in chosen:
            keys = tuple(calls.get(name, []))
            most[name] = max(most[name], len(keys))
            numbers[name] = parts.setdefault((numbers[name], keys), len(parts))
    groups: dict[tuple[Any, ...], list[str]] = {}
    # What one expert becomes does not change what the others beside it are given.
    beside = {name: (id(layer.module), layer.stack) for name, layer in chosen.items() if layer.stack is not None}
    for name in order:
        groups.setdefault(beside.get(name) or (numbers[name],), []).append(name)
    # Those that the first batch does not reach, such as experts that it has no rows for, come last, each by itself.
    last: list[str] = []
    called: list[tuple[list[str], bool | None]] = []
    for name in chosen:
        if id(chosen[name].module) in apart and not most[name]:
            called.append(([name], None))
        elif name not in order:
            (groups[beside[name]] if beside.get(name) in groups else last).append(name)
    called += [(names, all(most[name] == 1 and name in order for name in names)) for names in groups.values()]
    return called + [([name], False) for name in last]


class Factor(NamedTuple):
    """A triangular factor, the status of its matrix with the damping that was asked for, and the damping it took."""

    matrix: Tensor
    info: int
    damping: float


class Lacks(LayerStatistics):
    """Statistics whose sums with a teacher are of what each layer lacks of the teacher's outputs, t − Wx − b."""

    _lacks = True


class Sums:
    """The Gram matrix of a layer's inputs, ready to be solved with: means over the rows, dead inputs set apart.

    Attributes:
        gram: (d,d), of mean diagonal 1 where there are rows.
        dead: (d,), inputs that were 0 in all rows; their diagonal elements are 1.
        rows: how many there were.
        rank: of the Gram matrix, as ``LayerReport`` has it.
    """

    def __init__(self, statistics: LayerStatistics, name: str) -> None:
        sums = statistics[name]
        self.rows, self.rank = sums.count, statistics.rank(name)
        # With a teacher: Σxeᵀ, (d,k), and Σ‖e‖² of what the layer lacks, e = t − Wx − b, and Σ‖t‖².
        self._cross: Tensor | None = None
        if statistics.has_targets(name):
            targets = statistics.targets(name)
            assert targets.whole is not None
            self._cross, self._square, self._whole = targets.cross, float(targets.square), float(targets.whole)
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
        """What ``solved`` (k,d) loses of what ``weight`` puts out, or the teacher where there is one; 0 to about 1.

        ``weight`` is the layer's, as it was when the sums were made: Σ‖e + (W − Ŵ)x‖².
        """
        if self._cross is None:
            return self.own_error(weight, solved)
        change = weight - solved
        linear = float((change * self._cross.mT).sum(dtype=torch.float64))
        return max(self._loss(change) + 2 * linear + self._square, 0.0) / (self._whole or 1.0)

    def own_error(self, weight: Tensor, solved: Tensor) -> float:
        """As ``error``, of what ``weight`` puts out, also where there is a teacher."""
        return self._loss(weight - solved) / (self._loss(weight) or 1.0)

    @property
    def tells(self) -> bool:
        """Whether ``error`` tells what a layer is solved towards: a teacher needs as many rows as features."""
        return self._cross is None or self.rows >= len(self.gram)

    def aim(self, weight: Tensor, damping: float, zeros: Tensor | None = None) -> Tensor:
        """The weights that come closest to the teacher's outputs, argmin Σ‖Wx + b − t‖² + a pull towards ``weight``.

        Any Ŵ is as far from the teacher's outputs as it is from these weights' outputs, but for a constant.
        Without a teacher, or from fewer rows than there are features: ``weight`` itself.

        Args:
            weight: (k,d), as it is, but for dead inputs.
            damping: of the pull, in means of the Gram matrix's diagonal.
            zeros: (k,d), bool, weights that are to stay 0; then these are the closest that have the zeros.
        """
        if self._cross is None or not self.tells:
            return weight
        system = self.gram + damping * torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        right = self._cross / self._scale
        if zeros is not None and bool(zeros.any()):
            change, failed = solve_masked(system, right, zeros)
            return weight if failed else weight + change
        solved, info = linalg.solve_spd_ex(system, right)
        return weight if int(info) else weight + solved.mT

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

    def report(self, name: str, result: Factor, before: float, error: float) -> LayerReport:
        """Of a layer that was solved with a factor, with the errors without the solve and with it."""
        return LayerReport(
            name=name,
            rows=self.rows,
            features=len(self.gram),
            dead=int(self.dead.sum()),
            rank=self.rank,
            info=result.info,
            damping=result.damping,
            error_before=before,
            error=error,
        )
