"""Optimisers: torch.optim.Optimizer subclasses whose every step is a solve."""

from onestep.evaluation.errors import NonFiniteError
from onestep.optim.gauss_newton import GaussNewton
from onestep.optim.levenberg_marquardt import LevenbergMarquardt
from onestep.optim.newton_cg import NewtonCG
from onestep.optim.objective import Objective
from onestep.optim.polar_grad import PolarGrad
from onestep.optim.step_report import StepReport

__all__ = ["GaussNewton", "LevenbergMarquardt", "NewtonCG", "NonFiniteError", "Objective", "PolarGrad", "StepReport"]
