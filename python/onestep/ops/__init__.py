"""``torch.ops.onestep.*``: one op per kernel entry, with its schema, fake, vmap rule and derivatives."""

from onestep.ops import attention, cholesky, glm, lmhead, mlp, normal

__all__ = ["attention", "cholesky", "glm", "lmhead", "mlp", "normal"]
