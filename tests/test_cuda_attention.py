"""Attention by its CUDA kernels: on a GPU, or with ONESTEP_CUDA_EMULATE=1 on the emulator (small sizes)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, func
from torch.nn.attention import SDPBackend, sdpa_kernel

from onestep.curvature import hvp
from onestep.functional import scaled_dot_product_attention
from onestep.ops import _cuda
from onestep.ops.attention import cuda

ON_GPU = _cuda.native is not None and not _cuda.EMULATED and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = pytest.mark.skipif(not (ON_GPU or _cuda.EMULATED), reason="needs a GPU, or ONESTEP_CUDA_EMULATE=1")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Operands = tuple[Tensor, ...]


def math(*args: Any, **options: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **options)


class Problem:
    """Operands and directions of one problem, in any dtype."""

    def __init__(self, option: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        batch, heads, kv_heads, queries, keys, d, dv = sizes
        generator = torch.Generator().manual_seed(keys)
        shapes = [(batch, heads, queries, d), (batch, kv_heads, keys, d), (batch, kv_heads, keys, dv)]
        self.options: dict[str, Any] = {"is_causal": option == "causal", "enable_gqa": heads != kv_heads}
        if option == "boolean":
            mask = torch.rand(batch, 1, queries, keys, generator=generator) > 0.4
            mask[..., 0] = True
            self.options["attn_mask"] = mask.to(DEVICE)
        if option == "additive":
            shapes.append((heads, queries, keys))
        if option == "per key":
            shapes.append((keys,))

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.operands: Operands = tuple(map(normal, shapes))
        self.tangents: Operands = tuple(map(normal, shapes))
        self.cotangent = normal((batch, heads, queries, dv))

    def double(self) -> Problem:
        wide = object.__new__(Problem)
        wide.options = self.options
        wide.operands = tuple(x.double() for x in self.operands)
        wide.tangents = tuple(x.double() for x in self.tangents)
        wide.cotangent = self.cotangent.double()
        return wide

    def results(self, attention: Any) -> list[Tensor]:
        """The tangent, the gradient, its derivative forward over reverse and reverse over reverse."""
        places = tuple(range(len(self.operands)))

        def values(*x: Tensor) -> Tensor:
            return attention(*x, **self.options)

        def loss(*x: Tensor) -> Tensor:
            return (values(*x).square() * self.cotangent).sum()

        gradient = func.grad(loss, places)

        def along(*x: Tensor) -> Tensor:
            return sum((g * t).sum() for g, t in zip(gradient(*x), self.tangents, strict=True))  # type: ignore[return-value]

        tangent = func.jvp(values, self.operands, self.tangents)[1]
        both = func.jvp(gradient, self.operands, self.tangents)
        return [tangent, *both[0], *both[1], *func.grad(along, places)(*self.operands)]


def errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [
        ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
        for a, b in zip(got, expected, strict=True)
    ]


# batch, heads, kv_heads, queries, keys, d, dv
SIZES = {
    "small": (2, 2, 1, 9, 9, 8, 8),
    "edges": (1, 2, 2, 19, 35, 17, 9),
    "long": (1, 1, 1, 70, 66, 64, 64),
    "features": (1, 4, 2, 150, 150, 128, 96),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["none", "causal", "boolean", "additive", "per key"])
@pytest.mark.parametrize("size", list(SIZES) if ON_GPU else list(SIZES)[:2])
def test_every_order(size: str, option: str, dtype: torch.dtype) -> None:
    """Against float64: 16 bits within twice the error of the math backend in the same dtype."""
    if not ON_GPU and dtype.itemsize == 2 and (size != "small" or option not in ("causal", "additive")):
        pytest.skip("the emulator takes seconds for a matrix instruction's kernels; tests/cpp/cuda has these cases")
    problem = Problem(option, SIZES[size], dtype)
    expected = problem.double().results(math)
    got = problem.results(scaled_dot_product_attention)
    assert all(result.dtype == dtype for result in got)
    theirs = errors(problem.results(math), expected)
    # In 32 bits the kernels' probabilities of a row share the rounding of L; torch's sum to 1.
    floor = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-7, torch.float16: 5e-4}[dtype]
    for ours, other in zip(errors(got, expected), theirs, strict=True):
        assert ours <= 2 * other + floor
    again = problem.results(scaled_dot_product_attention)
    if cuda.path(*problem.operands[:3], None, 1.0, False, False).name == "kernel" or not ON_GPU:
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_get_the_work_memory_that_the_native_module_asks_for(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four numbers for each row of queries: of 2 × 3 problems, 4 heads and 5 queries."""
    taken: list[int] = []
    workspace = _cuda.workspace
    monkeypatch.setattr(_cuda, "workspace", lambda like, size: taken.append(size) or workspace(like, size))
    q = torch.randn(2, 3, 4, 5, 7, dtype=dtype, device=DEVICE, requires_grad=True)
    k = torch.randn(2, 3, 2, 6, 7, dtype=dtype, device=DEVICE)
    scaled_dot_product_attention(q, k, k, enable_gqa=True).sum().backward()
    assert taken == [4 * dtype.itemsize * 2 * 3 * 4 * 5]
    assert _cuda.native is not None
    monkeypatch.setattr(_cuda.native, "attention_gradients_workspace", lambda **sizes: taken[0] + 64)
    scaled_dot_product_attention(q, k, k, enable_gqa=True).sum().backward()
    assert taken[1:] == [taken[0] + 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_no_key(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 20, 8, device=DEVICE).to(dtype) for _ in range(3))
    mask = torch.ones(20, 20, dtype=torch.bool, device=DEVICE)
    mask[5] = False

    def loss(*x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*x, attn_mask=mask).square().sum()

    first, second = func.jvp(func.grad(loss, (0, 1, 2)), (q, k, v), (k, v, q))
    for result in (scaled_dot_product_attention(q, k, v, mask), first[0], second[0]):
        assert (result[:, :, 5] == 0).all()
    assert all(result.isfinite().all() for result in (*first, *second))


@pytest.mark.parametrize("masked", [True, False])
def test_layouts_are_read_in_place_or_copied(masked: bool) -> None:
    """Heads last, columns that are not next to each other, rows that do not start at 16 bytes; by our kernels (with a
    mask) the same bits."""
    q, k, v = (torch.randn(2, 3, 10, 8, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(10, 10, dtype=torch.bool, device=DEVICE).tril() if masked else None

    def gradient(query: Tensor) -> Tensor:
        return func.grad(lambda x: scaled_dot_product_attention(x, k, v, mask).square().sum())(query)

    expected = gradient(q)
    shifted = torch.zeros(q.numel() + 1, device=DEVICE, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    for other in (q.transpose(1, 2).contiguous().transpose(1, 2), q.mT.contiguous().mT, shifted):
        if masked:
            assert torch.equal(gradient(other), expected)
        else:
            torch.testing.assert_close(gradient(other), expected, rtol=2e-2, atol=2e-2)


def test_features_that_no_kernel_takes() -> None:
    problem = Problem("causal", (1, 1, 1, 5, 6, 300, 4), torch.float32)
    assert cuda.path(*problem.operands, None, 1.0, True, True).name == "formulas"
    assert "300" in cuda.path(*problem.operands, None, 1.0, True, True).reason
    expected = problem.double().results(math)
    assert max(errors(problem.results(scaled_dot_product_attention), expected)) < 1e-5


def test_common_part_of_the_tangents_of_scores_cancels() -> None:
    """All Ṡ of a row are near 1000: what is left of Ȯ and of the Hessian product must not be their rounding."""
    d = 8
    q, k = torch.zeros(1, 1, 24, d, device=DEVICE), torch.randn(1, 1, 24, d, device=DEVICE)
    q[..., 0], k[..., 0] = 1.0, 32.0
    v = torch.randn(1, 1, 24, d, device=DEVICE)
    dq = torch.zeros_like(q)
    dq[..., 0] = 88.0
    operands = tuple(x.bfloat16() for x in (q, k, v))
    zeros = torch.zeros_like(operands[1])
    tangent = func.jvp(scaled_dot_product_attention, operands, (dq.bfloat16(), zeros, zeros))[1]
    assert tangent.abs().max() < 0.05


@needs_gpu
def test_paths_on_a_gpu() -> None:
    q = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    assert cuda.path(q, q, q, None, 0.1, True, False).name == "flash"
    assert cuda.path(q, q, q, None, 0.1, True, True) == ("kernel", "not torch's flash kernels: they give no tangents")
    assert cuda.path(q, q, q[..., :32], None, 0.1, True, False).name == "kernel"


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_of_a_hessian_product(dtype: torch.dtype) -> None:
    """Captured once, replayed with other numbers; so nothing in it waits for the device."""
    problem = Problem("causal", (*SIZES["long"][:4], 70, 64, 64), dtype)

    def product() -> tuple[Operands, Operands]:
        def loss(*x: Tensor) -> Tensor:
            return (scaled_dot_product_attention(*x, **problem.options).square() * problem.cotangent).sum()

        return func.jvp(func.grad(loss, (0, 1, 2)), problem.operands, problem.tangents)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            product()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product()
    other = Problem("none", (*SIZES["long"][:4], 70, 64, 64), dtype)
    for mine, new in zip((*problem.operands, *problem.tangents), (*other.tangents, *other.operands), strict=True):
        mine.copy_(new)
    graph.replay()
    replayed = [x.clone() for part in captured for x in part]
    directly = [x for part in product() for x in part]
    for a, b in zip(replayed, directly, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_hessian_products_of_language_models(name: str, dtype: torch.dtype) -> None:
    """hvp through transformers' models, against the same model with eager attention in float64."""
    transformers = pytest.importorskip("transformers")
    from test_transformers import TOKENS, configurations

    from onestep.integrations.transformers import register_attention

    register_attention()
    auto_class, configuration = configurations()[name]
    torch.manual_seed(0)
    tokens = torch.randint(1, TOKENS, (2, 14), device="cuda")
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}

    def product(attention: str, kind: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = auto_class.from_config(configuration, attn_implementation=attention).to("cuda", dtype).to(kind).eval()
        params = {key: value.detach() for key, value in model.named_parameters()}
        torch.manual_seed(2)
        v = {key: torch.randn_like(value, dtype=torch.float32).to(dtype).to(kind) for key, value in params.items()}
        return hvp(lambda p: func.functional_call(model, p, (), inputs).loss, params, v)

    assert transformers
    expected = product("eager", torch.float64)
    scale = torch.stack([x.norm() for x in expected.values()]).norm()

    def error(results: dict[str, Tensor]) -> float:
        parts = [results[key].double() - expected[key] for key in expected]
        return (torch.stack([part.norm() for part in parts]).norm() / scale).item()

    assert error(product("onestep", dtype)) <= 2 * error(product("eager", dtype)) + 1e-5


@needs_gpu
def test_fit_on_a_gpu() -> None:
    """A transformer layer, trained by its curvature on the device that it is on."""
    import onestep

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(16 * 6, 1)).cuda()
    X, y = torch.randn(64, 6, 16, device="cuda"), torch.randn(64, 1, device="cuda")
    before = F.mse_loss(model(X), y).item()
    result = onestep.fit(model, (X, y), method="newton_cg", max_steps=5, progress=False)
    assert result.loss < 0.9 * before
    assert all(parameter.is_cuda for parameter in model.parameters())
