"""Passes of a model over its data: what a row costs, whether passes agree, the gradient, and sums of products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import vmap

from onestep._forward_mode import BusyError
from onestep._restored import eval_mode
from onestep._torch_private import tree_map_only
from onestep.curvature._vectors import all_finite
from onestep.curvature.products import Route
from onestep.evaluation.arrays import from_numpy
from onestep.evaluation.data import Chunk, as_source
from onestep.evaluation.distributed import check_equal_batches, share, summed, together
from onestep.evaluation.errors import NonFiniteError
from onestep.evaluation.exclusive import exclusive
from onestep.evaluation.losses import Loss
from onestep.evaluation.module import (
    autograd_gradient,
    call_model,
    check_first_rows,
    chunk_rows,
    explain,
    parameter_names,
    parameters_in_loss,
    summed_gradient,
    without_gradient,
)
from onestep.evaluation.parameters import ParameterVector
from onestep.evaluation.progress import Progress
from onestep.evaluation.row_means import RowMeans

Named: TypeAlias = dict[str, Tensor]
ProductOf: TypeAlias = Callable[[Chunk, int, Named], Callable[[Named], Named]]

# A chunk has a gradient's affordable rows divided by this, and as many vectors at once as then fit: a second derivative
# keeps as much for each vector as a gradient does.
_CHUNK_PARTS = 4
# How many rows are looked at to tell what a row costs.
_FEW = 8
# Losses of two passes are the same if they differ by at most this many ε; on a GPU sums may come in another order.
_SAME_ROUNDINGS = 100

_ORDERLY = (
    "expected the same rows in the same batches: no random augmentation, a sampler that repeats its order "
    "(shuffle=False), and a model without randomness in eval mode"
)


class Passes:
    """A model, its loss and all rows.

    Attributes:
        names: of the parameters with requires_grad=True, in their order.
        route: how torch can differentiate the model.
        vectorizes: whether torch.func.vmap can run the model, as far as is known.
        in_loss: which parameters the loss reads beside the outputs.
        affordable_rows: how many rows keep 256 MiB for a backward pass.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, data: Any, *, chunk_size: int | None, seed: int, progress: bool
    ) -> None:
        self.model, self.loss, self.progress = model, loss, progress
        # Another thread that computes with other parameters in the same model is waited for.
        with exclusive():
            self.parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
            self.names = parameter_names(model, self.parameters)
        self.source = as_source(from_numpy(data, self.parameters.tensors[0]), seed)
        self.source.share = share()
        check_equal_batches(data, self.source)
        self.route, self.vectorizes = Route(), True
        self.affordable_rows = together(self.look_at_rows)
        self.source.chunk_size = chunk_size or max(1, self.affordable_rows // _CHUNK_PARTS)

    def chunks(self) -> Iterator[Chunk]:
        """This process's rows, on the parameters' device."""
        for chunk in self.source.all():
            yield Chunk(*tree_map_only(Tensor, lambda t: t.to(self.parameters.device), tuple(chunk)))

    def _chunk_loss(self, chunk: Chunk) -> Tensor:
        """The loss summed over a chunk, at the model's own parameters."""
        with exclusive():
            return self.loss.sum(call_model(self.model, chunk.inputs), chunk.target)

    def look_at_rows(self) -> int:
        """How many rows keep as much for a backward pass as may be kept."""
        self.source.chunk_size = _FEW
        first = next(self.chunks(), None)
        if first is None:
            raise ValueError("data gives this process no rows; expected at least one for each process")
        with eval_mode(self.model), exclusive():
            rows = chunk_rows(self.model, self.loss, first)
            check_first_rows(self.model, self.loss, first.rows(slice(0, rows)))
            # Later rows are read only where the first have no gradient.
            reason = without_gradient(self.model, self.loss, chain([first], self.chunks()), self.parameters.tensors)
            named = dict(zip(self.names, self.parameters.tensors, strict=True))
            self.in_loss = parameters_in_loss(self.model, self.loss, first.rows(slice(0, rows)), named)
        if reason:
            raise ValueError(f"model: {reason}")
        return rows

    def _checked_loss(self, chunk: Chunk, row_means: RowMeans) -> float:
        """The loss summed over a chunk, once it is known to be a mean over rows."""
        with exclusive():
            outputs = call_model(self.model, chunk.inputs).detach()
            row_means.add(outputs, chunk.target)
            return self.loss.sum(outputs, chunk.target).item()

    def check_deterministic(self) -> None:
        """Raises where two passes over the data differ."""

        def losses() -> list[float]:
            found, row_means = [], RowMeans(self.loss)
            with torch.no_grad(), eval_mode(self.model):
                for number, chunk in enumerate(self.chunks()):
                    loss = self._checked_loss(chunk, row_means)
                    if not math.isfinite(loss):
                        raise NonFiniteError(explain(chunk, number, f"the loss is {loss}"))
                    found.append(loss)
            return found

        def compare() -> None:
            first, second = losses(), losses()
            close = _SAME_ROUNDINGS * torch.finfo(self.parameters.dtype).eps
            for number, (a, b) in enumerate(zip(first, second, strict=False)):
                if abs(a - b) > close * max(abs(a), abs(b)):
                    raise ValueError(f"data: the loss of batch {number} is {a:g}, then {b:g}; {_ORDERLY}")
            if len(first) != len(second):
                raise ValueError(f"data: a pass has {len(first)} batches, the next {len(second)}; {_ORDERLY}")

        together(compare)

    def multiply(self, V: Tensor, product_of: ProductOf, *, what: str, mean: bool) -> Tensor:
        """A V, (p,k), in one pass.

        Args:
            product_of: (chunk, its number, the parameters) → v ↦ A v, of the loss summed over the chunk.
            what: shown beside the bar.
            mean: whether the sum is divided by the elements of the loss.
        """
        tangents = dict(zip(self.names, self.parameters.split(V.mT.contiguous()), strict=True))

        def add(chunk: Chunk, number: int, point: Named, parts: Named) -> None:
            at_once = max(1, self.affordable_rows // len(chunk))
            product = product_of(chunk, number, point)
            for begin in range(0, V.shape[1], at_once):
                some = slice(begin, begin + at_once)
                results = self._of_each(product, {name: part[some] for name, part in tangents.items()})
                for name, result in results.items():
                    parts[name][some].add_(result)

        total, elements = self.sum_over_chunks(V.shape[1], add, what=what)
        return (total.div_(elements) if mean else total).to(V.dtype).mT.contiguous()

    def sum_over_chunks(
        self, k: int, add: Callable[[Chunk, int, Named, Named], None], *, what: str
    ) -> tuple[Tensor, float]:
        """A sum (k,p) over all chunks of all processes in one pass, in float32 at least, and the loss's elements.

        Args:
            add: (chunk, its number, the parameters, the sum (k,…) of each) adds to the last.
        """
        names, values = self.names, self.parameters.read()
        point = dict(zip(names, self.parameters.split(values), strict=True))

        def local() -> tuple[Tensor, list[float]]:
            # (k,p), as products come: sums into columns would be slow.
            dtype = torch.promote_types(values.dtype, torch.float32)
            total = torch.zeros(k, len(values), dtype=dtype, device=values.device)
            parts = dict(zip(names, self.parameters.split(total), strict=True))
            elements = 0.0
            rows = self.source.known_rows
            with (
                torch.no_grad(),
                eval_mode(self.model),
                Progress(
                    None if rows is None else -(-rows // share().size),
                    enabled=self.progress,
                    what=what,
                    unit="row",
                    of_a_pass=True,
                ) as bar,
            ):
                for number, chunk in enumerate(self.chunks()):
                    # The parameters are swapped inside a module that other threads may use.
                    with exclusive():
                        add(chunk, number, point, parts)
                    if not all_finite(total):
                        raise NonFiniteError(explain(chunk, number, "the product is NaN or infinite"))
                    elements += self.loss.elements(chunk.target, len(chunk))
                    bar.update(len(chunk))
            return total, [elements]

        total, (elements,) = summed(local)
        if not elements:
            raise ValueError("every target of the data is ignored; there is no loss to differentiate")
        return total, elements

    def _of_each(self, product: Callable[[Named], Named], V: Named) -> Named:
        """product of each of the vectors (k,…)."""
        k = len(V[self.names[0]])
        if k == 1:
            result = product({name: part[0] for name, part in V.items()})
            return {name: part[None] for name, part in result.items()}
        if self.vectorizes and not self.route.reverse_twice:
            try:
                block: Named = vmap(product, randomness="same")(V)
                return block
            except BusyError:
                pass
            except RuntimeError:
                # Not every module runs under vmap, nn.LSTM for one; what else is wrong, the loop will tell.
                self.vectorizes = False
        results = [product({name: part[j] for name, part in V.items()}) for j in range(k)]
        return {name: torch.stack([result[name] for result in results]) for name in self.names}

    def loss_and_gradient(self, *, mean: bool) -> tuple[float, Tensor]:
        """The loss over all data and its gradient (p,)."""
        with eval_mode(self.model):
            loss, gradient, elements = summed_gradient(
                lambda chunk: autograd_gradient(lambda: self._chunk_loss(chunk), self.parameters),
                lambda chunk: self.loss.elements(chunk.target, len(chunk)),
                self.chunks,
                self.parameters,
                self.source.share.pieces,
            )
        return (loss / elements, gradient / elements) if mean else (loss, gradient)
