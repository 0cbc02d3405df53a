"""What GPU benchmarks do with results after timing, on CPU tensors: right ones pass, wrong ones are refused."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, func

from onestep.curvature import glm, hvp
from onestep.functional import scaled_dot_product_attention
from onestep.functional.lmhead import linear_cross_entropy, linear_cross_entropy_ggnvp, linear_cross_entropy_hvp
from onestep.linalg import polar

FOLDER = Path(__file__).parents[1] / "bench" / "gpu"
NAMES = ("measure", "normal", "glm", "lmhead", "polar", "attention", "compensated")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmarks' modules, which find each other in their folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_last_rounds_results_are_checked(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench.measure, "timed", lambda call: (float(len(calls)), call()))
    calls: list[str] = []
    seen: list[dict[str, Any]] = []

    def call(name: str) -> int:
        calls.append(name)
        return calls.count(name)

    two = {name: functools.partial(call, name) for name in "ab"}
    assert bench.measure.interleaved(two, 3, seen.append) == {"a": 6.0, "b": 7.0}
    assert calls == ["a", "a", "b", "b", *"ababab"]
    assert seen == [{"a": 5, "b": 5}]


def test_a_wrong_case_has_no_row_and_ends_the_run(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure = bench.measure
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for limit in ("copy_bandwidth", "gemm_peak"):
        monkeypatch.setattr(measure, limit, lambda: 1.0)
    (tmp_path / "some.json").write_text('{"rows": [{"case": "of an earlier run"}]}')
    report = measure.Report("some", tmp_path)

    def benchmark(report: Any, error: float) -> None:
        measure.require("it", error, 1e-3)
        report.row(f"{error}", ms=1.0)

    for error in (3e-3, 2e-3, float("nan")):
        report.run(benchmark, error)
    assert [row["case"] for row in json.loads((tmp_path / "some.json").read_text())["rows"]] == ["0.002"]
    with pytest.raises(SystemExit, match=r"some: wrong results of 2 cases:\n.*3\.0e-03.*at most 2\.0e-03.*\n.*nan"):
        report.end()
    measure.Report("some", tmp_path).end()
    assert json.loads((tmp_path / "some.json").read_text())["rows"] == []


def test_errors_of_solutions_and_factors(bench: SimpleNamespace) -> None:
    X, Y = normal(300, 16, 8), normal(300, 16, 1, seed=1)
    W = torch.ops.onestep.solve_normal(X, Y)[0]
    good = bench.normal.solution_error(X, Y, W, elements=1000)
    assert good < 1e-5 and good == pytest.approx(bench.normal.solution_error(X, Y, W))
    bench.measure.require("solve_normal", good, bench.normal.solution_error(X, Y, bench.normal.composite(X, Y)))
    W[200] = 0  # one of 300
    assert bench.normal.solution_error(X, Y, W, elements=1000) == pytest.approx(1 / 300, rel=1e-3)
    A = X.mT @ X
    L = torch.ops.onestep.cholesky(A)[0]
    assert bench.normal.factor_error(A, L) < 1e-6
    L[7, 3, 2] += 1
    assert bench.normal.factor_error(A, L) > 1e-3


@pytest.mark.parametrize(("family", "k", "m"), [("logistic", 0, 0), ("logistic", 0, 3), ("softmax", 3, 0)])
def test_exact_results_of_linear_models(bench: SimpleNamespace, family: str, k: int, m: int) -> None:
    X, shape = normal(500, 8), (8, k) if k else (8,)
    W, V = normal(*shape, seed=1), normal(*((m, *shape) if m else shape), seed=2)
    y = (normal(500, seed=3) > 0).long() if k else (normal(500, seed=3) > 0).float()
    point = glm(X, y, W, family)
    results = (point.loss, point.grad, point.hvp(V))
    loss, grad, products = bench.glm.exact(X, y, W, V, family, rows=130)
    assert bench.measure.largest_error(results, (torch.tensor(loss), grad, products)) < 1e-6
    assert bench.glm.loss_and_gradient(X, y, W, family)[0] == pytest.approx(loss, rel=1e-5)
    assert not W.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_results_of_a_language_models_head(bench: SimpleNamespace, dtype: torch.dtype) -> None:
    problem = (normal(40, 16, dtype=dtype), normal(50, 16, seed=1, dtype=dtype), torch.arange(40),
               normal(40, 16, seed=2, dtype=dtype), normal(50, 16, seed=3, dtype=dtype))  # fmt: skip
    H, W, y, dH, dW = problem
    h, w = (x.double().requires_grad_() for x in (H, W))
    loss = torch.nn.functional.cross_entropy(h @ w.mT, y)
    grads = torch.autograd.grad(loss, (h, w), create_graph=True)
    product = torch.autograd.grad((grads[0] * dH).sum() + (grads[1] * dW).sum(), (h, w))
    assert bench.measure.largest_error(bench.lmhead.in_double(*problem, False, rows=7), product) < 1e-12
    assert bench.measure.largest_error(bench.lmhead.gradient_in_double(H, W, y, rows=7), grads) < 1e-12

    results = {
        "ggn": linear_cross_entropy_ggnvp(H, W, y, (dH, dW, None)),
        "ggn_composition": bench.lmhead.composition(*problem, True),
        "hvp": linear_cross_entropy_hvp(H, W, y, (dH, dW, None)),
        "hvp_composition": bench.lmhead.composition(*problem, False),
    }
    errors: dict[str, float] = {}
    bench.lmhead.check_products(problem, results, errors)
    assert errors.keys() == {"ggn_error", "ggn_composition_error", "hvp_error", "hvp_composition_error"}
    with pytest.raises(bench.measure.WrongResult, match="the product hvp is wrong"):
        bench.lmhead.check_products(problem, results | {"hvp": results["ggn"]}, {})
    mine = torch.autograd.grad(linear_cross_entropy(h.to(dtype), w.to(dtype), y), (h, w))
    assert bench.measure.largest_error(mine, grads) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("shape", [(20, 8, 24), (20, 24, 8), (3, 16, 16)])
def test_departure_from_a_polar_factor(bench: SimpleNamespace, shape: tuple[int, ...]) -> None:
    M = normal(*shape)
    results = {"polar": polar(M), "newton_schulz": bench.polar.newton_schulz(M)}
    bench.polar.check(results, M)
    left, _, right = torch.linalg.svd(M, full_matrices=False)
    assert bench.polar.departure(left @ right, M) < 1e-5
    wrong = results["polar"].clone()
    wrong[-1] = (
        torch.linalg.svd(normal(*shape, seed=1)[-1], full_matrices=False)[0] @ right[-1]
    )  # orthogonal, of another
    with pytest.raises(bench.measure.WrongResult, match="the polar factor is wrong"):
        bench.polar.check(results | {"polar": wrong}, M)
    with pytest.raises(bench.measure.WrongResult, match="the polar factor of the first matrices is wrong"):
        bench.polar.check(results | {"polar": -results["polar"]}, M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timed_attention_is_held_to_float64(bench: SimpleNamespace, dtype: torch.dtype) -> None:
    grad, dgrad, *rest = (normal(2, 3, 20, 8, seed=seed, dtype=dtype) for seed in range(8))
    operands, tangents = tuple(rest[:3]), tuple(rest[3:])
    ops, scale = torch.ops.onestep, 8**-0.5
    out, lse = ops.attention(*operands, None, scale, True)
    dout, dlse = ops.attention_jvp(*operands, None, out, lse, *tangents, None, scale, True)
    backward_jvp = ops.attention_backward_jvp(
        grad, None, *operands, None, out, lse, dgrad, None, *tangents, None, dout, dlse, scale, True, False
    )
    product = bench.attention.hessian_product(scaled_dot_product_attention, grad, operands, tangents, is_causal=True)
    results = {
        "jvp": (dout,),
        "jvp_mma": (dout.clone(),),
        "backward_jvp": backward_jvp[:3],
        "hvp": sum(product, ()),
    }
    tensors = (grad, dgrad, *operands, *tangents)
    errors = bench.attention.check_timed(results, tensors, dtype, is_causal=True)
    assert errors.keys() == {f"{name}_error" for name in results}
    for name in results:
        # One head of six.
        wrong = tuple(result.clone() for result in results[name])
        wrong[-1][1, 2] *= 1.5
        with pytest.raises(bench.measure.WrongResult, match=f"^{name} of attention is wrong"):
            bench.attention.check_timed(results | {name: wrong}, tensors, dtype, is_causal=True)
    with pytest.raises(bench.measure.WrongResult):
        bench.attention.check_timed(results, tensors, dtype, is_causal=False)


def test_heads_are_computed_some_at_a_time(bench: SimpleNamespace) -> None:
    sizes: list[int] = []

    def call(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        sizes.append(len(x))
        return x + y, x

    x, y = normal(2, 3, 10, 4), normal(2, 3, 10, 4, seed=1)
    total, first = bench.attention.by_heads(call, (x, y), torch.float64, elements=450)
    assert sizes == [4, 2] and total.dtype == torch.float64
    assert torch.equal(total.reshape(x.shape), x.double() + y.double()) and torch.equal(
        first.reshape(x.shape), x.double()
    )


def test_derivatives_of_a_language_model_are_held_to_eager_attention(bench: SimpleNamespace) -> None:
    transformers = pytest.importorskip("transformers")
    from onestep.integrations.transformers import register_attention

    register_attention()
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}

    def model_of(implementation: str) -> torch.nn.Module:
        torch.manual_seed(0)
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        return model.to(torch.bfloat16).eval()

    tokens = torch.arange(48).view(3, 16) % 37
    model = model_of("onestep")
    params = {name: value.detach() for name, value in model.named_parameters()}
    v = {name: normal(*value.shape, seed=len(name), dtype=value.dtype) for name, value in params.items()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
        result: Tensor = func.functional_call(model, p, (), inputs).loss
        return result

    grad, product = func.grad(loss)(params), hvp(loss, params, v)
    errors = bench.attention.check_gpt2(model_of, tokens, v, grad, product)
    assert errors["hvp_error"] < 0.1 and errors["gradient_error"] < 0.1
    with pytest.raises(bench.measure.WrongResult, match="the hvp of GPT-2 is wrong"):
        bench.attention.check_gpt2(model_of, tokens, v, grad, {name: -value for name, value in product.items()})


@pytest.mark.parametrize("what", ["quantize", "prune"])
def test_timed_layers_are_held_to_the_published_loops(bench: SimpleNamespace, what: str) -> None:
    module = bench.compensated
    A, W = module.gram_matrices(0, 300, device="cpu"), normal(40, 300)
    factor = torch.ops.onestep.inverse_cholesky(A, module.undamped(A))[0]
    exact = module.chain(A.double())
    assert bench.measure.relative_error(factor, exact) < 1e-5
    ours, loop = (
        (module.quantized, module.rounding_loop) if what == "quantize" else (module.pruned, module.pruning_loop)
    )
    results, facts = {"onestep": ours(W, A), "torch": loop(W, A)}, {}
    module.check_layer(what, W, A, results, facts)
    assert facts["loss_ratio"] == pytest.approx(1.0, abs=0.01) and facts["equal"] > 0.99
    codes, swept = results["onestep"]
    for wrong in ((codes, -swept), (codes.roll(1, 0), swept), (codes, torch.full_like(swept, torch.nan))):
        with pytest.raises(bench.measure.WrongResult, match=f"^{what} is wrong"):
            module.check_layer(what, W, A, results | {"onestep": wrong}, {})
    kept = module.pruned(W, A, 2, 4)[0]
    assert (kept.reshape(40, 75, 4).sum(-1) == 2).all()
