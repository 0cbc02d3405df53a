"""torch.func, forward mode and vmap, composed: no silent zeros, on the public functions and on bare ops alike.

Every transform of every function is held against the same transform of the same mathematics in torch's own ops."""

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from transform_cases import FUNCTIONS, composite, every, like, make_inputs, ops, scalar

from onestep.linalg import (
    moments,
    polar,
    solve_normal,
    solve_normal_ex,
)


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices this small, a busy machine's threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------------------- transforms


def jvp(function, inputs):
    return func.jvp(function, inputs, like(inputs))


def vjp(function, inputs):
    output, pullback = func.vjp(function, *inputs)
    return pullback(like([output])[0])


def grad(function, inputs):
    return func.grad(scalar(function), every(inputs))(*inputs)


def jvp_of_grad(function, inputs):
    return func.jvp(func.grad(scalar(function), every(inputs)), inputs, like(inputs))


def grad_of_jvp(function, inputs):
    def directional(*values):
        return func.jvp(function, values, like(inputs))[1].sin().sum()

    return func.grad(directional, every(inputs))(*inputs)


def jvp_of_jvp(function, inputs):
    def directional(*values):
        return func.jvp(function, values, like(inputs))[1]

    return func.jvp(directional, inputs, like(inputs, 0.3))


def grad_of_vjp(function, inputs):
    def pulled(*values):
        output, pullback = func.vjp(function, *values)
        return sum(part.sin().sum() for part in pullback(like([output])[0]))

    return func.grad(pulled, every(inputs))(*inputs)


def jacrev(function, inputs):
    return func.jacrev(function, every(inputs))(*inputs)


def jacfwd(function, inputs):
    return func.jacfwd(function, every(inputs))(*inputs)


def hessian(function, inputs):
    return func.hessian(scalar(function), every(inputs))(*inputs)


def jacfwd_of_jacrev(function, inputs):
    return func.jacfwd(func.jacrev(function, 0), every(inputs))(*inputs)


def jacrev_of_jacfwd(function, inputs):
    return func.jacrev(func.jacfwd(function, 0), every(inputs))(*inputs)


def dual_tensors(function, inputs):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, like(inputs), strict=True)]
        return forward_ad.unpack_dual(function(*duals)).tangent


def one_dual_tensor(function, inputs):
    with forward_ad.dual_level():
        first = forward_ad.make_dual(inputs[0], like(inputs)[0])
        return forward_ad.unpack_dual(function(first, *inputs[1:])).tangent


def dual_tensors_through_backward(function, inputs):
    with forward_ad.dual_level():
        leaves = [value.clone().requires_grad_() for value in inputs]
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, like(inputs), strict=True)]
        grads = torch.autograd.grad(scalar(function)(*duals), leaves, create_graph=True)
        return tuple(forward_ad.unpack_dual(value).tangent.detach() for value in grads)


def backward_through_tangent(function, inputs):
    leaves = [value.clone().requires_grad_() for value in inputs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, like(inputs), strict=True)]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
        return torch.autograd.grad(tangent.sin().sum(), leaves)


def functional_hvp(function, inputs):
    return torch.autograd.functional.hvp(scalar(function), inputs, like(inputs))


def functional_jacobian(function, inputs):
    return torch.autograd.functional.jacobian(function, inputs, vectorize=True)


def functional_jacobian_forward(function, inputs):
    return torch.autograd.functional.jacobian(function, inputs, vectorize=True, strategy="forward-mode")


def functional_hessian(function, inputs):
    return torch.autograd.functional.hessian(scalar(function), inputs, vectorize=True)


def functional_hessian_forward(function, inputs):
    return torch.autograd.functional.hessian(
        scalar(function), inputs, vectorize=True, outer_jacobian_strategy="forward-mode"
    )


def grad_of_vmap(function, inputs):
    batched = stacked(inputs)

    def total(*values):
        return func.vmap(function)(*values).sin().sum()

    return func.grad(total, every(inputs))(*batched)


def jvp_of_vmap(function, inputs):
    batched = stacked(inputs)
    return func.jvp(func.vmap(function), batched, like(batched))


def vmap_of_tangents(function, inputs):
    """Many directions at one point: only the tangents are mapped."""
    directions = stacked(like(inputs))
    return func.vmap(lambda *tangents: func.jvp(function, inputs, tangents)[1])(*directions)


def vmap_of_cotangents(function, inputs):
    output, pullback = func.vjp(function, *inputs)
    return func.vmap(pullback)(stacked(like([output]))[0])


def vmap_of_vjp_along_one_cotangent(function, inputs):
    """Many points along one direction: the cotangent alone is not mapped."""
    cotangent = like([function(*inputs)])[0]
    return func.vmap(lambda *values: func.vjp(function, *values)[1](cotangent))(*stacked(inputs))


def vmap_of_transform(transform):
    def mapped(function, inputs):
        return func.vmap(lambda *values: transform(function, values))(*stacked(inputs))

    mapped.__name__ = f"vmap_of_{transform.__name__}"
    return mapped


TRANSFORMS = [
    jvp,
    vjp,
    grad,
    jvp_of_grad,
    grad_of_jvp,
    jvp_of_jvp,
    grad_of_vjp,
    jacrev,
    jacfwd,
    hessian,
    jacfwd_of_jacrev,
    jacrev_of_jacfwd,
    dual_tensors,
    one_dual_tensor,
    dual_tensors_through_backward,
    backward_through_tangent,
    functional_hvp,
    functional_jacobian,
    functional_jacobian_forward,
    functional_hessian,
    functional_hessian_forward,
    grad_of_vmap,
    jvp_of_vmap,
    vmap_of_tangents,
    vmap_of_cotangents,
    vmap_of_vjp_along_one_cotangent,
    vmap_of_transform(grad),
    vmap_of_transform(jvp),
    vmap_of_transform(jvp_of_grad),
    vmap_of_transform(hessian),
]


# These share their derivatives with a function that goes through all transforms: the op behind a public function, the
# same op with operands left out, and families of GLMs that differ in scalar functions alone.
REPEATED = {
    "solve_normal, plain",
    "solve_normal, vector",
    "solve_normal_ex",
    "solve_normal_ex, plain",
    "gram, plain",
    "cholesky_ex",
    "solve_spd_ex",
    "linear_cross_entropy, sum",
    "linear_cross_entropy, none",
    "op solve_normal",
    "op solve_normal, plain",
    "op solve_normal_ex",
    "op solve_normal_ex, plain",
    "op solve_normal_ex, dual",
    "op gram",
    "op gram, plain",
    "op cholesky",
    "op cholesky_solve",
    "op solve_spd",
    "glm, gaussian",
    "glm, logistic",
}
# One transform of each kind, for these.
FEW_TRANSFORMS = [jvp, grad, jvp_of_grad, grad_of_jvp, backward_through_tangent, TRANSFORMS[-2]]
CASES = [(name, transform) for name in FUNCTIONS for transform in (FEW_TRANSFORMS if name in REPEATED else TRANSFORMS)]


def stacked(tensors, dim=0, count=3):
    """Each tensor and a few multiples of it, stacked; a positive definite matrix stays one."""
    return tuple(
        torch.stack([tensor * (1 + 0.3 * index) for index in range(count)], min(dim, tensor.dim()))
        for tensor in tensors
    )


def leaves_of(result):
    return torch.utils._pytree.tree_leaves(result)


def assert_same(ours, reference):
    ours, reference = leaves_of(ours), leaves_of(reference)
    assert any(part.abs().max() > 1e-3 for part in reference), "the reference is zero: nothing is tested"
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "transform"), CASES, ids=[f"{name}-{transform.__name__}" for name, transform in CASES]
)
def test_transform(name, transform):
    function = FUNCTIONS[name]
    inputs = make_inputs(function.inputs)
    assert_same(transform(function.ours, inputs), transform(function.reference, inputs))


# It traces what it is given, which takes half a second.
@pytest.mark.parametrize("name", ["solve_normal", "gram", "cholesky", "op solve_spd", "op solve_normal_backward"])
def test_linearize(name):
    def linearized(function, inputs):
        output, pushforward = func.linearize(function, *inputs)
        return output, pushforward(*like(inputs))

    function = FUNCTIONS[name]
    inputs = make_inputs(function.inputs)
    assert_same(linearized(function.ours, inputs), linearized(function.reference, inputs))


# -------------------------------------------------------------------------------------------------- derivatives put off


def off_for_reverse(function, inputs):
    """A constant inside the inner of two derivatives is one for the outer derivative, too."""

    def with_constant(*values):
        with torch.no_grad():
            constant = function(*values)
        return (constant * function(*values)).sin().sum()

    def inner(*values):
        return sum(part.sin().sum() for part in func.grad(with_constant, every(inputs))(*values))

    return func.grad(inner, every(inputs))(*inputs)


def off_for_forward(function, inputs):
    def with_constant(*values):
        with forward_ad._set_fwd_grad_enabled(False):
            constant = function(*values)
        return (constant * function(*values)).sin()

    def inner(*values):
        return func.jvp(with_constant, values, like(inputs))[1]

    return func.jvp(inner, inputs, like(inputs, 0.3))


def forward_without_reverse(function, inputs):
    with torch.no_grad(), forward_ad.dual_level():
        leaves = [value.clone().requires_grad_() for value in inputs]
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, like(inputs), strict=True)]
        output = forward_ad.unpack_dual(function(*duals))
        assert not output.primal.requires_grad
        return output.tangent


def transform_without_reverse(function, inputs):
    leaves = tuple(value.clone().requires_grad_() for value in inputs)
    with torch.no_grad():
        grads = func.grad(scalar(function), every(inputs))(*leaves)
    assert not any(value.requires_grad for value in grads)
    return grads


@pytest.mark.parametrize(
    "transform",
    [off_for_reverse, off_for_forward, forward_without_reverse, transform_without_reverse],
    ids=lambda transform: transform.__name__,
)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in REPEATED])
def test_derivatives_put_off(name, transform):
    function = FUNCTIONS[name]
    inputs = make_inputs(function.inputs)
    assert_same(transform(function.ours, inputs), transform(function.reference, inputs))


# ----------------------------------------------------------------------------------------------------------------- vmap


def in_dims_of(inputs):
    """Every argument alone, along each of its possible dimensions; all together; and a mix."""
    count = len(inputs)
    for index, value in enumerate(inputs):
        for dim in range(value.dim() + 1):
            yield tuple(dim if at == index else None for at in range(count))
    yield (0,) * count
    yield tuple(value.dim() for value in inputs)
    yield tuple(-1 if value.dim() else 0 for value in inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_over_each_argument(name):
    function = FUNCTIONS[name]
    inputs = make_inputs(function.inputs)
    for in_dims in in_dims_of(inputs):
        mapped = tuple(
            value if dim is None else stacked([value], dim if dim >= 0 else value.dim())[0]
            for value, dim in zip(inputs, in_dims, strict=True)
        )
        for out_dims in (0, -1):
            ours = func.vmap(function.ours, in_dims, out_dims)(*mapped)
            assert_same(ours, func.vmap(function.reference, in_dims, out_dims)(*mapped))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_of_derivatives_over_each_argument(name):
    function = FUNCTIONS[name]
    inputs = make_inputs(function.inputs)
    for index in range(len(inputs)):
        in_dims = tuple(0 if at == index else None for at in range(len(inputs)))
        mapped = tuple(stacked([value])[0] if dim == 0 else value for value, dim in zip(inputs, in_dims, strict=True))
        for transform in (grad, jvp):

            def apply(of, in_dims=in_dims, transform=transform, mapped=mapped):
                return func.vmap(lambda *values: transform(of, values), in_dims)(*mapped)

            assert_same(apply(function.ours), apply(function.reference))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if len(FUNCTIONS[name].inputs) >= 2])
def test_nested_vmap(name):
    function = FUNCTIONS[name]
    first, *rest = make_inputs(function.inputs)
    outer = (0,) + (None,) * len(rest)
    inner = (None,) + (0,) * len(rest)
    mapped = (*stacked([first]), *stacked(rest, count=2))

    def nested(of):
        return func.vmap(func.vmap(of, inner), outer)(*mapped)

    def nested_grad(of):
        return func.vmap(func.vmap(func.grad(scalar(of), every(mapped)), inner), outer)(*mapped)

    assert_same(nested(function.ours), nested(function.reference))
    assert_same(nested_grad(function.ours), nested_grad(function.reference))


@pytest.mark.parametrize("transform", [grad, jvp, jvp_of_grad, hessian], ids=lambda transform: transform.__name__)
def test_vmap_over_arguments_that_have_batch_dimensions(transform):
    """The mapped dimension goes in front of batch dimensions, of which the arguments have different numbers."""
    X, Y, weight, ridge = make_inputs("XYwr")
    batched = (stacked([X], count=4)[0], Y, stacked([weight], count=4)[0], ridge)

    def ours(X, Y, w, r):
        return solve_normal(X, Y, weight=w, ridge=r.unsqueeze(0))

    def mapped(of, in_dims):
        values = tuple(
            value if dim is None else stacked([value], dim)[0] for value, dim in zip(batched, in_dims, strict=True)
        )
        return func.vmap(lambda *values: transform(of, values), in_dims)(*values)

    for in_dims in [(0, None, None, None), (None, 1, None, None), (None, None, 1, None), (None, None, None, 1)]:
        assert_same(mapped(ours, in_dims), mapped(composite, in_dims))


def test_vmap_reports_each_problem():
    X, Y = make_inputs("XY")
    X = torch.stack([X, torch.zeros_like(X), X * 2])
    solved = func.vmap(lambda X: solve_normal_ex(X, Y))(X)
    assert solved.info.tolist() == [0, 1, 0]
    assert (solved.rcond > 0).tolist() == [True, False, True]
    with pytest.raises(torch.linalg.LinAlgError, match="1 of 3"):
        func.vmap(solve_normal, (0, None))(X, Y)


# ----------------------------------------------------------------------------------------------- what has no derivative


@pytest.mark.parametrize("function", [moments, ops.moments])
def test_moments_raise_where_a_derivative_is_wanted(function):
    X, Y = make_inputs("XY")
    with pytest.raises(NotImplementedError, match="moments has no derivative"):
        function(X.clone().requires_grad_(), Y)
    with pytest.raises(NotImplementedError, match="moments has no derivative"):
        function(X, Y.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="moments has no derivative"):
        func.grad(lambda X: function(X, Y)[0].sum())(X)
    with pytest.raises(NotImplementedError, match="moments has no derivative"):
        func.jvp(lambda X: function(X, Y)[0], (X,), (X,))
    with pytest.raises(NotImplementedError, match="moments has no derivative"), forward_ad.dual_level():
        function(forward_ad.make_dual(X, X), Y)


def test_vmap_of_moments_is_one_call_for_each_element():
    X, Y, weight = torch.randn(6, 4), torch.randn(6, 2), torch.rand(3, 6)
    many = torch.vmap(lambda w: ops.moments(X, Y, w))(weight)
    for element in range(3):
        for got, expected in zip(many, ops.moments(X, Y, weight[element]), strict=True):
            assert torch.equal(got[element], expected)


def test_vmap_of_polar_gives_nan_where_it_would_raise():
    M = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan)])
    factors = torch.vmap(polar)(M)
    torch.testing.assert_close(factors[0], torch.eye(3), rtol=0, atol=0.01)
    assert factors[1].isnan().all()


def test_moments_run_where_no_derivative_is_wanted():
    X, Y = make_inputs("XY")
    with torch.no_grad():
        result = moments(X.clone().requires_grad_(), Y)
    torch.testing.assert_close(result.gram, X.mT @ X)


def test_status_outputs_refuse_backward():
    X, Y = (value.requires_grad_() for value in make_inputs("XY"))
    with pytest.raises(RuntimeError, match="does not require grad"):
        solve_normal_ex(X, Y).rcond.backward()
