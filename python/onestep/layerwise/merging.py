"""Several models of one architecture put into one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onestep import linalg
from onestep._interrupts import undisturbed
from onestep.layerwise.checks import check_dtype_of_sums, check_flags, check_number
from onestep.layerwise.layers import Patterns, batches_of, check_devices, check_finite, check_untied, find_layers
from onestep.layerwise.rank import numerical_rank
from onestep.layerwise.report import LayerReport, Report
from onestep.layerwise.statistics import LayerStatistics
from onestep.ops.operands import LinAlgError


@undisturbed
def merge(
    models: Sequence[nn.Module],
    data: Sequence[Any],
    *,
    layers: Patterns = "*",
    shrinkage: float = 0.1,
    damping: float = 1e-6,
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
    report: Report | None = None,
) -> nn.Module:
    """Merges models that were trained apart on different data from the same start, in closed form (RegMean).

    Each linear layer becomes argmin Σᵢ Σ‖Wx − Wᵢx‖² over model i's inputs: W = (Σ Aᵢ)⁻¹ Σ AᵢWᵢ, with Aᵢ = Σxxᵀ whose
    elements off the diagonal are shrunk (Jin, Ren, Preotiuc-Pietro and Cheng 2023). All other parameters and floating
    buffers become means.

    Args:
        models: two or more, with parameters of the same names and shapes; left as they are.
        data: for each model its batches, as in ``quantize``.
        layers: a pattern of the layers that are solved for.
        shrinkage: 0 to 1, how much smaller elements off the diagonal are made.
        damping: added to the diagonal of Σ Aᵢ, in means of it; more where that is singular.
        dtype: of the sums and of the solves.
        progress: show bars.
        report: an empty ``Report`` to write into, since the result is the model: for each layer the rows of all models,
            the rank of their Σxxᵀ, the damping, and Σᵢ Σ‖Wᵢx − Wx‖² / Σᵢ Σ‖Wᵢx‖² with the mean of the weights as W
            (``error_before``) and with what the layer has become (``error``).

    Returns:
        A new model.

    Raises:
        ValueError: other than one ``data`` a model, one without batches, fewer than two models, models whose
            parameters differ, parameters that are not finite, or a ``report`` that has layers already.
        TypeError: an argument is something else.
        LinAlgError: the inputs of a layer have no Gram matrix that can be factored.

    Examples:
        >>> import torch
        >>> from onestep.layerwise import Report, merge
        >>> a, b = torch.nn.Sequential(torch.nn.Linear(3, 1)), torch.nn.Sequential(torch.nn.Linear(3, 1))
        >>> merged = merge([a, b], [torch.eye(3), 2 * torch.eye(3)], shrinkage=0.0, damping=0.0, progress=False)
        >>> torch.allclose(merged[0].weight, (a[0].weight + 4 * b[0].weight) / 5)  # b's inputs are larger
        True
        >>> report = Report()
        >>> _ = merge([a, b], [torch.eye(3), 2 * torch.eye(3)], progress=False, report=report)
        >>> report["0"].rows, report["0"].rank, report["0"].error < report["0"].error_before
        (6, 3, True)
    """
    for what, given in (("models", models), ("data", data)):
        if not isinstance(given, Sequence):
            raise TypeError(f"{what} is {type(given).__name__}; expected a list with one entry for each model")
    if len(models) < 2 or len(data) != len(models):
        raise ValueError(f"there are {len(models)} models and {len(data)} data; expected two or more, and as many data")
    check_number("shrinkage", shrinkage, most=1.0)
    check_number("damping", damping)
    check_flags(progress=progress)
    check_dtype_of_sums(dtype)
    if report is not None and not isinstance(report, Report):
        raise TypeError(f"report is {type(report).__name__}; expected onestep.layerwise.Report() or None")
    if report is not None and report.layers:
        raise ValueError(f"report has {len(report.layers)} layers already; expected an empty one, Report()")
    for index, model in enumerate(models):
        chosen = find_layers(model, layers, what=f"models[{index}]")
        check_devices(chosen.values())
        check_untied(chosen)
        check_finite(chosen, f"models[{index}]'s ")
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"the parameter {name!r} of models[{index}] holds NaN or infinity; expected finite values"
                )
    states = [model.state_dict() for model in models]
    for index, state in enumerate(states):
        shapes = {name: value.shape for name, value in state.items()}
        if shapes != {name: value.shape for name, value in states[0].items()}:
            raise ValueError(f"model {index} has other parameters than model 0; expected the same names and shapes")
    merged = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, value in merged.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.stack([state[name].to(value.device, dtype) for state in states]).mean(0))
    for index, part in enumerate(data):
        if next(iter(batches_of(part)), None) is None:
            raise ValueError(f"data[{index}] has no batches; expected at least one")
    own = [
        LayerStatistics(model, layers, dtype=dtype).collect(part, progress=progress)
        for model, part in zip(models, data, strict=True)
    ]
    found = [find_layers(model, layers) for model in models]
    described = []
    for name, layer in find_layers(merged, layers).items():
        device = layer.weight.device
        weights = [each[name].weight.to(device, dtype) for each in found]
        grams = [statistics[name].gram.to(device) for statistics in own]
        shrunk = [(1 - shrinkage) * gram + shrinkage * torch.diag(gram.diagonal()) for gram in grams]
        total = sum(shrunk, torch.zeros_like(grams[0]))
        right = sum((gram @ W.mT for gram, W in zip(shrunk, weights, strict=True)), torch.zeros_like(weights[0].mT))
        mean = torch.stack(weights).mean(0)
        # Where no input was other than 0 there is nothing to weigh by: the mean.
        dead = total.diagonal() == 0
        system = total + torch.diag(dead.to(dtype))
        right = torch.where(dead[:, None], mean.mT, right)
        U, info, used = linalg.inverse_cholesky(system, damping=damping)
        if bool(used.isnan()):
            raise LinAlgError(f"the inputs of layer {name!r} have no Gram matrix that can be factored")
        # The damping pulls towards the mean.
        pull = float(used) * float(system.diagonal().mean())
        layer.write((U.mT @ (U @ (right + pull * mean.mT))).mT)
        if report is None:
            continue
        rows, gram = sum(statistics[name].count for statistics in own), sum(grams, torch.zeros_like(grams[0]))
        described.append(
            LayerReport(
                name=name,
                rows=rows,
                features=len(gram),
                dead=int(dead.sum()),
                rank=numerical_rank(gram, rows),
                info=int(info),
                damping=float(used),
                error_before=_lost(mean.to(layer.weight.dtype).to(dtype), weights, grams),
                error=_lost(layer.weight.to(dtype), weights, grams),
            )
        )
    if report is not None:
        report.layers.extend(described)
    return merged


def _lost(weight: Tensor, weights: Sequence[Tensor], grams: Sequence[Tensor]) -> float:
    """Σᵢ Σ‖Wᵢx − Wx‖² / Σᵢ Σ‖Wᵢx‖², 0 where no input was other than 0."""

    def square(changes: Sequence[Tensor]) -> float:
        return sum(
            float(((change @ gram) * change).sum(dtype=torch.float64).clamp(min=0.0))
            for change, gram in zip(changes, grams, strict=True)
        )

    return square([W - weight for W in weights]) / (square(weights) or 1.0)
