"""The covariance of fitted parameters, from the Gauss-Newton matrix over all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep._interrupts import undisturbed
from onestep._restored import eval_mode
from onestep.curvature.kernels import differentiable_kernels
from onestep.evaluation.distributed import share
from onestep.evaluation.exclusive import exclusive
from onestep.evaluation.losses import LOSSES
from onestep.evaluation.module import parameter_names
from onestep.training.plan import FitPlan

# More parameters' covariance would take minutes and half a gigabyte.
_MOST_PARAMETERS = 4096


@undisturbed
def covariance(plan: FitPlan) -> Tensor:
    """(p,p) in float64, of the parameters as they are now. ``FitResult.covariance`` has the mathematics.

    Rows of the root of the matrix are taken together by QR, whose error grows with their condition, not its square.
    """
    parameters, loss, decay = plan.parameters, plan.loss, plan.settings.weight_decay
    p = len(parameters)
    if loss.name not in LOSSES:
        raise ValueError(
            f"covariance needs the distribution behind the loss, which {loss.name!r} does not tell; expected one of "
            f"{', '.join(map(repr, LOSSES))}"
        )
    if p > _MOST_PARAMETERS:
        raise ValueError(
            f"covariance is for models of at most {_MOST_PARAMETERS} parameters, this one has {p}; expected "
            "onestep.curvature.Laplace with structure='kronecker' or parameters='last_layer'"
        )
    if share().size > 1:
        raise NotImplementedError("covariance runs on one process; torch.distributed has several")
    R = torch.zeros(0, p, dtype=torch.float64, device=parameters.device)
    total = elements = 0.0
    with torch.no_grad(), eval_mode(plan.model), exclusive(), differentiable_kernels():
        objective = plan.objective(plan.source.all, plan.source.all, fixed=True)
        for chunk in plan.source.all():
            total += objective.chunk_loss(chunk).item()
            elements += loss.elements(chunk.target, len(chunk))
            for rows in objective.root_jacobian(parameters, chunk):
                R = torch.linalg.qr(torch.cat([R, rows.double()]), mode="r")[1]
    if len(R) < p and decay == 0:
        raise ValueError(
            f"the data gives {len(R)} equations for {p} parameters; expected more rows, or weight_decay > 0"
        )
    penalty = (elements * decay) ** 0.5 * torch.eye(p, dtype=torch.float64, device=parameters.device)
    scale, inverse = _inverse_root(torch.cat([R, penalty]), plan)
    result = (inverse @ inverse.mT) * scale * scale[:, None]
    if loss.name != "mse":
        return result
    # The loss is the square, without a half: RᵀR = 2JᵀJ, and p is the trace of the hat matrix without weight decay.
    used = (R * scale @ inverse).square().sum().item()
    if elements - used <= 0.5:
        raise ValueError(
            f"{elements:.0f} residuals and {used:.4g} parameters that they determine leave nothing to tell the noise "
            "by; expected more rows than parameters"
        )
    return result * (2 * total / (elements - used))


def _inverse_root(R: Tensor, plan: FitPlan) -> tuple[Tensor, Tensor]:
    """diag(s) and T with (RᵀR)⁻¹ = diag(s) T Tᵀ diag(s); s makes R's columns as long as each other."""
    norms = R.norm(dim=0)
    scale = torch.where(norms > 0, norms, 1.0).reciprocal()
    _, values, Vh = torch.linalg.svd(R * scale, full_matrices=False)
    noise = len(scale) * torch.finfo(plan.parameters.dtype).eps * values[0]
    if not bool(values[-1] > noise):
        names = parameter_names(plan.model, plan.parameters)
        sizes = [part.square().sum().item() for part in Vh[-1].split(plan.parameters.sizes)]
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"the Gauss-Newton matrix is singular: the data leaves a direction free that lies mostly in "
            f"{names[sizes.index(max(sizes))]!r}. Expected parameters that the data determines, or weight_decay > 0"
        )
    return scale, Vh.mT / values
