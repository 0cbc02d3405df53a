"""The kernels of solve_normal and solve_normal_ex, which differ between devices in how the primal form is solved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from onestep.ops._library import register
from onestep.ops.normal import schema
from onestep.ops.normal.dual import solve_dual
from onestep.ops.normal.options import Options, checked_of_solve_normal, checked_of_solve_normal_ex
from onestep.ops.normal.schema import Results

# (X, Y, weight, ridge, uniform_ridge, options, results)
Solve = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float, Options, Results], None]


def register_solves(device: str, solve: Solve) -> None:
    """Registers both ops for a device; ``solve`` computes the primal form, the dual form is a composition of ops."""

    @register(schema.solve_normal, device=device)
    def _solve_normal(
        X: Tensor,
        Y: Tensor,
        weight: Tensor | None = None,
        ridge: Tensor | None = None,
        uniform_ridge: float = 0.0,
        *plain: Any,
    ) -> tuple[Tensor, Tensor]:
        options = checked_of_solve_normal(*plain)
        solution, info = schema.solve_results(X, Y, weight, ridge, options)
        _run(X, Y, weight, ridge, uniform_ridge, options, (solution, None, info, None, None))
        return solution, info

    @register(schema.solve_normal_ex, device=device)
    def _solve_normal_ex(
        X: Tensor,
        Y: Tensor,
        weight: Tensor | None = None,
        ridge: Tensor | None = None,
        uniform_ridge: float = 0.0,
        *plain: Any,
    ) -> schema.Solved:
        options = checked_of_solve_normal_ex(*plain)
        out = schema.solve_ex_results(X, Y, weight, ridge, options)
        solution, L, info, rcond, jittered = out
        results = (solution, L, info, rcond if options.rcond else None, jittered)
        _run(X, Y, weight, ridge, uniform_ridge, options, results)
        return out

    def _run(
        X: Tensor,
        Y: Tensor,
        weight: Tensor | None,
        ridge: Tensor | None,
        uniform_ridge: float,
        options: Options,
        results: Results,
    ) -> None:
        schema.check_uniform_ridge(uniform_ridge)
        if options.dual:
            solve_dual(X.to(Y.dtype), Y, weight, ridge, options, results)
        else:
            solve(X, Y, weight, ridge, uniform_ridge, options, results)
        if options.check:
            schema.raise_if_failed(results[2], X.shape[-1])
