"""onestep.fit: a model's parameters solved for, in one step or a few."""

from onestep.training.fit import fit
from onestep.training.result import FitResult, Record

__all__ = ["FitResult", "Record", "fit"]
