"""A linear map inside a model, solved towards what the whole model puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onestep import linalg
from onestep._restored import hooked
from onestep.layerwise.layers import call
from onestep.layerwise.padding import Masks, Padding

# The first damping of both factors, in means of their diagonals. At 1 first steps were shorter than they might have
# been; at 0.1 most were refused.
_FIRST_DAMPING = 1.0
# Damping is multiplied by this after a step that lowers the loss,
_LESS = 0.25
# and by this after one that does not.
_MORE = 8.0
# A loss of so small a part of the outputs' squares is rounding.
_ROUNDING = 1e-9


@dataclass
class _Look:
    """The loss at some weights, over all rows, and its quadratic model: curvature ≈ inputs ⊗ outputs."""

    weight: Tensor  # (d, d + 1), the bias last
    loss: float
    whole: float  # Σ of the squares of the outputs that are wanted
    rows: int
    gradient: Tensor  # (d, d + 1)
    inputs: Tensor  # (d + 1, d + 1), Σxxᵀ
    outputs: Tensor  # (d, d), Σ JᵀJ, J of the model's outputs by the map's

    def step(self, damping: float) -> Tensor | None:
        """The weights that are better by the model; None: the factors are singular."""
        change = self.gradient.mT
        for factor in (self.inputs, self.outputs):
            mean = factor.diagonal().mean()
            damped = factor / self.rows
            damped.diagonal().add_(damping * mean / self.rows)
            solved, info = linalg.solve_spd_ex(damped, change)
            if int(info):
                return None
            change = solved.mT
        # Solved for once from each side: (d + 1, d) became (d, d + 1), and that (d + 1, d).
        return self.weight - change.mT / self.rows


def solve_towards_outputs(
    model: nn.Module,
    batches: Iterable[Any],
    linear: nn.Linear,
    before: Callable[[], AbstractContextManager[None]],
    steps: int,
    dtype: torch.dtype,
) -> int:
    """Gauss-Newton steps on Σ‖f(x) − f₀(x)‖², f₀ what the model put out before, by the weight and bias of one map.

    The curvature Σ xxᵀ ⊗ JᵀJ, J of the model's outputs by the map's, is taken for (Σxxᵀ) ⊗ (ΣJᵀJ) / n (K-FAC: Martens
    and Grosse 2015), ΣJᵀJ from one random combination of each batch's outputs. A step that does not lower the loss is
    taken back, and the next is damped more.

    Args:
        model: in eval mode.
        batches: can be gone through again.
        linear: its map; written to.
        before: makes a context in which the model is what it was.
        steps: how many are tried.
        dtype: of the sums and of the solves.

    Returns:
        How many steps were kept; 0 also where the model's outputs have no derivative.
    """
    looked = _Outputs(model, batches, linear, before, dtype)
    best = looked.look(torch.cat([linear.weight.detach(), linear.bias.detach()[:, None]], 1).to(dtype))
    kept, damping = 0, _FIRST_DAMPING
    for _ in range(steps):
        # So few rows would be fitted by heart.
        if best is None or best.loss <= _ROUNDING * best.whole or best.rows <= len(best.inputs):
            break
        tried = best.step(damping)
        found = None if tried is None else looked.look(tried)
        if found is not None and found.loss < best.loss:
            best, kept, damping = found, kept + 1, _LESS * damping
        else:
            damping *= _MORE
    if best is not None:
        looked.write(best.weight)
    return kept


class _Outputs:
    """Looks at a model's outputs, and at what they change by with those of one map."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        linear: nn.Linear,
        before: Callable[[], AbstractContextManager[None]],
        dtype: torch.dtype,
    ) -> None:
        self._model, self._batches, self._linear, self._before = model, batches, linear, before
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def write(self, weight: Tensor) -> None:
        """The weight, and the bias in the last column."""
        with torch.no_grad():
            self._linear.weight.copy_(weight[:, :-1])
            self._linear.bias.copy_(weight[:, -1])

    def look(self, weight: Tensor) -> _Look | None:
        """At these weights; None: there is nothing to be seen."""
        self.write(weight)
        d = self._linear.in_features
        sums = _Look(weight, 0.0, 0.0, 0, weight.new_zeros(d, d + 1), *(weight.new_zeros(k, k) for k in (d + 1, d)))
        for batch in self._batches:
            with torch.no_grad(), self._before():
                wanted = output_of(call(self._model, batch))
            if wanted is None or not self._add(sums, batch, wanted):
                return None
        return sums if sums.rows else None

    def _add(self, sums: _Look, batch: Any, wanted: Tensor) -> bool:
        given: list[Tensor] = []
        put_out: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            # What comes before needs no graph.
            torch.set_grad_enabled(True)
            given.append(args[0] if args else kwargs["input"])
            put_out.append(output.detach().requires_grad_())
            return put_out[-1]

        # no_grad puts back what the hook changes.
        with torch.no_grad():
            with hooked([(self._linear, hook)]):
                found = output_of(call(self._model, batch))
            torch.set_grad_enabled(True)
            if found is None or not found.requires_grad or found.shape != wanted.shape:
                return False
            kept = Padding(Masks.of(batch, self._model)).kept(found, None)
            missing, wanted = (f.reshape(-1, f.shape[-1]) for f in (found - wanted, wanted))
            if kept is not None:
                missing, wanted = missing[kept], wanted[kept]
            random = torch.randn(missing.shape, generator=self._generator).to(missing)
            gradients = torch.autograd.grad(0.5 * missing.square().sum(), put_out, retain_graph=True)
            combined = torch.autograd.grad((random * missing).sum(), put_out)
        for x, g, h in zip(given, gradients, combined, strict=True):
            rows, slope, probe = (part.reshape(-1, part.shape[-1]).to(self._dtype) for part in (x, g, h))
            # Padding changes nothing in what counts.
            felt = probe.any(-1)
            rows, slope, probe = rows[felt], slope[felt], probe[felt]
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            sums.gradient += slope.mT @ rows
            sums.inputs += rows.mT @ rows
            sums.outputs += probe.mT @ probe
            sums.rows += len(rows)
        sums.loss += float(0.5 * missing.detach().double().square().sum())
        sums.whole += float(wanted.double().square().sum())
        return True


def output_of(result: Any) -> Tensor | None:
    """The tensor of floats that a model puts out: of several the one called logits, or the first with rows."""
    if isinstance(result, Tensor):
        return result if result.is_floating_point() and result.dim() >= 2 else None
    if isinstance(result, Mapping):
        values = [result["logits"]] if result.get("logits") is not None else list(result.values())
    else:
        values = list(result) if isinstance(result, (tuple, list)) else []
    fitting = (value for value in values if isinstance(value, Tensor) and output_of(value) is not None)
    return next(fitting, None)
