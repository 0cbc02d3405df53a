"""Layers solved towards a teacher's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onestep import linalg
from onestep.layerwise.checks import check_dtype_of_sums, check_flags, check_number, check_teacher
from onestep.layerwise.layers import Layer, Patterns
from onestep.layerwise.masked import solve_masked
from onestep.layerwise.order import Sums, Teaching, solve_in_order
from onestep.layerwise.pairs import check_names
from onestep.layerwise.report import LayerReport, Report
from onestep.layerwise.statistics import LayerStatistics
from onestep.linalg.damping import more_damping
from onestep.ops.operands import LinAlgError


def refit(
    model: nn.Module,
    data: Any,
    teacher: nn.Module,
    *,
    layers: Patterns = "*",
    names: Mapping[str, str | None] | None = None,
    ridge: float = 1e-3,
    keep_zeros: bool = True,
    sequential: bool = True,
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> Report:
    """Solves each linear layer towards the teacher's outputs, on the inputs that it gets in this model.

    W, b ← argmin Σ‖Wx + b − t‖² + λ‖W − W₀‖², λ = ridge · mean diag Σxxᵀ, with t the outputs of the teacher's layer
    of the same name. In order: a layer's inputs come from layers that are solved already, whose errors it mends.
    (He, Zhang and Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, refit pruned layers so.)
    For a model that has been pruned, quantised (its weights are no longer on the grid then) or lost blocks.

    Args:
        model: as in ``quantize``; its weights and biases are replaced in place.
        data: batches, as in ``quantize``.
        teacher: a model with layers of the same names, which sees the same batches: what the model was before. Blocks
            that ``replace_blocks`` replaced since are matched by what they were called, and the map that took their
            place is solved towards what the last of them returned. Experts of a mixture are refused where the layers
            before them are solved, too, so that the two models send them different rows.
        layers: a pattern of names, or several.
        names: what modules are called in the teacher where that is something else, such as {"blocks.1": "blocks.2"}.
        ridge: 0 or more. It pulls towards the weights as they are.
        keep_zeros: weights that are 0 stay 0.
        sequential: False: all layers from one pass over the data, of the model as it is.
        dtype: of the sums and of the solves.
        progress: show a bar.

    Returns:
        A ``Report`` of Σ‖t − Wx − b‖² / Σ‖t‖² before and after.

    Raises:
        ValueError, TypeError: an argument out of its range; no layer matches; the teacher has other layers.

    Examples:
        >>> import copy, torch
        >>> from onestep.layerwise import prune, refit
        >>> teacher, data = torch.nn.Sequential(torch.nn.Linear(16, 4)), torch.randn(100, 16)
        >>> model = copy.deepcopy(teacher)
        >>> _ = prune(model, data, 0.5, progress=False)
        >>> report = refit(model, data, teacher, progress=False)
        >>> report["0"].error <= report["0"].error_before
        True
    """
    check_number("ridge", ridge)
    check_flags(keep_zeros=keep_zeros, sequential=sequential, progress=progress)
    check_dtype_of_sums(dtype)
    check_teacher(model, teacher, needed=True)
    check_names(names)
    report = Report()

    def solve(layer: Layer, statistics: LayerStatistics) -> None:
        problem = _Refit(layer, statistics, dtype)
        report.layers.append(problem.solve(ridge, keep_zeros))

    solve_in_order(
        model,
        data,
        layers,
        solve,
        teaching=Teaching(teacher, names, needed=True),
        sequential=sequential,
        dtype=dtype,
        progress=progress,
        what="refit",
    )
    return report


class _Refit:
    """One layer's equations, with a feature that is always 1 where there is a bias."""

    def __init__(self, layer: Layer, statistics: LayerStatistics, dtype: torch.dtype) -> None:
        self.layer, self.rows = layer, statistics[layer.name].count
        # A copy: the layer's own is written to before it is compared with.
        weight = layer.weight.to(dtype, copy=True)
        self.weight = weight
        self.sums = Sums(statistics, layer.name)
        if self.rows == 0:
            return
        inputs, targets = statistics[layer.name], statistics.targets(layer.name)
        # Of what the layer lacks of the teacher's outputs, e = t − Wx − b.
        assert targets.whole is not None
        self.gram, self.cross = inputs.gram, targets.cross
        self.square, self.whole = float(targets.square), float(targets.whole)
        if layer.bias is not None:
            self.weight = torch.cat([weight, layer.bias.to(dtype)[:, None]], 1)
            count = self.gram.new_full((1, 1), float(self.rows))
            total = inputs.total[:, None]
            self.gram = torch.cat([torch.cat([inputs.gram, total], 1), torch.cat([total.mT, count], 1)])
            self.cross = torch.cat([self.cross, targets.total[None]])

    def _stored(self, weight: Tensor) -> Tensor:
        """The weight, and the bias in the last column, as they are once the layer has them."""
        if self.layer.bias is None:
            return self.layer.stored(weight)
        bias = weight[:, -1:].to(self.layer.bias.dtype).to(weight.dtype)
        return torch.cat([self.layer.stored(weight[:, :-1]), bias], 1)

    def error(self, weight: Tensor) -> float:
        """Σ‖t − Wx − b‖² / Σ‖t‖²."""
        change = weight - self.weight
        fitted = ((change @ self.gram) * change).sum(dtype=torch.float64)
        linear = (change * self.cross.mT).sum(dtype=torch.float64)
        return max(float(fitted - 2 * linear) + self.square, 0.0) / (self.whole or 1.0)

    def solve(self, ridge: float, keep_zeros: bool) -> LayerReport:
        d, dead = self.layer.weight.shape[1], int(self.sums.dead.sum())
        if self.rows == 0:
            return LayerReport(self.layer.name, 0, d, dead, 0, 0, 0.0, 0.0, 0.0)
        before = self.error(self.weight)
        scale = float(self.sums.raw.diagonal().mean()) or 1.0
        zeros = self.weight == 0
        if self.layer.bias is not None:
            zeros[:, -1] = False
        masked = keep_zeros and bool(zeros.any())
        penalty, info = ridge, 0
        while True:
            solved, failed = self._solved(penalty * scale, zeros if masked else None)
            if not failed:
                break
            info = info or failed
            more = more_damping(torch.tensor(penalty, dtype=torch.float64), self.weight.dtype).item()
            if math.isnan(more):
                raise LinAlgError(f"layer {self.layer.name!r} has no solution with any ridge up to {penalty:g}")
            penalty = more
        # Rounding, in the solve or to the dtype of the layer, may lose more than there was to gain.
        solved = self._stored(solved)
        if self.error(solved) > before:
            solved = self.weight
        self.layer.write(solved[:, :d], solved[:, -1] if self.layer.bias is not None else None)
        rank = self.sums.rank
        return LayerReport(self.layer.name, self.rows, d, dead, rank, info, penalty, before, self.error(solved))

    def _solved(self, penalty: float, zeros: Tensor | None) -> tuple[Tensor, int]:
        """W, and the status of its equations."""
        # The bias has no penalty.
        pulled = self.gram.new_full((len(self.gram),), penalty)
        pulled[self.layer.weight.shape[1] :] = 0
        # For the change of W, which the penalty pulls to 0.
        system = self.gram + pulled.diag()
        if zeros is None:
            change, info = linalg.solve_spd_ex(system, self.cross)
            return self.weight + change.mT, int(info)
        change, failed = solve_masked(system, self.cross, zeros)
        return self.weight + change, failed
