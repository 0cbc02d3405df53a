"""CPU kernel of ``polar``: a composition of torch's ops."""

from __future__ import annotations

import torch
from torch import Tensor

from onestep.ops._library import register
from onestep.ops.polar import schema


@register(schema.polar, device="cpu")
def _polar(M: Tensor, iterations: int, lower: float) -> tuple[Tensor, Tensor]:
    U, info = schema.polar_results(M, iterations, lower)
    if U.numel() == 0:
        return U, info.zero_()
    tall = M.shape[-2] > M.shape[-1]
    X = schema.to_unit_range(M.mT if tall else M).to(U.dtype)
    info.zero_()
    for step, (a, b, c) in enumerate(schema.coefficients(iterations, lower)):
        G = X @ X.mT
        norm = torch.ones_like(G[..., :1, :1])
        if step == 0:
            # ‖XXᵀ‖, which is at least the largest singular value's square, and as a rule half of it.
            largest = torch.linalg.matrix_norm(G, keepdim=True)
            norm = torch.where(largest == 0, norm, largest)
        L, failed = torch.linalg.cholesky_ex(schema.identity_like(G) + (c / norm) * G)
        root = norm.sqrt()
        X = (b / c / root) * X + ((a - b / c) / root) * torch.cholesky_solve(X, L)
        # torch's Cholesky says nothing of NaN in some builds: the result does.
        failed = torch.where(X.isfinite().all(-1).all(-1), failed, failed.clamp(min=1))
        info = torch.where(info == 0, failed, info)
    X = torch.where((info != 0)[..., None, None], torch.nan, X)
    U.copy_(X.mT if tall else X)
    return U, info
