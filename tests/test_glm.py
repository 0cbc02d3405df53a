"""onestep.curvature.glm against the same models in torch's own ops, in fp64: values, derivatives, edges, bad input."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import assert_as_accurate, assert_bitwise, over, relative_error
from glm_cases import _LAYOUTS, _OPTIONS, _SIZES, CASES, FAMILIES, SMALL, GlmCase, Problem, as_matrix, named, problem
from processes import Child
from torch import Tensor, func
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from onestep.curvature import GLMPoint, glm


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices this small, a busy machine's threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------------- values


# How targets become numbers does not depend on X's type; in bfloat16 X is loaded otherwise, and the rest is float32's.
VALUES = [
    *[(case, torch.float64) for case in CASES],
    *[(case, torch.float32) for case in (*_OPTIONS, *_SIZES, *_LAYOUTS)],
    *[(case, torch.bfloat16) for case in (*_OPTIONS[::3], *_SIZES[::3], *_LAYOUTS[::2])],
]
VALUES = [(case, dtype) for case, dtype in VALUES if case.layout != "expanded"]


@pytest.mark.parametrize(("case", "dtype"), VALUES, ids=[f"{case.name}-{str(dtype)[6:]}" for case, dtype in VALUES])
def test_agrees_with_torch_in_double(case, dtype):
    """fp32 at most twice as far off as torch's own fp32; bf16 as fp32 on the widened X."""
    given = problem(case, dtype)
    point = given.point()
    ours = {"loss": point.loss, "grad": point.grad, "hvp": point.hvp(given.V)}
    if case.m == 0:
        assert ours["hvp"].shape == given.V.shape
        return
    assert ours["loss"].dtype == torch.float64
    torchs, expected = given.to(given.W.dtype).dense(), given.to(torch.float64).dense()
    for name, value in ours.items():
        assert value.shape == expected[name].shape
        if dtype == torch.float64:
            assert_same(value, expected[name])
        else:
            value = value.to(torch.float32)
            assert_as_accurate(*map(as_matrix, (value, torchs[name], expected[name])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["f64", "bf16"])
@over([*SMALL, *_LAYOUTS, *named("no-rows", "no-rows-softmax", "intercept-alone-softmax", "no-features")])
def test_gram_is_the_dense_hessian(case, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules[GLMPoint.__module__], "_WIDENED_ROWS", 16)
    given = problem(case, dtype)
    H = given.point().gram()
    assert H.dtype == given.W.dtype
    assert_bitwise(H, H.T)
    assert_same(H, given.to(torch.float64).dense_hessian())


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal in norm to 64 ε."""
    assert actual.shape == expected.shape
    assert relative_error(as_matrix(actual), as_matrix(expected.double())) <= 64 * torch.finfo(actual.dtype).eps


@over([*SMALL, *named("softmax-wide-and-long", "softmax-classes130-m9", "logistic-k17-m33")])
def test_block_of_right_hand_sides_is_one_by_one(case, dtype):
    given = problem(case, dtype)
    point = given.point()
    one_by_one = torch.stack([point.hvp(v) for v in given.V])
    assert_same(point.hvp(given.V), one_by_one)


@over([*SMALL, *named("softmax-wide-and-long", "logistic-n513")])
def test_hessian_is_symmetric_and_positive(case, dtype):
    given = problem(case, dtype)
    products = given.point().hvp(given.V)
    form = (products.double().flatten(1) @ given.V.double().flatten(1).T) / products.double().norm()
    bound = 100 * torch.finfo(dtype).eps
    assert (form - form.T).abs().max() <= bound
    assert form.diagonal().min() >= -bound


@over(named("logistic-n513", "softmax-wide-and-long", "softmax-classes130-m9", "transposed-poisson-d37"))
def test_bitwise_the_same_for_any_number_of_threads(case, dtype):
    given = problem(replace(case, n=1500), dtype)

    def everything() -> tuple[Tensor, ...]:
        point = given.point()
        return point.loss, point.grad, point.hvp(given.V), point.hvp(given.V[0])

    expected = everything()
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        for value, first in zip(everything(), expected, strict=True):
            assert_bitwise(value, first)


@over(_LAYOUTS)
def test_layout_does_not_change_the_result(case, dtype):
    given = problem(case, dtype)
    plain = replace(given, X=given.X.contiguous(), y=given.y.contiguous(), W=given.W.contiguous())
    assert_same(given.point().grad, plain.point().grad)
    assert_same(given.point().hvp(given.V), plain.point().hvp(given.V.contiguous()))


# ------------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("scale", [20.0, 100.0, 1000.0])
@pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
def test_logistic_extremes(dtype, scale, target):
    """p and 1 − p keep their digits where they round to 0 or 1."""
    X = torch.tensor([[scale], [-scale]], dtype=dtype)
    y, W = torch.full((2,), target, dtype=dtype), torch.ones(1, dtype=dtype)
    for rows in (slice(0, 1), slice(1, 2), slice(0, 2)):
        given = Problem(X[rows], y[rows], W, W[None], "logistic", None, False)
        point, double = given.point(), given.to(torch.float64)
        expected = double.dense_loss(double.W)
        p = (double.X @ double.W).sigmoid()
        # 1 − p by its own sigmoid: torch's p − y would round it away.
        slope = (1 - double.y) * p - double.y * (-double.X @ double.W).sigmoid()
        torch.testing.assert_close(point.loss, softplus_loss(double), rtol=1e-6, atol=torch.finfo(dtype).tiny)
        torch.testing.assert_close(point.loss, expected, rtol=1e-6, atol=1e-7)
        tiny = torch.finfo(dtype).tiny
        torch.testing.assert_close(point.grad.double(), double.X.T @ slope, rtol=1e-6, atol=tiny * scale)
        curvature = p * (-double.X @ double.W).sigmoid()
        expected_product = double.X.T @ (curvature * (double.X @ double.W))
        torch.testing.assert_close(point.hvp(W).double(), expected_product, rtol=2e-6, atol=tiny * scale**2)


def softplus_loss(given: Problem) -> Tensor:
    """y softplus(−η) + (1 − y) softplus(η), in which nothing cancels."""
    eta = given.X @ given.W
    return (given.y * log1pexp(-eta) + (1 - given.y) * log1pexp(eta)).sum()


def log1pexp(eta: Tensor) -> Tensor:
    return eta.clamp_min(0) + (-eta.abs()).exp().log1p()


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("scale", [50.0, 1000.0])
def test_softmax_extremes(dtype, scale, one_hot, label):
    W = torch.tensor([[1.0, 0.0, -1.0]], dtype=dtype)
    y = torch.tensor([label, label])
    targets = torch.nn.functional.one_hot(y, 3).to(dtype) if one_hot else y
    given = Problem(torch.tensor([[scale], [-scale]], dtype=dtype), targets, W, W[None], "softmax", None, False)
    expected = replace(given.to(torch.float64), y=targets.double() if one_hot else y).dense()
    point = given.point()
    torch.testing.assert_close(point.loss, expected["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(point.grad.double(), expected["grad"], rtol=1e-6, atol=1e-6)
    assert point.hvp(W).isfinite().all()


def test_poisson_extremes(dtype):
    """e^−1000 is 0; e^1000 is infinite, in the loss and in the gradient, as in torch."""
    W = torch.ones(1, dtype=dtype)
    low = glm(torch.full((1, 1), -1000.0, dtype=dtype), torch.tensor([3]), W, "poisson")
    assert (low.loss.item(), low.grad.item(), low.hvp(W).item()) == (3000.0, 3000.0, 0.0)
    high = glm(torch.full((1, 1), 1000.0, dtype=dtype), torch.tensor([3]), W, "poisson")
    assert (high.loss.item(), high.grad.item(), high.hvp(W).item()) == (math.inf,) * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_in_x_shows_in_every_result(family, dtype):
    given = problem(GlmCase("nan", family, k=3), dtype)
    X = given.X.clone()
    X[7, 2] = math.nan
    point = given.point(X=X)
    assert point.loss.isnan()
    assert point.grad[2].isnan().all()
    assert point.hvp(given.V[0])[2].isnan().all()


@over([case for case in SMALL if case.weighted])
def test_weight_is_repetition(case, dtype):
    given = problem(case, dtype)
    weight = torch.arange(case.n) % 3
    rows = torch.arange(case.n).repeat_interleave(weight)
    repeated = given.point(X=given.X[rows], y=given.y[rows], weight=None)
    weighted = given.point(weight=weight.to(dtype))
    # The loss is a float64 of terms in the dtype of W.
    assert_same(weighted.loss.to(given.W.dtype), repeated.loss)
    assert_same(weighted.grad, repeated.grad)
    assert_same(weighted.hvp(given.V), repeated.hvp(given.V))


# ---------------------------------------------------------------------------------------------------------- derivatives

# Compositions of torch.func's transforms are in test_transforms.py.
ENDS = [case for case in SMALL if case.intercept == case.weighted]


@over(ENDS)
def test_gradcheck(case):
    given = problem(replace(case, n=8, d=2))
    W, V = given.W.clone().requires_grad_(), given.V[:2].clone().requires_grad_()
    for of in (lambda W: given.point(W=W).loss, lambda W: given.point(W=W).grad):
        assert gradcheck(of, W, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert gradgradcheck(of, W, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)

    def products(W: Tensor, V: Tensor) -> Tensor:
        return given.point(W=W).hvp(V)

    assert gradcheck(products, (W, V), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(products, (W, V), check_fwd_over_rev=True, fast_mode=True)


@over(ENDS)
def test_third_order(case):
    given = problem(replace(case, n=8, d=2))

    def third(loss: Any) -> Tensor:
        """Three reverse passes, each along a fixed direction."""
        W = given.W.clone().requires_grad_()
        value = loss(W)
        for v in given.V:
            (slope,) = torch.autograd.grad(value, W, create_graph=True)
            value = (slope * v).sum()
        return value

    expected = third(given.dense_loss)
    assert case.family == "gaussian" or expected.abs() > 1e-3
    torch.testing.assert_close(third(lambda W: given.point(W=W).loss), expected, rtol=1e-9, atol=1e-11)


def parts_of(H: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal blocks of a Hessian, one for each column of W, and its diagonal."""
    d, k = len(W), W[0].numel()
    blocks = torch.stack([H.view(d, k, d, k)[:, c, :, c] for c in range(k)])
    return blocks, H.diagonal().view(W.shape)


@over([*SMALL, *_LAYOUTS])
def test_parts_of_the_gram(case):
    given = problem(case)
    point = given.point()
    blocks, diagonal = parts_of(given.dense_hessian(), given.W)
    assert_same(point.gram_blocks().flatten(1), blocks.flatten(1))
    assert_same(point.gram_diagonal(), diagonal)


@over(ENDS)
def test_gram_has_a_derivative(case):
    given = problem(replace(case, n=8, d=2))
    along = (given.W,), (given.V[0],)
    tangent = func.jvp(lambda W: given.point(W=W).gram(), *along)[1]
    expected = func.jvp(func.hessian(given.dense_loss), *along)[1].reshape(tangent.shape)
    torch.testing.assert_close(tangent, expected)
    blocks, diagonal = parts_of(expected, given.W)
    torch.testing.assert_close(func.jvp(lambda W: given.point(W=W).gram_blocks(), *along)[1], blocks)
    torch.testing.assert_close(func.jvp(lambda W: given.point(W=W).gram_diagonal(), *along)[1], diagonal)
    W = given.W.clone().requires_grad_()
    (slope,) = torch.autograd.grad(given.point(W=W).gram_diagonal().sum(), W)
    expected = func.grad(lambda W: func.hessian(given.dense_loss)(W).view(W.numel(), -1).diagonal().sum())(given.W)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("mapped", ["X", "y", "weight", "W"])
@over(named("logistic-k3-intercept1-weight1", "softmax-torch.int64", "softmax-k3-intercept1-weight1"))
def test_vmap_over_each_operand(case, mapped):
    given = problem(replace(case, weighted=True))
    several = torch.stack([getattr(given, mapped).roll(index, 0) for index in range(3)])

    def results(value: Tensor) -> tuple[Tensor, ...]:
        point = given.point(**{mapped: value})
        return point.loss, point.grad, point.hvp(given.V)

    together = func.vmap(results)(several)
    apart = [torch.stack(parts) for parts in zip(*map(results, several), strict=True)]
    torch.testing.assert_close(list(together), apart, rtol=1e-12, atol=1e-12)


def by_backward(of: Any, value: Tensor) -> None:
    leaf = value.clone().requires_grad_()
    torch.autograd.grad(of(leaf), leaf)


def by_forward_mode(of: Any, value: Tensor) -> None:
    with forward_ad.dual_level():
        of(forward_ad.make_dual(value, torch.ones_like(value)))


WAYS = {
    "backward": by_backward,
    "forward mode": by_forward_mode,
    "func.grad": lambda of, value: func.grad(of)(value),
    "func.jvp": lambda of, value: func.jvp(of, (value,), (torch.ones_like(value),)),
    "func.jvp of func.grad": lambda of, value: func.jvp(func.grad(of), (value,), (torch.ones_like(value),)),
    "func.grad of func.jvp": lambda of, value: func.grad(
        lambda at: func.jvp(of, (at,), (torch.ones_like(at),))[1].sum()
    )(value),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["X", "y", "weight"])
@pytest.mark.parametrize("result", ["loss", "grad", "hvp", "gram"])
def test_other_derivatives_raise(name, result, way):
    given = problem(GlmCase("refused", "logistic", weighted=True))

    def of(value: Tensor) -> Tensor:
        point = given.point(**{name: value})
        made = {"hvp": lambda: point.hvp(given.V), "gram": point.gram}.get(result, lambda: getattr(point, result))()
        return made.sum()

    if name == "y" and result in ("hvp", "gram") and way in ("backward", "func.grad"):
        pytest.skip("the Hessian does not depend on y, and nothing that does is differentiated")
    with pytest.raises(NotImplementedError, match=f"{name} takes part in derivatives"):
        WAYS[way](of, getattr(given, name))


@pytest.mark.parametrize("name", ["X", "weight"])
@pytest.mark.parametrize("way", ["backward", "forward mode", "func.grad", "func.jvp"])
def test_products_at_a_known_point_refuse_other_derivatives(name, way):
    """Bare ops, whose point does not take part."""
    given = problem(GlmCase("refused", "softmax", k=3, weighted=True))
    ops, operands = torch.ops.onestep, {"X": given.X, "weight": given.weight}
    curvature = ops.glm_point(given.X, given.y, given.W, given.weight, 2, False)[2]

    def of(value: Tensor) -> Tensor:
        changed = operands | {name: value}
        return ops.glm_product(given.V, changed["X"], given.W, changed["weight"], curvature, 2, False).sum()

    with pytest.raises(NotImplementedError, match=f"{name} takes part in derivatives"):
        WAYS[way](of, operands[name])


# -------------------------------------------------------------------------------------------------------------- memory


PEAK = """
import pathlib, sys, torch
from onestep.curvature import glm

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

n, d, k = 400_000, 64, 4
X = torch.full((d, n), 0.5).T if sys.argv[1] == "transposed" else torch.full((n, d), 0.5)
y, W = torch.zeros(n, dtype=torch.int64), torch.zeros(d + 1, k)

def work(rows):
    point = glm(X[:rows], y[:rows], W, "softmax", intercept=True)
    point.hvp(torch.ones(2, d + 1, k))
    point.hvp(torch.ones(d + 1, k))

work(10)
before = status("VmRSS")
work(n)
print(max(0, status("VmHWM") - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_x_is_not_copied(layout):
    done = Child(PEAK, layout).finish()
    assert done.output, done.errors
    assert int(done.output) < 32 << 20, "X is 98 MiB, the curvature 6 MiB"


# ------------------------------------------------------------------------------------------------------------ bad input


def changed(tensor: Tensor, value: float, index: Any = 0) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


# Label → the family, what is changed in a good problem (X (20,5), W (5,) or (5,3)), the error, and what it says.
BAD: dict[str, tuple[str, Any, type[Exception], str]] = {
    "family": ("logistic", lambda p: {"family": "probit"}, ValueError, "family is 'probit'; expected one of 'gau"),
    "X array": ("logistic", lambda p: {"X": p.X.numpy()}, TypeError, "X is ndarray; expected torch.Tensor"),
    "X sparse": ("logistic", lambda p: {"X": p.X.to_sparse()}, ValueError, "X has layout torch.sparse_coo"),
    "X vector": ("logistic", lambda p: {"X": p.X[0]}, ValueError, r"X has shape \(5,\); expected \(n, d\)"),
    "X batch": ("logistic", lambda p: {"X": p.X[None]}, ValueError, r"X has shape \(1, 20, 5\); expected \(n, d\)"),
    "X integers": ("logistic", lambda p: {"X": p.X.int()}, TypeError, "X has dtype torch.int32"),
    "X half": ("logistic", lambda p: {"X": p.X.half()}, TypeError, "X has dtype torch.float16"),
    "W scalar": ("logistic", lambda p: {"W": p.W[0]}, ValueError, r"W has shape \(\); expected \(d,\) or \(d, k\)"),
    "W short": ("logistic", lambda p: {"W": p.W[1:]}, ValueError, r"W has shape \(4, 1\)"),
    "W without intercept": ("logistic", lambda p: {"intercept": True}, ValueError, "expected .* one for an intercept"),
    "W dtype": ("logistic", lambda p: {"W": p.W.float()}, TypeError, "W has dtype torch.float32; expected torch.fl"),
    "W list": ("logistic", lambda p: {"W": [0.0] * 5}, TypeError, "W is list; expected torch.Tensor"),
    "W bfloat16": ("logistic", lambda p: {"X": p.X.bfloat16(), "W": p.W.bfloat16()}, TypeError, "W has dtype"),
    "W vector": ("softmax", lambda p: {"W": p.W[:, 0]}, ValueError, r"W has shape \(5,\); expected \(d, C\)"),
    "W one class": ("softmax", lambda p: {"W": p.W[:, :1], "y": p.y[:, :1]}, ValueError, "W has .* 2 classes or more"),
    "y list": ("logistic", lambda p: {"y": [0] * 20}, TypeError, "y is list; expected torch.Tensor"),
    "y short": ("logistic", lambda p: {"y": p.y[1:]}, ValueError, r"y has shape \(19,\); expected \(20, 1\) or"),
    "y columns": ("poisson", lambda p: {"W": p.W[:, None].expand(5, 2)}, ValueError, r"y has shape \(20,\); expected"),
    "y classes": ("softmax", lambda p: {"y": p.y[:, :2]}, ValueError, r"y has shape \(20, 2\); expected \(20, 3\) or"),
    "y complex": ("logistic", lambda p: {"y": p.y + 0j}, TypeError, "y has dtype torch.complex128"),
    "y float labels": ("softmax", lambda p: {"y": p.y[:, 0]}, TypeError, "y has dtype .* expected integer class"),
    "y label high": ("softmax", lambda p: {"y": torch.arange(20) % 4}, ValueError, "y has classes from 0 to 3; exp"),
    "y label low": ("softmax", lambda p: {"y": -(torch.arange(20) % 2)}, ValueError, "y has classes from -1 to 0"),
    "y over 1": ("logistic", lambda p: {"y": changed(p.y, 1.5)}, ValueError, "y has values from .* to 1.5; expected 0"),
    "y under 0": ("logistic", lambda p: {"y": changed(p.y, -1.0)}, ValueError, "y has values from -1.0 to .* 0 to 1"),
    "y not 1": ("softmax", lambda p: {"y": p.y / 2}, ValueError, "y has rows whose sum is off 1 by 0.5"),
    "y negative": ("softmax", lambda p: {"y": p.y - 2}, ValueError, "y has values from .* expected 0 to 1"),
    "y count": ("poisson", lambda p: {"y": changed(p.y, -1.0)}, ValueError, "y has values from -1.0 .* counts >= 0"),
    "y infinite": ("poisson", lambda p: {"y": changed(p.y, math.inf)}, ValueError, "y has values .* to inf"),
    "weight negative": ("logistic", lambda p: {"weight": changed(p.y, -1.0)}, ValueError, "weight has negative values"),
    "weight scalar": ("logistic", lambda p: {"weight": p.y[0]}, ValueError, r"weight has shape \(\); expected \(20,\)"),
    "weight short": ("logistic", lambda p: {"weight": p.y[1:]}, ValueError, r"weight has shape \(19,\)"),
    "weight matrix": ("logistic", lambda p: {"weight": p.y[None]}, ValueError, r"weight has shape \(1, 20\)"),
    "weight dtype": ("logistic", lambda p: {"weight": p.y.float()}, TypeError, "weight has dtype torch.float32"),
    "weight number": ("logistic", lambda p: {"weight": 2.0}, TypeError, "weight is float; expected torch.Tensor"),
    "device": ("logistic", lambda p: {"y": p.y.to("meta")}, ValueError, "y is on device meta; expected cpu"),
    **{f"NaN in y of {family}": (family, lambda p: {"y": changed(p.y, math.nan)}, ValueError, "y has values from nan")
       for family in FAMILIES},
}  # fmt: skip


@pytest.mark.parametrize("label", BAD)
def test_bad_input_is_named(label):
    family, change, error, message = BAD[label]
    given = problem(GlmCase("bad", family, k=3 if family == "softmax" else None))
    with pytest.raises(error, match=message):
        given.point(**change(given))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda V: V[:, :4], ValueError, r"V has shape \(3, 4\); expected \(5,\), W's, or \(m, 5\)"),
        (lambda V: V[None], ValueError, r"V has shape \(1, 3, 5\); expected"),
        (lambda V: V[0, 0], ValueError, r"V has shape \(\); expected"),
        (lambda V: V.float(), TypeError, "V has dtype torch.float32; expected torch.float64"),
        (lambda V: V.tolist(), TypeError, "V is list; expected torch.Tensor"),
    ],
)
def test_bad_right_hand_sides_are_named(change, error, message):
    given = problem(GlmCase("bad", "logistic"))
    with pytest.raises(error, match=message):
        given.point().hvp(change(given.V))


def test_rows_of_probabilities_may_be_rounded():
    given = problem(GlmCase("rounded", "softmax", k=3), torch.float32)
    assert given.point(y=given.y.half().float()).loss.isfinite()
