"""Recommends songs from listening counts by implicit-feedback matrix factorisation (Hu, Koren and Volinsky, ICDM 2008).

    python examples/als.py [--quick]

The data are SYNTHETIC: every listener likes two genres, and plays songs of these more often than others.

Alternating least squares minimises Σ c_ui (p_ui − x_uᵀy_i)² + λ(‖X‖² + ‖Y‖²) over all pairs of a listener and a song,
p = 1 where there was a play and 0 elsewhere, c = 1 + α·plays. With one side fixed, each row of the other is a small
least-squares problem; all of them are one call of onestep.linalg.solve_normal_segments, which adds YᵀY, what all pairs
without a play have in common, to the few played songs of each listener.
"""

import sys
import time

import torch

from onestep.linalg import gram, solve_normal_segments

GENRES = ["blues", "country", "folk", "hip hop", "jazz", "metal", "opera", "reggae", "samba", "techno"]
FACTORS, ALPHA, RIDGE, ROUNDS = 32, 5.0, 1.0, 12


def listening_counts(listeners, songs):
    """A sparse matrix of plays, whose song i is of genre i % 10, and the two genres that each listener likes."""
    torch.manual_seed(0)
    likes = torch.rand(listeners, len(GENRES)).argsort()[:, :2]
    chance = torch.full((listeners, len(GENRES)), 0.002).scatter_(1, likes, 0.05)
    popularity = torch.rand(songs).square() * 3
    played = torch.rand(listeners, songs) < chance[:, torch.arange(songs) % len(GENRES)] * popularity
    return (played * (1.0 + torch.poisson(torch.full((listeners, songs), 2.0)))).to_sparse_csr(), likes


def half_step(counts, fixed):
    """The rows of one side, given those of the other: (YᵀY + Σ αr yyᵀ + λI)⁻¹ Σ (1 + αr) y, over what was played."""
    extra = ALPHA * counts.values()
    offsets, indices = counts.crow_indices(), counts.col_indices()
    base, _ = gram(fixed)
    return solve_normal_segments(
        fixed, (1 + extra) / extra, offsets, indices=indices, weight=extra, base=base, ridge=RIDGE
    )


def loss(counts, X, Y):
    """The sum over all pairs, of which those without a play take one product of two small matrices."""
    entries = counts.to_sparse_coo().coalesce()
    u, i = entries.indices()
    score = (X[u] * Y[i]).sum(1)
    observed = (1 + ALPHA * entries.values()) * (1 - score) ** 2 - score**2
    return float((gram(X)[0] * gram(Y)[0]).sum() + observed.sum() + RIDGE * (X.square().sum() + Y.square().sum()))


def main():
    listeners, songs = (1_000, 500) if "--quick" in sys.argv else (10_000, 3_000)
    counts, likes = listening_counts(listeners, songs)
    by_song = counts.to_sparse_coo().t().coalesce().to_sparse_csr()
    Y = 0.1 * torch.randn(songs, FACTORS)
    print(f"{listeners:,} listeners, {songs:,} songs, {counts.values().numel():,} pairs with plays (synthetic)")
    for number in range(1, ROUNDS + 1):
        start = time.perf_counter()
        X = half_step(counts, Y)
        Y = half_step(by_song, X)
        print(f"round {number:2}: loss {loss(counts, X, Y):12,.1f}  {1000 * (time.perf_counter() - start):6.1f} ms")
    scores = X @ Y.mT
    scores[counts.to_dense() > 0] = -torch.inf  # what they know already is not recommended
    best = scores.topk(5).indices
    hits = (best % len(GENRES)).unsqueeze(-1).eq(likes.unsqueeze(1)).any(-1).float().mean()
    for u in range(4):
        liked = " and ".join(GENRES[g] for g in likes[u])
        songs_for_u = ", ".join(f"song {i} ({GENRES[i % len(GENRES)]})" for i in best[u].tolist())
        print(f"listener {u} likes {liked}. New to them: {songs_for_u}")
    print(f"{hits:.1%} of all recommendations are of a genre that the listener likes; by chance 20.0%")


if __name__ == "__main__":
    main()
