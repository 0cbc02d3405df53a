"""Multinomial logistic regression with any number of classes: preconditioned L-BFGS on fused passes over the rows."""

from onestep.solvers.multinomial.rows import DenseRows, Evaluation, Rows
from onestep.solvers.multinomial.solve import Solution, solve_multinomial

__all__ = ["DenseRows", "Evaluation", "Rows", "Solution", "solve_multinomial"]
