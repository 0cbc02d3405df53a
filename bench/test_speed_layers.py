"""The layers of language models: the inverse's Cholesky factor, the sweep of one layer, the Gram matrix of its inputs.

Peers: torch's chain of three factorisations, the published loop of GPTQ in torch's ops, and torch's own product.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from agreement import agree
from torch import Tensor

from onestep.linalg import gram, inverse_cholesky
from onestep.linalg.damping import unit_cholesky
from onestep.ops.compensated import compensated_sweep

BITS = 4
MOST = 2**BITS - 1


def gram_matrix(n: int) -> Tensor:
    X = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(n))
    A = X.mT @ X / len(X)
    return A + 0.01 * A.diagonal().mean() * torch.eye(n)


def chain(A: Tensor) -> Tensor:
    """What GPTQ's and SparseGPT's code do."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(A)), upper=True)


@pytest.mark.benchmark(group="layers of language models")
@pytest.mark.parametrize("n", [1024, 2048, 4096])
def test_inverse_cholesky(compare: Callable[..., float], n: int) -> None:
    A = gram_matrix(n)
    exact = chain(A.double())
    ours, theirs = ((found.double() - exact).norm() / exact.norm() for found in (inverse_cholesky(A).U, chain(A)))
    assert ours <= 1.1 * theirs
    compare(
        lambda: inverse_cholesky(A),
        lambda: chain(A),
        rounds=3,
        check=lambda found, expected: agree(found.U, expected),
        case=f"inverse_cholesky, n = {n}; peer: torch's cholesky, cholesky_inverse, cholesky",
        flops=2 * n**3 / 3,
        goal=1.7,
        error=float(ours),
        peer_error=float(theirs),
    )


def gptq(W: Tensor, A: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """The loop of Frantar et al. 2022 as published: blocks of columns, one column at a time; an asymmetric grid a row.

    Returns the codes and the rounded weights.
    """
    W = W.clone()
    codes = torch.empty_like(W)
    Hinv = chain(A)
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    scale = (high - low) / MOST
    zero = (-low / scale).round()
    for start in range(0, W.shape[1], block):
        end = min(start + block, W.shape[1])
        W1 = W[:, start:end].clone()
        Q1, Err1, H1 = torch.zeros_like(W1), torch.zeros_like(W1), Hinv[start:end, start:end]
        for i in range(end - start):
            w, d = W1[:, i], H1[i, i]
            code = torch.clamp((w / scale).round() + zero, 0, MOST)
            q = scale * (code - zero)
            codes[:, start + i] = code
            Q1[:, i] = q
            error = (w - q) / d
            W1[:, i:] -= error.unsqueeze(1).matmul(H1[i, i:].unsqueeze(0))
            Err1[:, i] = error
        W[:, start:end] = Q1
        W[:, end:] -= Err1.matmul(Hinv[start:end, end:])
    return codes, W


@pytest.mark.benchmark(group="layers of language models")
@pytest.mark.parametrize("n", [1024, 4096])
def test_quantising_a_layer(compare: Callable[..., float], n: int) -> None:
    A, W = gram_matrix(n), torch.randn(n, n, generator=torch.Generator().manual_seed(1))

    def ours() -> tuple[Tensor, ...]:
        # No sparsity; a scale for each row, and the unit factor.
        options = (None, None, None, BITS, False, n, 0.0, 0, 0, True)
        result: tuple[Tensor, ...] = compensated_sweep(W, unit_cholesky(A).R, *options)
        return result

    codes, expected = ours()[1], gptq(W, A)[0]
    # A tie that goes the other way changes what comes after it in its row. In float64 there are none.
    same = float((codes == expected).float().mean())
    W64, A64 = W[:64].double(), A.double()
    found = compensated_sweep(W64, unit_cholesky(A64).R, None, None, None, BITS, False, n, 0.0, 0, 0, True)[1]
    assert torch.equal(found.double(), gptq(W64, A64)[0])

    def loses_no_more(found: tuple[Tensor, ...], theirs: tuple[Tensor, Tensor]) -> None:
        losses = [float((((W - rounded) @ A) * (W - rounded)).sum()) for rounded in (found[0], theirs[1])]
        assert losses[0] <= 1.001 * losses[1]

    compare(
        ours,
        lambda: gptq(W, A),
        rounds=1,
        check=loses_no_more,
        case=f"{n} × {n} layer to 4 bits from its Gram matrix; peer: GPTQ's loop in torch",
        goal=5 if n == 4096 else None,
        same_codes=same,
    )


@pytest.mark.benchmark(group="layers of language models")
def test_gram_of_a_layers_inputs(compare: Callable[..., float]) -> None:
    X = torch.randn(16_384, 4_096)
    compare(
        lambda: gram(X),
        lambda: X.T @ X,
        rounds=3,
        check=lambda found, expected: agree(found[0], expected),
        case="gram of 16,384 × 4,096; peer: X.T @ X",
        flops=len(X) * 4_096**2,
        goal=1.6,
    )
