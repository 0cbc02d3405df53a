"""Drop-in for functions of ``torch.nn.functional``, with derivatives of every order."""

from onestep.functional._replace import replace_attention
from onestep.functional.attention import scaled_dot_product_attention
from onestep.functional.lmhead import linear_cross_entropy, linear_cross_entropy_ggnvp, linear_cross_entropy_hvp

__all__ = [
    "linear_cross_entropy",
    "linear_cross_entropy_ggnvp",
    "linear_cross_entropy_hvp",
    "replace_attention",
    "scaled_dot_product_attention",
]
