"""The derivative of ``polar``: refused.

That of U solves a Sylvester equation whose coefficients are sums of pairs of singular values (Kenney and Laub, 1991),
which the iteration does not have; and two iterations give no polar factor of which it would be the derivative.
"""

from onestep.ops._derivatives import register_not_differentiable
from onestep.ops.polar.schema import polar

register_not_differentiable(polar, "use M.detach(), or torch.linalg.svd where a derivative is wanted")
