"""Derivatives of the ops on generalised linear models, which are differentiable in W and V."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onestep.ops._derivatives import OpFunction, register_derivatives
from onestep.ops.glm.schema import FAMILIES, glm_point, glm_product


def _refuse(what: tuple[tuple[str, bool], ...]) -> None:
    for name, wanted in what:
        if wanted:
            raise NotImplementedError(
                f"glm is differentiable in W alone, but {name} takes part in derivatives: use {name}.detach()"
            )


def _product(V: Tensor, saved: tuple[Any, ...], ctx: Any) -> Tensor:
    """XᵀC(XV) at a saved point, for V (…,d,k)."""
    X, W, weight, curvature = saved[:4]
    block = V.unsqueeze(-3)
    product: Tensor = glm_product.dispatched(block, X, W, weight, curvature, ctx.family, ctx.intercept)
    return product.squeeze(-3)


class _Point(OpFunction):
    """dloss = ⟨g, dW⟩, dg = XᵀC(X dW); the curvature is a cached function of W."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        X, _, W, weight, ctx.family, ctx.intercept = inputs
        _, gradient, curvature = output
        ctx.mark_non_differentiable(curvature)
        ctx.save_for_backward(X, W, weight, curvature, gradient)
        ctx.save_for_forward(X, W, weight, curvature, gradient)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, d_gradient: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        _refuse((("X", needed[0]), ("y", needed[1]), ("weight", needed[3])))
        saved = ctx.saved_tensors
        W, gradient = saved[1], saved[4]
        total = None
        if d_loss is not None:
            total = d_loss[..., None, None].to(W.dtype) * gradient
        if d_gradient is not None:
            product = _product(d_gradient, saved, ctx)
            total = product if total is None else total + product
        return None, None, None if total is None else total.sum_to_size(W.shape)

    @staticmethod
    def jvp(ctx: Any, dX: Any, dy: Any, dW: Any, d_weight: Any, *unused: Any) -> tuple[Any, ...]:
        _refuse((("X", dX is not None), ("y", dy is not None), ("weight", d_weight is not None)))
        saved = ctx.saved_tensors
        gradient = saved[4]
        return (gradient * dW).sum((-2, -1), dtype=torch.float64), _product(dW.expand_as(gradient), saved, ctx), None


def _outputs(X: Tensor, V: Tensor, intercept: bool) -> Tensor:
    """XV, with the column of ones where there is an intercept."""
    return X @ V[..., :-1, :] + V[..., -1:, :] if intercept else X @ V


def _third_derivative(V: Tensor, U: Tensor, saved: tuple[Any, ...], ctx: Any) -> Tensor:
    """The derivative of XᵀC(XV) as W moves along U; V and U are (…,m,d,k). Made of torch's own ops."""
    X, W, weight = saved[:3]
    # A dimension for the right-hand sides.
    X, W = X.unsqueeze(-3), W.unsqueeze(-3)
    X = X.to(W.dtype)
    eta, z, u = (_outputs(X, B, ctx.intercept) for B in (W, V, U))
    if ctx.family == FAMILIES["softmax"]:
        P = eta.softmax(-1)
        tangent = P * (u - (P * u).sum(-1, keepdim=True))
        middle = tangent * (z - (P * z).sum(-1, keepdim=True)) - P * (tangent * z).sum(-1, keepdim=True)
    elif ctx.family == FAMILIES["logistic"]:
        p, not_p = eta.sigmoid(), (-eta).sigmoid()
        middle = p * not_p * (not_p - p) * z * u
    elif ctx.family == FAMILIES["poisson"]:
        middle = eta.exp() * z * u
    else:
        middle = torch.zeros_like(eta) * z * u
    if weight is not None:
        middle = weight[..., None, :, None] * middle
    back: Tensor = X.mT @ middle
    return torch.cat((back, middle.sum(-2, keepdim=True)), -2) if ctx.intercept else back


class _Product(OpFunction):
    """H is symmetric: in V the derivative is H itself; in W it is the third derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        V, X, W, weight, curvature, ctx.family, ctx.intercept = inputs
        ctx.save_for_backward(X, W, weight, curvature, V)
        ctx.save_for_forward(X, W, weight, curvature, V)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if grad is None:
            return ()
        _refuse((("X", needed[1]), ("weight", needed[3])))
        saved = ctx.saved_tensors
        X, W, weight, curvature, V = saved
        dV = glm_product.dispatched(grad, X, W, weight, curvature, ctx.family, ctx.intercept)
        dW = _third_derivative(V, grad, saved, ctx).sum(-3).sum_to_size(W.shape) if needed[2] else None
        return dV.sum_to_size(V.shape), None, dW

    @staticmethod
    def jvp(ctx: Any, dV: Any, dX: Any, dW: Any, d_weight: Any, *unused: Any) -> Tensor:
        _refuse((("X", dX is not None), ("weight", d_weight is not None)))
        saved = ctx.saved_tensors
        X, W, weight, curvature, V = saved
        total: Any = None
        if dV is not None:
            total = glm_product.dispatched(dV, X, W, weight, curvature, ctx.family, ctx.intercept)
        if dW is not None:
            moved = _third_derivative(V, dW.unsqueeze(-3), saved, ctx)
            total = moved if total is None else total + moved
        result: Tensor = total
        return result


register_derivatives(glm_point, _Point)
register_derivatives(glm_product, _Product)
