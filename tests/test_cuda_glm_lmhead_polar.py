"""glm, linear_cross_entropy and polar by their CUDA kernels: on a GPU, or with ONESTEP_CUDA_EMULATE=1 on the emulator.

What their other tests hold of every device is not repeated: here are the paths that only CUDA has (products by torch in
chunks, 16-bit types), what happens to bad values without a wait, and CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, softplus

from onestep.curvature import glm
from onestep.functional.lmhead import linear_cross_entropy, linear_cross_entropy_ggnvp, linear_cross_entropy_hvp
from onestep.linalg import polar_ex
from onestep.ops import _cuda

ON_GPU = _cuda.native is not None and not _cuda.EMULATED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = pytest.mark.skipif(not (ON_GPU or _cuda.EMULATED), reason="needs a GPU, or ONESTEP_CUDA_EMULATE=1")
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(5)
    yield


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def replayed(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The results of a call that is captured in a CUDA graph, after a replay over poisoned memory."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    return results


# ------------------------------------------------------------------------------------------------------------------ glm


def point_in_double(X: Tensor, y: Tensor, W: Tensor, family: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian of the intercept model, by autograd."""

    def loss(w: Tensor) -> Tensor:
        eta = X.double() @ w[:-1] + w[-1]
        if family == "softmax":
            return cross_entropy(eta, y, reduction="sum")
        return (softplus(eta) - y * eta).sum()

    wide = W.double()
    return loss(wide), torch.func.grad(loss)(wide), torch.func.hessian(loss)(wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "k"), [("softmax", 18), ("logistic", 17), ("softmax", 3), ("logistic", 1)])
def test_glm(family: str, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from onestep.ops.glm import cuda

    # More than 16 columns go by chunks: of 16 rows, and what remains.
    size = torch.finfo(dtype).bits // 8 if dtype == torch.float64 else 4
    monkeypatch.setattr(cuda, "_CHUNK_BYTES", 16 * size * (6 + k))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    X, W, V = normal(70, 6, dtype=dtype), normal(7, k, dtype=compute), normal(2, 7, k, dtype=compute)
    y = torch.randint(k, (70,)) if family == "softmax" else torch.rand(70, k)
    y = y.to(DEVICE) if family == "softmax" else y.to(DEVICE, compute)
    loss, grad, H = point_in_double(X, y, W, family)
    point = glm(X, y, W, family, intercept=True)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert abs(point.loss - loss) < tolerance * loss
    assert error(point.grad, grad) < tolerance
    expected = torch.einsum("acbd,mbd->mac", H, V.double())
    assert error(point.hvp(V), expected) < tolerance
    assert torch.equal(point.hvp(V), point.hvp(V))
    assert point.info == 0


@gpu_only
@pytest.mark.parametrize("k", [1, 5, 20])
def test_glm_says_what_was_wrong_without_waiting(k: int) -> None:
    X, W, y = normal(200, 8), normal(8, k), torch.rand(200, k, device=DEVICE)
    weight = torch.ones(200, device=DEVICE)
    y[17, 0], bad_weight = 2.0, weight.clone()
    bad_weight[3] = -1
    torch.cuda.set_sync_debug_mode("error")
    try:
        points = [glm(X, y, W, "logistic", weight=w) for w in (weight, bad_weight)]
        points[0].hvp(W)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [point.info.item() for point in points] == [1, 2]
    assert all(point.loss.isnan() for point in points)
    # A target is of one output, a weight of all.
    assert points[0].grad.isnan().any(0).nonzero().flatten().tolist() == [0]
    assert points[1].grad.isnan().all()


@gpu_only
@pytest.mark.parametrize("k", [1, 5, 20])
def test_glm_in_a_graph(k: int) -> None:
    X, W, V, y = normal(3000, 33), normal(33, k), normal(33, k), torch.rand(3000, k, device=DEVICE)

    def call() -> tuple[Tensor, ...]:
        point = glm(X, y, W, "logistic")
        return point.loss, point.grad, point.hvp(V)

    for got, expected in zip(replayed(call), call(), strict=True):
        assert torch.equal(got, expected)


# --------------------------------------------------------------------------------------------------------------- lmhead


def composition(H: Tensor, W: Tensor, b: Tensor | None, y: Tensor, vector: tuple[Tensor, ...], dtype: torch.dtype):
    """Loss, gradient and Hessian-vector product with the logits, as one writes them in torch, in a dtype."""
    operands = [t.to(dtype) for t in (H, W, b) if t is not None]
    along = tuple(t.to(dtype) for t in vector)

    def loss(*tensors: Tensor) -> Tensor:
        return cross_entropy(linear(*tensors).float() if dtype == torch.bfloat16 else linear(*tensors), y)

    gradient = torch.func.grad(loss, argnums=tuple(range(len(operands))))
    return loss(*operands), *torch.func.jvp(gradient, tuple(operands), along)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy(bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from onestep.ops.lmhead import cuda

    # 64 rows a chunk, 256 classes a block.
    monkeypatch.setattr(cuda, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(cuda, "_BLOCK_BYTES", 1)
    n, d, classes = 70, 24, 300
    H, W, dH, dW = normal(n, d, dtype=dtype), normal(classes, d, dtype=dtype), normal(n, d, dtype=dtype), None
    dW = normal(classes, d, dtype=dtype)
    b, db = (normal(classes, dtype=dtype), normal(classes, dtype=dtype)) if bias else (None, None)
    y = torch.randint(classes, (n,)).to(DEVICE)
    y[5] = -100
    along = tuple(t for t in (dH, dW, db) if t is not None)
    loss, gradient, tangent = composition(H, W, b, y, along, torch.float64)

    operands = [t.requires_grad_() for t in (H, W, b) if t is not None]
    value = linear_cross_entropy(H, W, y, b)
    ours = torch.autograd.grad(value, operands)
    product = [of for of in linear_cross_entropy_hvp(H, W, y, (dH, dW, db), b) if of is not None]
    exact = 1e-12 if dtype == torch.float64 else 5e-6
    assert abs(value - loss) < exact * loss
    if dtype in (torch.bfloat16, torch.float16):
        limits = composition(H, W, b, y, along, torch.bfloat16)
        scale = 1.0 if dtype == torch.bfloat16 else 2.0**-3
        for got, expected, theirs in zip(
            (*ours, *product), (*gradient, *tangent), (*limits[1], *limits[2]), strict=True
        ):
            assert got.dtype == dtype
            assert error(got, expected) < 2 * scale * error(theirs, expected)
    else:
        for got, expected in zip((*ours, *product), (*gradient, *tangent), strict=True):
            assert error(got, expected) < exact


def test_gauss_newton_is_the_hessian_without_the_gradient() -> None:
    H, W, y = normal(9, 5, dtype=torch.float64), normal(11, 5, dtype=torch.float64), torch.randint(11, (9,)).to(DEVICE)
    v = normal(9, 5, dtype=torch.float64), normal(11, 5, dtype=torch.float64), None
    product = linear_cross_entropy_ggnvp(H, W, y, v)
    z, dz = torch.func.jvp(lambda h, w: h @ w.mT, (H, W), v[:2])
    P = z.softmax(-1)
    dg = P * (dz - (P * dz).sum(-1, keepdim=True)) / 9
    assert error(product[0], dg @ W) < 1e-12
    assert error(product[1], dg.mT @ H) < 1e-12


@gpu_only
def test_linear_cross_entropy_of_no_class_is_nan_without_waiting() -> None:
    H, W, y = normal(9, 8).requires_grad_(), normal(11, 8), torch.randint(11, (9,)).to(DEVICE)
    y[4] = 11
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = linear_cross_entropy(H, W, y, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), H)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isnan().tolist() == [i == 4 for i in range(9)]
    assert gradient.isnan().all(-1).tolist() == [i == 4 for i in range(9)]


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_cross_entropy_in_a_graph(dtype: torch.dtype) -> None:
    H, W, y = normal(300, 64, dtype=dtype), normal(5000, 64, dtype=dtype), torch.randint(5000, (300,)).to(DEVICE)
    v = normal(300, 64, dtype=dtype), normal(5000, 64, dtype=dtype), None

    def call() -> tuple[Tensor, ...]:
        return linear_cross_entropy(H, W, y), *linear_cross_entropy_hvp(H, W, y, v)[:2]

    for got, expected in zip(replayed(call), call(), strict=True):
        assert torch.equal(got, expected)


# ---------------------------------------------------------------------------------------------------------------- polar


@pytest.mark.parametrize("shape", [(2, 20, 30), (1, 150, 140), (1, 300, 310)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_polar(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from onestep.ops.polar import cuda

    monkeypatch.setattr(cuda, "_LEAST_NARROW_ORDER", 100)
    values = torch.linspace(1, 0.05, min(shape[1:]))
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    M = ((left * values) @ right).to(DEVICE, dtype)
    factor, info = polar_ex(M, iterations=3)
    left, _, right = torch.linalg.svd(M.double(), full_matrices=False)
    assert not info.any()
    assert error(factor, left @ right) < (1e-5 if dtype == torch.float32 else 5e-2)
    spread = torch.linalg.svdvals(factor.double())
    assert (spread - 1).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_polar_of_a_bad_matrix() -> None:
    M = normal(3, 140, 150)
    expected = polar_ex(M).factor
    M[1, 130, 7] = torch.nan
    factor, info = polar_ex(M)
    assert (info > 0).tolist() == [False, True, False]
    assert factor[1].isnan().all()
    assert torch.equal(factor[::2], expected[::2])


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_polar_in_a_graph(dtype: torch.dtype) -> None:
    M = normal(2, 600, 700, dtype=dtype)
    assert torch.equal(replayed(lambda: (polar_ex(M).factor,))[0], polar_ex(M).factor)
