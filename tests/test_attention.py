"""Attention: values and derivatives of every composition against torch's math backend, mostly in fp64."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import COMPOSITIONS, OPTIONS, SIZES, UP_TO_SECOND_ORDER, Problem, math, normal, ops, worst
from torch import func
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from onestep.functional import scaled_dot_product_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_math_backend(option, size):
    """Every composition up to the second order."""
    problem = Problem(option, SIZES[size])
    for name in UP_TO_SECOND_ORDER:
        composition = COMPOSITIONS[name]
        assert worst(composition(problem, scaled_dot_product_attention), composition(problem, math)) < 1e-10, name


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("composition", ["jvp of jvp", "jvp of grad of jvp", "grad of jvp of grad"])
def test_beyond_the_kernels(option, composition):
    """Forward mode twice and order three."""
    problem = Problem(option, SIZES["tiny"])
    run = COMPOSITIONS[composition]
    assert worst(run(problem, scaled_dot_product_attention), run(problem, math)) < 1e-10


@pytest.mark.parametrize("option", ["none", "causal", "boolean", "additive"])
@pytest.mark.parametrize("composition", UP_TO_SECOND_ORDER)
def test_fp32_error_is_at_most_twice_the_math_backends(option, composition):
    exact = Problem(option, (1, 2, 2, 200, 200, 64, 64))
    rounded = exact.to(torch.float32)
    run = COMPOSITIONS[composition]
    expected = run(rounded.to(torch.float64), math)
    ours = worst(run(rounded, scaled_dot_product_attention), expected)
    assert ours <= 2 * worst(run(rounded, math), expected) + 1e-7


@pytest.mark.parametrize("option", ["none", "causal", "boolean", "additive"])
@pytest.mark.parametrize("composition", UP_TO_SECOND_ORDER)
def test_bf16_error_is_about_the_math_backends(option, composition):
    """Against fp64 of the same rounded operands: products that cancel are never rounded to bf16.

    The last two compositions reach each operand on two ways, whose gradients autograd adds in bf16.
    """
    rounded = Problem(option, (1, 2, 2, 100, 100, 32, 32)).to(torch.bfloat16)
    run = COMPOSITIONS[composition]
    got = run(rounded, scaled_dot_product_attention)
    assert all(result.dtype == torch.bfloat16 for result in got)
    expected = run(rounded.to(torch.float64), math)
    ways = 2.5 if composition in ("grad of jvp", "grad of grad") else 1.1
    assert worst(got, expected) <= ways * worst(run(rounded, math), expected)


def test_bf16_reads_strides_and_a_float32_mask():
    q, k, v = (normal(2, 9, 3, 8, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    mask = normal(9, 9, dtype=torch.float32)
    expected = math(q.double(), k.double(), v.double(), mask.double())
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask).double(), expected, rtol=1e-2, atol=1e-2)


# ----------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option):
    problem = Problem(option, (1, 2, 1, 3, 4, 3, 2))
    operands = tuple(x.requires_grad_() for x in problem.operands)
    run = problem.attention(scaled_dot_product_attention)
    assert gradcheck(run, operands, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(run, operands, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


def test_gradcheck_of_the_log_sum_exp():
    q, k, v, mask = (x.requires_grad_() for x in (normal(2, 3, 3), normal(1, 4, 3), normal(1, 4, 2), normal(1, 3, 4)))

    def both(*operands):
        return ops.attention(*operands, 0.6, True)

    def only_lse(*operands):
        return ops.attention(*operands, 0.6, True)[1]

    for run in (both, only_lse):
        assert gradcheck(run, (q, k, v, mask), check_forward_ad=True)
        assert gradgradcheck(run, (q, k, v, mask), check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_of_one_operand_alone(wanted):
    problem = Problem("additive", SIZES["tiny"])
    expected = func.grad(problem.loss(math), wanted)(*problem.operands)
    second = func.jvp(
        lambda x: func.grad(problem.loss(math), wanted)(*problem.operands[:wanted], x, *problem.operands[wanted + 1 :]),
        (problem.operands[wanted],),
        (problem.tangents[wanted],),
    )[1]
    operands = list(problem.operands)
    operands[wanted] = operands[wanted].clone().requires_grad_()
    loss = problem.loss(scaled_dot_product_attention)(*operands)
    (gradient,) = torch.autograd.grad(loss, operands[wanted], create_graph=True)
    torch.testing.assert_close(gradient, expected)
    (product,) = torch.autograd.grad(gradient, operands[wanted], problem.tangents[wanted])
    torch.testing.assert_close(product, second)
    with forward_ad.dual_level():
        operands[wanted] = forward_ad.make_dual(operands[wanted].detach(), problem.tangents[wanted])
        tangent = forward_ad.unpack_dual(problem.loss(scaled_dot_product_attention)(*operands)).tangent
    torch.testing.assert_close(tangent, (expected * problem.tangents[wanted]).sum())


def test_a_graph_may_be_kept_at_every_order():
    """create_graph=True where no further derivative is taken."""
    q = normal(2, 6, 4).requires_grad_()
    loss = scaled_dot_product_attention(q, q, q, is_causal=True).square().sum()
    (first,) = torch.autograd.grad(loss, q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q, create_graph=True)
    (third,) = torch.autograd.grad(second.square().sum(), q)
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.scaled_dot_product_attention(q, q, q, is_causal=True).square().sum()
        (first,) = torch.autograd.grad(loss, q, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), q, create_graph=True)
        (expected,) = torch.autograd.grad(second.square().sum(), q)
    torch.testing.assert_close(third, expected)


# -------------------------------------------------------------------------------------------------------- torch.func


def test_hessian():
    problem = Problem("causal", (1, 2, 1, 3, 3, 2, 2))
    got = func.hessian(problem.loss(scaled_dot_product_attention), (0, 1, 2))(*problem.operands)
    expected = func.hessian(problem.loss(math), (0, 1, 2))(*problem.operands)
    for row, expected_row in zip(got, expected, strict=True):
        for block, expected_block in zip(row, expected_row, strict=True):
            torch.testing.assert_close(block, expected_block)


@pytest.mark.parametrize("composition", [*UP_TO_SECOND_ORDER, "jvp of jvp"])
@pytest.mark.parametrize("mapped", [(0,), (1,), (2,), (3,), (0, 3), (0, 1, 2, 3)])
def test_vmap(composition, mapped):
    """Over any of the operands, against a loop; the tangents are mapped with their operands."""
    problem = Problem("per_head", (2, 2, 1, 4, 5, 3, 2))
    stacked = [
        torch.stack([x, torch.randn_like(x), torch.randn_like(x)], dim=1) if i in mapped else x
        for i, x in enumerate(problem.operands)
    ]
    in_dims = tuple(1 if i in mapped else None for i in range(4))
    run = COMPOSITIONS[composition]

    def at(*operands):
        here = object.__new__(Problem)
        here.__dict__ |= problem.__dict__ | {"operands": operands}
        return run(here, scaled_dot_product_attention)

    got = func.vmap(at, in_dims)(*stacked)
    singles = [at(*(x.select(1, i) if d == 1 else x for x, d in zip(stacked, in_dims, strict=True))) for i in range(3)]
    for result, expected in zip(got, zip(*singles, strict=True), strict=True):
        torch.testing.assert_close(result, torch.stack(expected))


def test_vmap_over_a_boolean_mask():
    q = normal(2, 4, 3)
    masks = torch.rand(5, 4, 4) > 0.3
    masks[..., 0] = True
    got = func.vmap(lambda mask: scaled_dot_product_attention(q, q, q, mask))(masks)
    torch.testing.assert_close(got, torch.stack([math(q, q, q, mask) for mask in masks]))


# ---------------------------------------------------------------------------------------------------- masked-out rows


@pytest.mark.parametrize("kind", ["boolean", "additive", "no keys"])
def test_rows_that_see_no_key(kind):
    """Zeros, with zero derivatives of both orders, and the other rows as they are."""
    keys = 0 if kind == "no keys" else 7
    q, k, v = normal(2, 70, 4), normal(2, keys, 4), normal(2, keys, 3)
    mask = torch.ones(70, keys, dtype=torch.bool)
    mask[5] = mask[69] = False
    if kind == "additive":
        mask = torch.zeros(70, keys, dtype=torch.float64).masked_fill(~mask, -torch.inf)

    def loss(q, k, v):
        out = scaled_dot_product_attention(q, k, v, mask)
        return (out * out.detach().cos()).sum() + out.square().sum()

    out = scaled_dot_product_attention(q, k, v, mask)
    gradient = func.grad(loss, (0, 1, 2))
    first = gradient(q, k, v)
    second = func.jvp(gradient, (q, k, v), (torch.ones_like(q), torch.ones_like(k), torch.ones_like(v)))[1]
    blind = [5, 69] if keys else list(range(70))
    for result in (out, first[0], second[0]):
        assert (result[:, blind] == 0).all()
    for result in (*first, *second):
        assert result.isfinite().all()
    if keys:
        seen = [i for i in range(70) if i not in blind]
        torch.testing.assert_close(out[:, seen], math(q[:, seen], k, v))


def test_no_queries():
    q, k = normal(2, 0, 4).requires_grad_(), normal(2, 3, 4).requires_grad_()
    mask = normal(1, 3).requires_grad_()
    out = scaled_dot_product_attention(q, k, k, mask)
    assert out.shape == (2, 0, 4)
    for gradient in torch.autograd.grad(out.sum(), (k, mask)):
        assert (gradient == 0).all()


# ------------------------------------------------------------------------------------------------- layouts and shapes


@pytest.mark.parametrize("composition", UP_TO_SECOND_ORDER)
def test_strided_operands(composition):
    """Heads last, transposed, every second element: as if contiguous, bit for bit."""
    problem = Problem("additive", (2, 2, 2, 66, 66, 8, 8))
    q, k, v, mask = problem.operands
    strided = object.__new__(Problem)
    strided.__dict__ |= problem.__dict__
    strided.operands = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.mT.contiguous().mT,
        torch.stack([v, v], -1)[..., 0],
        mask.mT.contiguous().mT,
    )
    contiguous = object.__new__(Problem)
    contiguous.__dict__ |= problem.__dict__
    contiguous.operands = tuple(x.contiguous() for x in strided.operands)
    run = COMPOSITIONS[composition]
    results = zip(
        run(strided, scaled_dot_product_attention), run(contiguous, scaled_dot_product_attention), strict=True
    )
    for got, expected in results:
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((5, 4), (7, 4), (7, 3)), {}),
        (((3, 5, 4), (3, 7, 4), (3, 7, 3)), {"is_causal": True}),
        (((2, 8, 5, 4), (2, 1, 7, 4), (2, 1, 7, 3)), {}),
        (((2, 1, 5, 4), (2, 8, 7, 4), (2, 1, 7, 3)), {}),
        (((2, 8, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3)), {"enable_gqa": True}),
        (((2, 1, 3, 5, 4), (6, 3, 7, 4), (2, 6, 3, 7, 2)), {}),
    ],
)
def test_shapes_that_torch_takes(shapes, options):
    operands = tuple(normal(*shape) for shape in shapes)
    got, expected = scaled_dot_product_attention(*operands, **options), math(*operands, **options)
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(expected)
    gradients = [
        func.vjp(lambda *x, f=f: f(*x, **options), *operands)[1](cotangent)
        for f in (scaled_dot_product_attention, math)
    ]
    for gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("option", ["none", "causal", "additive", "per_key"])
def test_threads_change_no_bit(option, dtype):
    problem = Problem(option, (1, 2, 1, 300, 290, 16, 16)).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([COMPOSITIONS[name](problem, scaled_dot_product_attention) for name in UP_TO_SECOND_ORDER])
    for other in results[1:]:
        for composition, expected in zip(other, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(composition, expected, strict=True))


def test_large_scores():
    """Scores of ±1e4 neither overflow nor lose the largest."""
    q, k, v = 100 * normal(1, 80, 4), 100 * normal(1, 80, 4), normal(1, 80, 4)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), math(q, k, v))


def test_nan_reaches_its_row_alone():
    q, k, v = normal(2, 70, 4), normal(2, 66, 4), normal(2, 66, 4)
    clean = scaled_dot_product_attention(q, k, v)
    q[1, 65, 2] = torch.nan
    out = scaled_dot_product_attention(q, k, v)
    assert out[1, 65].isnan().all()
    out[1, 65] = clean[1, 65]
    assert torch.equal(out, clean)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(4)}, ValueError, "query has shape"),
        ({"query": torch.ones(2, 5, 4, dtype=torch.int64)}, TypeError, "query has dtype torch.int64"),
        ({"query": torch.ones(2, 5, 4, dtype=torch.float16)}, TypeError, "query has dtype torch.float16"),
        ({"key": torch.ones(2, 7, 4, dtype=torch.float64)}, TypeError, "key has dtype torch.float64"),
        ({"key": torch.ones(2, 7, 5)}, ValueError, r"key has shape.*as many features as query"),
        (
            {"query": torch.ones(2, 5, 0), "key": torch.ones(2, 7, 0)},
            ValueError,
            "one feature at least",
        ),
        ({"value": torch.ones(2, 6, 4)}, ValueError, r"value has shape \(2, 6, 4\).*as many rows as key"),
        ({"key": torch.ones(3, 7, 4), "value": torch.ones(3, 7, 4)}, ValueError, "heads"),
        ({"query": torch.ones(3, 5, 4), "enable_gqa": True}, ValueError, "a multiple"),
        ({"key": torch.ones(2, 7, 4, device="meta")}, ValueError, "device meta"),
        ({"dropout_p": 1.5}, ValueError, "probability"),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p=0.1"),
        ({"attn_mask": torch.ones(5, 7, dtype=torch.int32)}, TypeError, "attn_mask has dtype torch.int32"),
        ({"attn_mask": torch.ones(4, 7)}, ValueError, "attn_mask has shape"),
        ({"attn_mask": torch.ones(1, 2, 5, 7)}, ValueError, "at most as many dimensions"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"query": torch.ones(2, 5, 4), "key": torch.ones(2, 7, 4), "value": torch.ones(2, 7, 4)} | change
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**arguments)


def test_bare_op_names_operands_as_the_public_function_does():
    q, k = normal(2, 5, 4), normal(2, 7, 4)
    for operands, message in (
        ((q, k[..., :3], k), "key has shape .* as many features as query"),
        ((q, k, k.float()), "value has dtype torch.float32"),
        ((q, k, k, torch.ones(1, 5, 7, dtype=torch.int32)), "attn_mask has dtype torch.int32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            torch.ops.onestep.attention(*(*operands, None)[:4], 0.5, False)


def test_too_many_batch_dimensions():
    q = torch.ones((1,) * 9 + (2, 5, 4))
    with pytest.raises(ValueError, match="at most 8"):
        scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_no_scores_give_zero_gradients(sizes):
    """No batch element, head, query or key: every gradient is there and zero, that of a mask of its own heads too."""
    batch, heads, queries, keys = sizes
    q, k, v = normal(batch, heads, queries, 3), normal(batch, heads or 2, keys, 3), normal(batch, heads or 2, keys, 3)
    mask = normal(1, heads, queries, keys)
    ops = torch.ops.onestep
    out, lse = ops.attention(q, k, v, mask, 1.0, False)
    grads = ops.attention_backward(torch.ones_like(out), None, q, k, v, mask, out, lse, 1.0, False, True)
    for grad, operand in zip(grads, (q, k, v, mask), strict=True):
        assert grad.shape == operand.shape
        assert not grad.any()
