"""``torch.ops.onestep.*``: one op per kernel entry, with its schema, fake, vmap rule and derivatives."""

from onestep.ops import cholesky, lmhead, normal

__all__ = ["cholesky", "lmhead", "normal"]
