"""The ops on perceptrons have no derivatives: ``onestep.fit`` needs none."""

from onestep.ops._derivatives import register_not_differentiable
from onestep.ops.mlp.schema import mlp_gradient, mlp_jacobian, mlp_product

for _op in (mlp_gradient, mlp_product, mlp_jacobian):
    register_not_differentiable(_op, "write the network in torch's ops where derivatives of it are wanted")
