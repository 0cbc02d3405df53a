"""Schemas of the ops on multilayer perceptrons under squared error: ``mlp_gradient``, ``mlp_product`` (of the
Gauss-Newton matrix, or its diagonal) and ``mlp_jacobian``.

A network is its ``widths`` (inputs, then each layer's outputs), a code of ``ACTIVATIONS`` a layer, and whether each
layer is ``biased``; its parameters are one vector: W₁ (outputs × inputs, by rows), b₁, W₂, ... ``onestep.fit`` takes
small networks through these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onestep.ops._library import define
from onestep.ops.operands import check_dims, check_floating, check_like

# csrc/mlp/mlp.hpp, MlpActivation
ACTIVATIONS = {"identity": 0, "relu": 1, "tanh": 2, "sigmoid": 3}
# csrc/mlp/mlp.hpp, kMostMlpLayers
MOST_LAYERS = 32


def _check(
    X: Tensor, parameters: Tensor, widths: Sequence[int], activations: Sequence[int], biased: Sequence[bool]
) -> None:
    check_floating("X", X)
    check_like("parameters", parameters, X)
    layers = len(activations)
    if not 1 <= layers <= MOST_LAYERS or len(widths) != layers + 1 or len(biased) != layers:
        raise ValueError(
            f"widths, activations and biased have {len(widths)}, {layers} and {len(biased)} elements; expected m + 1, "
            f"m and m for m from 1 to {MOST_LAYERS} layers"
        )
    if min(widths) < 1:
        raise ValueError(f"widths={list(widths)}; expected numbers of 1 or more")
    unknown = set(activations) - set(ACTIVATIONS.values())
    if unknown:
        raise ValueError(f"activations={list(activations)}; expected codes from {ACTIVATIONS}")
    if X.dim() != 2 or X.shape[1] != widths[0]:
        raise ValueError(f"X has shape {tuple(X.shape)}; expected (n, {widths[0]})")
    pairs = zip(widths[:-1], widths[1:], biased, strict=True)
    count = sum(outputs * (inputs + bias) for inputs, outputs, bias in pairs)
    check_dims("parameters", parameters, 1, f"({count},)")
    if parameters.shape != (count,):
        raise ValueError(f"parameters has shape {tuple(parameters.shape)}; expected ({count},)")


def gradient_results(
    X: Tensor,
    y: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Checks the operands; returns loss () and gradient (p,), or (0,) if unwanted, empty."""
    _check(X, parameters, widths, activations, biased)
    check_like("y", y, X)
    if y.shape != (X.shape[0], widths[-1]):
        raise ValueError(f"y has shape {tuple(y.shape)}; expected ({X.shape[0]}, {widths[-1]})")
    return X.new_empty((), dtype=torch.float64), parameters.new_empty(parameters.shape[0] if wants_gradient else 0)


mlp_gradient = define(
    "mlp_gradient(Tensor X, Tensor y, Tensor parameters, int[] widths, int[] activations, bool[] biased, "
    "bool wants_gradient) -> (Tensor, Tensor)",
    fake=gradient_results,
)


def product_results(
    X: Tensor,
    parameters: Tensor,
    v: Tensor | None,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
) -> Tensor:
    """Checks the operands; returns the product (p,), empty."""
    _check(X, parameters, widths, activations, biased)
    if v is not None:
        check_like("v", v, X)
        if v.shape != parameters.shape:
            raise ValueError(f"v has shape {tuple(v.shape)}; expected {tuple(parameters.shape)}, as parameters")
    return torch.empty_like(parameters, memory_format=torch.contiguous_format)


mlp_product = define(
    "mlp_product(Tensor X, Tensor parameters, Tensor? v, int[] widths, int[] activations, bool[] biased) -> Tensor",
    fake=product_results,
)


def jacobian_results(
    X: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    activations: Sequence[int],
    biased: Sequence[bool],
    scale: float,
) -> Tensor:
    """Checks the operands; returns the Jacobian (n, outputs, p), empty."""
    _check(X, parameters, widths, activations, biased)
    return X.new_empty((X.shape[0], widths[-1], parameters.shape[0]))


mlp_jacobian = define(
    "mlp_jacobian(Tensor X, Tensor parameters, int[] widths, int[] activations, bool[] biased, float scale) -> Tensor",
    fake=jacobian_results,
)
