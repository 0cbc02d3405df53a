"""Attention's ops as torch sees them: opcheck, torch.compile, modules that are replaced, curvature products."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import COMPOSITIONS, SIZES, UP_TO_SECOND_ORDER, Problem, math, normal, ops, worst
from torch import func
from torch.autograd import forward_ad, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import onestep
from onestep.functional import replace_attention, scaled_dot_product_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in ("attention_jvp", "attention_backward") else ())
        for name in op_arguments()
    ],
)
def test_opcheck(name):
    arguments = op_arguments()[name]
    if name in ("attention", "attention_jvp"):
        arguments = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    # Tracing takes a second; the ops of values and tangents are traced in test_compiled_forward_mode.
    untraced = ("test_schema", "test_autograd_registration", "test_faketensor")
    options = {"test_utils": untraced} if name.endswith("and_jvp") else {}
    torch.library.opcheck(getattr(ops, name).default, tuple(arguments), **options)


@pytest.mark.parametrize("name", op_arguments())
def test_vmap_of_nothing(name):
    first, *rest = op_arguments()[name]
    one = getattr(ops, name)(first, *rest)
    none = func.vmap(lambda x: getattr(ops, name)(x, *rest))(first.new_empty((0, *first.shape)))
    # The mask's gradient and the like are empty where they are not wanted, mapped or not.
    assert all(
        got.shape in ((0, *expected.shape), (0, *expected.shape[1:])) for got, expected in zip(none, one, strict=True)
    )


@pytest.mark.parametrize("heads", [2, 0])
def test_no_heads(heads):
    q, k = torch.zeros(1, heads, 3, 4), torch.zeros(1, 0, 3, 4)
    with pytest.raises(ValueError, match=r"key has shape \(1, 0, 3, 4\); expected one head at least"):
        ops.attention(q, k, k, None, 1.0, False)
    with pytest.raises(ValueError, match="head"):
        scaled_dot_product_attention(q, k, k, enable_gqa=True)


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
    [
        ("jvp of grad", "aot_eager"),
        ("in dual tensors", "eager"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                *((name, "aot_eager") for name in FORWARD_MODE if name != "jvp of grad"),
                ("jvp of grad", "eager"),
            ]
        ),
    ],
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
