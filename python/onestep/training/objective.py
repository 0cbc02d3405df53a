"""The loss of a module over data, as the optimisers see it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

import onestep.linalg as linalg
from onestep._cached import cached_property
from onestep.curvature import glm
from onestep.curvature.jacobian import root_jacobian
from onestep.curvature.kernels import differentiable_kernels
from onestep.curvature.products import Route, gauss_newton_products, hessian_product
from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import summed, summed_by_piece
from onestep.evaluation.exclusive import exclusive
from onestep.evaluation.losses import Loss, check_range, drawn_slope
from onestep.evaluation.module import autograd_gradient, call_model, parameter_names, summed_gradient, uncompiled
from onestep.evaluation.parameters import ParameterVector
from onestep.evaluation.row_means import RowMeans
from onestep.optim import Objective
from onestep.optim.objective import CurvatureRoot, Preconditioner, random_pullback
from onestep.training.kronecker import Factors

# Rows of the Jacobian are kept for products if they take no more bytes than this.
_ROOT_BYTES = 64 * 2**20
# Of so many rows of the Jacobian at a time the squares are summed: they stay in cache.
_SQUARED_ROWS = 128


class SummedRoot(CurvatureRoot):
    """Terms of the pieces of a sample, added up in the pieces' order, over ``count`` elements of the loss."""

    def __init__(self, like: Tensor, pieces: int, count: float) -> None:
        self.like, self.pieces, self.count = like, pieces, count

    @abstractmethod
    def diagonals(self) -> Iterator[tuple[int, Tensor]]:
        """The summands of the diagonal (p,), each with its piece."""

    @abstractmethod
    def products(self, v: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The summands of Av (p,)."""

    @abstractmethod
    def matrices(self) -> Iterator[tuple[int, Tensor]]:
        """The summands of A (p,p)."""

    def _sum(self, like: Tensor, terms: Iterator[tuple[int, Tensor]]) -> Tensor:
        with torch.no_grad():
            total, _ = summed_by_piece(self.pieces, (like, 0), lambda: ((piece, term, []) for piece, term in terms))
        return total.div_(self.count)

    @cached_property
    def diagonal(self) -> Tensor:
        return self._sum(self.like, self.diagonals())

    def multiply(self, v: Tensor) -> Tensor:
        return self._sum(self.like, self.products(v))

    def matrix(self) -> Tensor:
        return self._sum(self.like.new_empty(2 * self.like.shape), self.matrices())


class _KeptRoot(SummedRoot):
    """By rows of the Jacobian that are kept."""

    def __init__(self, parts: list[tuple[int, Tensor]], like: Tensor, pieces: int, count: float) -> None:
        super().__init__(like, pieces, count)
        self.parts = parts
        # RᵀRv is the Hessian-vector product of linear regression on R, which reads it once.
        self.regressions = [
            (piece, glm(rows, rows.new_zeros(len(rows)), torch.zeros_like(like), "gaussian")) for piece, rows in parts
        ]

    def diagonals(self) -> Iterator[tuple[int, Tensor]]:
        blocks = ((piece, block) for piece, rows in self.parts for block in rows.split(_SQUARED_ROWS))
        return ((piece, block.square().sum(0)) for piece, block in blocks)

    def products(self, v: Tensor) -> Iterator[tuple[int, Tensor]]:
        return ((piece, regression.hvp(v)) for piece, regression in self.regressions)

    def matrices(self) -> Iterator[tuple[int, Tensor]]:
        return ((piece, linalg.gram(rows)[0]) for piece, rows in self.parts)


class DataObjective(Objective):
    """The mean loss of a module over one batch: all data, or a mini-batch.

    Args:
        module: evaluated as it is; its trainable parameters are those of the optimiser.
        loss: what is minimised.
        chunks: gives the batch's rows, chunk by chunk; called once for each pass.
        curvature_chunks: gives the rows over which curvature is taken.
        fixed: whether the batch is the same at every step.
        trial_chunks: gives the rows on which a step is judged, if not on the batch.
        sampled: whether curvature is of a sample of the rows.
        pieces: how many pieces a batch is cut into, whose sums are added up in their order.
        kept_rows: with at most this many rows, forward passes are kept from one product with the curvature to the next.
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
        sampled: bool = False,
        pieces: int = 1,
        kept_rows: int = 0,
    ) -> None:
        self.module, self.loss, self.chunks, self.curvature_chunks = module, loss, chunks, curvature_chunks
        self.fixed, self.trial_chunks, self.sampled = fixed, trial_chunks, sampled
        self.pieces, self.kept_rows = pieces, kept_rows
        self.route = Route()
        # Looks at the rows of the first pass.
        self.row_means: RowMeans | None = RowMeans(loss)

    def _elements(self, chunk: Chunk) -> float:
        if self.row_means is not None:
            check_range(self.loss, chunk.target)
        return self.loss.elements(chunk.target, len(chunk))

    def chunk_loss(self, chunk: Chunk, values: dict[str, Tensor] | None = None) -> Tensor:
        """The loss summed over a chunk, at the parameters' values or at others."""
        outputs = call_model(self.module, chunk.inputs, values)
        if self.row_means is not None and values is None:
            self.row_means.add(outputs, chunk.target)
        return self.loss.sum(outputs, chunk.target)

    def chunk_gradient(self, chunk: Chunk, parameters: ParameterVector) -> tuple[float, Tensor]:
        """The loss summed over a chunk and its gradient (p,)."""
        return autograd_gradient(lambda: self.chunk_loss(chunk), parameters)

    def value(self, parameters: ParameterVector) -> float:
        def terms() -> Iterator[tuple[int, Tensor, list[float]]]:
            for chunk in (self.trial_chunks or self.chunks)():
                loss = self.chunk_loss(chunk).item()
                yield chunk.piece, torch.empty(0), [loss, self._elements(chunk)]

        with torch.no_grad():
            total, count = summed_by_piece(self.pieces, (torch.empty(0), 2), terms)[1]
        self.row_means = None
        return total / count

    def before(self, parameters: ParameterVector) -> float | None:
        return None if self.trial_chunks is None else self.value(parameters)

    def gradient(self, parameters: ParameterVector) -> tuple[float, Tensor]:
        loss, gradient, count = summed_gradient(
            lambda chunk: self.chunk_gradient(chunk, parameters), self._elements, self.chunks, parameters, self.pieces
        )
        self.row_means = None
        return loss / count, gradient.div_(count)

    def values(self, parameters: ParameterVector) -> Callable[[Tensor], dict[str, Tensor]]:
        """A vector (p,) ↦ the module's parameters by their names."""
        names = parameter_names(self.module, parameters)
        return lambda vector: dict(zip(names, parameters.split(vector), strict=True))

    def multiplier(
        self, parameters: ParameterVector, point: Tensor, chunk: Chunk, *, hessian: bool
    ) -> Callable[[Tensor], Tensor]:
        """v (p,) ↦ the Hessian or Gauss-Newton matrix of a chunk's summed loss at a point, times v."""
        values = self.values(parameters)
        if hessian:
            return lambda v: hessian_product(
                lambda vector: self.chunk_loss(chunk, values(vector)), point, v, self.route
            )
        return gauss_newton_products(
            lambda vector: call_model(self.module, chunk.inputs, values(vector)),
            lambda outputs: self.loss.sum(outputs, chunk.target),
            point,
            route=self.route,
        )

    def curvature(self, parameters: ParameterVector, *, hessian: bool) -> Callable[[Tensor], Tensor]:
        # Products may be asked for when the parameters have moved on.
        point = parameters.read()

        def prepared(chunk: Chunk) -> tuple[Chunk, Callable[[Tensor], Tensor]]:
            return chunk, self.multiplier(parameters, point, chunk, hessian=hessian)

        @cache
        def kept() -> list[tuple[Chunk, Callable[[Tensor], Tensor]]] | None:
            chunks, rows = [], 0
            for chunk in self.curvature_chunks():
                rows += len(chunk)
                if rows > self.kept_rows:
                    return None
                chunks.append(chunk)
            return [prepared(chunk) for chunk in chunks]

        def product(v: Tensor) -> Tensor:
            def terms() -> Iterator[tuple[int, Tensor, list[float]]]:
                for chunk, multiply in kept() or map(prepared, self.curvature_chunks()):
                    yield chunk.piece, multiply(v), [self._elements(chunk)]

            with torch.no_grad():
                total, (count,) = summed_by_piece(self.pieces, (v, 1), terms)
            return total.div_(count or 1)

        return product

    def preconditioner(self, parameters: ParameterVector) -> Preconditioner | None:
        result = Factors(self.module, parameters)
        if not result.layers:
            return None

        def terms() -> Iterator[tuple[int, Tensor, list[float]]]:
            # Each piece has its own, so that what is drawn does not depend on which process draws it.
            generators: dict[int, torch.Generator] = {}
            for chunk in self.curvature_chunks():
                generator = generators.setdefault(
                    chunk.piece, torch.Generator(parameters.device).manual_seed(chunk.piece)
                )
                factors = Factors(self.module, parameters)
                with torch.enable_grad(), factors.collecting(), uncompiled(self.module):
                    outputs = call_model(self.module, chunk.inputs)
                    slope = drawn_slope(self.loss, outputs.detach(), chunk.target, generator)
                    factors.backward = True
                    parts = torch.autograd.grad(outputs, parameters.tensors, slope, allow_unused=True)
                factors.add_gradient(parts)
                sums, positions = factors.packed()
                yield chunk.piece, sums, [*positions, self._elements(chunk)]

        like, positions = result.packed()
        try:
            sums, (*positions, count) = summed_by_piece(self.pieces, (like, len(positions) + 1), terms)
        except RuntimeError as error:
            # Hooks see layers that the model differentiates by torch.func inside such a transform.
            if "transform" not in str(error):
                raise
            return None
        result.unpack(sums, positions)
        return lambda damping: result.preconditioner(count or 1, damping)

    def output_gradient(self, parameters: ParameterVector) -> Tensor | None:
        def terms() -> Iterator[tuple[int, Tensor, list[float]]]:
            generators: dict[int, torch.Generator] = {}
            for chunk in self.curvature_chunks():
                generator = generators.setdefault(
                    chunk.piece, torch.Generator(parameters.device).manual_seed(chunk.piece)
                )
                with torch.enable_grad(), uncompiled(self.module):
                    gradient = random_pullback(call_model(self.module, chunk.inputs), parameters, generator)
                yield chunk.piece, gradient, []

        return summed_by_piece(self.pieces, (parameters.read(), 0), terms)[0]

    def curvature_root(self, parameters: ParameterVector) -> CurvatureRoot | None:
        """Of a sample alone, in which an exact solution is not worth its time, and only if it takes little memory."""
        if not self.sampled or parameters.device.type != "cpu":
            return None
        parts: list[tuple[int, Tensor]] = []

        def local() -> tuple[Tensor, list[float]]:
            count, size = 0.0, 0
            with torch.no_grad(), exclusive(), differentiable_kernels():
                for chunk in self.curvature_chunks():
                    count += self._elements(chunk)
                    for rows in map(_without_kinks, self.root_jacobian(parameters, chunk)):
                        parts.append((chunk.piece, rows))
                        size += rows.numel() * rows.element_size()
                        if size > _ROOT_BYTES:
                            return torch.empty(0), [count, size]
            return torch.empty(0), [count, size]

        # What all processes have counts, so that any number of them goes the same way.
        _, (count, size) = summed(local)
        if size > _ROOT_BYTES or not count:
            return None
        return _KeptRoot(parts, parameters.read(), self.pieces, count)

    def gauss_newton_matrix(self, parameters: ParameterVector, *, precise: bool = False) -> Tensor:
        p = len(parameters)

        def local() -> tuple[Tensor, list[float]]:
            total, count = torch.zeros(p, p, dtype=torch.float64, device=parameters.device), 0.0
            with torch.no_grad(), exclusive(), differentiable_kernels():
                for chunk in self.curvature_chunks():
                    for rows in map(_without_kinks, self.root_jacobian(parameters, chunk)):
                        rows = rows.double() if precise else rows
                        total += linalg.moments(rows, rows[:, :0]).gram
                    count += self._elements(chunk)
            return total, [count]

        total, (count,) = summed(local)
        return total.div_(count or 1)

    def root_jacobian(self, parameters: ParameterVector, chunk: Chunk) -> Iterator[Tensor]:
        """Rows R with RᵀR the sum of JᵀHJ over rows of the chunk, some rows at a time."""
        point = parameters.read()
        for rows in root_jacobian(self.module, self.loss, chunk, point, self.values(parameters), self.route):
            yield rows.reshape(-1, len(parameters))


def _without_kinks(R: Tensor) -> Tensor:
    """Rows R with zeros for those that are not finite: at a kink, such as that of a norm, a loss has no Hessian.

    Without its curvature the step is longer, which damping shortens, and no test for a minimum is met too early.
    """
    return torch.where(R.isfinite().all(1, keepdim=True), R, 0.0)
