"""linear_cross_entropy against F.cross_entropy(F.linear(...)): values, derivatives of every order, options, bad input.

Transforms of torch.func are in test_transforms.py, opcheck in test_ops.py, torch.compile in test_compile.py.
"""

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import func
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import onestep
from onestep.functional import linear_cross_entropy, linear_cross_entropy_ggnvp, linear_cross_entropy_hvp
from onestep.ops import _cuda

F64 = torch.float64

# On CUDA the products are torch's: operands are rounded once more there, and bits depend on layout and, in emulation,
# on threads. test_cuda_glm_lmhead_polar.py says what holds instead.
cpu_kernels_only = pytest.mark.skipif(_cuda.EMULATED, reason="holds of the CPU kernels")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reference(input, weight, target, bias=None, *, reduction="mean", **options):
    """By torch's own ops, with the logits."""
    logits = F.linear(input, weight, bias).reshape(-1, weight.shape[0])
    losses = F.cross_entropy(logits, target.reshape(-1), reduction=reduction, **options)
    return losses.reshape(target.shape) if reduction == "none" else losses


def head(*rows, d=6, v=11, bias=True, dtype=F64, ignored=2):
    """input (…,d), weight (v,d), target (…), bias (v,), a few of the targets ignored."""
    input, weight = torch.randn(*rows, d, dtype=dtype), torch.randn(v, d, dtype=dtype) / d**0.5
    target = torch.randint(v, rows)
    target.view(-1)[1 : 1 + ignored] = -100
    return input, weight, target, torch.randn(v, dtype=dtype) if bias else None


def derivatives(function, input, weight, target, bias, **options):
    """Loss, gradient, and Hessian-vector product by double backward."""
    leaves = [value.detach().clone().requires_grad_() for value in (input, weight, bias) if value is not None]
    loss = function(leaves[0], leaves[1], target, *leaves[2:], **options)
    total = (loss * torch.linspace(0.5, 1.5, loss.numel()).to(loss.dtype).reshape(loss.shape)).sum()
    gradient = torch.autograd.grad(total, leaves, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(leaf.shape, generator=generator, dtype=F64).to(leaf.dtype) for leaf in leaves]
    return loss.detach(), *(g.detach() for g in gradient), *torch.autograd.grad(gradient, leaves, direction)


OPTIONS = [
    {"reduction": reduction, "label_smoothing": smoothing}
    for reduction, smoothing in product(("mean", "sum", "none"), (0.0, 0.1, 1.0))
]

# Rows, features and classes around the edges of tiles, panels, blocks and chunks.
SIZES = [(1, 1, 2), (5, 3, 7), (25, 24, 49), (23, 257, 130), (500, 5, 33), (40, 7, 2100)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_value_gradient_and_hvp(size, bias, options):
    n, d, v = size
    inputs = head(n, d=d, v=v, bias=bias, ignored=2 if n > 2 else 0)
    torch.testing.assert_close(
        derivatives(linear_cross_entropy, *inputs, **options),
        derivatives(reference, *inputs, **options),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("size", [(200, 64, 1000), (33, 768, 257), (1000, 16, 64)], ids=str)
def test_error_is_at_most_twice_torchs(size):
    """In fp32, against torch in fp64."""
    n, d, v = size
    exact_inputs = head(n, d=d, v=v)
    inputs = [value.float() if value.is_floating_point() else value for value in exact_inputs]
    exact_inputs = [value.double() if value.is_floating_point() else value for value in inputs]
    exact = derivatives(reference, *exact_inputs)
    ours, torchs = derivatives(linear_cross_entropy, *inputs), derivatives(reference, *inputs)

    def error(value, exact):
        return float((value.double() - exact).norm() / exact.norm())

    for mine, peer, truth in zip(ours, torchs, exact, strict=True):
        assert error(mine, truth) <= 2 * error(peer, truth) + 2e-7


@cpu_kernels_only
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "none"}], ids=str)
def test_bfloat16_is_accumulated_in_float32(options):
    inputs = [value.bfloat16() if value.is_floating_point() else value for value in head(60, d=40, v=300)]
    wide = [value.float() if value.is_floating_point() else value for value in inputs]
    ours, exact = derivatives(linear_cross_entropy, *inputs, **options), derivatives(reference, *wide, **options)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-5, atol=1e-5)
    for part, expected in zip(ours[1:4], exact[1:4], strict=True):
        assert part.dtype == torch.bfloat16
        # Rounded once, at the end.
        torch.testing.assert_close(part.float(), expected, rtol=2**-7, atol=1e-6)
    for part, expected in zip(ours[4:], exact[4:], strict=True):
        assert part.dtype == torch.bfloat16
        assert (part.float() - expected).norm() < 2**-6 * expected.norm()


@pytest.mark.parametrize("rows", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(rows):
    inputs = head(*rows, ignored=0)
    for reduction in ("mean", "none"):
        ours = derivatives(linear_cross_entropy, *inputs, reduction=reduction)
        assert ours[0].shape == (rows if reduction == "none" else ())
        torch.testing.assert_close(ours, derivatives(reference, *inputs, reduction=reduction))


LAYOUTS = {
    "shifted": lambda: (torch.randn(3, 6, 5)[:, :-1], torch.randn(7, 5), torch.randint(7, (3, 6))[:, 1:]),
    "transposed": lambda: (torch.randn(5, 8).mT, torch.randn(5, 7).mT, torch.randint(7, (8,))),
    "every other": lambda: (torch.randn(16, 10)[::2, ::2], torch.randn(14, 10)[::2, 1::2], torch.randint(7, (8,))),
    "expanded": lambda: (torch.randn(1, 5).expand(8, 5), torch.randn(1, 5).expand(7, 5), torch.tensor(3).expand(8)),
}


@cpu_kernels_only
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands_are_read_in_place(layout):
    input, weight, target = LAYOUTS[layout]()
    assert not (input.is_contiguous() and weight.is_contiguous())
    bias = torch.randn(14)[::2]
    vector = input * 0.5, weight * 0.3, bias * 0.2
    copies = [value.contiguous() for value in (input, weight, target)]
    # Bitwise: a stride changes where a number is read, not what is done to it.
    assert torch.equal(
        linear_cross_entropy(input, weight, target, bias), linear_cross_entropy(*copies, bias.contiguous())
    )
    ours = linear_cross_entropy_hvp(input, weight, target, vector, bias)
    contiguous = tuple(part.contiguous() for part in vector)
    theirs = linear_cross_entropy_hvp(*copies, contiguous, bias.contiguous())
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction, smoothing):
    """NaN for the mean of nothing, zero otherwise, and zero gradients, as torch has it."""
    input, weight, target, bias = head(4)
    target.fill_(-100)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    results = []
    for function in (linear_cross_entropy, reference):
        leaves = [value.clone().requires_grad_() for value in (input, weight, bias)]
        loss = function(leaves[0], leaves[1], target, leaves[2], **options)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(*results, equal_nan=True)
    assert results[0][0].isnan().all() == (reduction == "mean")


def test_ignore_index_may_be_a_class():
    input, weight, target, bias = head(9, ignored=0)
    target[::2] = 3
    torch.testing.assert_close(
        derivatives(linear_cross_entropy, input, weight, target, bias, ignore_index=3),
        derivatives(reference, input, weight, target, bias, ignore_index=3),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction):
    input, weight, target, bias = (
        torch.randn(0, 4),
        torch.randn(5, 4),
        torch.empty(0, dtype=torch.int64),
        torch.randn(5),
    )
    torch.testing.assert_close(
        derivatives(linear_cross_entropy, input, weight, target, bias, reduction=reduction)[:4],
        derivatives(reference, input, weight, target, bias, reduction=reduction)[:4],
        equal_nan=True,
    )


def test_no_features():
    inputs = head(5, d=1)
    empty = (inputs[0][:, :0], inputs[1][:, :0], *inputs[2:])
    torch.testing.assert_close(linear_cross_entropy(*empty), reference(*empty))


def test_masked_classes_and_large_logits():
    """A bias of −∞ masks a class; logits far beyond the range of exp."""
    input, weight, target, bias = head(12)
    bias[4], bias[7] = -torch.inf, 2000.0
    target[target == 4] = 5
    torch.testing.assert_close(
        derivatives(linear_cross_entropy, input, weight, target, bias),
        derivatives(reference, input, weight, target, bias),
    )


def test_nan_stays_in_its_row():
    input, weight, target, bias = head(30, v=300, ignored=0)
    clean = linear_cross_entropy(input, weight, target, bias, reduction="none")
    input[3, 2] = torch.nan
    losses = linear_cross_entropy(input, weight, target, bias, reduction="none")
    others = torch.arange(30) != 3
    assert losses[3].isnan()
    assert torch.equal(losses[others], clean[others])


def test_tied_weights_sum_both_paths():
    def loss(function, table, tokens):
        return function(table[tokens[:-1]].tanh(), table, tokens[1:])

    table, tokens = torch.randn(9, 4, dtype=F64), torch.randint(9, (14,))
    vector = torch.randn_like(table)
    for take in (
        lambda f: func.grad(f)(table),
        lambda f: onestep.curvature.hvp(f, table, vector),
        lambda f: func.grad(lambda t: (func.grad(f)(t) * vector).sum())(table),
    ):
        ours, torchs = (take(lambda t, of=of: loss(of, t, tokens)) for of in (linear_cross_entropy, reference))
        torch.testing.assert_close(ours, torchs)


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "reduction": "sum"}, {"reduction": "none"}], ids=str)
def test_gradcheck(options):
    input, weight, target, bias = head(4, d=3, v=5)

    def function(input, weight, bias):
        return linear_cross_entropy(input, weight, target, bias, **options)

    leaves = tuple(value.requires_grad_() for value in (input, weight, bias))
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (1, 2), (2,)], ids=str)
def test_frozen_operands(frozen):
    """Gradients and Hessian-vector products in some of the operands alone."""
    input, weight, target, bias = head(7)
    results = []
    for function in (linear_cross_entropy, reference):
        operands = [value.clone() for value in (input, weight, bias)]
        leaves = [value.requires_grad_() for at, value in enumerate(operands) if at not in frozen]
        loss = function(operands[0], operands[1], target, operands[2])
        gradient = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(part.sin().sum() for part in gradient), leaves)
        results.append((*(part.detach() for part in gradient), *second))
    torch.testing.assert_close(*results)


def test_inner_gradient_in_one_operand_outer_in_the_other():
    input, weight, target, bias = head(7)

    def mixed(function):
        def inner(weight):
            return func.grad(lambda input: function(input, weight, target, bias))(input).sin().sum()

        return func.grad(inner)(weight)

    torch.testing.assert_close(mixed(linear_cross_entropy), mixed(reference))


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_backward_twice_and_results_that_are_changed(factor):
    """The gradient of the forward pass is handed out once at most: changing it must not change the next."""
    input, weight, target, bias = head(7)
    weight.requires_grad_()
    loss = factor * linear_cross_entropy(input, weight, target, bias)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    kept = first.clone()
    first.mul_(7)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], kept)


ONE = torch.tensor(1.0, dtype=F64)

# A factor of 1 may be left out only where it is a constant of every derivative that is being taken.
DERIVATIVES_OF_THE_SCALE = {
    "jvp": lambda scaled: func.jvp(scaled, (ONE,), (2 * ONE,)),
    "grad": lambda scaled: func.grad(lambda s: scaled(s).sin().sum())(ONE),
    "vmap": lambda scaled: func.vmap(scaled)(torch.stack([ONE, 3 * ONE])),
    "vmap of jvp": lambda scaled: func.vmap(lambda v: func.jvp(scaled, (ONE,), (v,)))(torch.stack([ONE, 3 * ONE])),
    "jvp of jvp": lambda scaled: func.jvp(
        lambda t: func.jvp(lambda s: scaled(s * t), (ONE,), (ONE,))[1], (ONE,), (ONE,)
    ),
    "grad below jvp": lambda scaled: func.grad(
        lambda s: func.jvp(lambda t: scaled(s) * t, (ONE,), (ONE,))[1].sin().sum()
    )(ONE),
}


@pytest.mark.parametrize("name", DERIVATIVES_OF_THE_SCALE)
def test_derivative_of_a_scale_of_one(name):
    input, weight, target, bias = head(6)
    ours, torchs = (
        DERIVATIVES_OF_THE_SCALE[name](lambda s, of=of: func.grad(lambda h: s * of(h, weight, target, bias))(input))
        for of in (linear_cross_entropy, reference)
    )
    torch.testing.assert_close(ours, torchs)


def test_derivative_of_a_scale_of_one_in_eager_mode():
    input, weight, target, bias = head(6)
    input.requires_grad_()
    plain = torch.autograd.grad(linear_cross_entropy(input, weight, target, bias), input)[0]
    scale = ONE.clone().requires_grad_()
    loss = scale * linear_cross_entropy(input, weight, target, bias)
    gradient = torch.autograd.grad(loss, input, create_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(gradient.sum(), scale)[0], plain.sum())
    with forward_ad.dual_level():
        loss = forward_ad.make_dual(ONE, 2 * ONE) * linear_cross_entropy(input, weight, target, bias)
        tangent = forward_ad.unpack_dual(torch.autograd.grad(loss, input)[0]).tangent
        torch.testing.assert_close(tangent, 2 * plain)


def test_accumulated_gradients():
    input, weight, target, bias = head(8, ignored=0)
    weight.requires_grad_()
    reference(input, weight, target, bias).backward()
    expected, weight.grad = weight.grad, None
    for rows in (slice(0, 4), slice(4, 8)):
        (linear_cross_entropy(input[rows], weight, target[rows], bias) / 2).backward()
    torch.testing.assert_close(weight.grad, expected)


def test_no_silent_zero_in_forward_mode():
    """torch's own chunked head returns a zero tangent without an error."""
    input, weight, target, bias = head(6)
    direction = torch.randn_like(input)
    exact = func.jvp(lambda h: reference(h, weight, target, bias), (input,), (direction,))[1]
    assert exact.abs() > 1e-3

    def ours(h):
        return linear_cross_entropy(h, weight, target, bias)

    torch.testing.assert_close(func.jvp(ours, (input,), (direction,))[1], exact)
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(input, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, exact)
    torch.testing.assert_close(func.jvp(torch.no_grad()(ours), (input,), (direction,))[1], exact)


def third_directional(function, x, v):
    first = func.grad(function)
    second = func.grad(lambda x: (first(x) * v).sum())
    return func.grad(lambda x: (second(x) * v).sum())(x)


def test_third_order():
    input, weight, target, bias = head(6)
    vector = torch.randn_like(weight)
    ours, torchs = (
        third_directional(lambda w, of=of: of(input, w, target, bias, label_smoothing=0.1), weight, vector)
        for of in (linear_cross_entropy, reference)
    )
    assert torchs.abs().max() > 1e-4
    torch.testing.assert_close(ours, torchs)


# ------------------------------------------------------------------------------------------------------------- products


def dense(of_logits, input, weight, target, bias, options):
    """J = ∂z/∂(input, weight, bias) and the Hessian of the loss, both dense, over the operands as one vector."""
    sizes = [input.numel(), weight.numel(), bias.numel()]

    def logits(x):
        h, w, b = (part.reshape(like.shape) for part, like in zip(x.split(sizes), (input, weight, bias), strict=True))
        return F.linear(h, w, b)

    def loss(z):
        return F.cross_entropy(z, target, **options)

    x = torch.cat([input.flatten(), weight.flatten(), bias])
    if not of_logits:
        return func.hessian(lambda x: loss(logits(x)))(x)
    J = func.jacrev(lambda x: logits(x).flatten())(x)
    z = logits(x)
    return J.mT @ func.hessian(lambda flat: loss(flat.reshape(z.shape)))(z.flatten()) @ J


@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.3}], ids=str)
@pytest.mark.parametrize(
    ("times_matrix", "gauss_newton"), [(linear_cross_entropy_hvp, False), (linear_cross_entropy_ggnvp, True)]
)
def test_products_are_those_of_the_dense_matrix(times_matrix, gauss_newton, options):
    input, weight, target, bias = head(5, d=3, v=4, ignored=1)
    matrix = dense(gauss_newton, input, weight, target, bias, options)

    def times(*vector):
        return times_matrix(input, weight, target, vector, bias, **options)

    vector = tuple(torch.randn_like(value) for value in (input, weight, bias))
    flat = torch.cat([part.flatten() for part in vector])
    torch.testing.assert_close(torch.cat([part.flatten() for part in times(*vector)]), matrix @ flat)
    # Parts of the vector: the blocks of the matrix.
    start = 0
    for at, part in enumerate(vector):
        alone = times(*(part if index == at else None for index in range(3)))
        assert [of is None for of in alone] == [index != at for index in range(3)]
        block = slice(start, start + part.numel())
        torch.testing.assert_close(alone[at].flatten(), matrix[block, block] @ part.flatten())
        start += part.numel()


def test_products_are_symmetric_and_the_gauss_newton_one_positive():
    input, weight, target, bias = head(40, d=16, v=90, dtype=torch.float32)

    def vector():
        return tuple(torch.randn_like(value) for value in (input, weight, bias))

    def inner(a, b):
        return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))

    u, v = vector(), vector()
    for matrix in (linear_cross_entropy_hvp, linear_cross_entropy_ggnvp):
        times = partial(matrix, input, weight, target, bias=bias)
        torch.testing.assert_close(inner(u, times(v)), inner(v, times(u)), rtol=1e-4, atol=1e-5)
    for _ in range(5):
        v = vector()
        assert inner(v, linear_cross_entropy_ggnvp(input, weight, target, v, bias)) >= 0


@pytest.mark.parametrize("bias", [True, False])
def test_curvature_products(bias):
    """onestep.curvature works through it."""
    input, weight, target, b = head(6, bias=bias)
    params = {"w": weight, "b": b} if bias else {"w": weight}
    vector = {name: torch.randn_like(value) for name, value in params.items()}

    def losses(function):
        return lambda p: function(input, p["w"], target, p.get("b"))

    ours, torchs = (onestep.curvature.hvp(losses(of), params, vector) for of in (linear_cross_entropy, reference))
    torch.testing.assert_close(ours, torchs)
    direct = linear_cross_entropy_hvp(input, weight, target, (None, vector["w"], vector.get("b")), b)
    torch.testing.assert_close(direct[1], torchs["w"])

    features, layer = torch.randn(6, 3, dtype=F64), torch.randn(6, 3, dtype=F64)
    ours, torchs = (
        onestep.curvature.ggnvp(
            lambda p: (features @ p.mT).tanh(), lambda h, of=of: of(h, weight, target, b), layer, layer.flip(0)
        )
        for of in (linear_cross_entropy, reference)
    )
    torch.testing.assert_close(ours, torchs)


# ---------------------------------------------------------------------------------------------------------- determinism


@cpu_kernels_only
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("size", [(600, 20, 100), (130, 70, 1111)], ids=str)
def test_bitwise_for_any_number_of_threads(size, dtype, restore_threads):
    n, d, v = size
    inputs = [value.to(dtype) if value.is_floating_point() else value for value in head(n, d=d, v=v)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(derivatives(linear_cross_entropy, *inputs))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


# ------------------------------------------------------------------------------------------------------------ bad input


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message[:40])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad(r"input has shape \(5, 4\).*as many features", input=torch.randn(5, 4)),
        bad(r"input has shape \(\)", input=torch.tensor(1.0), target=torch.tensor(1)),
        bad(r"weight has shape \(3,\)", weight=torch.randn(3)),
        bad(r"weight has shape \(0, 3\)", weight=torch.randn(0, 3)),
        bad(r"bias has shape \(8,\)", bias=torch.randn(8)),
        bad(r"target has shape \(4,\)", target=torch.zeros(4, dtype=torch.int64)),
        bad(r"target holds 7; expected classes from 0 to 6", target=torch.tensor([0, 7, -100, 3, 9])),
        bad(r"target holds -1; expected", target=torch.tensor([0, -1, -100, 3, 9])),
        bad(r"label_smoothing is 1.5", label_smoothing=1.5),
        bad(r"label_smoothing is nan", label_smoothing=float("nan")),
        bad(r"reduction is 'median'", reduction="median"),
        bad(r"target has dtype torch.int32", TypeError, target=torch.zeros(5, dtype=torch.int32)),
        bad(r"target has dtype torch.float32", TypeError, target=torch.rand(5)),
        bad(r"input has dtype torch.int32", TypeError, input=torch.ones(5, 3, dtype=torch.int32)),
        bad(r"weight has dtype torch.float64", TypeError, weight=torch.randn(7, 3, dtype=F64)),
        bad(r"bias has dtype torch.float64", TypeError, bias=torch.randn(7, dtype=F64)),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_bad_input(changes, error, message, recorded):
    arguments = {"input": torch.randn(5, 3), "weight": torch.randn(7, 3), "target": torch.zeros(5, dtype=torch.int64)}
    arguments |= changes
    if recorded and arguments["input"].is_floating_point():
        arguments["input"] = arguments["input"].clone().requires_grad_()
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_bad_vector():
    input, weight, target, bias = head(5)
    with pytest.raises(ValueError, match="2 parts; expected 3"):
        linear_cross_entropy_hvp(input, weight, target, (input, weight), bias)
    with pytest.raises(ValueError, match="bias_tangent is given, but bias is None"):
        linear_cross_entropy_hvp(input, weight, target, (input, weight, bias))
    with pytest.raises(ValueError, match=r"weight_tangent has shape \(10, 6\)"):
        linear_cross_entropy_ggnvp(input, weight, target, (input, weight[:-1], bias), bias)
    with pytest.raises(TypeError, match=r"input_tangent has dtype torch\.float32"):
        linear_cross_entropy_ggnvp(input, weight, target, (input.float(), weight, bias), bias)
    with pytest.raises(ValueError, match="reduction is 'none'"):
        linear_cross_entropy_hvp(input, weight, target, (input, weight, bias), bias, reduction="none")


@cpu_kernels_only
def test_float16_needs_a_gpu():
    input, weight = torch.randn(5, 3).half(), torch.randn(7, 3).half()
    with pytest.raises(TypeError, match=r"input has dtype torch\.float16; expected .* or on a GPU torch.float16"):
        linear_cross_entropy(input, weight, torch.zeros(5, dtype=torch.int64))
