"""``torch.ops.onestep.*`` as PyTorch sees them: schemas, fakes, autograd registration, and how they are called."""

import runpy
import sys

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import onestep.functional
import onestep.linalg
from onestep.curvature import glm
from onestep.ops import _cuda
from onestep.ops._library import _raise_without_kernel
from onestep.ops.normal import gram

ops = torch.ops.onestep


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -------------------------------------------------------------------------------------------------------------- samples


class Make:
    """Inputs of one dtype, which require grad or do not."""

    def __init__(self, dtype, requires_grad=False):
        self.dtype = dtype
        self.requires_grad = requires_grad

    def normal(self, *shape):
        return torch.randn(shape, dtype=self.dtype).requires_grad_(self.requires_grad)

    def positive(self, *shape):
        return (torch.rand(shape, dtype=self.dtype) + 0.5).requires_grad_(self.requires_grad)

    def spd(self, *shape):
        root = torch.randn(*shape, shape[-1], dtype=self.dtype)
        matrix = root @ root.mT + shape[-1] * torch.eye(shape[-1], dtype=self.dtype)
        return matrix.requires_grad_(self.requires_grad)

    def factor(self, *shape):
        return torch.linalg.cholesky(self.spd(*shape)).detach().requires_grad_(self.requires_grad)


def solve_samples(make):
    return {
        "plain": (make.normal(6, 3), make.normal(6, 2)),
        "weight": (make.normal(6, 3), make.normal(6, 2), make.positive(6)),
        "ridge": (make.normal(2, 6, 3), make.normal(2, 6, 1), None, make.positive(3)),
        "broadcasting": (make.normal(2, 1, 6, 3), make.normal(3, 6, 1), make.positive(2, 1, 6), make.positive(3, 3)),
        "uniform ridge": (make.normal(2, 6, 3), make.normal(6, 2), None, None, 0.5),
        "refined": (make.normal(6, 3), make.normal(6, 2), make.positive(6), make.positive(3), 0.0, 1),
        "blocked": (make.normal(2, 40, 34), make.normal(40, 2), None, None, 0.1),
    }


def dual(samples, make, *between):
    """``samples``, and the dual form, whose flag comes after ``between``."""
    wide = (make.normal(2, 3, 5), make.normal(4, 1, 3, 2), make.positive(3), make.positive(5), 0.0, 0)
    return samples | {"dual": (*wide, *between, True)}


def solved_samples(make):
    """The arguments of solve_normal_ex, and its results as constants."""
    defaults = (None, None, None, None, 0.0)
    samples = {}
    for label in ("plain", "weight", "ridge", "broadcasting", "blocked"):
        args = solve_samples(make)[label]
        X, Y, weight, ridge, uniform_ridge = (*args, *defaults[len(args) :])
        with torch.no_grad():
            solution, factor, info, *_ = ops.solve_normal_ex(X, Y, weight, ridge, uniform_ridge)
        samples[label] = (X, Y, weight, ridge, solution, factor, info)
    return samples


def samples_of(name, make):
    """Label → arguments."""
    if name == "solve_normal":
        return dual(solve_samples(make), make)
    if name == "solve_normal_ex":
        samples = dual(solve_samples(make), make, 0.0)
        samples["jitter"] = (make.normal(6, 3), make.normal(6, 2), None, None, 0.0, 0, 1e-6)
        samples["no rcond"] = (*samples["plain"], None, None, 0.0, 0, 0.0, False, False, True)
        return samples
    if name == "solve_normal_backward":
        return {
            label: (make.normal(*solution.shape), X, Y, weight, ridge, solution, factor, info)
            for label, (X, Y, weight, ridge, solution, factor, info) in solved_samples(make).items()
        }
    if name == "apply_normal_inverse":
        return {
            label: (make.normal(*solution.shape), X, weight, ridge, factor)
            for label, (X, _, weight, ridge, solution, factor, _) in solved_samples(make).items()
        }
    if name == "gram":
        return {
            "plain": (make.normal(6, 3), make.normal(6, 2)),
            "no targets": (make.normal(2, 6, 3), make.normal(6, 0)),
            "weight, broadcasting": (make.normal(2, 1, 6, 3), make.normal(3, 6, 2), make.positive(6)),
        }
    if name == "moments":
        plain = Make(make.dtype)
        return {
            "plain": (plain.normal(6, 3), plain.normal(6, 2)),
            "centred": (plain.normal(6, 3), plain.normal(6, 2), plain.positive(6), True),
        }
    if name == "linear_cross_entropy":
        return head_samples(make)
    if name == "linear_cross_entropy_tangent":
        return {
            label: (args[0], None, *args[1:5], *tangents_of(make, args[1:4]), *args[5:7], label == "no bias", args[7])
            for label, args in head_samples(make).items()
        }
    if name == "cholesky":
        return {
            "one": (make.spd(3),),
            "batch": (make.spd(2, 4, 3),),
            "checked": (make.spd(34), True),
        }
    if name == "cholesky_solve":
        return {
            "one": (make.normal(3, 2), make.factor(3)),
            "broadcasting": (make.normal(2, 1, 3, 2), make.factor(4, 3)),
        }
    if name == "inverse_cholesky":
        constant = Make(make.dtype)
        return {"one": (make.spd(3), constant.positive()), "batch": (make.spd(2, 4, 3), constant.positive(4))}
    if name == "solve_spd":
        return {
            "one": (make.spd(3), make.normal(3, 2)),
            "broadcasting": (make.spd(4, 3), make.normal(2, 1, 3, 2), True),
        }
    if name == "apply_spd_inverse":
        return {
            "one": apply_spd_sample(make.spd(3), make.normal(3, 2)),
            "broadcasting": apply_spd_sample(make.spd(4, 3), make.normal(2, 1, 3, 2)),
        }
    if name in ("glm_point", "glm_product"):
        return glm_samples(name, make)
    raise KeyError(name)


def glm_samples(name, make):
    """Only W and V have derivatives."""
    plain = Make(make.dtype)
    X, weight = plain.normal(6, 3), plain.positive(6)
    labels = torch.arange(6)[:, None] % 4
    points = {
        "logistic": (X, plain.normal(6, 2).sigmoid(), make.normal(3, 2), None, 1, False),
        "weight, intercept": (X, plain.normal(6, 1), make.normal(4, 1), weight, 0, True),
        "labels, broadcasting": (plain.normal(2, 1, 6, 3), labels, make.normal(3, 4, 4), weight, 2, True),
    }
    if name == "glm_point":
        return points
    samples = {}
    for label, (X, y, W, weight, family, intercept) in points.items():
        with torch.no_grad():
            curvature = ops.glm_point(X, y, W, weight, family, intercept)[2]
        samples[label] = (make.normal(5, *W.shape[-2:]), X, W, weight, curvature, family, intercept)
    return samples


def head_samples(make):
    target = torch.tensor([[1, 4, -100], [0, 2, 2]])
    options = (-100, 0.1)
    return {
        "all": (
            make.positive(2, 3),
            make.normal(2, 3, 4),
            make.normal(5, 4),
            make.normal(5),
            target,
            *options,
            [True] * 3,
        ),
        "no bias": (
            make.positive(3),
            make.normal(3, 4),
            make.normal(5, 4),
            None,
            target[0],
            *options,
            [False, True, True],
        ),
        "losses alone": (make.positive(), make.normal(4), make.normal(5, 4), None, target[0, 0], *options, [False] * 3),
    }


def tangents_of(make, operands):
    return [None if operand is None else make.normal(*operand.shape) for operand in operands]


def apply_spd_sample(A, B):
    return B, A, ops.cholesky(A.detach())[0]


OPS = [
    "apply_normal_inverse",
    "apply_spd_inverse",
    "cholesky",
    "cholesky_solve",
    "glm_point",
    "glm_product",
    "gram",
    "inverse_cholesky",
    "linear_cross_entropy",
    "linear_cross_entropy_tangent",
    "moments",
    "solve_normal",
    "solve_normal_backward",
    "solve_normal_ex",
    "solve_spd",
]
SAMPLES = [(name, label) for name in OPS for label in samples_of(name, Make(torch.float64))]


# Those of tests/test_attention_ops.py, test_compensated_sweep.py, test_mlp.py, test_polar.py, test_segments.py and
# test_sparse_products.py.
ELSEWHERE = ["attention", "attention_and_jvp", "attention_jvp"]
ELSEWHERE += ["attention_backward", "attention_backward_and_jvp", "attention_backward_jvp"]
ELSEWHERE += ["compensated_sweep", "unit_cholesky", "mlp_gradient", "mlp_jacobian", "mlp_product", "polar"]
ELSEWHERE += ["apply_segments_inverse", "solve_normal_segments", "solve_normal_segments_ex", "sparse_multiply"]


def test_every_op_is_tested():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("onestep::")}
    assert registered == {f"onestep::{name}" for name in OPS + ELSEWHERE}


# -------------------------------------------------------------------------------------------------------------- opcheck


# Tracing takes a second a sample: these, which between them have every optional tensor and broadcasting.
TRACED = [
    ("apply_normal_inverse", "broadcasting"),
    ("apply_spd_inverse", "broadcasting"),
    ("cholesky", "batch"),
    ("cholesky_solve", "broadcasting"),
    ("glm_point", "labels, broadcasting"),
    ("glm_product", "labels, broadcasting"),
    ("gram", "weight, broadcasting"),
    ("linear_cross_entropy", "all"),
    ("linear_cross_entropy_tangent", "all"),
    ("moments", "centred"),
    ("solve_normal", "broadcasting"),
    ("solve_normal_backward", "weight"),
    ("solve_normal_ex", "dual"),
    ("solve_spd", "broadcasting"),
]
UNTRACED = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(("dtype", "requires_grad"), [(torch.float64, True), (torch.float32, False)])
@pytest.mark.parametrize(("name", "label"), SAMPLES)
def test_opcheck(name, label, dtype, requires_grad):
    args = samples_of(name, Make(dtype, requires_grad))[label]
    opcheck(getattr(ops, name).default, args, test_utils=UNTRACED)


@pytest.mark.long
@pytest.mark.parametrize(("name", "label"), TRACED)
def test_opcheck_traced(name, label):
    """With dynamic shapes, forward and backward."""
    args = samples_of(name, Make(torch.float64, requires_grad=True))[label]
    opcheck(getattr(ops, name).default, args, test_utils="test_aot_dispatch_dynamic")


# ---------------------------------------------------------------------------------------------------------------- fakes


def described(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [(tuple(output.shape), output.stride(), output.dtype) for output in outputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "label"), SAMPLES)
def test_fake_has_the_kernels_shapes_strides_and_dtypes(name, label, dtype):
    args = samples_of(name, Make(dtype))[label]
    on_meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
    op = getattr(ops, name).default
    assert described(op(*on_meta)) == described(op(*args))


def elsewhere_samples(make):
    """Of ops that have no samples above: arguments by the op's name."""
    X, offsets, weight = make.normal(6, 3), torch.tensor([0, 4, 6]), make.positive(6)
    problem = (X, make.normal(6, 2), offsets, None, weight, make.spd(3), make.positive(2, 3))
    L = ops.solve_normal_segments_ex(*problem)[1]
    return {
        "apply_segments_inverse": (make.normal(2, 3, 2), X, *problem[2:], L),
        "compensated_sweep": (make.normal(4, 3), make.factor(3).mT, None, None, None, 4, True, 3),
        "polar": (make.normal(2, 4, 3), 2, 1e-2),
        "solve_normal_segments": problem,
        "solve_normal_segments_ex": problem,
        "sparse_multiply": (torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), make.normal(3), make.normal(3, 5)),
        "unit_cholesky": (make.spd(2, 3), make.positive()),
    }


# moments takes no batches, see test_transforms.py. Attention and perceptrons have such a test of their own.
@pytest.mark.parametrize(
    ("name", "label"),
    [sample for sample in SAMPLES if sample[0] != "moments"]
    + [(name, None) for name in elsewhere_samples(Make(torch.float64))],
)
def test_vmap_over_each_operand(name, label):
    """The results of one call, as often as there are elements: twice, or not at all."""
    make = Make(torch.float64)
    args = elsewhere_samples(make)[name] if label is None else samples_of(name, make)[label]
    op = getattr(ops, name)
    one = op(*args)
    for place, arg in enumerate(args):
        if not isinstance(arg, torch.Tensor):
            continue
        mapped = torch.vmap(lambda x, place=place: op(*args[:place], x, *args[place + 1 :]))
        for size in (0, 2):
            many = mapped(arg.expand(size, *arg.shape))
            for got, expected in zip(many, one, strict=True) if isinstance(one, tuple) else [(many, one)]:
                torch.testing.assert_close(got, expected.expand(size, *expected.shape))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,), (2, 1)])
@pytest.mark.parametrize("d", [1, 4, 34])
def test_factors_are_column_major(d, batch):
    make = Make(torch.float64)
    A, X = make.spd(*batch, d), make.normal(*batch, d + 2, d)
    for L in (
        ops.cholesky(A)[0],
        ops.solve_spd(A, make.normal(d, 1))[1],
        ops.solve_normal_ex(X, make.normal(d + 2, 1))[1],
    ):
        assert L.shape == (*batch, d, d)
        assert L.stride()[-2:] == (1, d)
        assert L.mT.is_contiguous()
        assert torch.equal(L, L.tril())


# -------------------------------------------------------------------------------------------------------- ways to call


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(op)
        return op(*args, **(kwargs or {}))


def public_calls(make):
    """Every public function with its op, on the same arguments."""
    X, Y, weight, ridge = make.normal(3, 6, 4), make.normal(6, 2), make.positive(6), make.positive(4)
    A, B = make.spd(3, 4), make.normal(4, 2)
    linalg = onestep.linalg
    solve_arguments = (X, Y, weight, ridge, 0.0, 0)
    return {
        "solve_normal": (
            lambda: linalg.solve_normal(X, Y, weight=weight, ridge=ridge),
            lambda: ops.solve_normal(*solve_arguments, False, True)[0],
        ),
        "solve_normal_ex": (
            lambda: linalg.solve_normal_ex(X, Y, weight=weight, ridge=ridge).rcond,
            lambda: ops.solve_normal_ex(*solve_arguments, 0.0, False)[3],
        ),
        "gram": (lambda: linalg.gram(X, Y, weight=weight)[1], lambda: ops.gram(X, Y, weight)[1]),
        "moments": (lambda: linalg.moments(X[0], Y).gram, lambda: ops.moments(X[0], Y)[0]),
        "cholesky": (lambda: linalg.cholesky(A), lambda: ops.cholesky(A, True)[0]),
        "cholesky_solve": (lambda: linalg.cholesky_solve(B, A), lambda: ops.cholesky_solve(B, A)),
        "solve_spd": (lambda: linalg.solve_spd(A, B), lambda: ops.solve_spd(A, B, True)[0]),
        "glm_point": (
            lambda: glm(X[0], Y, B, "gaussian", weight=weight).grad,
            lambda: ops.glm_point(X[0], Y, B, weight, 0, False)[1],
        ),
        "glm_product": (
            lambda: glm(X[0], Y, B, "gaussian", weight=weight).hvp(B),
            lambda: ops.glm_product(B[None], X[0], B, weight, ops.glm_point(X[0], Y, B, weight, 0, False)[2], 0, False)[
                0
            ],
        ),
    }


@pytest.mark.parametrize("name", public_calls(Make(torch.float32)))
def test_public_function_is_the_op_bitwise(name):
    public, op = public_calls(Make(torch.float32))[name]
    assert torch.equal(public(), op())


@pytest.mark.parametrize("name", public_calls(Make(torch.float32)))
def test_dispatch_modes_see_the_public_functions(name):
    public, _ = public_calls(Make(torch.float32))[name]
    with Record() as record:
        public()
    assert getattr(ops, name).default in record.seen


@pytest.mark.parametrize("name", ["solve_normal", "solve_normal_ex", "gram", "cholesky", "cholesky_solve", "solve_spd"])
def test_result_is_bitwise_the_same_where_a_gradient_is_recorded(name):
    torch.manual_seed(0)
    recorded, _ = public_calls(Make(torch.float32, requires_grad=True))[name]
    torch.manual_seed(0)
    plain, _ = public_calls(Make(torch.float32))[name]
    assert torch.equal(plain(), recorded().detach())


def test_public_functions_on_meta_tensors():
    X, Y = torch.empty(3, 6, 4, device="meta"), torch.empty(6, 2, device="meta")
    assert onestep.linalg.solve_normal(X, Y).shape == (3, 4, 2)
    assert onestep.linalg.gram(X, Y)[0].shape == (3, 4, 4)


def test_dual_form_on_meta_tensors():
    wide, targets = torch.empty(3, 40, device="meta"), torch.empty(3, 2, device="meta")
    ridge = torch.ones(40, device="meta")
    assert onestep.linalg.solve_normal(wide, targets, ridge=0.5).shape == (40, 2)
    assert onestep.linalg.solve_normal(wide, targets, ridge=ridge).shape == (40, 2)


def test_default_device_does_not_matter():
    X, Y = torch.randn(3, 40), torch.randn(3, 2)
    expected = onestep.linalg.solve_normal_ex(X, Y, ridge=0.5)
    with torch.device("meta"):
        solved = onestep.linalg.solve_normal_ex(X, Y, ridge=0.5)
    assert torch.equal(solved.solution, expected.solution)
    assert torch.equal(solved.rcond, expected.rcond)


@pytest.mark.parametrize(("n", "d"), [(6, 3), (50, 40)])
def test_nine_batch_dimensions_that_broadcast(n, d):
    """One more than the kernels address: the operands are copied, and the copies must live until the kernel is done."""
    make = Make(torch.float64)
    X = make.normal(2, 1, 2, 1, 2, 1, 2, 1, 1, n, d)
    Y = make.normal(1, 2, 1, 2, 1, 1, 1, 1, 2, n, 2)
    W = onestep.linalg.solve_normal(X, Y)
    batch = torch.broadcast_shapes(X.shape[:-2], Y.shape[:-2])
    expected = onestep.linalg.solve_normal(
        X.expand(*batch, n, d).reshape(-1, n, d), Y.expand(*batch, n, 2).reshape(-1, n, 2)
    )
    assert torch.equal(W, expected.reshape(W.shape))


def test_autocast_does_not_touch_the_solution():
    X, Y = torch.randn(20, 4), torch.randn(20, 2)
    expected = onestep.linalg.solve_normal(X, Y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(onestep.linalg.solve_normal(X, Y), expected)


def test_negated_views_are_read_with_their_sign():
    """The imaginary part of a conjugate is a view whose values are negated when they are read."""
    x = torch.randn(6, 3, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    plain = x.resolve_neg()
    assert torch.equal(onestep.linalg.gram(x)[0], onestep.linalg.gram(plain)[0])
    assert torch.equal(onestep.linalg.gram(plain, x)[1], onestep.linalg.gram(plain, plain)[1])
    y, W = torch.randn(6), torch.randn(3)
    assert torch.equal(glm(x, y, W, "gaussian").grad, glm(plain, y, W, "gaussian").grad)
    q = x[None]
    expected = onestep.functional.scaled_dot_product_attention(plain[None], plain[None], plain[None])
    assert torch.equal(onestep.functional.scaled_dot_product_attention(q, q, q), expected)


# -------------------------------------------------------------------------------------------------------------- devices


@pytest.fixture
def without_cuda_kernel(monkeypatch):
    """gram as it is in a build for the CPU alone."""
    monkeypatch.delitem(gram.kernels, "cuda", raising=False)
    monkeypatch.setattr(_cuda, "native", None)


def test_device_without_a_kernel_is_named(without_cuda_kernel):
    with pytest.raises(NotImplementedError, match=r"onestep::gram has no kernel for cuda tensors.*\.cpu\(\)"):
        _raise_without_kernel(gram, "cuda")
    for key in ("CUDA", "MPS", "XPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("onestep::gram", key)


def test_emulation_without_its_module_does_not_run_on_the_cpu(monkeypatch):
    """What happens at import, in a second copy of the module that loads the kernels."""
    monkeypatch.setenv("ONESTEP_CUDA_EMULATE", "1")
    monkeypatch.setitem(sys.modules, "onestep._native_cuda_emulated", None)
    with pytest.raises(ImportError, match=r"ONESTEP_CUDA_EMULATE is set, but onestep\._native_cuda_emulated is not"):
        runpy.run_path(_cuda.__file__)
