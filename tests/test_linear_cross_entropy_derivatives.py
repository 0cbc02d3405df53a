"""Derivatives of linear_cross_entropy: against finite differences, torch's own and dense matrices."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lmhead_cases import F64, head, reference
from torch import func
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import onestep
from onestep.functional import linear_cross_entropy, linear_cross_entropy_ggnvp, linear_cross_entropy_hvp


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
