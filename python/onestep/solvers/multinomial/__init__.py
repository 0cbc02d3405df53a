"""Multinomial logistic regression with any number of classes: preconditioned L-BFGS on fused passes over the rows."""

from onestep.solvers.multinomial.memory import Gram
from onestep.solvers.multinomial.rows import DenseRows, Evaluation, Rows, constant_loss
from onestep.solvers.multinomial.solve import OVERSHOOT, Descent, Solution, solve_multinomial
from onestep.solvers.multinomial.sparse import SparseRows

__all__ = [
    "OVERSHOOT",
    "DenseRows",
    "Descent",
    "Evaluation",
    "Gram",
    "Rows",
    "Solution",
    "SparseRows",
    "constant_loss",
    "solve_multinomial",
]
