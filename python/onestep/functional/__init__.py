"""Drop-in for functions of ``torch.nn.functional``, with derivatives of every order."""

from onestep.functional.attention import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
