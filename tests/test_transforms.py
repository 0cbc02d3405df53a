"""torch.func, forward mode and vmap, composed: no silent zeros, on the public functions and on bare ops alike.

Every transform of every function is held against the same transform of the same mathematics in torch's own ops.
"""

from typing import NamedTuple

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from onestep.curvature import glm
from onestep.functional import linear_cross_entropy, scaled_dot_product_attention
from onestep.linalg import (
    cholesky,
    cholesky_ex,
    cholesky_solve,
    gram,
    moments,
    solve_normal,
    solve_normal_ex,
    solve_spd,
    solve_spd_ex,
)
from onestep.ops.glm import FAMILIES

ops = torch.ops.onestep


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices this small, a busy machine's threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------ functions


def flat(*tensors):
    """All outputs as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def sym(A):
    return (A + A.mT) / 2


def system(X, weight, ridge):
    return X.mT @ (weight.unsqueeze(-1) * X) + torch.diag_embed(ridge)


def composite(X, Y, weight, ridge):
    """solve_normal by torch's own ops."""
    factor = torch.linalg.cholesky(system(X, weight, ridge))
    return torch.cholesky_solve(X.mT @ (weight.unsqueeze(-1) * Y), factor)


def composite_plain(X, Y):
    return torch.cholesky_solve(X.mT @ Y, torch.linalg.cholesky(X.mT @ X))


def composite_per_scalar(X, y, weight, ridge):
    """A vector of targets and a scalar ridge."""
    return composite(X, y.unsqueeze(-1), weight, ridge * torch.ones_like(X[0])).squeeze(-1)


def composite_gram(X, Y, weight):
    weighted = weight.unsqueeze(-1) * X
    return flat(weighted.mT @ X, weighted.mT @ Y)


def composite_backward(grad, X, Y, weight, ridge):
    return flat(*func.vjp(composite, X, Y, weight, ridge)[1](grad))


def bare_backward(grad, X, Y, weight, ridge):
    solution, factor, info, _, _ = ops.solve_normal_ex(X, Y, weight, ridge)
    return flat(*ops.solve_normal_backward(grad, X, Y, weight, ridge, solution, factor, info))


def bare_apply_normal_inverse(B, X, weight, ridge):
    factor = ops.solve_normal_ex(X, X[:, :1], weight, ridge)[1]
    return ops.apply_normal_inverse(B, X, weight, ridge, factor)


def bare_apply_spd_inverse(B, A):
    return ops.apply_spd_inverse(B, sym(A), ops.cholesky(sym(A))[0])


def spd_inverse_times(B, A):
    # Not torch.linalg.solve: in torch 2.13 its derivatives beyond forward mode are wrong.
    return torch.cholesky_solve(B, torch.linalg.cholesky(sym(A)))


# Rows of a model: X, an intercept, and targets that suit every family.
MODEL_X = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MODEL_Y = torch.tensor([[0, 1, 0], [1, 0, 0], [0.5, 0, 0.5], [0, 0, 1], [0.25, 0.5, 0.25]], dtype=torch.float64)
MODEL_WEIGHT = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)


def model(family):
    """Everything that a GLMPoint gives."""

    def function(W, V):
        point = glm(MODEL_X, MODEL_Y, W, family, weight=MODEL_WEIGHT, intercept=True)
        return flat(point.loss, point.grad, point.hvp(V), point.gram())

    return function


def bare_model(W, V):
    family = FAMILIES["softmax"]
    loss, gradient, curvature = ops.glm_point(MODEL_X, MODEL_Y, W, MODEL_WEIGHT, family, True)
    product = ops.glm_product(V.unsqueeze(-3), MODEL_X, W, MODEL_WEIGHT, curvature, family, True)
    return flat(loss, gradient, product)


def composite_model(family, with_hessian=True):
    """The same by formulas: loss, XᵀR, XᵀC(XV) and, column by column, XᵀCX."""
    X = torch.cat((MODEL_X, torch.ones(5, 1, dtype=torch.float64)), 1)
    weight = MODEL_WEIGHT[:, None]

    def function(W, V):
        eta = X @ W
        # Not torch's softmax: reverse mode through the tangent of log_softmax fails in torch 2.13.
        total = eta.exp().sum(1, keepdim=True)
        loss, mean, curvature = {
            "gaussian": lambda: ((eta - MODEL_Y).square() / 2, eta, torch.ones_like(eta)),
            "logistic": lambda: (
                torch.log1p(eta.exp()) - MODEL_Y * eta,
                eta.sigmoid(),
                eta.sigmoid() * (1 - eta.sigmoid()),
            ),
            "poisson": lambda: (eta.exp() - MODEL_Y * eta, eta.exp(), eta.exp()),
            "softmax": lambda: (-MODEL_Y * (eta.exp() / total).log(), eta.exp() / total, eta.exp() / total),
        }[family]()

        def product(V):
            z = X @ V
            z = z - (curvature * z).sum(1, keepdim=True) if family == "softmax" else z
            return X.mT @ (weight * curvature * z)

        parts = [(weight * loss).sum(), X.mT @ (weight * (mean - MODEL_Y)), product(V)]
        if with_hessian:
            parts += [product(column) for column in torch.eye(9, dtype=torch.float64).reshape(9, 3, 3)]
        return flat(*parts)

    return function


# One row is ignored.
CLASSES, TARGETS = 4, torch.tensor([1, 3, -100, 0, 3])


def composite_head(H, W, b=None, label_smoothing=0.0, reduction="mean"):
    """Cross-entropy in elementary ops: of torch's own, backward through a tangent fails."""
    z = H @ W.mT if b is None else H @ W.mT + b
    counts = TARGETS != -100
    q = (1 - label_smoothing) * torch.eye(CLASSES, dtype=z.dtype)[TARGETS * counts] + label_smoothing / CLASSES
    losses = torch.where(counts, z.exp().sum(-1).log() - (q * z).sum(-1), 0)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counts.sum()}[reduction]


def composite_head_gradient(weight, H, W, b):
    """Every result of the op linear_cross_entropy."""

    def value(H, W, b):
        losses = composite_head(H, W, b, label_smoothing=0.1, reduction="none")
        return (weight * losses).sum(), losses

    total, pullback, losses = func.vjp(value, H, W, b, has_aux=True)
    return flat(total, losses, *pullback(torch.ones_like(total)))


def composite_head_tangent(weight, dweight, *operands_and_tangents):
    """J v as the pullback of the pullback, which is linear: forward mode does not nest in dual tensors."""
    inputs = (weight, *operands_and_tangents[:3])
    outputs, pullback = func.vjp(composite_head_gradient, *inputs)
    return func.vjp(pullback, torch.zeros_like(outputs))[1]((dweight, *operands_and_tangents[3:]))[0]


def composite_attention(q, k, v):
    """Causal, in elementary ops: torch's softmax fails as its cross-entropy does."""
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp().tril()
    return weights @ v / weights.sum(-1, keepdim=True)


class Function(NamedTuple):
    ours: object
    reference: object
    inputs: str


# Few parameters, but more features than the packed kernel takes and more than there are rows.
WIDE = 33
WIDEN = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

# The letters name the inputs; see make_inputs.
FUNCTIONS = {
    "solve_normal": Function(lambda X, Y, w, r: solve_normal(X, Y, weight=w, ridge=r), composite, "XYwr"),
    "solve_normal, plain": Function(solve_normal, composite_plain, "XY"),
    "solve_normal, vector": Function(
        lambda X, y, w, s: solve_normal(X, y, weight=w, ridge=s, refine=1), composite_per_scalar, "Xyws"
    ),
    "solve_normal, dual": Function(
        lambda X, Y, w: WIDEN @ solve_normal(X @ WIDEN, Y, weight=w, ridge=0.5),
        lambda X, Y, w: WIDEN @ composite(X @ WIDEN, Y, w, torch.full((WIDE,), 0.5, dtype=torch.float64)),
        "DTv",
    ),
    "solve_normal_ex": Function(
        lambda X, Y, w, r: solve_normal_ex(X, Y, weight=w, ridge=r, jitter=1e-8).solution, composite, "XYwr"
    ),
    "solve_normal_ex, plain": Function(lambda X, Y: solve_normal_ex(X, Y).solution, composite_plain, "XY"),
    "gram": Function(lambda X, Y, w: flat(*gram(X, Y, weight=w)), composite_gram, "XYw"),
    "gram, plain": Function(lambda X: gram(X)[0], lambda X: X.mT @ X, "X"),
    "cholesky": Function(lambda A: cholesky(sym(A)), lambda A: torch.linalg.cholesky(sym(A)), "A"),
    "cholesky_ex": Function(lambda A: cholesky_ex(sym(A))[0], lambda A: torch.linalg.cholesky(sym(A)), "A"),
    "cholesky_solve": Function(lambda B, L: cholesky_solve(B, L), lambda B, L: torch.cholesky_solve(B, L.tril()), "BL"),
    "solve_spd": Function(lambda B, A: solve_spd(sym(A), B), spd_inverse_times, "BA"),
    "solve_spd_ex": Function(lambda B, A: solve_spd_ex(sym(A), B)[0], spd_inverse_times, "BA"),
    "linear_cross_entropy": Function(
        lambda H, W, b: linear_cross_entropy(H, W, TARGETS, b, label_smoothing=0.1),
        lambda H, W, b: composite_head(H, W, b, label_smoothing=0.1),
        "XCc",
    ),
    "linear_cross_entropy, sum": Function(
        lambda H, W: linear_cross_entropy(H, W, TARGETS, reduction="sum"),
        lambda H, W: composite_head(H, W, reduction="sum"),
        "XC",
    ),
    "linear_cross_entropy, none": Function(
        lambda H, W, b: linear_cross_entropy(H, W, TARGETS, b, reduction="none"),
        lambda H, W, b: composite_head(H, W, b, reduction="none"),
        "XCc",
    ),
    "attention": Function(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), composite_attention, "XXX"
    ),
    "op linear_cross_entropy": Function(
        lambda w, H, W, b: flat(*ops.linear_cross_entropy(w, H, W, b, TARGETS, -100, 0.1, (True,) * 3)),
        composite_head_gradient,
        "wXCc",
    ),
    "op linear_cross_entropy_tangent": Function(
        lambda w, dw, H, W, b, dH, dW, db: flat(
            *ops.linear_cross_entropy_tangent(w, dw, H, W, b, TARGETS, dH, dW, db, -100, 0.1, False, (True,) * 3)
        ),
        composite_head_tangent,
        "wwXCcXCc",
    ),
    "op solve_normal": Function(lambda X, Y, w, r: ops.solve_normal(X, Y, w, r)[0], composite, "XYwr"),
    "op solve_normal, plain": Function(lambda X, Y: ops.solve_normal(X, Y)[0], composite_plain, "XY"),
    "op solve_normal_ex": Function(lambda X, Y, w, r: ops.solve_normal_ex(X, Y, w, r)[0], composite, "XYwr"),
    "op solve_normal_ex, plain": Function(lambda X, Y: ops.solve_normal_ex(X, Y)[0], composite_plain, "XY"),
    "op solve_normal_ex, dual": Function(
        lambda X, Y, w, r: ops.solve_normal_ex(X, Y, w, r, dual=True)[0], composite, "DTvr"
    ),
    "op solve_normal_backward": Function(bare_backward, composite_backward, "BXYwr"),
    "op apply_normal_inverse": Function(
        bare_apply_normal_inverse,
        lambda B, X, w, r: torch.cholesky_solve(B, torch.linalg.cholesky(system(X, w, r))),
        "BXwr",
    ),
    "op gram": Function(lambda X, Y, w: flat(*ops.gram(X, Y, w)), composite_gram, "XYw"),
    "op gram, plain": Function(
        lambda X, Y: flat(*ops.gram(X, Y)), lambda X, Y: composite_gram(X, Y, torch.ones_like(X[:, 0])), "XY"
    ),
    "op cholesky": Function(lambda A: ops.cholesky(sym(A))[0], lambda A: torch.linalg.cholesky(sym(A)), "A"),
    "op cholesky_solve": Function(
        lambda B, L: ops.cholesky_solve(B, L), lambda B, L: torch.cholesky_solve(B, L.tril()), "BL"
    ),
    "op solve_spd": Function(lambda B, A: ops.solve_spd(sym(A), B)[0], spd_inverse_times, "BA"),
    "op apply_spd_inverse": Function(bare_apply_spd_inverse, spd_inverse_times, "BA"),
    **{f"glm, {family}": Function(model(family), composite_model(family), "MM") for family in FAMILIES},
    "op glm_point, op glm_product": Function(bare_model, composite_model("softmax", with_hessian=False), "MM"),
}

N, D, K = 5, 3, 2
FEW = 2


def make_inputs(letters):
    generator = torch.Generator().manual_seed(sum(map(ord, letters)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def positive(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5

    root = normal(D, D)
    make = {
        "X": lambda: normal(N, D),
        "Y": lambda: normal(N, K),
        "y": lambda: normal(N),
        "w": lambda: positive(N),
        "r": lambda: positive(D),
        "s": lambda: positive(),
        "A": lambda: root @ root.mT + D * torch.eye(D, dtype=torch.float64),
        "B": lambda: normal(D, K),
        "C": lambda: normal(CLASSES, D),
        "c": lambda: normal(CLASSES),
        "L": lambda: torch.linalg.cholesky(root @ root.mT + D * torch.eye(D, dtype=torch.float64)),
        # Three classes: the derivatives of two are each other's negatives, and their sines add up to zero.
        "M": lambda: 0.3 * normal(D, 3),
        # n < d
        "D": lambda: normal(FEW, D),
        "T": lambda: normal(FEW, 1),
        "v": lambda: positive(FEW),
    }
    return tuple(make[letter]() for letter in letters)


def like(tensors, start=-1.0):
    """A fixed direction for every tensor."""
    return tuple(torch.linspace(start, 1, value.numel(), dtype=value.dtype).reshape(value.shape) for value in tensors)


def scalar(function):
    return lambda *inputs: function(*inputs).sin().sum()


def every(inputs):
    return tuple(range(len(inputs)))


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


def test_moments_do_not_take_batches_from_vmap():
    X, Y = make_inputs("XY")
    with pytest.raises((NotImplementedError, ValueError), match="moments"):
        func.vmap(lambda X: moments(X, Y).gram)(stacked([X])[0])


def test_moments_run_where_no_derivative_is_wanted():
    X, Y = make_inputs("XY")
    with torch.no_grad():
        result = moments(X.clone().requires_grad_(), Y)
    torch.testing.assert_close(result.gram, X.mT @ X)


def test_status_outputs_refuse_backward():
    X, Y = (value.requires_grad_() for value in make_inputs("XY"))
    with pytest.raises(RuntimeError, match="does not require grad"):
        solve_normal_ex(X, Y).rcond.backward()
