"""Multinomial logistic regression with any number of classes: preconditioned L-BFGS on fused passes over the rows."""

from onestep.solvers.multinomial.rows import DenseRows, Evaluation, Rows
from onestep.solvers.multinomial.solve import Gram, Solution, solve_multinomial

__all__ = ["DenseRows", "Evaluation", "Gram", "Rows", "Solution", "solve_multinomial"]
