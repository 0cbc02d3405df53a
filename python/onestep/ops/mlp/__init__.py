"""Multilayer perceptrons under squared error: ``mlp_gradient``, ``mlp_product`` and ``mlp_jacobian``."""

from onestep.ops.mlp import cpu, cuda, derivatives
from onestep.ops.mlp.schema import ACTIVATIONS, MOST_LAYERS, mlp_gradient, mlp_jacobian, mlp_product

__all__ = [
    "ACTIVATIONS",
    "MOST_LAYERS",
    "cpu",
    "cuda",
    "derivatives",
    "mlp_gradient",
    "mlp_jacobian",
    "mlp_product",
]
