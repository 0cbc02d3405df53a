"""Quantisation and pruning with compensated errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onestep.layerwise.checks import check_dtype_of_sums, check_flags, check_number, check_teacher
from onestep.layerwise.export import QuantizedWeight
from onestep.layerwise.grids import rounded
from onestep.layerwise.layers import Layer, Patterns, find_layers
from onestep.layerwise.order import Factor, Sums, Teaching, solve_in_order
from onestep.layerwise.pairs import check_names
from onestep.layerwise.report import Report
from onestep.layerwise.statistics import LayerStatistics
from onestep.ops.compensated import compensated_sweep


def quantize(
    model: nn.Module,
    data: Any,
    bits: int = 4,
    group_size: int | None = 64,
    *,
    teacher: nn.Module | bool | None = True,
    names: Mapping[str, str | None] | None = None,
    layers: Patterns = "*",
    symmetric: bool = False,
    act_order: bool = True,
    keep_zeros: bool = False,
    damping: float = 0.01,
    sequential: bool = True,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Report:
    """Rounds the weights of linear layers to a few bits, so that the layers' outputs on ``data`` change least.

    Column by column, each weight is rounded and its error is made up for by the columns to come: with A = E[xxᵀ] and
    A⁻¹ = UᵀU, w ← w − (w_j − q)/U_jj · U_j: (Hassibi and Stork 1993; GPTQ, Frantar et al. 2022). With a scale
    for each row, or act_order, the Cholesky factor of A takes the same steps (LDLQ, Chee et al. 2023). The sweep begins
    at argmin Σ‖Wx + b − t‖², t the teacher's outputs. The weights are replaced in place by the rounded
    ones; the report has their codes. A layer that would lose more so than rounded to nearest, as from a few rows, is
    rounded to nearest. Zeros of a pruned model make up for errors, too, and are zeros no more, unless ``keep_zeros``.

    Args:
        model: any nn.Module with nn.Linear layers, or transformers' Conv1D.
        data: batches that can be gone through again, each a tensor, a tuple of positional arguments, or a mapping of
            keyword arguments (whose ``attention_mask`` leaves padding out).
        bits: 2 to 8.
        group_size: columns that share a scale; None: a scale for each row.
        teacher: True: the model as it is when this is called, of which a copy of each weight that is written to is kept
            meanwhile. A model: that one, such as the model as it was before it was pruned. Each layer is then rounded
            towards the teacher's outputs on its own inputs, so that it mends what the layers before it lost (GPTAQ, Li
            et al. 2025), in about twice the time. None: towards its own outputs. Experts of a mixture always are, since
            the two models send them different rows.
        names: what modules are called in the teacher where that is something else, such as {"blocks.1": "blocks.2"};
            None for what has no counterpart. Blocks that ``replace_blocks`` replaced are matched without it.
        layers: a pattern of names such as ``"*.mlp.*"``, or several; "!head" leaves a layer out.
        symmetric: codes around 2^(bits−1); otherwise each group's range from its least to its largest weight.
        act_order: columns with the largest inputs first; the groups stay those of neighbouring columns, on grids that
            are known before the sweep. False: in the order of the columns, each group on the grid of its weights as
            they have become.
        keep_zeros: weights that are 0 stay 0, as after ``prune``, and the others make up for errors, on grids that are
            known before the sweep, with act_order or without. With a teacher the sweep begins at argmin Σ‖Wx + b − t‖²
            among the weights with these zeros, which are other equations for each row of W, as in ``refit``.
        damping: added to A's diagonal, in means of the diagonal; more where A is rank deficient, as the report says.
        sequential: each layer sees inputs from the layers that are rounded already. False: one pass over the data.
        dtype: of the sums, torch.float32 or torch.float64.
        progress: show a bar.

    Returns:
        ``Report``: for each layer the rows, damping and errors (against the teacher, where there is one), rounding to
        nearest beside it, and its codes.

    Raises:
        ValueError, TypeError: an argument out of its range; no layer matches; weights or inputs that are not finite.

    Examples:
        >>> import torch
        >>> from onestep.layerwise import quantize
        >>> generator = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
        >>> report = quantize(model, torch.randn(100, 16), bits=4, group_size=16, progress=False)
        >>> report["0"].error <= report["0"].error_before
        True
    """
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}; expected an integer from 2 to 8")
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        raise ValueError(f"group_size is {group_size!r}; expected a positive integer, or None for a scale for each row")
    check_flags(
        symmetric=symmetric, act_order=act_order, keep_zeros=keep_zeros, sequential=sequential, progress=progress
    )
    check_number("damping", damping)
    check_dtype_of_sums(dtype)
    check_teacher(model, teacher)
    check_names(names)
    report = Report()

    def solve(layer: Layer, statistics: LayerStatistics) -> None:
        weight = _weight_of(layer, dtype)
        sums = Sums(statistics, layer.name)
        size = group_size or weight.shape[1]
        plain = rounded(weight, bits, size, symmetric)
        to_nearest = layer.stored(plain.dequantize())
        order = sums.gram.diagonal().argsort(descending=True, stable=True) if act_order else None
        zeros = weight == 0 if keep_zeros else None
        # Grids that are known beforehand: the weights ahead need not be, and R takes half the time of U.
        known = act_order or keep_zeros
        unit = known or size >= weight.shape[1]
        result = sums.factor(damping, order, unit=unit)
        live = sums.without_dead(weight)
        goal = sums.aim(live, result.damping, zeros)
        if known:
            grid = plain if goal is weight else rounded(goal, bits, size, symmetric)
            quantized = _on_grid(goal, result.matrix, grid, symmetric, order, zeros)
        else:
            _, codes, scale, zero, _ = compensated_sweep(
                goal, result.matrix, None, None, None, bits, symmetric, size, 0.0, 0, 0, unit
            )
            quantized = QuantizedWeight(codes, scale, zero, plain.group, bits)
        solved = layer.stored(quantized.dequantize())
        before, error = sums.error(weight, to_nearest), sums.error(weight, solved)
        own = sums.own_error
        if error > before if sums.tells else own(weight, solved) > own(weight, to_nearest):
            quantized = plain if live is weight else rounded(live, bits, size, symmetric)
            error = sums.error(weight, layer.stored(quantized.dequantize()))
        layer.write(quantized.dequantize())
        report.quantized[layer.name] = quantized
        report.layers.append(sums.report(layer.name, result, before, error))

    solve_in_order(
        model,
        data,
        layers,
        solve,
        teaching=Teaching(teacher, names),
        sequential=sequential,
        dtype=dtype,
        progress=progress,
        what="quantize",
    )
    return report


def prune(
    model: nn.Module,
    data: Any,
    sparsity: float | tuple[int, int] = 0.5,
    *,
    teacher: nn.Module | bool | None = True,
    names: Mapping[str, str | None] | None = None,
    layers: Patterns = "*",
    damping: float = 0.01,
    sequential: bool = True,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Report:
    """Removes weights of linear layers, so that the layers' outputs on ``data`` change least.

    As ``quantize``, with weights that become 0 where w²/U_jj², what removing it costs, is smallest (SparseGPT, Frantar
    and Alistarh 2023). Which ones, is decided block by block, after what came before has been made up for. A layer that
    would lose more so than by removing the smallest weights, as where inputs nearly depend on each other, is solved
    again with ten times the damping, up to 1; the best is taken, and the report has its damping.

    Args:
        model, data, teacher, names, layers, damping, sequential, dtype, progress: as in ``quantize``.
        sparsity: the fraction that is removed of each block of 128 columns; or (n, m): of every m neighbouring weights
            of a row, n are kept, such as (2, 4).

    Returns:
        A ``Report``, with pruning by size beside it.

    Raises:
        ValueError, TypeError: as ``quantize``; or a layer's features are not a multiple of m.

    Examples:
        >>> import torch
        >>> from onestep.layerwise import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
        >>> report = prune(model, torch.randn(100, 16), (2, 4), progress=False)
        >>> (model[0].weight == 0).float().mean().item(), report["0"].error <= report["0"].error_before
        (0.5, True)
    """
    fraction, keep, of = _sparsity(sparsity)
    check_flags(sequential=sequential, progress=progress)
    check_number("damping", damping)
    check_dtype_of_sums(dtype)
    check_teacher(model, teacher)
    check_names(names)
    for layer in find_layers(model, layers).values():
        if of and layer.weight.shape[1] % of:
            raise ValueError(f"layer {layer.name!r} has {layer.weight.shape[1]} features; expected a multiple of {of}")
    report = Report()

    def solve(layer: Layer, statistics: LayerStatistics) -> None:
        weight = _weight_of(layer, dtype)
        sums = Sums(statistics, layer.name)
        before = sums.error(weight, layer.stored(_smallest_removed(weight, fraction, keep, of)))

        def pruned(damping: float) -> tuple[float, Tensor, Factor]:
            result = sums.factor(damping, unit=False)
            goal = sums.aim(sums.without_dead(weight), result.damping)
            swept = compensated_sweep(goal, result.matrix, None, None, None, 0, False, 1, fraction, keep, of)[0]
            swept = layer.stored(swept)
            return sums.error(weight, swept), swept, result

        error, solved, result = pruned(damping)
        # Where features nearly depend on each other, a weight's cost is taken for what later columns leave of it, which
        # are pruned themselves. Damping trusts them less.
        while error > before and result.damping < 1.0:
            again = pruned(min(10.0 * max(result.damping, 0.01), 1.0))
            if again[0] >= error:
                break
            error, solved, result = again
        layer.write(solved)
        report.layers.append(sums.report(layer.name, result, before, error))

    solve_in_order(
        model,
        data,
        layers,
        solve,
        teaching=Teaching(teacher, names),
        sequential=sequential,
        dtype=dtype,
        progress=progress,
        what="prune",
    )
    return report


def _on_grid(
    goal: Tensor, factor: Tensor, grid: QuantizedWeight, symmetric: bool, order: Tensor | None, zeros: Tensor | None
) -> QuantizedWeight:
    """The sweep on grids that are known.

    Args:
        goal: (k,d), the weights that it begins at.
        factor: R (``unit_cholesky``) of the Gram matrix, in the order of the sweep.
        grid: of the goal.
        symmetric: as in ``quantize``.
        order: (d,), of the columns; None: as they are.
        zeros: (k,d), bool, weights that stay 0.
    """
    scale, zero, group = grid.scale, grid.zero, grid.group
    if zeros is not None and bool(zeros.any()):
        # A grid for each weight; those that stay 0 have one with nothing but 0 on it, as far as the sweep can tell.
        scale = scale[:, group].masked_fill(zeros, torch.finfo(scale.dtype).tiny)
        zero, group = zero[:, group], torch.arange(len(group), device=group.device)
    columns = torch.arange(goal.shape[1], device=goal.device) if order is None else order
    codes = compensated_sweep(
        goal[:, columns], factor, scale, zero, group[columns], grid.bits, symmetric, 1, 0.0, 0, 0, True
    )[1][:, columns.argsort()]
    if zeros is not None:
        codes = torch.where(zeros, grid.zero[:, grid.group].to(codes.dtype), codes)
    return QuantizedWeight(codes, grid.scale, grid.zero, grid.group, grid.bits)


def _weight_of(layer: Layer, dtype: torch.dtype) -> Tensor:
    # A copy: the layer's own is written to before it is compared with.
    return layer.weight.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _sparsity(sparsity: float | tuple[int, int]) -> tuple[float, int, int]:
    """The fraction, or how many are kept of how many."""
    if isinstance(sparsity, (tuple, list)):
        if len(sparsity) != 2 or any(type(n) is not int for n in sparsity) or not 0 <= sparsity[0] <= sparsity[1] > 0:
            raise ValueError(f"sparsity is {sparsity!r}; expected (n, m) with 0 <= n <= m and m > 0, n of m are kept")
        return 0.0, sparsity[0], sparsity[1]
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity is {sparsity!r}; expected a fraction from 0 to 1, or (n, m)")
    return float(sparsity), 0, 0


def _smallest_removed(weight: Tensor, fraction: float, keep: int, of: int) -> Tensor:
    """Pruning by size."""
    if of:
        runs = weight.reshape(len(weight), -1, of)
        gone = runs.abs().argsort(dim=-1, stable=True)[..., : of - keep]
        return runs.scatter(-1, gone, 0.0).reshape(weight.shape)
    removed = round(fraction * weight.numel())
    if removed == 0:
        return weight
    # As many, where weights are of the same size, too: the first of them.
    gone = weight.abs().flatten().argsort(stable=True)[:removed]
    return weight.flatten().index_fill(0, gone, 0.0).view(weight.shape)
