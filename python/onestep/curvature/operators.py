"""The Hessian, Gauss-Newton and Fisher matrices of a loss over data, as linear operators."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from inspect import cleandoc
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad

from onestep._restored import eval_mode
from onestep.curvature._estimates import Estimate, averaged, seeds
from onestep.curvature._operator import CurvatureOperator, check_choice, check_count, in_order
from onestep.curvature._passes import Named
from onestep.curvature._roots import Root, root_of_loss, signs
from onestep.curvature.jacobian import root_jacobian
from onestep.curvature.products import Result, Route, hessian_product, hvp, outer_products
from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import share, summed
from onestep.evaluation.exclusive import exclusive
from onestep.evaluation.losses import LOSSES, as_loss, drawn_slope
from onestep.evaluation.module import evaluate_at
from onestep.evaluation.parameters import flatten

# Rows of the Jacobian give a diagonal exactly, at the cost of a gradient for each output and of eigenvalues of the
# loss's Hessian in a row's outputs. 64 random vectors cost as much as 64 outputs, and leave an error of 18 %.
_MOST_OUTPUTS = 64
# What one of them may take.
_ROW_BYTES = 2**28


class HessianOperator(CurvatureOperator):
    """H = ∂²L/∂θ², products by forward over reverse mode (Pearlmutter, Neural Computation 6, 1994).

    Examples:
        >>> import torch
        >>> from onestep.curvature import HessianOperator
        >>> X = torch.tensor([[1.0], [2.0]])
        >>> H = HessianOperator(torch.nn.Linear(1, 1), (X, X), "mse")
        >>> H @ torch.tensor([1.0, 0.0]), H.trace().value.item()
        (tensor([5., 3.]), 7.0)
    """

    __doc__ = f"{cleandoc(__doc__ or '')}\n\n{cleandoc(CurvatureOperator.__doc__ or '')}"

    def _product(self, chunk: Chunk, number: int, point: Named) -> Callable[[Named], Named]:
        outputs, loss = self._outputs(chunk), self._loss_of_outputs(chunk)

        def total(values: Named) -> Tensor:
            given = outputs(values)
            return (
                loss(given) if self._passes.in_loss == "none" else evaluate_at(self.model, values, lambda: loss(given))
            )

        return lambda v: hessian_product(total, point, v, self._passes.route)

    def _check_parameters_in_loss(self) -> None:
        """A penalty counts where its parameters are those that the model has while a product is taken."""
        if self._passes.in_loss == "held":
            raise ValueError(
                "loss holds parameters of the model itself, of which no derivatives are seen; expected a function that "
                "takes them from the model when it is called, such as model.layer.weight or model.parameters()"
            )


class _OuterProductOperator(CurvatureOperator):
    """Jᵀ C J, J = ∂outputs/∂θ: the outputs' tangent and what Jᵀ goes back through come from one forward pass."""

    @abstractmethod
    def _outer(self, chunk: Chunk, number: int, point: Named) -> Callable[[Tensor, Tensor], Tensor]:
        """(outputs, tangent) ↦ C tangent, for the loss summed over a chunk."""

    def _product(self, chunk: Chunk, number: int, point: Named) -> Callable[[Named], Named]:
        outer = self._outer(chunk, number, point)
        return outer_products(self._outputs(chunk), outer, point, keep=False, route=self._passes.route)

    def _diagonal_by_rows(self) -> Tensor | None:
        if not self._has_rows():
            return None

        def diagonal_of(chunk: Chunk, number: int, point: Named) -> Callable[[Named], Named]:
            return lambda _: self._chunk_diagonal(chunk, number, point)

        one = torch.ones(self.shape[0], 1, dtype=self.dtype, device=self.device)
        what = f"{type(self).__name__}.diagonal"
        total = self._passes.multiply(one, diagonal_of, what=what, mean=self.reduction == "mean")
        return total[:, 0].double()

    def _root(self, chunk: Chunk, number: int, point: Named, outputs: Tensor) -> Root | None:
        """What draws s like ``outputs`` with E ssᵀ = C, rows being independent; None where it is not known."""
        return root_of_loss(self._loss, outputs, chunk.target)

    def _estimated_diagonal(self, samples: int, generator: torch.Generator | None) -> Estimate:
        """The mean of (Jᵀs)², which is never negative, s drawn by the root of C; by products where that is unknown."""
        point = dict(zip(self._names, [p.detach() for p in self._parameters.tensors], strict=True))

        def unknown() -> tuple[Tensor, list[float]]:
            few = next(self._passes.chunks()).rows(slice(0, 2))
            with torch.no_grad(), eval_mode(self.model), exclusive():
                return torch.empty(0), [self._root(few, 0, point, self._outputs(few)(point)) is None]

        if summed(unknown)[1][0]:
            return super()._estimated_diagonal(samples, generator)

        def squares() -> Iterator[Tensor]:
            for block in seeds(self._empty(), samples, generator):
                total, elements = self._passes.sum_over_chunks(
                    len(block), partial(self._add_drawn, block), what=f"{type(self).__name__}.diagonal"
                )
                value = total.double().square().mT
                yield value / elements if self.reduction == "mean" else value

        return averaged(squares(), self._empty(), samples)

    def _add_drawn(self, block: list[int], chunk: Chunk, number: int, point: Named, parts: Named) -> None:
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
            outputs = self._outputs(chunk)(leaves)
        root = self._root(chunk, number, point, outputs.detach())
        assert root is not None
        for sample, seed in enumerate(block):
            own = torch.Generator().manual_seed((seed * 1_000_003 + number) * share().size + share().rank)
            pulled = torch.autograd.grad(
                outputs, list(leaves.values()), root(own), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for name, part in zip(leaves, pulled, strict=True):
                parts[name][sample].add_(part)

    def _has_rows(self) -> bool:
        """Whether outputs are few and rows of the Jacobian can be had by vmap, tried on the first two rows."""

        def fails() -> tuple[Tensor, list[float]]:
            few = next(self._passes.chunks()).rows(slice(0, 2))
            point = dict(zip(self._names, [p.detach() for p in self._parameters.tensors], strict=True))
            with torch.no_grad(), eval_mode(self.model), exclusive():
                outputs = self._outputs(few)(point)
                k = outputs[:1].numel()
                if k > _MOST_OUTPUTS or k * self.shape[0] * outputs.element_size() > _ROW_BYTES:
                    return torch.empty(0), [1]
                try:
                    self._chunk_diagonal(few, 0, point)
                except RuntimeError:
                    return torch.empty(0), [1]
            return torch.empty(0), [0]

        return not summed(fails)[1][0]

    def _chunk_diagonal(self, chunk: Chunk, number: int, point: Named) -> Named:
        """Of the loss summed over a chunk: Σ ±(Jᵀs)², with C = Σ ±ssᵀ for each row."""
        parameters, outer = self._parameters, self._outer(chunk, number, point)
        outputs = self._outputs(chunk)(point)
        n, k = len(chunk), outputs[:1].numel()
        units = torch.eye(k, dtype=outputs.dtype, device=outputs.device)
        columns = [outer(outputs, unit.expand(n, k).reshape(outputs.shape)).reshape(n, k) for unit in units]
        C = torch.stack(columns, 2).double()
        if not bool(C.isfinite().all()):
            # LAPACK takes none: the sum says which batch it is.
            return {name: torch.full_like(value, math.nan) for name, value in point.items()}
        values, vectors = torch.linalg.eigh((C + C.mT) / 2)
        # Those under this are made of rounding.
        least = k * torch.finfo(outputs.dtype).eps * values.abs().amax(1, keepdim=True)
        values = torch.where(values.abs() > least, values, 0.0)
        roots = (vectors * values.abs().sqrt()[:, None]).mT.to(outputs.dtype)
        signs, total, begin = values.sign().to(outputs.dtype), parameters.read().zero_(), 0
        for J in root_jacobian(
            self.model,
            None,
            chunk,
            flatten([point[name] for name in self._names]),
            lambda vector: dict(zip(self._names, parameters.split(vector), strict=True)),
            _ByVmap(),
        ):
            rows = slice(begin, begin + len(J))
            total += torch.einsum("mk,mkp->p", signs[rows], (roots[rows] @ J).square_())
            begin += len(J)
        return dict(zip(self._names, parameters.split(total), strict=True))


class _ByVmap(Route):
    """Fails where vmap does: row by row, the Jacobian of all rows would take as many passes as there are rows."""

    def take(self, by_torch_func: Callable[[], Result], by_reverse_mode: Callable[[], Result]) -> Result:
        return by_torch_func()


class GaussNewtonOperator(_OuterProductOperator):
    """G = 1/m Σᵢ Jᵢᵀ (∂²ℓᵢ/∂fᵢ²) Jᵢ, Jᵢ = ∂f(xᵢ)/∂θ (Schraudolph, Neural Computation 14, 2002).

    Positive semi-definite where ℓ is convex in the outputs.

    Examples:
        >>> import torch
        >>> from onestep.curvature import GaussNewtonOperator
        >>> X = torch.tensor([[1.0], [2.0]])
        >>> G = GaussNewtonOperator(torch.nn.Linear(1, 1, bias=False), (X, X), "mse")
        >>> x, report = G.solve(torch.tensor([6.0]), damping=1.0)
        >>> round(x.item(), 4), report.converged
        (1.0, True)
    """

    __doc__ = f"{cleandoc(__doc__ or '')}\n\n{cleandoc(CurvatureOperator.__doc__ or '')}"

    def _outer(self, chunk: Chunk, number: int, point: Named) -> Callable[[Tensor, Tensor], Tensor]:
        loss = self._loss_of_outputs(chunk)
        return lambda outputs, tangent: hvp(loss, outputs, tangent)


class FisherOperator(_OuterProductOperator):
    """F = 1/m Σᵢ E ∇ℓᵢ ∇ℓᵢᵀ, with ℓᵢ = -log p(y | f(xᵢ; θ)) of all outputs of a row together.

    - kind="true": y is distributed as the model says (Amari 1998; Martens, New insights and perspectives on the natural
      gradient method, JMLR 21, 2020): for "mse" normal with variance ½, which makes the squared error -log p up to a
      constant, for "cross_entropy" categorical, for "poisson" Poisson. The expectation is exact: ∂²ℓ/∂f² does not
      depend on y there, and F is the Gauss-Newton matrix. With ``mc_samples=M`` it is the mean over M draws for each
      row, unbiased and the same draws in every product, of rank at most M times the rows.
    - kind="empirical": y is what the data holds. Not an approximation of the Hessian far from a fit (Kunstner, Balles
      and Hennig 2019). A function as ``loss`` must be a mean over rows, each a function of its own outputs.

    Args:
        model, data, loss, options: as for all operators. ``seed`` also sets the draws, which differ with the number of
            processes and the chunks.
        kind: "true" or "empirical".
        mc_samples: draws of y for each row; None for the exact expectation.

    Examples:
        >>> import torch
        >>> from onestep.curvature import FisherOperator
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)  # both classes have probability 1/2
        >>> F = FisherOperator(model, (torch.tensor([[2.0]]), torch.tensor([0])), "cross_entropy")
        >>> F @ torch.tensor([1.0, 0.0])
        tensor([ 1., -1.])
    """

    _construction_depth = 4
    __doc__ = f"{cleandoc(__doc__ or '')}\n\n{cleandoc(CurvatureOperator.__doc__ or '')}"

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: Any = "mse",
        *,
        kind: Literal["true", "empirical"] = "true",
        mc_samples: int | None = None,
        **options: Any,
    ) -> None:
        check_choice("kind", kind, "true", "empirical")
        if mc_samples is not None:
            check_count("mc_samples", mc_samples)
            if kind == "empirical":
                raise ValueError(f"mc_samples={mc_samples} with kind='empirical', which draws nothing; expected None")
        data, loss = in_order(data, loss, stacklevel=2)
        if kind == "true" and as_loss(loss).name not in LOSSES:
            raise ValueError(
                "kind='true' needs the distribution behind the loss, which a function does not tell; expected a named "
                "loss, kind='empirical', or GaussNewtonOperator"
            )
        self.kind, self.mc_samples = kind, mc_samples
        super().__init__(model, data, loss, **options)

    def _slopes(self, chunk: Chunk, number: int, outputs: Tensor) -> Tensor:
        """Of the data or of draws (r,n,…): C is the mean of their outer products."""
        if self.kind == "empirical":
            slope: Tensor = grad(self._loss_of_outputs(chunk))(outputs)
            return slope[None]
        generator = torch.Generator(self.device)
        generator.manual_seed((self.seed * 1_000_003 + number) * share().size + share().rank)
        draws = range(self.mc_samples or 0)
        return torch.stack([drawn_slope(self._loss, outputs, chunk.target, generator) for _ in draws])

    def _root(self, chunk: Chunk, number: int, point: Named, outputs: Tensor) -> Root | None:
        if self.kind == "true" and self.mc_samples is None:
            return super()._root(chunk, number, point, outputs)
        slopes = self._slopes(chunk, number, outputs)
        slopes = slopes / len(slopes) ** 0.5

        def draw(generator: torch.Generator) -> Tensor:
            chosen = signs(slopes[(...,) + (slice(0, 1),) * (outputs.dim() - 1)], generator)
            total: Tensor = (chosen * slopes).sum(0)
            return total

        return draw

    def _outer(self, chunk: Chunk, number: int, point: Named) -> Callable[[Tensor, Tensor], Tensor]:
        loss = self._loss_of_outputs(chunk)
        if self.kind == "true" and self.mc_samples is None:
            return lambda outputs, tangent: hvp(loss, outputs, tangent)
        slopes = self._slopes(chunk, number, self._outputs(chunk)(point))

        def product(outputs: Tensor, tangent: Tensor) -> Tensor:
            along = (slopes * tangent).reshape(*slopes.shape[:2], -1).sum(-1)
            along = along.reshape(*along.shape, *[1] * (tangent.dim() - 1))
            mean: Tensor = (slopes * along).mean(0)
            return mean

        return product
