"""linear_cross_entropy against F.cross_entropy(F.linear(...)): values, derivatives of every order, options, bad input.

Transforms of torch.func are in test_transforms.py, opcheck in test_ops.py, torch.compile in test_compile.py."""

import pytest
import torch
from lmhead_cases import F64, OPTIONS, SIZES, cpu_kernels_only, derivatives, head, reference
from torch import func

import onestep
from onestep.functional import linear_cross_entropy, linear_cross_entropy_ggnvp, linear_cross_entropy_hvp


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
        bad(r"target has shape \(5,\) and dtype torch.float32; expected probabilities \(5, 7\)", target=torch.rand(5)),
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
