"""Attention: values and derivatives of every composition against torch's math backend, mostly in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import func
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import onestep
from onestep.functional import replace_attention, scaled_dot_product_attention

ops = torch.ops.onestep


def math(*args, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **options)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Problem:
    """Operands, tangents and a cotangent for one option of the function."""

    def __init__(self, option, sizes, dtype=torch.float64):
        batch, heads, kv_heads, queries, keys, d, dv = sizes
        self.options = {"is_causal": option == "causal", "enable_gqa": kv_heads != heads}
        if option == "scale":
            self.options["scale"] = -0.7
        self.operands = [
            normal(batch, heads, queries, d, dtype=dtype),
            normal(batch, kv_heads, keys, d, dtype=dtype),
            normal(batch, kv_heads, keys, dv, dtype=dtype),
        ]
        if option == "boolean":
            mask = torch.rand(batch, 1, queries, keys) > 0.4
            mask[..., 0] = True
            self.options["attn_mask"] = mask
        elif option == "padding":
            self.options["attn_mask"] = (torch.arange(keys) < max(1, keys - 3)).expand(batch, 1, 1, keys)
        elif option == "additive":
            self.operands.append(normal(batch, heads, queries, keys, dtype=dtype))
        elif option == "per_head":
            self.operands.append(normal(heads, queries, keys, dtype=dtype))
        elif option == "per_key":
            self.operands.append(normal(keys, dtype=dtype))
        self.operands = tuple(self.operands)
        self.tangents = tuple(torch.randn_like(x) for x in self.operands)
        self.others = tuple(torch.randn_like(x) for x in self.operands)
        self.cotangent = normal(batch, heads, queries, dv, dtype=dtype)

    def to(self, dtype):
        cast = object.__new__(Problem)
        cast.options = self.options
        for name in ("operands", "tangents", "others"):
            setattr(cast, name, tuple(x.to(dtype) for x in getattr(self, name)))
        cast.cotangent = self.cotangent.to(dtype)
        return cast

    def attention(self, function):
        return lambda *operands: function(*operands, **self.options)

    def loss(self, function):
        """Not linear in the output, so that the second derivative has all of its terms."""

        def loss(*operands):
            out = function(*operands, **self.options)
            return (out * self.cotangent).sum() + out.square().sum()

        return loss

    def gradient(self, function):
        return func.grad(self.loss(function), tuple(range(len(self.operands))))


OPTIONS = ("none", "causal", "scale", "boolean", "padding", "additive", "per_head", "per_key")
# batch, heads, kv_heads, queries, keys, d, dv
SIZES = {
    "tiny": (2, 4, 2, 5, 7, 4, 3),
    "edges": (1, 2, 1, 70, 66, 17, 9),
    "long keys": (1, 2, 2, 3, 130, 8, 8),
    "long queries": (1, 1, 1, 130, 65, 16, 16),
    "wide": (1, 1, 1, 40, 37, 130, 65),
    "many pieces": (1, 1, 1, 200, 200, 8, 8),
}

# Each composition as a function of the problem and of the attention that it runs on.
COMPOSITIONS = {
    "forward": lambda p, f: (p.attention(f)(*p.operands),),
    "jvp": lambda p, f: (func.jvp(p.attention(f), p.operands, p.tangents)[1],),
    "grad": lambda p, f: p.gradient(f)(*p.operands),
    "jvp of grad": lambda p, f: func.jvp(p.gradient(f), p.operands, p.tangents)[1],
    "grad of jvp": lambda p, f: func.grad(
        lambda *x: func.jvp(p.loss(f), x, p.tangents)[1], tuple(range(len(p.operands)))
    )(*p.operands),
    "grad of grad": lambda p, f: func.grad(
        lambda *x: sum((g * t).sum() for g, t in zip(p.gradient(f)(*x), p.tangents, strict=True)),
        tuple(range(len(p.operands))),
    )(*p.operands),
    "jvp of jvp": lambda p, f: (
        func.jvp(lambda *x: func.jvp(p.attention(f), x, p.tangents)[1], p.operands, p.others)[1],
    ),
    "jvp of grad of jvp": lambda p, f: func.jvp(
        func.grad(lambda *x: func.jvp(p.loss(f), x, p.tangents)[1], tuple(range(len(p.operands)))),
        p.operands,
        p.others,
    )[1],
    "grad of jvp of grad": lambda p, f: func.grad(
        lambda *x: sum((g * t).sum() for g, t in zip(func.jvp(p.gradient(f), x, p.tangents)[1], p.others, strict=True)),
        tuple(range(len(p.operands))),
    )(*p.operands),
}
UP_TO_SECOND_ORDER = tuple(COMPOSITIONS)[:6]


def worst(got, expected):
    """The largest difference, relative to the largest element of each result."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item()
        for a, b in zip(got, expected, strict=True)
    )


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


# ---------------------------------------------------------------------------------------------------- ops and compile


def op_arguments():
    q, k, v, mask = normal(2, 4, 5, 3), normal(2, 2, 6, 3), normal(2, 2, 6, 2), normal(1, 4, 5, 6)
    out, lse = ops.attention(q, k, v, mask, 0.5, False)
    tangents = [torch.randn_like(x) for x in (q, k, v, mask)]
    dout, dlse = ops.attention_jvp(q, k, v, mask, out, lse, *tangents, 0.5, False)
    grads = [torch.randn_like(out), torch.randn_like(lse)]
    primal = (*grads, q, k, v, mask, out, lse)
    return {
        "attention": (q, k, v, mask, 0.5, False),
        "attention_jvp": (q, k, v, mask, out, lse, *tangents, 0.5, False),
        "attention_and_jvp": (q, k, v, mask, *tangents, 0.5, False),
        "attention_backward": (*primal, 0.5, False, True),
        "attention_backward_jvp": (*primal, *grads, *tangents, dout, dlse, 0.5, False, True),
        "attention_backward_and_jvp": (*primal, *grads, *tangents, dout, dlse, 0.5, False, True),
    }


@pytest.mark.parametrize("name", op_arguments())
def test_opcheck(name):
    arguments = op_arguments()[name]
    if name in ("attention", "attention_jvp"):
        arguments = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    # Tracing takes a second; the ops of values and tangents are traced in test_compiled_forward_mode.
    untraced = ("test_schema", "test_autograd_registration", "test_faketensor")
    options = {"test_utils": untraced} if name.endswith("and_jvp") else {}
    torch.library.opcheck(getattr(ops, name).default, tuple(arguments), **options)


@pytest.mark.parametrize("name", ["attention_and_jvp", "attention_backward_and_jvp"])
def test_values_and_tangents_where_a_derivative_is_wanted(name):
    """These levels get what the two ops give one after the other."""
    arguments = op_arguments()[name]
    places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
    apart = {
        "attention_and_jvp": lambda *x: (*(o := ops.attention(*x[:4], *x[8:])), *ops.attention_jvp(*x[:4], *o, *x[4:])),
        "attention_backward_and_jvp": lambda *x: (
            *ops.attention_backward(*x[:8], *x[16:]),
            *ops.attention_backward_jvp(*x),
        ),
    }[name]

    def weighed(op, tensors):
        given = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return sum((result * (i + 1)).cos().sum() for i, result in enumerate(op(*given)))

    tensors = tuple(arguments[place] for place in places)
    together = getattr(ops, name).default
    wanted = range(len(tensors)) if name == "attention_and_jvp" else [i for i, p in enumerate(places) if p < 6]
    for got, expected in zip(
        func.grad(lambda *x: weighed(together, x), tuple(wanted))(*tensors),
        func.grad(lambda *x: weighed(apart, x), tuple(wanted))(*tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_vmap_of_tangents_computes_values_once(monkeypatch):
    q, k, v = normal(2, 5, 3), normal(2, 6, 3), normal(2, 6, 3)
    directions = tuple(torch.randn(4, *x.shape, dtype=x.dtype) for x in (q, k, v))

    def product(*direction):
        loss = func.grad(lambda *x: scaled_dot_product_attention(*x).sin().sum(), (0, 1, 2))
        return func.jvp(loss, (q, k, v), direction)[1]

    expected = [product(*(t[i] for t in directions)) for i in range(4)]
    values = count_calls(monkeypatch), count_calls(monkeypatch, "backward")
    both = count_calls(monkeypatch, "forward_and_jvp"), count_calls(monkeypatch, "backward_and_jvp")
    got = func.vmap(product)(*directions)
    assert [len(calls) for calls in (*values, *both)] == [1, 1, 0, 0]
    for results, *each in zip(got, *expected, strict=True):
        torch.testing.assert_close(results, torch.stack(each))


@pytest.mark.parametrize("option", ["causal", "boolean", "additive"])
def test_compile_fullgraph(option):
    problem = Problem(option, SIZES["tiny"])
    torch._dynamo.reset()
    compiled = torch.compile(problem.loss(scaled_dot_product_attention), fullgraph=True, backend="aot_eager")
    operands = tuple(x.clone().requires_grad_() for x in problem.operands)
    gradients = torch.autograd.grad(compiled(*operands), operands)
    expected = problem.gradient(math)(*problem.operands)
    assert worst(gradients, expected) < 1e-10


def in_dual_tensors(f, x, t):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(x, t, strict=True)]
        return forward_ad.unpack_dual(f(*duals)).tangent


FORWARD_MODE = {
    "jvp": lambda f, x, t: func.jvp(f, x, t)[1],
    "jvp of grad": lambda f, x, t: func.jvp(func.grad(lambda *y: f(*y).sin().sum(), (0, 1, 2)), x, t)[1],
    "grad of jvp": lambda f, x, t: func.grad(lambda *y: func.jvp(f, y, t)[1].sin().sum(), (0, 1, 2))(*x),
    "jvp of jvp": lambda f, x, t: func.jvp(lambda *y: func.jvp(f, y, t)[1], x, t)[1],
    "in dual tensors": in_dual_tensors,
}


# "eager" runs the graph as it is, which enters forward-mode levels past torch.autograd.forward_ad.
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "aot_eager") for name in FORWARD_MODE), ("jvp of grad", "eager"), ("in dual tensors", "eager")],
)
def test_compiled_forward_mode(name, backend):
    problem = Problem("none", SIZES["long keys"])
    run = FORWARD_MODE[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: run(scaled_dot_product_attention, x, problem.tangents), backend=backend)
    expected = run(math, problem.operands, problem.tangents)
    torch.testing.assert_close(compiled(*problem.operands), expected, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------- modules and curvature


def count_calls(monkeypatch, name="forward"):
    """Counts how often a kernel runs."""
    from onestep.ops.attention import cpu

    calls = []
    entries = {
        "forward": cpu._FORWARD,
        "forward_and_jvp": cpu._FORWARD_AND_JVP,
        "backward": cpu._BACKWARD,
        "backward_and_jvp": cpu._BACKWARD_AND_JVP,
    }[name]
    kernel = entries[torch.float64]
    monkeypatch.setitem(entries, torch.float64, lambda *args, **named: (calls.append(None), kernel(*args, **named))[1])
    return calls


def test_replace_attention_reaches_modules(monkeypatch):
    calls = count_calls(monkeypatch)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = normal(2, 5, 8)
    expected = layer(x)
    assert not calls
    with replace_attention():
        got = layer(x)
        F.scaled_dot_product_attention(x, x, x)
    assert len(calls) == 2
    torch.testing.assert_close(got, expected)
    layer(x)
    assert len(calls) == 2


def test_replace_attention_leaves_what_it_does_not_take():
    x = normal(2, 5, 8).half()
    with replace_attention():
        torch.testing.assert_close(F.scaled_dot_product_attention(x, x, x), F.scaled_dot_product_attention(x, x, x))
        assert F.scaled_dot_product_attention(x.float(), x.float(), x.float(), dropout_p=0.5).shape == x.shape


def test_curvature_products_run_on_the_kernel(monkeypatch):
    calls = count_calls(monkeypatch, "forward_and_jvp")
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = normal(2, 5, 8)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in params.items()}

    def outputs(p):
        return func.functional_call(layer, p, (x,))

    def loss(out):
        return out.square().sum() + out.sin().sum()

    got = onestep.curvature.hvp(lambda p: loss(outputs(p)), params, v)
    assert len(calls) == 1
    with sdpa_kernel(SDPBackend.MATH):
        expected = func.jvp(func.grad(lambda p: loss(outputs(p))), (params,), (v,))[1]
        out, tangent = func.jvp(outputs, (params,), (v,))
        curved = func.jvp(func.grad(loss), (out,), (tangent,))[1]
        gauss_newton = func.vjp(outputs, params)[1](curved)[0]
    for name in params:
        torch.testing.assert_close(got[name], expected[name])
    got = onestep.curvature.ggnvp(outputs, loss, params, v)
    for name in params:
        torch.testing.assert_close(got[name], gauss_newton[name])


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("composition", UP_TO_SECOND_ORDER)
def test_causal_and_mask_together(composition, additive):
    """Both hold, as in torch: here against the one mask that says the same."""
    both, one = Problem("causal", SIZES["tiny"]), Problem("none", SIZES["tiny"])
    for name in ("operands", "tangents", "others", "cotangent"):
        setattr(one, name, getattr(both, name))
    queries, keys = 5, 7
    seen = torch.ones(queries, keys, dtype=torch.bool).tril()
    mask = normal(queries, keys) if additive else (torch.rand(queries, keys) > 0.4) | torch.eye(queries, keys).bool()
    both.options["attn_mask"] = mask
    one.options["attn_mask"] = mask.masked_fill(~seen, -torch.inf) if additive else mask & seen
    got = COMPOSITIONS[composition](both, scaled_dot_product_attention)
    expected = COMPOSITIONS[composition](one, F.scaled_dot_product_attention)
    assert worst(got, expected) < 1e-12
    with onestep.functional.replace_attention():
        out = F.scaled_dot_product_attention(*both.operands, **both.options)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*one.operands, **one.options))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_padding_mask": torch.tensor([[False, False, True], [False, False, False]])},
        {"attn_mask": torch.ones(3, 3, dtype=torch.bool).triu(1), "is_causal": True},
        {"attn_mask": torch.tensor([[0.3, -1.0, 2.0]] * 3, dtype=torch.float64)},
    ],
)
def test_multihead_attention(need_weights, options, monkeypatch):
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    ours = onestep.nn.MultiheadAttention(8, 2, batch_first=True).double()
    ours.load_state_dict(theirs.state_dict())
    calls = count_calls(monkeypatch)
    x = normal(2, 3, 8)
    expected, expected_weights = theirs(x, x, x, need_weights=need_weights, **options)
    got, weights = ours(x, x, x, need_weights=need_weights, **options)
    torch.testing.assert_close(got, expected)
    assert len(calls) == (0 if need_weights else 1)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)
    else:
        assert weights is None


def test_multihead_attention_has_second_derivatives():
    ours = onestep.nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = normal(2, 3, 8).requires_grad_()
    assert gradgradcheck(lambda x: ours(x, x, x, need_weights=False)[0], (x,), check_fwd_over_rev=True)


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
