"""A linear head under cross-entropy or a Poisson loss: a generalised linear model of what the layer is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

import onestep.linalg as linalg
from onestep.curvature import GLMPoint, glm
from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import summed_by_piece
from onestep.evaluation.layers import columns
from onestep.evaluation.losses import IGNORED, Loss, like_outputs, scores_and_classes
from onestep.evaluation.parameters import ParameterVector
from onestep.linalg.spd import factor_with_shift
from onestep.optim.objective import Preconditioner
from onestep.training.objective import DataObjective
from onestep.training.structures.affine_head import Head, features_and_outputs
from onestep.training.structures.base import Mismatch, ObjectiveType, Structure

if TYPE_CHECKING:
    from onestep.training.facts import Facts

# The families of `curvature.glm` by the losses that they are.
_FAMILIES = {"cross_entropy": "softmax", "poisson": "poisson"}

# The largest matrix that is factored: the whole Hessian, or its block for each output.
_LARGEST_FACTOR = 1024
# What is added to a diagonal of ones at least. Directions in which nothing bends, as the common shift of softmax, need
# it.
_LEAST_DAMPING = 1e-10
# The same, in ε of the parameters' type: what rounding makes of a curvature of zero.
_ROUNDINGS = 10
# A diagonal element counts as this part of the largest at least: that of a feature that is always zero is zero.
_LEAST_DIAGONAL = 1e-20


def is_glm(loss: Loss) -> bool:
    """Whether the loss of a linear layer's outputs is that of a generalised linear model with a canonical link."""
    return loss.name in _FAMILIES


class GLMHead(Structure):
    """The one linear layer that is trained ends the model, under a loss of a generalised linear model."""

    name: ClassVar[str] = "GLM head"

    def objective(self, facts: Facts, method: str) -> ObjectiveType | Mismatch:
        """Products with the Hessian by the GLM kernels, for methods that take products."""
        if method in ("levenberg_marquardt", "gradient_descent"):
            return Mismatch(f"{method} takes no products with the Hessian")
        if not is_glm(facts.loss):
            return Mismatch(f"the loss is {facts.loss.name!r}, not one of {', '.join(map(repr, _FAMILIES))}")
        if facts.loss.name == "cross_entropy" and facts.first.target.is_floating_point():
            return Mismatch("the targets are probabilities")
        return facts.head if isinstance(facts.head, Mismatch) else partial(HeadObjective, head=facts.head)


class HeadObjective(DataObjective):
    """The loss of a model that ends in the one linear layer that is trained: curvature by ``onestep.curvature.glm``.

    The Hessian and the Gauss-Newton matrix are the same here. Each chunk goes through the model once, for the features,
    and a product reads those once.
    """

    def __init__(self, *args: Any, head: Head, **options: Any) -> None:
        super().__init__(*args, **options)
        self.head = head

    def _matrix(self, v: Tensor) -> Tensor:
        """A vector of parameters as W (d, k), with the bias as its last row."""
        outputs = len(self.head.weight)
        weight = v[: self.head.weight.numel()].view(outputs, -1).mT
        if self.head.bias is None:
            return weight
        return torch.cat((weight, v[self.head.weight.numel() :].unsqueeze(0)))

    def _vector(self, W: Tensor) -> Tensor:
        if self.head.bias is None:
            return W.mT.reshape(-1)
        return torch.cat((W[:-1].mT.reshape(-1), W[-1]))

    def _model(self, point: Tensor, chunk: Chunk) -> GLMPoint:
        found = features_and_outputs(self.head, self.module, chunk)
        if found is None:
            raise ValueError("the model's outputs are not those of its last layer for some rows; set another method")
        features, outputs = (columns(self.head.layer, value) for value in found)
        weight = None
        if self.loss.name == "cross_entropy":
            target = scores_and_classes(found[1], chunk.target)[1]
            if (target == IGNORED).any():
                weight = (target != IGNORED).to(features.dtype)
                target = target.clamp_min(0)
        else:
            target = columns(self.head.layer, like_outputs(found[1], chunk.target)).to(outputs.dtype)
        W = self._matrix(point)
        return glm(features, target, W, _FAMILIES[self.loss.name], weight=weight, intercept=self.head.bias is not None)

    def multiplier(
        self, parameters: ParameterVector, point: Tensor, chunk: Chunk, *, hessian: bool
    ) -> Callable[[Tensor], Tensor]:
        model = self._model(point, chunk)
        return lambda v: self._vector(model.hvp(self._matrix(v)))

    def without_flat(self, parameters: ParameterVector) -> Callable[[Tensor], Tensor] | None:
        """Softmax does not see what is added to the scores of all classes."""
        if self.loss.name != "cross_entropy":
            return None

        def centred(v: Tensor) -> Tensor:
            W = self._matrix(v)
            return self._vector(W - W.mean(1, keepdim=True))

        return centred

    def preconditioner(self, parameters: ParameterVector) -> Preconditioner | None:
        point = parameters.read()
        height, outputs = self._matrix(point).shape
        whole = height * outputs <= _LARGEST_FACTOR
        if not whole and height > _LARGEST_FACTOR:
            return super().preconditioner(parameters)
        shape = (1, height * outputs, height * outputs) if whole else (outputs, height, height)

        def terms() -> Iterator[tuple[int, Tensor, list[float]]]:
            for chunk in self.curvature_chunks():
                model = self._model(point, chunk)
                blocks = model.gram().unsqueeze(0) if whole else model.gram_blocks()
                yield chunk.piece, blocks.double(), [self._elements(chunk)]

        like = torch.empty(shape, dtype=torch.float64, device=point.device)
        total, (count,) = summed_by_piece(self.pieces, (like, 1), terms)
        blocks = total / (count or 1)
        # Products of features in float32 are off by some ε of themselves.
        rounding = max(_LEAST_DAMPING, _ROUNDINGS * torch.finfo(point.dtype).eps)

        def solver(damping: float) -> Callable[[Tensor], Tensor]:
            # To a diagonal of ones: what is small beside a column of incomes is large beside the column of the bias.
            diagonal = blocks.diagonal(dim1=-2, dim2=-1) + damping
            scale = diagonal.clamp_min(_LEAST_DIAGONAL * diagonal.max().item() or 1.0).rsqrt().unsqueeze(-1)
            scaled = blocks * scale * scale.mT
            scaled.diagonal(dim1=-2, dim2=-1).add_(damping * scale.squeeze(-1).square())
            L, factored = factor_with_shift(scaled, rounding)
            if not factored:
                return torch.Tensor.clone

            def solve(v: Tensor) -> Tensor:
                V = self._matrix(v).double()
                right = V.reshape(1, -1, 1) if whole else V.mT.unsqueeze(-1)
                solution = (scale * linalg.cholesky_solve(scale * right, L)).squeeze(-1)
                return self._vector(solution.view(height, outputs) if whole else solution.mT).to(v.dtype)

            return solve

        return solver
