"""All functions that have derivatives, beside the same mathematics in torch's own ops."""

from typing import NamedTuple

import torch
from torch import func

from onestep.curvature import glm
from onestep.functional import linear_cross_entropy, scaled_dot_product_attention
from onestep.linalg import (
    cholesky,
    cholesky_ex,
    cholesky_solve,
    gram,
    solve_normal,
    solve_normal_ex,
    solve_spd,
    solve_spd_ex,
)
from onestep.ops.glm import FAMILIES

ops = torch.ops.onestep


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
