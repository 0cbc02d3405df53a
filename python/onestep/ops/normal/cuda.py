"""CUDA kernels of the normal-equations ops: one fused kernel of csrc/normal/cuda where it pays, else composed.

Fused (Gram, factor and solution with X read once): d up to 168, few right-hand sides, and rows that one warp or block
sums quickly. Otherwise the Gram matrix is torch's matrix product, and what follows is ops/cholesky/cuda.py. Nothing
waits for the GPU; a negative weight or penalty is a status.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onestep.ops._cuda import entry, place
from onestep.ops._library import register
from onestep.ops.cholesky import cuda as cholesky
from onestep.ops.normal import schema
from onestep.ops.normal.dual import apply_dual
from onestep.ops.normal.formulas import column, more_jitter, solve_normal_vjp
from onestep.ops.normal.options import Options
from onestep.ops.normal.schema import Results
from onestep.ops.normal.solves import register_solves
from onestep.ops.operands import check_not_negative, kernel_batch, operand, optional_operand

# Rows that are summed in one accumulator: more are cut into pieces by torch's matrix product.
_MOST_ROWS = 4096

# Fewer problems than this do not fill a GPU; their rows are shared among its multiprocessors by torch's matrix product,
# unless there are few of them.
_FEW_PROBLEMS = 64
_FEW_ROWS = 256

# Bytes of float64 copies that a step of refinement holds at a time.
_REFINE_BYTES = 256 << 20

# Tenfold steps that jitter may take: the last one adds the mean diagonal itself or more.
_MOST_JITTER_STEPS = 20


def _fused(X: Tensor, n: int, d: int, k: int, problems: int) -> bool:
    if d > cholesky.most_features(X) or k > cholesky.most_columns(d, X.dtype) or n > _MOST_ROWS:
        return False
    return problems >= _FEW_PROBLEMS or n <= _FEW_ROWS


def _scaled(weight: Tensor | None, rows: Tensor) -> Tensor:
    return rows if weight is None else rows * weight.sqrt().unsqueeze(-1)


def _gram_into(X: Tensor, Y: Tensor, weight: Tensor | None, gram: Tensor, cross: Tensor) -> None:
    batch = tuple(gram.shape[:-2])
    n, d = X.shape[-2:]
    k = Y.shape[-1]
    problems = gram[..., 0, 0].numel()
    if not _fused(X, n, d, min(k, 1), problems):
        rows, targets = _scaled(weight, X), _scaled(weight, Y)
        gram.copy_(rows.mT @ rows)
        # torch's product is symmetric up to rounding.
        gram.copy_((gram + gram.mT) / 2)
        cross.copy_(rows.mT @ targets)
        return
    together = k <= cholesky.most_columns(d, X.dtype)
    entry("normal_system", X.dtype)(
        x=operand(X, batch, 2),
        y=operand(Y, batch, 2),
        weight=optional_operand(weight, batch, 1),
        normal_equations=True,
        batch=kernel_batch(batch),
        n=n,
        d=d,
        k=k if together else 0,
        gram=gram.data_ptr(),
        cross=cross.data_ptr(),
        **place(X),
    )
    if not together:
        cross.copy_(_scaled(weight, X).mT @ _scaled(weight, Y))


@register(schema.gram, device="cuda")
def _gram(X: Tensor, Y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    gram, cross = schema.gram_results(X, Y, weight)
    X = X.to(Y.dtype)
    check_not_negative("weight", weight)
    if gram.numel():
        _gram_into(X, Y, weight, gram, cross)
    return gram, cross


@register(schema.moments, device="cuda")
def _moments(X: Tensor, Y: Tensor, weight: Tensor | None = None, center: bool = False) -> schema.Moments:
    out = schema.moments_results(X, Y, weight)
    X = X.to(Y.dtype)
    check_not_negative("weight", weight)
    gram, cross, mean, total = out
    n, d = X.shape
    k = Y.shape[-1]
    # In double, a chunk of rows at a time, centred on the means of a sample so that an offset does not cancel.
    sample = torch.cat([X[:: max(n // 1024, 1)], Y[:: max(n // 1024, 1)]], -1).double()
    shift = sample.mean(0).nan_to_num_(0.0, 0.0, 0.0) if center and n else X.new_zeros(d + k, dtype=torch.float64)
    second = X.new_zeros(d, d + k, dtype=torch.float64)
    first = X.new_zeros(d + k, dtype=torch.float64)
    total.zero_()
    rows = max(_REFINE_BYTES // (8 * (d + k)), 1)
    for begin in range(0, n, rows):
        part = slice(begin, begin + rows)
        table = torch.cat([X[part], Y[part]], -1).double() - shift
        weighted = table if weight is None else table * weight[part].double().unsqueeze(-1)
        second.addmm_(table[:, :d].mT, weighted)
        first += weighted.sum(0)
        total += float(table.shape[0]) if weight is None else weight[part].double().sum()
    offset = torch.where(total > 0, first / total, 0) if center else torch.zeros_like(first)
    second -= total * offset[:d, None] * offset
    gram.copy_((second[:, :d] + second[:, :d].mT) / 2)
    cross.copy_(second[:, d:])
    mean.copy_(shift + offset if center else torch.zeros_like(mean))
    return out


def _solve_fused(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    uniform_ridge: float,
    n: int,
    d: int,
    k: int,
    out: Results,
    norm: Tensor | None,
) -> None:
    solution, L, info, *_ = out
    batch = info.shape
    entry("normal_system", X.dtype)(
        x=operand(X, batch, 2),
        y=operand(Y, batch, 2),
        weight=None if weight is None else operand(weight, batch, 1),
        ridge=None if ridge is None else operand(ridge, batch, 1),
        uniform_ridge=uniform_ridge,
        normal_equations=True,
        batch=kernel_batch(batch),
        n=n,
        d=d,
        k=k,
        solution=solution.data_ptr(),
        factor=0 if L is None else L.data_ptr(),
        info=info.data_ptr(),
        norm=0 if norm is None else norm.data_ptr(),
        **place(X),
    )


def _solve_composed(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    uniform_ridge: float,
    jitter: float,
    out: Results,
    norm: Tensor | None,
) -> None:
    solution, L, info, _, jittered = out
    batch = tuple(info.shape)
    d, k = X.shape[-1], Y.shape[-1]
    A, R = X.new_empty(*batch, d, d), X.new_empty(*batch, d, k)
    _gram_into(X, Y, weight, A, R)
    A.diagonal(dim1=-2, dim2=-1).add_(uniform_ridge if ridge is None else ridge)
    cholesky.solve_system(A, R, solution, L, info, normal_equations=True)
    if jitter > 0 and jittered is not None:
        _escalate(A, R, jitter, solution, L, info, jittered)
    if norm is not None:
        if jitter > 0 and jittered is not None:
            A.diagonal(dim1=-2, dim2=-1).add_(jittered.unsqueeze(-1))
        norm.copy_(A.abs().sum(-1).amax(-1))


def _escalate(
    A: Tensor, R: Tensor, jitter: float, solution: Tensor, L: Tensor | None, info: Tensor, jittered: Tensor
) -> None:
    """Adds jitter, tenfold from step to step, to the diagonals of failed problems, as the CPU does.

    How many steps are needed only the GPU knows, so all are taken: the number depends on ``jitter`` alone.
    """
    d = A.shape[-1]
    mean = A.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.zeros_like(mean)
    factor = A.new_empty(*info.shape, d, d).mT
    attempt_solution, attempt_info = torch.empty_like(solution), torch.empty_like(info)
    for attempt in range(_MOST_JITTER_STEPS):
        retry, added = more_jitter(info, d, mean, added, jitter, attempt)
        trial = A + torch.diag_embed(added.unsqueeze(-1).expand(*info.shape, d))
        cholesky.solve_system(trial, R, attempt_solution, factor, attempt_info, normal_equations=True)
        chosen = retry[..., None, None]
        solution.copy_(torch.where(chosen, attempt_solution, solution))
        if L is not None:
            L.copy_(torch.where(chosen, factor, L))
        info.copy_(torch.where(retry, attempt_info, info))
        if jitter * 10.0**attempt >= 1:
            break
    jittered.copy_(torch.where((info > 0) & (info <= d), 0, added))


def _refine(
    X: Tensor, Y: Tensor, weight: Tensor | None, penalty: Tensor | float, L: Tensor, solution: Tensor, steps: int
) -> None:
    """W += A⁻¹(XᵀD(Y − XW) − λW), the residual in float64 (corrected semi-normal equations)."""
    wide = solution.double()
    n = X.shape[-2]
    rows = max(_REFINE_BYTES // (8 * max(X[..., :1, :].numel(), 1)), 1)
    for _ in range(steps):
        right = -(penalty.unsqueeze(-1) if isinstance(penalty, Tensor) else penalty) * wide
        for begin in range(0, n, rows):
            part = slice(begin, begin + rows)
            x = X[..., part, :].double()
            residual = Y[..., part, :].double() - x @ wide
            right = right + x.mT @ column(None if weight is None else weight[..., part].double(), residual)
        delta = torch.empty_like(solution)
        cholesky.solve_into(L, right.to(solution.dtype), delta)
        wide += delta.double()
    solution.copy_(wide)


def _condition_into(L: Tensor, norm: Tensor, info: Tensor, rcond: Tensor) -> None:
    """1 / (‖A‖₁ ‖A⁻¹‖₁), exactly; 0 where the factorisation failed."""
    d = L.shape[-1]
    if d > cholesky.SMALL_FEATURES:
        failed = (info > 0) & (info <= d)
        rcond.copy_(torch.where(failed, 0, 1 / (norm * _inverse_norm(L))))
        return
    entry("normal_condition", L.dtype)(
        factor=L.data_ptr(),
        norm=norm.data_ptr(),
        info=info.data_ptr(),
        rcond=rcond.data_ptr(),
        count=info.numel(),
        d=d,
        **place(L),
    )


def _inverse_norm(L: Tensor) -> Tensor:
    """‖(LLᵀ)⁻¹‖₁."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse = torch.empty(L.shape, dtype=L.dtype, device=L.device)
    cholesky.solve_into(L, eye.expand(L.shape), inverse)
    return inverse.abs().sum(-2).amax(-1)


def _solve(
    X: Tensor,
    Y: Tensor,
    weight: Tensor | None,
    ridge: Tensor | None,
    uniform_ridge: float,
    options: Options,
    out: Results,
) -> None:
    refine, jitter = options.refine, options.jitter
    if X.dtype != Y.dtype:
        X = X.to(Y.dtype)
    check_not_negative("weight", weight)
    check_not_negative("ridge", ridge)
    solution, L, info, rcond, jittered = out
    (n, d), k, problems = X.shape[-2:], Y.shape[-1], info.numel()
    if jittered is not None:
        jittered.zero_()
    if problems == 0 or d == 0:
        info.zero_()
        return
    if L is None and refine > 0:
        L = X.new_empty(*info.shape, d, d).mT
    norm = None if rcond is None else torch.empty_like(rcond)
    out = (solution, L, info, rcond, jittered)
    if jitter == 0 and k > 0 and _fused(X, n, d, k, problems):
        _solve_fused(X, Y, weight, ridge, uniform_ridge, n, d, k, out, norm)
    else:
        _solve_composed(X, Y, weight, ridge, uniform_ridge, jitter, out, norm)
    if refine > 0 and L is not None:
        penalty: Tensor | float = uniform_ridge if ridge is None else ridge.double()
        if jitter > 0 and jittered is not None:
            penalty = penalty + jittered.double().unsqueeze(-1)
        _refine(X, Y, weight, penalty, L, solution, refine)
        cholesky.finish(solution, info)
    if rcond is not None and norm is not None and L is not None:
        _condition_into(L, norm, info, rcond)
    for values, code in ((weight, schema.NEGATIVE_WEIGHT), (ridge, schema.NEGATIVE_RIDGE)):
        if values is not None and values.is_cuda:
            info.masked_fill_((values < 0).any(-1), code)


register_solves("cuda", _solve)


@register(schema.solve_normal_backward, device="cuda")
def _solve_normal_backward(grad: Tensor, X: Tensor, Y: Tensor, *rest: Any) -> schema.Gradients:
    shapes = (result.shape for result in schema.backward_results(grad, X, Y, *rest))
    gradients = zip(solve_normal_vjp(grad, X.to(Y.dtype), Y, *rest), shapes, strict=True)
    x, y, weight, ridge = (gradient.expand(shape).contiguous() for gradient, shape in gradients)
    return x, y, weight, ridge


@register(schema.apply_normal_inverse, device="cuda")
def _apply_normal_inverse(B: Tensor, X: Tensor, weight: Tensor | None, ridge: Tensor | None, L: Tensor) -> Tensor:
    if L.shape[-1] == X.shape[-1]:
        out = schema.apply_results(B, X, weight, ridge, L)
        if out.numel():
            cholesky.solve_into(L, B, out)
        return out
    assert ridge is not None
    return apply_dual(B, X, weight, ridge, L).contiguous()
