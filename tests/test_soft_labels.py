"""linear_cross_entropy of probabilities, against F.cross_entropy with the logits."""

import pytest
import torch
import torch.nn.functional as F
from lmhead_cases import F64, OPTIONS, derivatives
from torch import func

from onestep.functional import linear_cross_entropy, linear_cross_entropy_ggnvp, linear_cross_entropy_hvp


def soft(*rows, d=6, v=11, sums_to_one=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    target = normal(*rows, v).softmax(-1) if sums_to_one else normal(*rows, v).abs()
    return normal(*rows, d), normal(v, d), target, normal(v)


def reference(input, weight, target, bias=None, *, reduction="mean", **options):
    logits = F.linear(input, weight, bias).flatten(0, -2)
    losses = F.cross_entropy(logits, target.flatten(0, -2), reduction=reduction, **options)
    return losses.reshape(target.shape[:-1]) if reduction == "none" else losses


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sums_to_one", [True, False])
@pytest.mark.parametrize("rows", [(1,), (25,), (3, 7)])
def test_value_gradient_and_hvp(rows, sums_to_one, options):
    inputs = soft(*rows, v=130, sums_to_one=sums_to_one)
    torch.testing.assert_close(
        derivatives(linear_cross_entropy, *inputs, **options),
        derivatives(reference, *inputs, **options),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}], ids=str)
def test_products(options):
    input, weight, target, bias = soft(3, 7)
    vector = (torch.randn_like(input), torch.randn_like(weight), torch.randn_like(bias))
    gradient = func.grad(lambda *operands: reference(*operands[:2], target, operands[2], **options), argnums=(0, 1, 2))
    exact = func.jvp(gradient, (input, weight, bias), vector)[1]
    torch.testing.assert_close(
        linear_cross_entropy_hvp(input, weight, target, vector, bias, **options), exact, rtol=1e-10, atol=1e-10
    )
    # JᵀAJv, with A the Hessian in the scores.
    scores, along = func.jvp(F.linear, (input, weight, bias), vector)
    of_scores = func.grad(lambda z: reference(z, torch.eye(11, dtype=F64), target, **options))
    curved = func.jvp(of_scores, (scores,), (along,))[1]
    expected = func.vjp(F.linear, input, weight, bias)[1](curved)
    found = linear_cross_entropy_ggnvp(input, weight, target, vector, bias, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # One operand alone.
    (alone, *others) = linear_cross_entropy_hvp(input, weight, target, (vector[0], None, None), bias, **options)
    assert others == [None, None]
    of_input = func.jvp(lambda x: gradient(x, weight, bias)[0], (input,), (vector[0],))[1]
    torch.testing.assert_close(alone, of_input, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_probabilities():
    """As for the teacher of a distillation that is trained, too."""
    input, weight, target, bias = soft(5)
    assert torch.autograd.gradcheck(
        lambda t: linear_cross_entropy(input, weight, t, bias, label_smoothing=0.2), target.requires_grad_()
    )


def test_float32_and_bfloat16():
    exact = soft(60, d=40, v=300)
    truth = reference(*exact)
    single = [value.float() for value in exact]
    assert abs(linear_cross_entropy(*single) - truth) <= 2 * abs(reference(*single) - truth) + 1e-6
    half = [value.bfloat16() for value in exact]
    loss = linear_cross_entropy(*half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference(*[value.float() for value in half]), rtol=1e-5, atol=1e-5)


def test_classes_as_probabilities_are_the_classes():
    input, weight, _, bias = soft(9)
    classes = torch.arange(9)
    as_one_hot = F.one_hot(classes, 11).to(F64)
    for options in OPTIONS:
        torch.testing.assert_close(
            linear_cross_entropy(input, weight, as_one_hot, bias, **options),
            linear_cross_entropy(input, weight, classes, bias, **options),
        )


def test_no_rows_and_bad_input():
    input, weight, target, bias = soft(4)
    assert linear_cross_entropy(input[:0], weight, target[:0], bias).isnan()
    assert linear_cross_entropy(input[:0], weight, target[:0], bias, reduction="sum") == 0
    with pytest.raises(ValueError, match=r"target has shape \(4,\) and dtype torch.float64; expected .* \(4, 11\)"):
        linear_cross_entropy(input, weight, target[:, 0], bias)
    with pytest.raises(ValueError, match="ignore_index=3 is given with probabilities as target"):
        linear_cross_entropy(input, weight, target, bias, ignore_index=3)


@pytest.mark.parametrize(
    ("input", "weight", "message"),
    [
        ((), (3, 2), r"input has shape \(\)"),
        ((4, 2), (), r"weight has shape \(\)"),
        ((4, 2), (3, 5), "input has shape"),
    ],
)
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_hvp])
def test_operands_of_other_shapes_are_named(function, input, weight, message):
    h, w = torch.ones(input), torch.ones(weight)
    rest = ((None, w, None),) if function is linear_cross_entropy_hvp else ()
    with pytest.raises(ValueError, match=message):
        function(h, w, torch.ones(4, 3), *rest)
