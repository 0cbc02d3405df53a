"""Multinomial logistic regression with any number of classes: preconditioned L-BFGS on fused passes over the rows."""

from onestep.solvers.multinomial.rows import DenseRows, Evaluation, Rows
from onestep.solvers.multinomial.solve import Gram, Solution, solve_multinomial
from onestep.solvers.multinomial.sparse import SparseRows

__all__ = ["DenseRows", "Evaluation", "Gram", "Rows", "Solution", "SparseRows", "solve_multinomial"]
