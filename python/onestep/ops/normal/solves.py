"""The kernels of solve_normal and solve_normal_ex, which differ between devices in how the primal form is solved."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from onestep.ops._library import register
from onestep.ops.normal import schema
from onestep.ops.normal.dual import solve_dual

# solution, L, info, rcond and what was added to the diagonal, for a device's solve to fill; None: not wanted.
Results = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]
# (X, Y, weight, ridge, uniform_ridge, refine, jitter, results)
Solve = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float, int, float, Results], None]


def register_solves(device: str, solve: Solve) -> None:
    """Registers both ops for a device; ``solve`` computes the primal form, the dual form is a composition of ops."""

    @register(schema.solve_normal, device=device)
    def _solve_normal(
        X: Tensor,
        Y: Tensor,
        weight: Tensor | None = None,
        ridge: Tensor | None = None,
        uniform_ridge: float = 0.0,
        refine: int = 0,
        dual: bool = False,
        check: bool = False,
    ) -> tuple[Tensor, Tensor]:
        solution, info = schema.solve_results(X, Y, weight, ridge, dual=dual)
        if dual:
            solve_dual(X.to(Y.dtype), Y, weight, ridge, refine, (solution, None, info, None))
        else:
            solve(X, Y, weight, ridge, uniform_ridge, refine, 0.0, (solution, None, info, None, None))
        if check:
            schema.raise_if_failed(info, X.shape[-1])
        return solution, info

    @register(schema.solve_normal_ex, device=device)
    def _solve_normal_ex(
        X: Tensor,
        Y: Tensor,
        weight: Tensor | None = None,
        ridge: Tensor | None = None,
        uniform_ridge: float = 0.0,
        refine: int = 0,
        jitter: float = 0.0,
        dual: bool = False,
        rcond: bool = True,
        check: bool = False,
    ) -> schema.Solved:
        out = schema.solve_ex_results(X, Y, weight, ridge, dual=dual, rcond=rcond)
        solution, L, info, condition, jittered = out
        if dual:
            solve_dual(X.to(Y.dtype), Y, weight, ridge, refine, (solution, L, info, condition if rcond else None))
            jittered.zero_()
        else:
            results = (solution, L, info, condition if rcond else None, jittered)
            solve(X, Y, weight, ridge, uniform_ridge, refine, jitter, results)
        if check:
            schema.raise_if_failed(info, X.shape[-1])
        return out
