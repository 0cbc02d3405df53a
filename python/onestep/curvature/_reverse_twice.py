"""Products by reverse mode alone, on torch's own graphs: for models that torch.func cannot differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onestep._torch_private import tree_flatten, tree_map, tree_unflatten
from onestep.curvature.kernels import gradients


def hessian_product(scalar: Callable[[Any], Tensor], params: Any, v: Any) -> Any:
    """Hv as the gradient of gᵀv. Can be differentiated where gradients are recorded."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves, structure, point = _leaves(params, recorded)
        loss = scalar(point)
        slopes = _pulled([loss], leaves, [torch.ones_like(loss)])
        along = sum(
            ((slope * t).sum() for slope, t in zip(slopes, tree_flatten(v)[0], strict=True)), loss.new_zeros(())
        )
        return tree_unflatten(_pulled([along], leaves, [torch.ones_like(along)], recorded=recorded), structure)


class GaussNewtonProduct:
    """v ↦ Jᵀ C J v: Jᵀ from one pass, whose graph is kept, and J as the derivative of w ↦ Jᵀw (Pearlmutter 1994).

    Outputs are a tensor or a tree of tensors.
    """

    def __init__(self, model_fn: Callable[[Any], Any], params: Any) -> None:
        self.recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            self.leaves, self.structure, point = _leaves(params, self.recorded)
            self.outputs, self.output_structure = tree_flatten(model_fn(point))
            self.weights = [torch.zeros_like(output, requires_grad=True) for output in self.outputs]
            self.pulled = _pulled(self.outputs, self.leaves, self.weights)

    def __call__(self, outer: Callable[[Any, Any], Any], v: Any) -> Any:
        with torch.enable_grad():
            pairs = zip(self.pulled, tree_flatten(v)[0], strict=True)
            moving = [(slope, t) for slope, t in pairs if slope.requires_grad]
            tangents = [torch.zeros_like(output) for output in self.outputs]
            if moving:
                slopes, along = zip(*moving, strict=True)
                tangents = gradients(slopes, self.weights, along, recorded=self.recorded)
        outputs = self.outputs if self.recorded else [output.detach() for output in self.outputs]
        image = outer(*(tree_unflatten(parts, self.output_structure) for parts in (outputs, tangents)))
        with torch.enable_grad():
            parts = _pulled(self.outputs, self.leaves, tree_flatten(image)[0], recorded=self.recorded)
            return tree_unflatten(parts, self.structure)


def _leaves(params: Any, recorded: bool) -> tuple[list[Tensor], Any, Any]:
    """Tensors to differentiate by, their structure, and params made of them; the caller's own where he may follow."""

    def leaf(p: Tensor) -> Tensor:
        return p if recorded and p.requires_grad else p.detach().requires_grad_()

    point = tree_map(leaf, params)
    leaves, structure = tree_flatten(point)
    return leaves, structure, point


def _pulled(outputs: list[Tensor], leaves: list[Tensor], along: list[Tensor], *, recorded: bool = True) -> list[Tensor]:
    """Jᵀ along, zeros where nothing depends on a leaf."""
    pairs = [(output, a) for output, a in zip(outputs, along, strict=True) if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    depending, cotangents = zip(*pairs, strict=True)
    return gradients(depending, leaves, cotangents, recorded=recorded)
