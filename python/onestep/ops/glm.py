"""Ops on generalised linear models: ``glm_point`` (loss, gradient, curvature) and ``glm_product`` (Hessian products).

Targets and right-hand sides are matrices here: y is (…,n,k) in the dtype of W or (…,n,1) class indices in int64, W is
(…,d,k), one row more with an intercept, and V is (…,m,d,k). ``onestep.curvature.glm`` is the public face.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from onestep import _native
from onestep.ops._library import OpFunction, define, register_derivatives
from onestep.ops._operands import Operand, broadcast_batch, check_dims, check_size

# csrc/glm/glm.hpp, GlmFamily
FAMILIES = {"gaussian": 0, "logistic": 1, "softmax": 2, "poisson": 3}
# csrc/glm/glm.hpp, kCurvatureSlack
_CURVATURE_SLACK = 16

# Which targets a family knows: the least, the largest, and both in words.
_LARGEST = torch.finfo(torch.float64).max
_TARGETS = {
    "gaussian": (-_LARGEST, _LARGEST, "finite numbers"),
    "logistic": (0.0, 1.0, "0 to 1"),
    "softmax": (0.0, 1.0, "0 to 1"),
    "poisson": (0.0, _LARGEST, "finite counts >= 0"),
}
# How far the probabilities of a row may be from a sum of 1.
_SUM_TOLERANCE = 1e-3

_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
_POINT = {dtype: getattr(_native, f"glm_point_{suffix}") for dtype, suffix in _SUFFIX.items()}
_PRODUCT = {dtype: getattr(_native, f"glm_product_{suffix}") for dtype, suffix in _SUFFIX.items()}


def parameter_dtype(X: Tensor) -> torch.dtype:
    """The dtype of W, V, y, weight and the results: X's own, or float32 for bfloat16."""
    if X.dtype not in _SUFFIX:
        raise TypeError(f"X has dtype {X.dtype}; expected torch.float32, torch.float64 or torch.bfloat16")
    return torch.float32 if X.dtype == torch.bfloat16 else X.dtype


def _whole_operand(tensor: Tensor | None) -> Operand | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.stride(), tensor)


def _batches(*operands: tuple[Tensor | None, int]) -> tuple[int, ...]:
    return broadcast_batch(*(tuple(t.shape[: t.dim() - own]) for t, own in operands if t is not None))


def _matrices(tensor: Tensor | None, batch: tuple[int, ...], own: int) -> Any:
    """The tensor's matrices in the order of the batch, as views."""
    if tensor is None:
        return itertools.repeat(None, math.prod(batch))
    expanded = tensor.expand((*batch, *tensor.shape[tensor.dim() - own :]))
    return (expanded[index] for index in itertools.product(*map(range, batch)))


# ----------------------------------------------------------------------------------------------------------- glm_point

Point = tuple[Tensor, Tensor, Tensor]


def _check_rows(X: Tensor, W: Tensor, weight: Tensor | None, intercept: bool) -> None:
    dtype = parameter_dtype(X)
    check_dims("X", X, 2, "(..., n, d)")
    check_dims("W", W, 2, "(..., d, k)")
    n, d = X.shape[-2:]
    check_size("W", W, -2, d + intercept, f"(..., {d + intercept}, k): a row per feature, and one for an intercept")
    operands = [("W", W)]
    if weight is not None:
        check_size("weight", weight, -1, n, f"(..., {n})")
        operands.append(("weight", weight))
    for name, tensor in operands:
        check_operand(name, tensor, X, dtype)


def check_operand(name: str, tensor: Tensor, X: Tensor, dtype: torch.dtype) -> None:
    """Raises unless the tensor has the given dtype (TypeError) and X's device (ValueError)."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {dtype} beside X of {X.dtype}")
    if tensor.device != X.device:
        raise ValueError(f"{name} is on device {tensor.device}; expected {X.device}, X's device")


def _check_targets(X: Tensor, y: Tensor, W: Tensor, family: int) -> None:
    softmax = family == FAMILIES["softmax"]
    k = W.shape[-1]
    if softmax and k < 2:
        raise ValueError(f"W has shape {tuple(W.shape)}; expected a column for each of 2 classes or more")
    labelled = softmax and y.dtype == torch.int64
    columns = 1 if labelled else k
    check_dims("y", y, 2, "(..., n, k)")
    if y.shape[-2:] != (X.shape[-2], columns):
        raise ValueError(f"y has shape {tuple(y.shape)}; expected (..., {X.shape[-2]}, {columns})")
    check_operand("y", y, X, torch.int64 if labelled else parameter_dtype(X))


def _check_values(y: Tensor, family: int, classes: int) -> None:
    """Raises ValueError unless the family knows every target. By numpy, since torch's reductions hang after a fork."""
    if y.numel() == 0:
        return
    values = y.detach().numpy()
    least, most = values.min().item(), values.max().item()
    if not y.is_floating_point():
        if least < 0 or most >= classes:
            raise ValueError(f"y has classes from {least} to {most}; expected 0 to {classes - 1}, W's columns")
        return
    name = list(FAMILIES)[family]
    low, high, meaning = _TARGETS[name]
    # NaN compares false.
    if not (low <= least and most <= high):
        raise ValueError(f"y has values from {least} to {most}; expected {meaning} for family={name!r}")
    if name == "softmax":
        off = abs(values.sum(-1) - 1).max()
        if off > _SUM_TOLERANCE:
            raise ValueError(f"y has rows whose sum is off 1 by {off}; expected one-hot rows or probabilities")


def _point_fake(X: Tensor, y: Tensor, W: Tensor, weight: Tensor | None, family: int, intercept: bool) -> Point:
    _check_rows(X, W, weight, intercept)
    _check_targets(X, y, W, family)
    batch = _batches((X, 2), (y, 2), (W, 2), (weight, 1))
    return (
        W.new_empty(batch, dtype=torch.float64),
        W.new_empty((*batch, *W.shape[-2:])),
        W.new_empty((*batch, X.shape[-2] * W.shape[-1] + _CURVATURE_SLACK)),
    )


def _point_cpu(X: Tensor, y: Tensor, W: Tensor, weight: Tensor | None, family: int, intercept: bool) -> Point:
    batch = _batches((X, 2), (y, 2), (W, 2), (weight, 1))
    if batch:
        points = [
            _point_cpu(*operands, family, intercept)
            for operands in zip(
                _matrices(X, batch, 2),
                _matrices(y, batch, 2),
                _matrices(W, batch, 2),
                _matrices(weight, batch, 1),
                strict=True,
            )
        ]
        if not points:
            return _point_fake(X, y, W, weight, family, intercept)
        stacked = (torch.stack(parts) for parts in zip(*points, strict=True))
        loss, gradient, curvature = (part.reshape((*batch, *part.shape[1:])) for part in stacked)
        return loss, gradient, curvature
    loss, gradient, curvature = _point_fake(X, y, W, weight, family, intercept)
    curvature[-_CURVATURE_SLACK:] = 0
    labelled = not y.is_floating_point()
    _check_values(y, family, W.shape[-1])
    _POINT[X.dtype](
        family,
        intercept,
        _whole_operand(X),
        None if labelled else _whole_operand(y),
        _whole_operand(y.squeeze(-1)) if labelled else None,
        _whole_operand(weight),
        _whole_operand(W),
        *X.shape,
        W.shape[-1],
        loss.data_ptr(),
        gradient.data_ptr(),
        curvature.data_ptr(),
    )
    return loss, gradient, curvature


define(
    "glm_point(Tensor X, Tensor y, Tensor W, Tensor? weight, int family, bool intercept) -> (Tensor, Tensor, Tensor)",
    cpu=_point_cpu,
    fake=_point_fake,
    own_dims=(2, 2, 2, 1),
)


def _refuse(what: tuple[tuple[str, bool], ...]) -> None:
    for name, wanted in what:
        if wanted:
            raise NotImplementedError(
                f"glm is differentiable in W alone, but {name} takes part in derivatives: use {name}.detach()"
            )


def _product(V: Tensor, ctx: Any) -> Tensor:
    """XᵀC(XV) at a saved point, for V (…,d,k)."""
    X, W, weight, curvature = ctx.saved_tensors[:4]
    block = V.unsqueeze(-3)
    product: Tensor = torch.ops.onestep.glm_product.default(block, X, W, weight, curvature, ctx.family, ctx.intercept)
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
        W, gradient = ctx.saved_tensors[1], ctx.saved_tensors[4]
        total = None
        if d_loss is not None:
            total = d_loss[..., None, None].to(W.dtype) * gradient
        if d_gradient is not None:
            product = _product(d_gradient, ctx)
            total = product if total is None else total + product
        return None, None, None if total is None else total.sum_to_size(W.shape), None, None, None

    @staticmethod
    def jvp(ctx: Any, dX: Any, dy: Any, dW: Any, d_weight: Any, *unused: Any) -> tuple[Any, ...]:
        _refuse((("X", dX is not None), ("y", dy is not None), ("weight", d_weight is not None)))
        gradient = ctx.saved_tensors[4]
        return (gradient * dW).sum((-2, -1), dtype=torch.float64), _product(dW.expand_as(gradient), ctx), None


# --------------------------------------------------------------------------------------------------------- glm_product


def _product_fake(
    V: Tensor, X: Tensor, W: Tensor, weight: Tensor | None, curvature: Tensor, family: int, intercept: bool
) -> Tensor:
    _check_rows(X, W, weight, intercept)
    check_dims("V", V, 3, "(..., m, d, k)")
    check_operand("V", V, X, W.dtype)
    check_operand("curvature", curvature, X, W.dtype)
    if V.shape[-2:] != W.shape[-2:]:
        raise ValueError(f"V has shape {tuple(V.shape)}; expected (..., m, {W.shape[-2]}, {W.shape[-1]}), W's")
    check_size("curvature", curvature, -1, X.shape[-2] * W.shape[-1] + _CURVATURE_SLACK, "that of glm_point's result")
    batch = _batches((V, 3), (X, 2), (W, 2), (weight, 1), (curvature, 1))
    return W.new_empty((*batch, *V.shape[-3:]))


def _product_cpu(
    V: Tensor, X: Tensor, W: Tensor, weight: Tensor | None, curvature: Tensor, family: int, intercept: bool
) -> Tensor:
    batch = _batches((V, 3), (X, 2), (W, 2), (weight, 1), (curvature, 1))
    if V.shape[:-3] == batch and all(
        t is None or t.dim() == own for t, own in ((X, 2), (W, 2), (weight, 1), (curvature, 1))
    ):
        # One point for the whole batch: its right-hand sides share one pass.
        V, shape = V.reshape((math.prod(V.shape[:-2]), *V.shape[-2:])), V.shape
        product = _product_fake(V, X, W, weight, curvature, family, intercept)
        # The kernel reads it as one array; vmap may hand over a strided view.
        curvature = curvature.contiguous()
        _PRODUCT[X.dtype](
            family,
            intercept,
            _whole_operand(X),
            _whole_operand(weight),
            curvature.data_ptr(),
            _whole_operand(V),
            V.shape[0],
            *X.shape,
            V.shape[-1],
            product.data_ptr(),
        )
        return product.reshape(shape)
    products = [
        _product_cpu(*operands, family, intercept)
        for operands in zip(
            _matrices(V, batch, 3),
            _matrices(X, batch, 2),
            _matrices(W, batch, 2),
            _matrices(weight, batch, 1),
            _matrices(curvature, batch, 1),
            strict=True,
        )
    ]
    if not products:
        return _product_fake(V, X, W, weight, curvature, family, intercept)
    return torch.stack(products).reshape((*batch, *V.shape[-3:]))


define(
    "glm_product(Tensor V, Tensor X, Tensor W, Tensor? weight, Tensor curvature, int family, bool intercept) -> Tensor",
    cpu=_product_cpu,
    fake=_product_fake,
    own_dims=(3, 2, 2, 1, 1),
)


def _outputs(X: Tensor, V: Tensor, intercept: bool) -> Tensor:
    """XV, with the column of ones where there is an intercept."""
    return X @ V[..., :-1, :] + V[..., -1:, :] if intercept else X @ V


def _third_derivative(V: Tensor, U: Tensor, ctx: Any) -> Tensor:
    """The derivative of XᵀC(XV) as W moves along U; V and U are (…,m,d,k). Made of torch's own ops."""
    X, W, weight = ctx.saved_tensors[:3]
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
            return (None,) * len(needed)
        _refuse((("X", needed[1]), ("weight", needed[3])))
        X, W, weight, curvature, V = ctx.saved_tensors
        dV = torch.ops.onestep.glm_product.default(grad, X, W, weight, curvature, ctx.family, ctx.intercept)
        dW = _third_derivative(V, grad, ctx).sum(-3).sum_to_size(W.shape) if needed[2] else None
        return dV.sum_to_size(V.shape), None, dW, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dV: Any, dX: Any, dW: Any, d_weight: Any, *unused: Any) -> Tensor:
        _refuse((("X", dX is not None), ("weight", d_weight is not None)))
        X, W, weight, curvature, V = ctx.saved_tensors
        total: Any = None
        if dV is not None:
            total = torch.ops.onestep.glm_product.default(dV, X, W, weight, curvature, ctx.family, ctx.intercept)
        if dW is not None:
            moved = _third_derivative(V, dW.unsqueeze(-3), ctx)
            total = moved if total is None else total + moved
        result: Tensor = total
        return result


register_derivatives("glm_point", _Point)
register_derivatives("glm_product", _Product)
