"""Rows R of a model's Jacobian, scaled so that RᵀR is the Gauss-Newton matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vjp, vmap

from onestep._torch_private import tree_map_only
from onestep.curvature.kernels import gradients
from onestep.curvature.products import Route
from onestep.evaluation.data import Chunk
from onestep.evaluation.losses import Loss, widened
from onestep.evaluation.module import call_model

# Rows are formed this many bytes at a time.
_JACOBIAN_BYTES = 64 * 2**20


def jacobian_parts(chunk: Chunk, row_bytes: int) -> Iterator[Chunk]:
    """The rows whose Jacobian, of so many bytes a row, is formed at a time."""
    size = max(1, _JACOBIAN_BYTES // row_bytes)
    for begin in range(0, len(chunk), size):
        yield chunk.rows(slice(begin, begin + size))


def root_jacobian(
    module: nn.Module,
    loss: Loss | None,
    chunk: Chunk,
    point: Tensor,
    values: Callable[[Tensor], dict[str, Tensor]],
    route: Route,
) -> Iterator[Tensor]:
    """R (m,k,p), some of the chunk's rows at a time: RᵀR summed over rows and outputs is the sum of JᵀHJ.

    J is the Jacobian of a row's k outputs in the parameters, H the Hessian of the row's loss in those outputs.

    Args:
        loss: None for R = J.
        point: (p,), the parameters' values.
        values: a vector (p,) ↦ parameters by their names, as the module's are replaced; others stay.
    """

    def one(vector: Tensor, inputs: Any) -> Tensor:
        row = tree_map_only(Tensor, lambda t: t.unsqueeze(0), inputs)
        return widened(call_model(module, row, values(vector)).squeeze(0))

    def root(outputs: Tensor, target: Any) -> Tensor:
        return root_of_loss(loss, outputs, shape, target)

    def by_torch_func(part: Chunk) -> Tensor:
        def row(vector: Tensor, inputs: Any, target: Any) -> Tensor:
            linearized: tuple[Tensor, Any] = vjp(lambda v: one(v, inputs).reshape(-1), vector)  # type: ignore[assignment]
            outputs, pullback = linearized
            rows: Tensor = vmap(pullback)(root(outputs, target))[0]
            return rows

        return vmap(row, in_dims=(None, 0, 0))(point, part.inputs, part.target)

    def by_reverse_mode(part: Chunk) -> Tensor:
        """Row by row on torch's own graph, for models that torch.func cannot differentiate."""
        outputs, J = jacobian_by_rows(
            lambda vector: widened(call_model(module, part.inputs, values(vector))).reshape(len(part), -1), point
        )
        return vmap(root)(outputs, part.target) @ J

    outputs = widened(call_model(module, chunk.rows(slice(0, 1)).inputs))
    shape = outputs.shape[1:]
    for part in jacobian_parts(chunk, outputs.numel() * len(point) * outputs.element_size()):
        yield route.take(partial(by_torch_func, part), partial(by_reverse_mode, part))


def jacobian_by_rows(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Tensor]:
    """function(point) (…) and its Jacobian (…,p) at a point (p,), one output after the other on torch's own graph.

    For functions that torch.func cannot differentiate.
    """
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        outputs = function(leaf)
        rows = [
            gradients([z], [leaf], [torch.ones_like(z)])[0] if z.requires_grad else torch.zeros_like(point)
            for z in outputs.flatten()
        ]
    J = torch.stack(rows) if rows else point.new_empty(0, len(point))
    return outputs.detach(), J.reshape(*outputs.shape, len(point))


def root_of_loss(loss: Loss | None, outputs: Tensor, shape: torch.Size, target: Any) -> Tensor:
    """R (k,k) with RᵀR the Hessian of a row's loss in its k outputs, of this shape; NaN where that is not finite."""
    if loss is None or loss.name == "mse":
        factor = 1.0 if loss is None else math.sqrt(2.0)
        return factor * torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)

    def row_loss(z: Tensor) -> Tensor:
        of_one = tree_map_only(Tensor, lambda t: t.unsqueeze(0), target)
        return loss.sum(z.reshape(shape).unsqueeze(0), of_one)

    def slope(z: Tensor) -> Tensor:
        result: Tensor = grad(row_loss)(z)
        return result

    H = jacrev(slope)(outputs)
    # LAPACK takes no NaN, and none is hidden.
    finite = H.isfinite().all()
    H = torch.where(finite, H, 0.0)
    values, vectors = torch.linalg.eigh((H + H.mT) / 2)
    root: Tensor = torch.where(finite, (vectors * values.clamp_min(0).sqrt()).mT, math.nan)
    return root
