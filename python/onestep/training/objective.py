"""The loss of a module over data, as the optimisers see it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vjp, vmap
from torch.utils._pytree import tree_map_only

import onestep.linalg as linalg
from onestep.curvature import hvp
from onestep.curvature._products import differentiable_attention, gauss_newton_products
from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import share, summed
from onestep.evaluation.losses import Loss, drawn_slope
from onestep.evaluation.module import call_model, parameter_names, summed_gradient
from onestep.evaluation.parameters import ParameterVector
from onestep.optim import Objective
from onestep.training.kronecker import Factors

# Rows of the Jacobian are formed this many bytes at a time.
_JACOBIAN_BYTES = 64 * 2**20
# Forward over reverse mode keeps several times what a gradient does: a chunk's Hessian is taken in so many parts.
_HESSIAN_PIECES = 4


class DataObjective(Objective):
    """The mean loss of a module over one batch: all data, or a mini-batch.

    Args:
        module: evaluated as it is; its trainable parameters are those of the optimiser.
        loss: what is minimised.
        chunks: gives the batch's rows, chunk by chunk; called once for each pass.
        curvature_chunks: gives the rows over which curvature is taken.
        fixed: whether the batch is the same at every step.
        trial_chunks: gives the rows on which a step is judged, if not on the batch.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        chunks: Callable[[], Iterable[Chunk]],
        curvature_chunks: Callable[[], Iterable[Chunk]],
        *,
        fixed: bool,
        trial_chunks: Callable[[], Iterable[Chunk]] | None = None,
    ) -> None:
        self.module, self.loss, self.chunks, self.curvature_chunks = module, loss, chunks, curvature_chunks
        self.fixed, self.trial_chunks = fixed, trial_chunks

    def value(self, parameters: ParameterVector) -> float:
        def local() -> tuple[Tensor, list[float]]:
            total, count = 0.0, 0
            with torch.no_grad():
                for chunk in (self.trial_chunks or self.chunks)():
                    total += self.loss.sum(call_model(self.module, chunk.inputs), chunk.target).item()
                    count += self.loss.elements(chunk.target, len(chunk))
            return torch.empty(0), [total, count]

        total, count = summed(local)[1]
        return total / count

    def before(self, parameters: ParameterVector, loss: float) -> float:
        return loss if self.trial_chunks is None else self.value(parameters)

    def gradient(self, parameters: ParameterVector) -> tuple[float, Tensor]:
        loss, gradient, count = summed_gradient(self.module, self.loss, self.chunks, parameters)
        return loss / count, gradient.div_(count)

    def _functions(
        self, parameters: ParameterVector, chunk: Chunk
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """θ (p,) ↦ outputs of a chunk, and outputs ↦ summed loss."""
        names = parameter_names(self.module, parameters)

        def outputs(vector: Tensor) -> Tensor:
            return call_model(self.module, chunk.inputs, dict(zip(names, parameters.split(vector), strict=True)))

        return outputs, lambda z: self.loss.sum(z, chunk.target)

    def curvature(self, parameters: ParameterVector, *, hessian: bool) -> Callable[[Tensor], Tensor]:
        point = parameters.read()
        # What a batch of one chunk keeps between products, and its elements.
        only: list[tuple[Callable[[Tensor], Tensor], int]] = []

        def prepared(chunk: Chunk) -> tuple[Callable[[Tensor], Tensor], int]:
            outputs, loss = self._functions(parameters, chunk)
            elements = self.loss.elements(chunk.target, len(chunk))
            if hessian:
                return lambda v: hvp(_compose(loss, outputs), point, v), elements
            return gauss_newton_products(outputs, loss, point), elements

        def all_prepared() -> Iterator[tuple[Callable[[Tensor], Tensor], int]]:
            chunks = _pieces(self.curvature_chunks(), _HESSIAN_PIECES if hessian else 1)
            first, second = next(chunks, None), next(chunks, None)
            if first is not None and second is None:
                only.append(prepared(first))
                yield only[0]
                return
            for chunk in itertools.chain((chunk for chunk in (first, second) if chunk is not None), chunks):
                yield prepared(chunk)

        def product(v: Tensor) -> Tensor:
            def local() -> tuple[Tensor, list[float]]:
                total, count = torch.zeros_like(v), 0
                with torch.no_grad():
                    for multiply, elements in only or all_prepared():
                        total += multiply(v)
                        count += elements
                return total, [count]

            total, (count,) = summed(local)
            return total.div_(max(count, 1))

        return product

    def preconditioner(self, parameters: ParameterVector) -> Callable[[float], Callable[[Tensor], Tensor]] | None:
        factors = Factors(self.module, parameters)
        if not factors.layers:
            return None

        def local() -> tuple[Tensor, list[float]]:
            count = 0
            generator = torch.Generator().manual_seed(share().rank)
            with torch.enable_grad(), factors.collecting():
                for chunk in self.curvature_chunks():
                    outputs = call_model(self.module, chunk.inputs)
                    slope = drawn_slope(self.loss, outputs.detach(), chunk.target, generator)
                    parts = torch.autograd.grad(outputs, parameters.tensors, slope, allow_unused=True)
                    factors.add_gradient(parts)
                    count += self.loss.elements(chunk.target, len(chunk))
            sums, positions = factors.packed()
            return sums, [*positions, count]

        sums, (*positions, count) = summed(local)
        factors.unpack(sums, positions)
        return lambda damping: factors.preconditioner(max(count, 1), damping)

    def gauss_newton_matrix(self, parameters: ParameterVector) -> Tensor:
        p = len(parameters)

        def local() -> tuple[Tensor, list[float]]:
            total, count = torch.zeros(p, p, dtype=torch.float64), 0
            with torch.no_grad(), differentiable_attention():
                for chunk in self.curvature_chunks():
                    for rows in self.root_jacobian(parameters, chunk):
                        total += linalg.moments(rows, rows[:, :0]).gram
                    count += self.loss.elements(chunk.target, len(chunk))
            return total, [count]

        total, (count,) = summed(local)
        return total.div_(max(count, 1))

    def root_jacobian(self, parameters: ParameterVector, chunk: Chunk) -> Iterator[Tensor]:
        """Rows R with RᵀR the sum of JᵀHJ over rows of the chunk, a piece at a time."""
        names = parameter_names(self.module, parameters)
        point = parameters.read()

        def one(vector: Tensor, inputs: Any) -> Tensor:
            values = dict(zip(names, parameters.split(vector), strict=True))
            row = tree_map_only(Tensor, lambda t: t.unsqueeze(0), inputs)
            return call_model(self.module, row, values).squeeze(0)

        def root(vector: Tensor, inputs: Any, target: Any) -> Tensor:
            def flat(v: Tensor) -> Tensor:
                return one(v, inputs).reshape(-1)

            def slope(z: Tensor) -> Tensor:
                result: Tensor = grad(lambda z: self._row_loss(z.reshape(shape), target))(z)
                return result

            linearized: tuple[Tensor, Any] = vjp(flat, vector)  # type: ignore[assignment]
            outputs, pullback = linearized
            if self.loss.name == "mse":
                factor = math.sqrt(2.0) * torch.eye(len(outputs), dtype=outputs.dtype)
            else:
                H = jacrev(slope)(outputs)
                values, vectors = torch.linalg.eigh((H + H.mT) / 2)
                factor = (vectors * values.clamp_min(0).sqrt()).mT
            rows: Tensor = vmap(pullback)(factor)[0]
            return rows

        outputs = call_model(self.module, chunk.rows(slice(0, 1)).inputs)
        shape = outputs.shape[1:]
        row_bytes = outputs.numel() * len(parameters) * outputs.element_size()
        size = max(1, _JACOBIAN_BYTES // row_bytes)
        for begin in range(0, len(chunk), size):
            part = chunk.rows(slice(begin, begin + size))
            yield vmap(root, in_dims=(None, 0, 0))(point, part.inputs, part.target).reshape(-1, len(parameters))

    def _row_loss(self, outputs: Tensor, target: Any) -> Tensor:
        target = tree_map_only(Tensor, lambda t: t.unsqueeze(0), target)
        return self.loss.sum(outputs.unsqueeze(0), target)


def _pieces(chunks: Iterable[Chunk], parts: int) -> Iterator[Chunk]:
    """The same rows in chunks of a fraction of the size."""
    for chunk in chunks:
        size = -(-len(chunk) // parts)
        for begin in range(0, len(chunk), max(1, size)):
            yield chunk.rows(slice(begin, begin + size))


def _compose(outer: Callable[[Tensor], Tensor], inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda p: outer(inner(p))
