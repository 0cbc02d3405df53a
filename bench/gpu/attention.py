"""Second derivatives of attention on a GPU, beside torch's flash forward and backward and its math backend.

    python bench/gpu/attention.py [--out FOLDER] [--quick]

First, results of every kind of problem against float64: bf16 and fp16 within twice the error of the same composition by
torch's math backend in that dtype. Then times, and what was timed is held to float64 in the same way, a few heads at a
time; that of GPT-2 to eager attention in float32. A wrong result ends the run with an error.

Goals at T 8192, H 16, D 128, causal, bf16: tangent (JVP) at most 4 times torch's flash forward; Hessian product at most
4 times its forward and backward; at least 5 times faster than the math backend where that fits; memory that grows with
T, not T². Hessian product of GPT-2 (124 M) at T 1024: at most 4 gradients' time and 2 gradients' memory.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Report, WrongResult, added_bytes, interleaved, largest_error, relative_error, require
from torch import Tensor, func
from torch.nn.attention import SDPBackend, sdpa_kernel

from onestep.functional import scaled_dot_product_attention
from onestep.ops.attention import cuda

ops = torch.ops.onestep
Operands = tuple[Tensor, ...]


def by(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(*operands: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*operands, **options)

    return attention


math_attention, flash_attention = by(SDPBackend.MATH), by(SDPBackend.FLASH_ATTENTION)


def hessian_product(
    attention: Callable[..., Tensor], cotangent: Tensor, operands: Operands, tangents: Operands, **options: Any
) -> tuple[Operands, Operands]:
    """The gradient of a loss that is not linear in the output, and its derivative along the tangents."""

    def loss(*inputs: Tensor) -> Tensor:
        return (attention(*inputs, **options).square() * cotangent).sum()

    result: tuple[Operands, Operands] = func.jvp(func.grad(loss, tuple(range(len(operands)))), operands, tangents)
    return result


# ------------------------------------------------------------------------------------------------------------- results

# name, heads, kv_heads, queries, keys, features, features of v, options
PROBLEMS = (
    ("causal 64", 4, 4, 300, 300, 64, 64, "causal"),
    ("causal 128", 2, 2, 517, 517, 128, 128, "causal"),
    ("causal 256", 2, 2, 200, 200, 256, 256, "causal"),
    ("full 16", 2, 2, 130, 260, 16, 16, "none"),
    ("grouped", 8, 2, 260, 260, 128, 128, "causal"),
    ("unequal causal", 2, 1, 100, 333, 80, 40, "causal"),
    ("boolean", 2, 2, 150, 150, 64, 64, "boolean"),
    ("additive", 2, 2, 150, 200, 64, 64, "additive"),
    ("odd features", 2, 2, 70, 90, 33, 17, "none"),
)


def check(report: Report, dtype: torch.dtype, device: str) -> None:
    """Gradients and Hessian products of every kind of problem; raises if some are wrong, which their rows say."""
    good = True
    for name, heads, kv_heads, queries, keys, d, dv, option in PROBLEMS:
        generator = torch.Generator(device).manual_seed(queries)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        shapes = [(2, heads, queries, d), (2, kv_heads, keys, d), (2, kv_heads, keys, dv)]
        options: dict[str, Any] = {"is_causal": option == "causal", "enable_gqa": heads != kv_heads}
        if option == "boolean":
            options["attn_mask"] = torch.rand(2, 1, queries, keys, generator=generator, device=device) > 0.3
            options["attn_mask"][..., 0] = True
        if option == "additive":
            shapes.append((heads, queries, keys))
        operands, tangents = (tuple(normal(*shape) for shape in shapes) for _ in range(2))
        cotangent = normal(2, heads, queries, dv)
        wide = hessian_product(
            math_attention,
            cotangent.double(),
            tuple(x.double() for x in operands),
            tuple(x.double() for x in tangents),
            **options,
        )

        def errors(results: tuple[Operands, Operands], wide: tuple[Operands, Operands] = wide) -> tuple[float, ...]:
            return tuple(
                relative_error(got, expected) if torch.isfinite(got).all() else math.inf
                for gots, expecteds in zip(results, wide, strict=True)
                for got, expected in zip(gots, expecteds, strict=True)
            )

        theirs = errors(hessian_product(math_attention, cotangent, operands, tangents, **options))
        for warp_groups in (True, False) if dtype.itemsize == 2 else (False,):
            cuda.WARP_GROUPS = warp_groups
            run = [
                hessian_product(scaled_dot_product_attention, cotangent, operands, tangents, **options)
                for _ in range(2)
            ]
            ours = errors(run[0])
            same = all(torch.equal(a, b) for a, b in zip(run[0][1], run[1][1], strict=True))
            worst = max(a / (2 * b + 1e-6) for a, b in zip(ours, theirs, strict=True))
            good = good and worst <= 1
            report.row(
                f"{name} {dtype}{' wgmma' if warp_groups else ''}",
                right=worst <= 1,
                error_to_math=max(a / b for a, b in zip(ours, theirs, strict=True)),
                worst=max(ours),
                same_bits=same,
            )
        cuda.WARP_GROUPS = True
    if not good:
        raise WrongResult("gradients or Hessian products of the rows above that say right False")


# ----------------------------------------------------------------------------------------------- results after timing

# A call on (gradient, its tangent, q, k, v, their tangents), which gives one or more tensors.
Call = Callable[..., Operands]


def references(attention: Callable[..., Tensor], **options: Any) -> dict[str, Call]:
    """What the timed calls compute, by another attention: derivatives as torch.func takes them."""

    def attend(*inputs: Tensor) -> Tensor:
        return attention(*inputs, **options)

    def jvp(grad: Tensor, dgrad: Tensor, *rest: Tensor) -> Operands:
        return (func.jvp(attend, rest[:3], rest[3:])[1],)

    def backward_jvp(grad: Tensor, dgrad: Tensor, *rest: Tensor) -> Operands:
        def backward(grad: Tensor, *inputs: Tensor) -> Any:
            return func.vjp(attend, *inputs)[1](grad)

        tangents: Operands = func.jvp(backward, (grad, *rest[:3]), (dgrad, *rest[3:]))[1]
        return tangents

    def hvp(grad: Tensor, dgrad: Tensor, *rest: Tensor) -> Operands:
        return sum(hessian_product(attention, grad, rest[:3], rest[3:], **options), ())

    return {"jvp": jvp, "backward_jvp": backward_jvp, "hvp": hvp}


def by_heads(call: Call, tensors: Operands, dtype: torch.dtype, elements: int = 1 << 26) -> Operands:
    """A call that keeps T × T matrices, for as many heads at a time as have so many elements in one of them."""
    heads = [x.flatten(0, 1).unsqueeze(1) for x in tensors]
    at_once = max(1, elements // heads[0].shape[-2] ** 2)
    parts = [call(*(x.to(dtype) for x in few)) for few in zip(*(x.split(at_once) for x in heads), strict=True)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def check_timed(results: dict[str, Any], tensors: Operands, dtype: torch.dtype, **options: Any) -> dict[str, float]:
    """Errors of what was timed against float64; raises where one is over twice the math backend's in ``dtype``.

    Results are named as in ``references``, those of other kernels with more after it, such as "jvp_mma".
    """
    errors = {}
    for name, reference in references(math_attention, **options).items():
        exact = by_heads(reference, tensors, torch.float64)
        theirs = largest_error(by_heads(reference, tensors, dtype), exact)
        for key, result in results.items():
            if key.removesuffix("_mma") == name:
                errors[f"{key}_error"] = largest_error(result, exact)
                require(f"{key} of attention", errors[f"{key}_error"], theirs, dtype)
    return errors


# --------------------------------------------------------------------------------------------------------------- times


def operands_of(batch: int, heads: int, length: int, d: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.randn(batch, heads, length, d, device="cuda").to(dtype) for _ in range(count)]


def measure(report: Report, batch: int, heads: int, length: int, d: int, dtype: torch.dtype, causal: bool) -> None:
    q, k, v, dq, dk, dv, grad, dgrad = operands_of(batch, heads, length, d, dtype, 8)
    operands, tangents = (q, k, v), (dq, dk, dv)
    scale = d**-0.5
    options = {"is_causal": causal}
    recorded = tuple(x.clone().requires_grad_() for x in operands)
    half = dtype.itemsize == 2
    attention = flash_attention if half else by(SDPBackend.EFFICIENT_ATTENTION)

    def forward_and_backward() -> Operands:
        grads: Operands = torch.autograd.grad(attention(*recorded, **options), recorded, grad)
        return grads

    out, lse = ops.attention(q, k, v, None, scale, causal)
    dout, dlse = ops.attention_jvp(q, k, v, None, out, lse, *tangents, None, scale, causal)
    primal = (grad, None, q, k, v, None, out, lse)
    tangent = (dgrad, None, dq, dk, dv, None, dout, dlse)

    def tangent_of_backward() -> Any:
        return ops.attention_backward_jvp(*primal, *tangent, scale, causal, False)

    def jvp() -> Any:
        return ops.attention_jvp(q, k, v, None, out, lse, *tangents, None, scale, causal)

    def plain(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            cuda.WARP_GROUPS = False
            result = call()
            cuda.WARP_GROUPS = True
            return result

        return run

    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: attention(*operands, **options),
        "forward_backward": forward_and_backward,
        "jvp": jvp,
        "backward_jvp": tangent_of_backward,
        "hvp": lambda: hessian_product(scaled_dot_product_attention, grad, operands, tangents, **options),
        "both": lambda: func.jvp(lambda *x: scaled_dot_product_attention(*x, **options), operands, tangents),
        "default_forward_backward": lambda: torch.autograd.grad(
            F.scaled_dot_product_attention(*recorded, **options), recorded, grad
        ),
    }
    if half:
        calls |= {"jvp_mma": plain(jvp), "backward_jvp_mma": plain(tangent_of_backward)}
    errors: dict[str, float] = {}

    def check_results(results: dict[str, Any]) -> None:
        found = {
            key: result[:1] if key.startswith("jvp") else result[:3]
            for key, result in results.items()
            if key.startswith(("jvp", "backward_jvp"))
        } | {"hvp": sum(results["hvp"], ())}
        errors.update(check_timed(found, (grad, dgrad, *operands, *tangents), dtype, **options))

    times = interleaved(calls, check=check_results)
    # Multiplications and additions of one product of T × T × D, of which a causal mask leaves half.
    print(*kernels_of(calls["hvp"]).items(), sep="\n", flush=True)
    product = 2 * batch * heads * length * length * d * (0.5 if causal else 1)
    name = f"B {batch} H {heads} T {length} D {d} {dtype} {'causal' if causal else 'full'}"
    report.row(
        name,
        **{f"{key}_ms": value for key, value in times.items()},
        jvp_to_forward=times["jvp"] / times["forward"],
        hvp_to_forward_backward=times["hvp"] / times["forward_backward"],
        jvp_tflops=5 * product / times["jvp"] / 1e9,
        backward_jvp_tflops=12 * product / times["backward_jvp"] / 1e9,
        hvp_added_mib=added_bytes(calls["hvp"]) / 2**20,
        gradient_added_mib=added_bytes(forward_and_backward) / 2**20,
        **errors,
    )


def kernels_of(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kernel of one call, by the profiler."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return {
        event.key.replace("onestep::cuda::", "")[:150]: round(event.device_time_total / 1e3, 3)
        for event in sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:8]
    }


def measure_math(report: Report, heads: int, length: int, d: int) -> None:
    """Beside the math backend, at a length where it fits."""
    operands = tuple(operands_of(1, heads, length, d, torch.bfloat16, 3))
    tangents = tuple(operands_of(1, heads, length, d, torch.bfloat16, 3))
    (grad,) = operands_of(1, heads, length, d, torch.bfloat16, 1)

    def run(attention: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: hessian_product(attention, grad, operands, tangents, is_causal=True)

    calls = {"math": run(math_attention), "onestep": run(scaled_dot_product_attention)}
    errors: dict[str, float] = {}

    def check_results(results: dict[str, Any]) -> None:
        hvp = references(math_attention, is_causal=True)["hvp"]
        exact = by_heads(hvp, (grad, grad, *operands, *tangents), torch.float64)
        errors.update({f"{name}_error": largest_error(sum(pair, ()), exact) for name, pair in results.items()})
        require("hvp of attention", errors["onestep_error"], errors["math_error"], torch.bfloat16)

    times = interleaved(calls, 5, check_results)
    report.row(
        f"HVP beside math, H {heads} T {length} D {d}",
        math_ms=times["math"],
        onestep_ms=times["onestep"],
        faster=times["math"] / times["onestep"],
        math_added_mib=added_bytes(calls["math"]) / 2**20,
        onestep_added_mib=added_bytes(calls["onestep"]) / 2**20,
        **errors,
    )


Named = dict[str, Tensor]


def derivatives_by_rows(model: torch.nn.Module, tokens: Tensor, v: Named) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian product of a causal model's mean loss, in its dtype, a row at a time: T × T matrices fit so.

    Rows have as many tokens each, so the mean over rows is that of the loss; it is taken in float32. Parameters are
    joined in the order of their names.
    """
    params = {name: value.detach() for name, value in model.named_parameters()}
    along = {name: v[name].to(value.dtype) for name, value in params.items()}
    grad = product = torch.zeros(())
    for row in tokens.split(1):

        def loss(p: Named, row: Tensor = row) -> Tensor:
            inputs = {"input_ids": row, "labels": row, "use_cache": False}
            result: Tensor = func.functional_call(model, p, (), inputs).loss
            return result

        parts = func.jvp(func.grad(loss), (params,), (along,))
        grad, product = (
            total.to(tokens.device) + joined(part) / len(tokens)
            for total, part in zip((grad, product), parts, strict=True)
        )
    return grad, product


def joined(values: Named) -> Tensor:
    """All elements in float32, in the order of the names."""
    return torch.cat([values[name].float().flatten() for name in sorted(values)])


def check_gpt2(
    model_of: Callable[[str], torch.nn.Module], tokens: Tensor, v: Named, grad: Named, product: Named
) -> Any:
    """Errors of a timed gradient and Hessian product against eager attention in float32; raises where one is too large.

    Four times the error of eager attention in the timed dtype, not two: rows one by one round elsewhere than together.
    """
    model = model_of("eager")
    # The parameters that were timed are rounded to their dtype: so are those of the reference.
    theirs = derivatives_by_rows(model, tokens, v)
    exact = derivatives_by_rows(model.float(), tokens, v)
    errors = {}
    for name, got, peer, expected in zip(
        ("gradient", "hvp"), (joined(grad), joined(product)), theirs, exact, strict=True
    ):
        errors[f"{name}_error"] = relative_error(got, expected)
        errors[f"eager_{name}_error"] = relative_error(peer, expected)
        require(f"the {name} of GPT-2", errors[f"{name}_error"], 2 * errors[f"eager_{name}_error"])
    return errors


def measure_gpt2(report: Report, batch: int, length: int) -> None:
    """A Hessian product of GPT-2 (124 M), beside one gradient by torch's own attention."""
    from transformers import AutoModelForCausalLM, GPT2Config

    from onestep.curvature import hvp
    from onestep.integrations.transformers import register_attention

    register_attention()
    tokens = torch.randint(0, 50257, (batch, length), device="cuda")
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}

    def model_of(implementation: str) -> torch.nn.Module:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(GPT2Config(), attn_implementation=implementation)
        return model.to("cuda", torch.bfloat16).eval()

    models = {name: model_of(name) for name in ("sdpa", "onestep")}
    params = {name: value.detach() for name, value in models["onestep"].named_parameters()}
    v = {name: torch.randn_like(value) for name, value in params.items()}

    def loss(p: Named) -> Tensor:
        result: Tensor = func.functional_call(models["onestep"], p, (), inputs).loss
        return result

    def gradient(name: str) -> Callable[[], Any]:
        model = models[name]
        return lambda: torch.autograd.grad(model(**inputs).loss, tuple(model.parameters()))

    calls = {f"gradient_{name}": gradient(name) for name in models} | {"hvp": lambda: hvp(loss, params, v)}
    errors: dict[str, float] = {}

    def check_results(results: dict[str, Any]) -> None:
        grad = dict(zip(params, results["gradient_onestep"], strict=True))
        errors.update(check_gpt2(model_of, tokens, v, grad, results["hvp"]))

    times = interleaved(calls, 7, check_results)
    memory = {name: added_bytes(call) / 2**20 for name, call in calls.items()}
    report.row(
        f"GPT-2 124 M, B {batch} T {length}, bf16",
        **{f"{name}_ms": value for name, value in times.items()},
        **{f"{name}_added_mib": value for name, value in memory.items()},
        hvp_to_gradient=times["hvp"] / times["gradient_sdpa"],
        memory_to_gradient=memory["hvp"] / memory["gradient_sdpa"],
        **errors,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument("--quick", action="store_true", help="results, and times of the goals alone")
    options = parser.parse_args()
    report = Report("attention", options.out)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        report.run(check, dtype, "cuda")
    report.run(measure, 1, 16, 8192, 128, torch.bfloat16, True)
    report.run(measure_math, 16, 4096, 128)
    report.run(measure_gpt2, 8, 1024)
    if not options.quick:
        report.run(measure, 1, 16, 8192, 64, torch.bfloat16, True)
        report.run(measure, 8, 12, 1024, 64, torch.bfloat16, True)
        report.run(measure, 1, 16, 4096, 128, torch.bfloat16, False)
        report.run(measure, 1, 16, 2048, 64, torch.float32, True)
    report.end()


if __name__ == "__main__":
    main()
