"""Products by reverse mode alone, on torch's own graphs: for models that torch.func cannot differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onestep._torch_private import tree_flatten, tree_map, tree_unflatten


def hessian_product(scalar: Callable[[Any], Tensor], params: Any, v: Any) -> Any:
    """Hv as the gradient of gᵀv. Can be differentiated where gradients are recorded."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves, structure, point = _leaves(params, recorded)
        loss = scalar(point)
        slopes = _pulled(loss, leaves, torch.ones_like(loss))
        along = sum(
            ((slope * t).sum() for slope, t in zip(slopes, tree_flatten(v)[0], strict=True)), loss.new_zeros(())
        )
        return tree_unflatten(_pulled(along, leaves, torch.ones_like(along), recorded=recorded), structure)


class GaussNewtonProduct:
    """v ↦ Jᵀ C J v: Jᵀ from one pass, whose graph is kept, and J as the derivative of w ↦ Jᵀw (Pearlmutter 1994)."""

    def __init__(self, model_fn: Callable[[Any], Tensor], params: Any) -> None:
        self.recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            self.leaves, self.structure, point = _leaves(params, self.recorded)
            self.outputs = model_fn(point)
            self.weights = torch.zeros_like(self.outputs, requires_grad=True)
            self.pulled = _pulled(self.outputs, self.leaves, self.weights)

    def __call__(self, outer: Callable[[Tensor, Tensor], Tensor], v: Any) -> Any:
        with torch.enable_grad():
            pairs = zip(self.pulled, tree_flatten(v)[0], strict=True)
            moving = [(slope, t) for slope, t in pairs if slope.requires_grad]
            tangent = torch.zeros_like(self.outputs)
            if moving:
                slopes, tangents = zip(*moving, strict=True)
                (tangent,) = torch.autograd.grad(
                    slopes,
                    self.weights,
                    tangents,
                    retain_graph=True,
                    create_graph=self.recorded,
                    materialize_grads=True,
                )
        outputs = self.outputs if self.recorded else self.outputs.detach()
        along = outer(outputs, tangent)
        with torch.enable_grad():
            return tree_unflatten(_pulled(self.outputs, self.leaves, along, recorded=self.recorded), self.structure)


def _leaves(params: Any, recorded: bool) -> tuple[list[Tensor], Any, Any]:
    """Tensors to differentiate by, their structure, and params made of them; the caller's own where he may follow."""

    def leaf(p: Tensor) -> Tensor:
        return p if recorded and p.requires_grad else p.detach().requires_grad_()

    point = tree_map(leaf, params)
    leaves, structure = tree_flatten(point)
    return leaves, structure, point


def _pulled(outputs: Tensor, leaves: list[Tensor], along: Tensor, *, recorded: bool = True) -> list[Tensor]:
    """Jᵀ along, zeros where nothing depends on a leaf."""
    if not outputs.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(
        torch.autograd.grad(outputs, leaves, along, retain_graph=True, create_graph=recorded, materialize_grads=True)
    )
