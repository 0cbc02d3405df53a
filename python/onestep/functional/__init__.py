"""Drop-in replacements for functions of ``torch.nn.functional``, with fused derivatives of second order."""

from onestep.functional.lmhead import linear_cross_entropy, linear_cross_entropy_ggnvp, linear_cross_entropy_hvp

__all__ = ["linear_cross_entropy", "linear_cross_entropy_ggnvp", "linear_cross_entropy_hvp"]
