"""Facts written into a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onestep._interrupts import undisturbed
from onestep._restored import hooked, replaced
from onestep.layerwise.checks import check_number
from onestep.layerwise.layers import call, check_devices, check_finite, evaluating, find_layers, padded
from onestep.layerwise.layout import layouts_of, without_last
from onestep.layerwise.order import Sums
from onestep.layerwise.padding import Masks, Padding
from onestep.layerwise.report import LayerReport, Report
from onestep.layerwise.statistics import LayerStatistics

# Of the factor that are converted to float64 at a time.
_ROWS = 1024


@undisturbed
def edit(
    model: nn.Module,
    subjects: Any,
    targets: Tensor,
    *,
    layer: str,
    statistics: LayerStatistics,
    strength: float = 1.0,
    damping: float = 1e-4,
) -> Report:
    """Changes one linear layer so that it puts out ``targets`` for ``subjects``, and what it did for all else (MEMIT).

    Δ = R Kᵀ(C + KKᵀ)⁻¹, with the keys K the layer's inputs at each subject's last place, R = targets − WK what is
    missing, and C = E[xxᵀ] / strength of ordinary text (Meng et al. 2023). By Woodbury's identity that is
    R (1 + KᵀC⁻¹K)⁻¹ KᵀC⁻¹: C⁻¹ = UᵀU is factored once for each ``statistics`` and kept there, and a batch of m edits
    solves m × m equations, in float64. A batch knows nothing of edits before it, and undoes them in part where keys are
    alike: what has to hold together belongs in one batch.

    Args:
        model: changed in place.
        subjects: one batch, as in ``quantize``, of m sequences. The key of a sequence is the layer's input at its last
            place that is not padding. The inputs may be rows of all places (m·places, d), as in transformers' OPT,
            where ``subjects`` is a mapping with ids or a mask; those of one row for each subject (m, d) are taken as
            they are.
        targets: (m, outputs), of any floating dtype and device, what the layer is to put out for them, its bias
            included.
        layer: its name.
        statistics: of ordinary text, with this layer among its names.
        strength: above 0; larger values write the targets more exactly, at the cost of all else. How exactly, the dtype
            of the layer limits: subjects that are nearly alike with unlike targets take large weights, whose rounding
            changes all outputs; the report's ``error`` is of the weights after it, and no strength brings it under
            that. Of the same subject with two targets the mean is written.
        damping: of C, in means of its diagonal; more where it is rank deficient.

    Returns:
        A ``Report`` of one layer, with Σ‖target − output‖² / Σ‖target‖² over the subjects, before and after. ``rows``
        are the subjects; ``dead``, ``rank``, ``info`` and ``damping`` are of C, the ordinary text.

    Raises:
        ValueError: the layer is not there, was not reached or is not finite, ``targets`` has another shape or is not
            finite, or a subject is padding alone.
        TypeError: ``targets`` is no tensor, or ``statistics`` something else.
        NotImplementedError: the layer is one of stacked experts.

    Examples:
        >>> import torch
        >>> from onestep.layerwise import LayerStatistics, edit
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> text = LayerStatistics(model).collect([torch.randn(100, 4)], progress=False)
        >>> subject, target = torch.ones(1, 4), torch.tensor([[1.0, -1.0]])
        >>> report = edit(model, subject, target, layer="0", statistics=text, strength=1e4)
        >>> model(subject).detach().round(decimals=2)
        tensor([[ 1., -1.]])
    """
    check_number("strength", strength, positive=True)
    check_number("damping", damping)
    if not isinstance(layer, str):
        raise TypeError(f"layer is {layer!r}; expected the full name of one layer")
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets is {type(targets).__name__}; expected a tensor (subjects, outputs)")
    if not isinstance(statistics, LayerStatistics):
        raise TypeError(f"statistics is {type(statistics).__name__}; expected LayerStatistics")
    found = find_layers(model, layer)
    if layer not in found:
        raise ValueError(f"layer is {layer!r}; expected the full name of one layer")
    if found[layer].stack is not None:
        raise NotImplementedError(f"layer {layer!r} is one of stacked experts, which see some of the places only")
    check_devices(found.values())
    check_finite({layer: found[layer]})
    if layer not in statistics.names:
        raise ValueError(f"statistics has no layer {layer!r}; expected it among {statistics.names[:3]}, ...")
    chosen = found[layer]
    # All but the factor: where keys are alike, large terms cancel.
    dtype = torch.float64
    keys = _keys(model, layer, chosen.module, subjects, len(targets)).to(dtype)
    weight = chosen.weight.to(dtype)
    if targets.shape != (len(keys), len(weight)):
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected ({len(keys)}, {len(weight)})")
    wanted = targets.detach().to(weight.device, dtype)
    for what, values in (("targets", wanted), ("the layer's inputs for the subjects", keys)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{what} hold NaN or infinity; expected finite values")
    whole = float(wanted.square().sum()) or 1.0
    if chosen.bias is not None:
        wanted = wanted - chosen.bias.to(dtype)
    missing = wanted - keys @ weight.mT
    sums = Sums(statistics, layer)
    result, scale = statistics.kept_factor(layer, damping)
    # Of C = scale · (UᵀU)⁻¹ / strength.
    reduced = _product(result.U, keys.mT)
    # KᵀC⁻¹K by its eigenvalues: those of 0, of subjects that are the same, take no part at any strength.
    values, vectors = torch.linalg.eigh(reduced.mT @ reduced)
    parts = 1.0 / (values.clamp(min=0.0) + scale / strength)
    parts[values <= len(keys) * torch.finfo(dtype).eps * values[-1:]] = 0.0
    change = (reduced @ vectors * parts) @ (vectors.mT @ missing)
    chosen.write(weight + _product(result.U.mT, change).mT)
    after = float((wanted - keys @ chosen.weight.to(dtype).mT).square().sum())
    return Report(
        [
            LayerReport(
                name=layer,
                rows=len(keys),
                features=weight.shape[1],
                dead=int(sums.dead.sum()),
                rank=sums.rank,
                info=int(result.info),
                damping=float(result.damping),
                error_before=float(missing.square().sum()) / whole,
                error=after / whole,
            )
        ]
    )


def _product(factor: Tensor, matrix: Tensor) -> Tensor:
    """factor @ matrix in float64, without a copy of the whole factor."""
    return torch.cat([rows.to(torch.float64) @ matrix for rows in factor.split(_ROWS)])


def _keys(model: nn.Module, name: str, module: nn.Module, subjects: Any, count: int) -> Tensor:
    """The layer's inputs (m, d) at each subject's last place."""
    x, kept = _input_of(model, module, subjects)
    if x.dim() == 2:
        # All places in one dimension, as transformers' OPT computes the last two layers of a block.
        places_first = _places_first_of_rows(model, name, module, subjects, x, count)
        if places_first is None:
            return x
        shape = (len(x) // count, count) if places_first else (count, len(x) // count)
        mask = None if kept is None else _mask_of_rows(model, subjects, kept, count, name)
        x = x.reshape(*shape, x.shape[-1])
    elif x.dim() == 3:
        mask = None if kept is None else kept.reshape(x.shape[:-1])
        places_first = _places_first(model, name, module, subjects, x, count)
        mask = mask.mT if places_first and mask is not None else mask
    else:
        raise ValueError(
            f"the layer's inputs for the subjects have shape {tuple(x.shape)}; expected (subjects, features) or "
            "(subjects, places, features)"
        )
    x = x.transpose(0, 1) if places_first else x
    _check_places(subjects, x, name)
    if mask is None:
        return x[:, -1]
    if not bool(mask.any(1).all()):
        raise ValueError(f"subject {int(mask.any(1).int().argmin())} is padding alone; expected a place that is not")
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask).masked_fill(~mask, -1).amax(1)
    return x[torch.arange(len(x), device=x.device), places]


def _input_of(model: nn.Module, module: nn.Module, subjects: Any) -> tuple[Tensor, Tensor | None]:
    """What a layer is given, and which of its rows are not padding; None: all."""
    seen: list[tuple[Tensor, Tensor | None]] = []
    padding = Padding(Masks.of(subjects, model))

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        seen.append((x, padding.kept(x, module)))

    around = padding.hooks(model, [module]) + padded([model])
    with replaced(around), hooked([(module, hook)], before=True), evaluating(model), torch.no_grad():
        call(model, subjects)
    if len(seen) != 1:
        raise ValueError(f"the layer was called {len(seen)} times for the subjects; expected once")
    return seen[0]


def _places_first_of_rows(
    model: nn.Module, name: str, module: nn.Module, subjects: Any, x: Tensor, count: int
) -> bool | None:
    """Whether rows of all places (…, d) have those of a subject ``count`` apart; None: there is one for each subject.

    It shows when the model is run without the last subject.
    """
    places = len(x) // count if count else 0
    if len(x) in (count, 0) or len(x) != count * places or (count, places) not in _shapes_of(subjects):
        return None
    if count == 1:
        return False
    fewer = _input_of(model, module, without_last(subjects, count))[0]
    ways = {False: x[:-places], True: x.reshape(places, count, -1)[:, :-1].reshape(-1, x.shape[-1])}
    near = 1e-3 * float(x.abs().max())
    fitting = [
        way for way, rows in ways.items() if fewer.shape == rows.shape and float((fewer - rows).abs().max()) <= near
    ]
    if len(fitting) != 1:
        raise ValueError(_untold(name, len(x), count))
    return fitting[0]


def _mask_of_rows(model: nn.Module, subjects: Any, kept: Tensor, count: int, name: str) -> Tensor:
    """(subjects, places), which places are not padding, where rows of all places have these."""
    masks = Masks.of(subjects, model)
    for mask in (masks.places, masks.decoder):
        fits = mask is not None and mask.shape == (count, len(kept) // count)
        if mask is not None and fits and any(torch.equal(kept, rows.reshape(-1)) for rows in (mask, mask.mT)):
            return mask
    raise ValueError(_untold(name, len(kept), count))


def _untold(name: str, rows: int, count: int) -> str:
    return (
        f"layer {name!r} is given {rows} rows by {count} subjects of {rows // count} places, and which row is which "
        "place cannot be told: edit one subject at a time, or another layer"
    )


def _places_first(model: nn.Module, name: str, module: nn.Module, subjects: Any, x: Tensor, count: int) -> bool:
    """Whether an input (…, …, d) has the places in its first dimension, and the ``count`` subjects in its second."""
    if x.shape[0] != x.shape[1]:
        return len(x) != count and x.shape[1] == count
    if len(x) != count or count < 2:
        return False
    first = layouts_of(model, subjects, count).get(id(module))
    if first is None:
        raise ValueError(
            f"layer {name!r} is given {tuple(x.shape)} by {count} subjects of as many places, so that which of the two "
            "come first cannot be told: pass subjects with another number of places, or edit fewer at a time"
        )
    return first


def _check_places(subjects: Any, x: Tensor, name: str) -> None:
    """Refuses an input (subjects, places, d) with other places than the subjects have, of which the last is not known.

    What a model puts between or behind them, as one that attends to windows pads them to whole ones, may be padding.
    """
    shapes = _shapes_of(subjects)
    if shapes and tuple(x.shape[:2]) not in shapes and any(shape[0] == len(x) for shape in shapes):
        raise ValueError(
            f"layer {name!r} is given {x.shape[1]} places of each subject; expected "
            f"{' or '.join(str(shape[1]) for shape in sorted(shapes))}, those of the subjects, as which of them is a "
            f"subject's last cannot be told: edit another layer, or pass subjects of {x.shape[1]} places"
        )


def _shapes_of(subjects: Any) -> set[tuple[int, ...]]:
    """(subjects, places), where the batch says so."""
    values = subjects.items() if isinstance(subjects, Mapping) else []
    return {
        tuple(value.shape)
        for key, value in values
        if isinstance(value, Tensor) and value.dim() == 2 and (str(key).endswith(("_mask", "input_ids")))
    }
