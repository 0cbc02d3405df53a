"""One iteration of implicit-feedback ALS against the package implicit (pip install implicit): seconds and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from onestep.linalg import gram, solve_normal_segments

implicit = pytest.importorskip("implicit")
threadpoolctl = pytest.importorskip("threadpoolctl")

import numpy as np  # noqa: E402
import scipy.sparse  # noqa: E402
from implicit.als import AlternatingLeastSquares  # noqa: E402

USERS, ITEMS, DENSITY, FACTORS, RIDGE = 50_000, 20_000, 1e-3, 64, 0.01
# Iterations from the same start after which the losses are compared.
ITERATIONS = 3


def half_step(counts: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """implicit's problem: c = its counts (alpha = 1), A = YᵀY + Σ (c − 1) yyᵀ + λI."""
    confidence = counts.values()
    extra = confidence - 1
    return solve_normal_segments(
        fixed,
        confidence / extra,
        counts.crow_indices(),
        indices=counts.col_indices(),
        weight=extra,
        base=gram(fixed)[0],
        ridge=RIDGE,
    )


def loss(counts: Any, X: np.ndarray, Y: np.ndarray) -> float:
    """Σ over all pairs c (p − xᵀy)² + λ(‖X‖² + ‖Y‖²), in float64."""
    X, Y = X.astype(np.float64), Y.astype(np.float64)
    entries = counts.tocoo()
    score = np.einsum("ij,ij->i", X[entries.row], Y[entries.col])
    observed = (entries.data * (1 - score) ** 2 - score**2).sum()
    total = ((X.T @ X) * (Y.T @ Y)).sum() + observed + RIDGE * ((X**2).sum() + (Y**2).sum())
    return float(total)


def loses_no_more(counts: Any, found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert loss(counts, *found) <= 1.001 * loss(counts, *expected)


@pytest.mark.parametrize("use_cg", [False, True])
@pytest.mark.benchmark(group="ALS iteration")
def test_iteration(compare: Callable[..., float], use_cg: bool) -> None:
    random = np.random.default_rng(0)
    pairs = np.unique(random.integers(0, USERS * ITEMS, round(USERS * ITEMS * DENSITY)))
    plays = random.integers(2, 7, len(pairs)).astype(np.float32)
    counts = scipy.sparse.csr_matrix((plays, (pairs // ITEMS, pairs % ITEMS)), (USERS, ITEMS))
    turned = counts.T.tocsr()
    by_user, by_item = (
        torch.sparse_csr_tensor(m.indptr.astype(np.int64), m.indices.astype(np.int64), m.data, m.shape)
        for m in (counts, turned)
    )
    start_x = random.uniform(0, 0.1, (USERS, FACTORS)).astype(np.float32)
    start_y = random.uniform(0, 0.1, (ITEMS, FACTORS)).astype(np.float32)

    def theirs(iterations: int) -> tuple[np.ndarray, np.ndarray]:
        # A model that has factors goes on from them.
        model = AlternatingLeastSquares(
            factors=FACTORS,
            regularization=RIDGE,
            alpha=1.0,
            use_cg=use_cg,
            iterations=iterations,
            num_threads=torch.get_num_threads(),
        )
        model.user_factors, model.item_factors = start_x.copy(), start_y.copy()
        # As implicit asks for: its own threads, BLAS with one.
        with threadpoolctl.threadpool_limits(1, "blas"):
            model.fit(counts, show_progress=False)
        return model.user_factors, model.item_factors

    def ours(iterations: int) -> tuple[np.ndarray, np.ndarray]:
        Y = torch.from_numpy(start_y)
        for _ in range(iterations):
            X = half_step(by_user, Y)
            Y = half_step(by_item, X)
        return X.numpy(), Y.numpy()

    compare(
        lambda: ours(1),
        lambda: theirs(1),
        rounds=5,
        case=f"{USERS} x {ITEMS}, density {DENSITY}, {FACTORS} factors, use_cg={use_cg}",
        check=lambda found, expected: loses_no_more(counts, found, expected),
        goal=4.0 if use_cg else 15.0,
        loss=loss(counts, *ours(ITERATIONS)),
        peer_loss=loss(counts, *theirs(ITERATIONS)),
    )
