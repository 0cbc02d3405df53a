"""Second-order optimisers: torch.optim.Optimizer subclasses whose every step is a solve."""

from onestep.evaluation.errors import NonFiniteError
from onestep.optim._objective import Objective
from onestep.optim._optimizer import StepReport
from onestep.optim.gauss_newton import GaussNewton
from onestep.optim.levenberg_marquardt import LevenbergMarquardt
from onestep.optim.newton_cg import NewtonCG

__all__ = ["GaussNewton", "LevenbergMarquardt", "NewtonCG", "NonFiniteError", "Objective", "StepReport"]
