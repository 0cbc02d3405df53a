"""Schemas of the ops on generalised linear models: operands' checks, results' shapes, vmap rules.

Targets and right-hand sides are matrices here: y is (…,n,k) in the dtype of W or (…,n,1) class indices in int64, W is
(…,d,k), one row more with an intercept, and V is (…,m,d,k). ``onestep.curvature.glm`` is the public function.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onestep.ops._cuda import runs_on_cuda
from onestep.ops._library import define
from onestep.ops.operands import broadcast_batch, check_dims, check_size, reads_values

Batch = tuple[int, ...]
# loss, gradient, curvature
Point = tuple[Tensor, Tensor, Tensor]

# csrc/glm/glm.hpp, GlmFamily
FAMILIES = {"gaussian": 0, "logistic": 1, "softmax": 2, "poisson": 3}
# csrc/glm/glm.hpp, kCurvatureSlack
CURVATURE_SLACK = 16

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

# The dtypes of X that the kernels read, and what they compute in.
COMPUTE_DTYPES = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}
# What the CUDA kernels read beside these.
CUDA_DTYPES = {torch.float16: torch.float32}


def parameter_dtype(X: Tensor) -> torch.dtype:
    """The dtype of W, V, y, weight and the results: X's own, or float32 for bfloat16, and on a GPU for float16."""
    dtype = COMPUTE_DTYPES.get(X.dtype)
    if dtype is None and runs_on_cuda(X):
        dtype = CUDA_DTYPES.get(X.dtype)
    if dtype is None:
        raise TypeError(
            f"X has dtype {X.dtype}; expected torch.float32, torch.float64 or torch.bfloat16, or on a GPU torch.float16"
        )
    return dtype


def batches(*operands: tuple[Tensor | None, int]) -> tuple[int, ...]:
    return broadcast_batch(
        "X, y, W, weight", *(tuple(t.shape[: t.dim() - own]) for t, own in operands if t is not None)
    )


def matrices(tensor: Tensor | None, batch: tuple[int, ...], own: int) -> Any:
    """The tensor's matrices in the order of the batch, as views."""
    if tensor is None:
        return itertools.repeat(None, math.prod(batch))
    expanded = tensor.expand((*batch, *tensor.shape[tensor.dim() - own :]))
    return (expanded[index] for index in itertools.product(*map(range, batch)))


def _check_family(family: int) -> None:
    if family not in FAMILIES.values():
        raise ValueError(f"family is {family}; expected {FAMILIES}")


def _check_rows(X: Tensor, W: Tensor, weight: Tensor | None, intercept: bool) -> None:
    dtype = parameter_dtype(X)
    check_dims("X", X, 2, "(..., n, d)")
    check_dims("W", W, 2, "(..., d, k)")
    n, d = X.shape[-2:]
    # int: torch 2.11 cannot add a bool to a symbolic size.
    rows = d + int(intercept)
    check_size("W", W, -2, rows, f"(..., {rows}, k): a row per feature, and one for an intercept")
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


def check_values(y: Tensor, family: int, classes: int) -> None:
    """Raises ValueError unless the family knows every target; on a GPU nothing is read (see ``reads_values``)."""
    if y.numel() == 0 or not reads_values(y):
        return
    # By numpy, since torch's reductions hang in a forked child.
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


def check_point(X: Tensor, y: Tensor, W: Tensor, weight: Tensor | None, family: int, intercept: bool) -> None:
    """Raises unless the operands of ``glm_point`` fit together."""
    _check_family(family)
    _check_rows(X, W, weight, intercept)
    _check_targets(X, y, W, family)


def point_results(X: Tensor, y: Tensor, W: Tensor, weight: Tensor | None, family: int, intercept: bool) -> Point:
    """Checks the operands; returns loss, gradient and curvature, empty."""
    check_point(X, y, W, weight, family, intercept)
    batch = batches((X, 2), (y, 2), (W, 2), (weight, 1))
    return (
        W.new_empty(batch, dtype=torch.float64),
        W.new_empty((*batch, *W.shape[-2:])),
        W.new_empty((*batch, X.shape[-2] * W.shape[-1] + CURVATURE_SLACK)),
    )


glm_point = define(
    "glm_point(Tensor X, Tensor y, Tensor W, Tensor? weight, int family, bool intercept) -> (Tensor, Tensor, Tensor)",
    fake=point_results,
    own_dims=(2, 2, 2, 1),
)


def check_product(
    V: Tensor, X: Tensor, W: Tensor, weight: Tensor | None, curvature: Tensor, family: int, intercept: bool
) -> None:
    """Raises unless the operands of ``glm_product`` fit together."""
    _check_family(family)
    _check_rows(X, W, weight, intercept)
    check_dims("V", V, 3, "(..., m, d, k)")
    check_operand("V", V, X, W.dtype)
    check_operand("curvature", curvature, X, W.dtype)
    if V.shape[-2:] != W.shape[-2:]:
        raise ValueError(f"V has shape {tuple(V.shape)}; expected (..., m, {W.shape[-2]}, {W.shape[-1]}), W's")
    check_size("curvature", curvature, -1, X.shape[-2] * W.shape[-1] + CURVATURE_SLACK, "that of glm_point's result")


def product_results(
    V: Tensor, X: Tensor, W: Tensor, weight: Tensor | None, curvature: Tensor, family: int, intercept: bool
) -> Tensor:
    """Checks the operands; returns the products, empty."""
    check_product(V, X, W, weight, curvature, family, intercept)
    batch = batches((V, 3), (X, 2), (W, 2), (weight, 1), (curvature, 1))
    return W.new_empty((*batch, *V.shape[-3:]))


glm_product = define(
    "glm_product(Tensor V, Tensor X, Tensor W, Tensor? weight, Tensor curvature, int family, bool intercept) -> Tensor",
    fake=product_results,
    own_dims=(3, 2, 2, 1, 1),
)


# ----------------------------------------------------------------------------------- batches, for kernels of one model


def point_by_matrix(
    kernel: Callable[..., Point],
    batch: Batch,
    X: Tensor,
    y: Tensor,
    W: Tensor,
    weight: Tensor | None,
    family: int,
    intercept: bool,
) -> Point:
    """``glm_point`` of a batch, by a kernel of one model that is called for each."""
    points = [
        kernel(*operands, family, intercept)
        for operands in zip(
            matrices(X, batch, 2),
            matrices(y, batch, 2),
            matrices(W, batch, 2),
            matrices(weight, batch, 1),
            strict=True,
        )
    ]
    if not points:
        return point_results(X, y, W, weight, family, intercept)
    stacked = (torch.stack(parts) for parts in zip(*points, strict=True))
    loss, gradient, curvature = (part.reshape((*batch, *part.shape[1:])) for part in stacked)
    return loss, gradient, curvature


def shares_one_point(batch: Batch, V: Tensor, X: Tensor, W: Tensor, weight: Tensor | None, curvature: Tensor) -> bool:
    """Whether the whole batch has one point, so that its right-hand sides share one pass."""
    operands = ((X, 2), (W, 2), (weight, 1), (curvature, 1))
    return V.shape[:-3] == batch and all(t is None or t.dim() == own for t, own in operands)


def product_by_matrix(
    kernel: Callable[..., Tensor],
    batch: Batch,
    V: Tensor,
    X: Tensor,
    W: Tensor,
    weight: Tensor | None,
    curvature: Tensor,
    family: int,
    intercept: bool,
) -> Tensor:
    """``glm_product`` of a batch of points, by a kernel of one point that is called for each."""
    products = [
        kernel(*operands, family, intercept)
        for operands in zip(
            matrices(V, batch, 3),
            matrices(X, batch, 2),
            matrices(W, batch, 2),
            matrices(weight, batch, 1),
            matrices(curvature, batch, 1),
            strict=True,
        )
    ]
    if not products:
        return product_results(V, X, W, weight, curvature, family, intercept)
    return torch.stack(products).reshape((*batch, *V.shape[-3:]))
