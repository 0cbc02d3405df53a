"""What one step of a damped optimiser did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        loss: before the step, weight decay included, on the rows that it is made of.
        new_loss: after it, on the rows that judge it, which for mini-batches are others; as it was there before the
            step if none was accepted.
        grad_norm: ‖∇loss‖₂ before the step.
        step_norm: ‖step‖₂, 0 if none was accepted.
        predicted: the reduction that the quadratic model promised for the step, or for the first trial if all failed.
        decrement: what the quadratic model could reduce without damping; infinite where that is not known to be small.
            A small one says that the parameters before the step were at a minimum, as far as the model tells.
        resolution: by how much rounding the parameters may change the loss, where the method can tell.
        damping: with which the step was solved for.
        gain: actual over predicted reduction.
        accepted: whether a step was kept.
        rejected: trials taken back.
        cg_iterations: products with the curvature matrix, of all trials together.
        without_influence: parameters on which the outputs no longer depend, where the method can tell.

    Examples:
        >>> import torch
        >>> from onestep.optim import LevenbergMarquardt
        >>> p = torch.zeros(2, requires_grad=True)
        >>> optimizer = LevenbergMarquardt([p])
        >>> loss = optimizer.step(lambda: p - 1)
        >>> optimizer.report.accepted, optimizer.report.new_loss < 0.1 * loss
        (True, True)
    """

    loss: float
    new_loss: float
    grad_norm: float
    step_norm: float
    predicted: float
    decrement: float
    resolution: float
    damping: float
    gain: float
    accepted: bool
    rejected: int
    cg_iterations: int
    without_influence: int
