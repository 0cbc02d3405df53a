"""Drop-in for functions of ``torch.nn.functional``, with derivatives of every order."""

from onestep.functional._replace import replace_attention
from onestep.functional.attention import scaled_dot_product_attention

__all__ = ["replace_attention", "scaled_dot_product_attention"]
