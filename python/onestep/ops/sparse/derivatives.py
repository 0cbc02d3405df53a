"""The op on sparse matrices has no derivatives: the estimators need none."""

from onestep.ops._derivatives import register_not_differentiable
from onestep.ops.sparse.schema import sparse_multiply

register_not_differentiable(sparse_multiply, "pass values.detach() and V.detach(), or torch.sparse.mm of a CSR tensor")
