"""The Hessian, Gauss-Newton and Fisher matrices of a loss over data, as linear operators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad

from onestep.curvature._operator import CurvatureOperator, check_count, in_order
from onestep.curvature._passes import Named
from onestep.curvature.products import hessian_product, hvp, outer_products
from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import share
from onestep.evaluation.losses import LOSSES, as_loss, drawn_slope


class HessianOperator(CurvatureOperator):
    """H = ∂²L/∂θ², products by forward over reverse mode (Pearlmutter, Neural Computation 6, 1994)."""

    __doc__ = f"{__doc__}\n\n{CurvatureOperator.__doc__}"

    def _product(self, chunk: Chunk, number: int, point: Named) -> Callable[[Named], Named]:
        outputs, loss = self._outputs(chunk), self._loss_of_outputs(chunk)
        return lambda v: hessian_product(lambda values: loss(outputs(values)), point, v, self._passes.route)


class _OuterProductOperator(CurvatureOperator):
    """Jᵀ C J, J = ∂outputs/∂θ: the outputs' tangent and what Jᵀ goes back through come from one forward pass."""

    @abstractmethod
    def _outer(self, chunk: Chunk, number: int, point: Named) -> Callable[[Tensor, Tensor], Tensor]:
        """(outputs, tangent) ↦ C tangent, for the loss summed over a chunk."""

    def _product(self, chunk: Chunk, number: int, point: Named) -> Callable[[Named], Named]:
        outer = self._outer(chunk, number, point)
        return outer_products(self._outputs(chunk), outer, point, keep=False, route=self._passes.route)


class GaussNewtonOperator(_OuterProductOperator):
    """G = 1/m Σᵢ Jᵢᵀ (∂²ℓᵢ/∂fᵢ²) Jᵢ, Jᵢ = ∂f(xᵢ)/∂θ (Schraudolph, Neural Computation 14, 2002).

    Positive semi-definite where ℓ is convex in the outputs.
    """

    __doc__ = f"{__doc__}\n\n{CurvatureOperator.__doc__}"

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

    ``kind`` and ``mc_samples`` come on top of the arguments below; ``seed`` also sets the draws, which differ with the
    number of processes and the chunks.
    """

    _construction_depth = 4
    __doc__ = f"{__doc__}\n\n{CurvatureOperator.__doc__}"

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
        if kind not in ("true", "empirical"):
            raise ValueError(f"kind={kind!r}; expected 'true' or 'empirical'")
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

    def _outer(self, chunk: Chunk, number: int, point: Named) -> Callable[[Tensor, Tensor], Tensor]:
        loss = self._loss_of_outputs(chunk)
        if self.kind == "true" and self.mc_samples is None:
            return lambda outputs, tangent: hvp(loss, outputs, tangent)
        outputs = self._outputs(chunk)(point)
        if self.kind == "empirical":
            slopes = grad(loss)(outputs)[None]
        else:
            generator = torch.Generator(self.device)
            generator.manual_seed((self.seed * 1_000_003 + number) * share().size + share().rank)
            draws = range(self.mc_samples or 0)
            slopes = torch.stack([drawn_slope(self._loss, outputs, chunk.target, generator) for _ in draws])

        def product(outputs: Tensor, tangent: Tensor) -> Tensor:
            along = (slopes * tangent).reshape(*slopes.shape[:2], -1).sum(-1)
            along = along.reshape(*along.shape, *[1] * (tangent.dim() - 1))
            mean: Tensor = (slopes * along).mean(0)
            return mean

        return product
