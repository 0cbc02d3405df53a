"""Batched least squares and Cholesky solves, differentiable to every order.

Every function takes float32 or float64 tensors of any strides and any batch dimensions, broadcast as torch.linalg does,
and reads them in place. They are on the CPU, or on a CUDA GPU (``solve_normal_segments``: on the CPU). Results of
bfloat16 and float16 inputs are float32. The rows X of ``gram``, ``moments``, ``solve_normal`` and ``NormalEquations``
are widened as they are read; other inputs are converted.
"""

from onestep.linalg._accumulate import LinearSolution, NormalEquations
from onestep.linalg._cholesky import cholesky, cholesky_ex, cholesky_solve, solve_spd, solve_spd_ex
from onestep.linalg._inverse_cholesky import InverseCholeskyResult, inverse_cholesky
from onestep.linalg._normal import Moments, SolveNormalResult, gram, moments, solve_normal, solve_normal_ex
from onestep.linalg._polar import PolarResult, polar, polar_ex
from onestep.linalg._segments import SolveSegmentsResult, solve_normal_segments, solve_normal_segments_ex

__all__ = [
    "InverseCholeskyResult",
    "LinearSolution",
    "Moments",
    "NormalEquations",
    "PolarResult",
    "SolveNormalResult",
    "SolveSegmentsResult",
    "cholesky",
    "cholesky_ex",
    "cholesky_solve",
    "gram",
    "inverse_cholesky",
    "moments",
    "polar",
    "polar_ex",
    "solve_normal",
    "solve_normal_ex",
    "solve_normal_segments",
    "solve_normal_segments_ex",
    "solve_spd",
    "solve_spd_ex",
]
