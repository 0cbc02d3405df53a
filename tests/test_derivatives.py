"""Derivatives of the linalg functions: against finite differences, and against autograd through torch's own ops."""

import pytest
import torch
import torch.utils.checkpoint
from derivative_cases import F64, composite, ex_solution, gradients, leaf, leaves, positive_leaf, rows, spd
from torch.autograd import gradcheck, gradgradcheck

from onestep.linalg import (
    cholesky,
    cholesky_ex,
    cholesky_solve,
    gram,
    solve_normal,
    solve_spd,
    solve_spd_ex,
)


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    """On matrices this small, a busy machine's threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------- finite differences

# X, Y, weight, ridge (a shape is a tensor that requires grad, a float is itself), refine
SOLVE_CASES = {
    "plain": ((5, 3), (5, 2), None, 0.0, 0),
    "vector, float ridge": ((4, 3), (4,), None, 0.7, 0),
    "weight, scalar ridge": ((2, 4, 2), (2, 4, 1), (2, 4), (), 0),
    "ridge per problem": ((3, 4, 2), (3, 4, 1), (4,), (3,), 0),
    "ridge per feature": ((5, 3), (5, 1), (5,), (3,), 0),
    "ridge per problem and feature": ((2, 4, 3), (2, 4), None, (2, 3), 0),
    "broadcasting": ((2, 1, 4, 2), (3, 4, 1), (2, 1, 4), (2, 1, 1), 0),
    "weights broadcast over one X": ((4, 2), (4, 1), (3, 4), 0.1, 0),
    "refined": ((5, 3), (5, 2), (5,), (), 1),
    "fewer rows than features": ((2, 3), (2, 1), (2,), (3,), 0),
}
# More features than the packed kernel takes: checked along random directions instead of every one.
LARGE_SOLVE_CASES = {
    "blocked": ((2, 36, 33), (36, 2), (2, 36), (33,), 0),
    "dual, float ridge": ((3, 35), (3, 2), (3,), 0.8, 0),
    "dual, tensor ridge": ((2, 3, 34), (2, 3, 1), None, (2,), 0),
    "dual, refined": ((3, 34), (3,), (3,), (34,), 1),
}


def solve_function(case, function):
    """The function of its tensors alone, and the tensors."""
    X, Y, weight, ridge, refine = case
    tensors = {"X": leaf(*X), "Y": leaf(*Y)}
    fixed = {"refine": refine}
    if weight is not None:
        tensors["weight"] = positive_leaf(*weight)
    if isinstance(ridge, float):
        fixed["ridge"] = ridge
    else:
        tensors["ridge"] = positive_leaf(*ridge)
    return lambda *values: function(**dict(zip(tensors, values, strict=True)), **fixed), tuple(tensors.values())


def check_first_order(function, inputs, fast_mode=False):
    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=fast_mode,
    )


def check_second_order(function, inputs, fast_mode=False):
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=fast_mode)


# solve_normal's derivative is that of solve_normal_ex.
FIRST_ORDER = [(case, solve_normal) for case in SOLVE_CASES] + [("refined", ex_solution), ("broadcasting", ex_solution)]


@pytest.mark.parametrize(("case", "function"), FIRST_ORDER)
def test_solve_normal_first_order(case, function):
    check_first_order(*solve_function(SOLVE_CASES[case], function))


@pytest.mark.parametrize("case", SOLVE_CASES)
def test_solve_normal_second_order(case):
    """Along every direction in one case, along random ones in the others."""
    every = case == "weight, scalar ridge"
    check_second_order(*solve_function(SOLVE_CASES[case], solve_normal), fast_mode=not every)


@pytest.mark.parametrize("case", LARGE_SOLVE_CASES)
def test_solve_normal_of_many_features(case):
    check_first_order(*solve_function(LARGE_SOLVE_CASES[case], solve_normal), fast_mode=True)
    check_second_order(*solve_function(LARGE_SOLVE_CASES[case], ex_solution), fast_mode=True)


def symmetric(function):
    """The function of a symmetric matrix: what finite differences of one element alone would break."""
    return lambda A, *others: function((A + A.mT) / 2, *others)


def lower(function):
    return lambda B, L: function(B, L.tril())


OTHER_FUNCTIONS = {
    "gram": (lambda X, Y, weight: gram(X, Y, weight=weight), lambda: (leaf(2, 4, 3), leaf(4, 2), positive_leaf(2, 4))),
    "gram, no targets": (lambda X, weight: gram(X, weight=weight)[0], lambda: (leaf(4, 3), positive_leaf(4))),
    "gram, vector": (gram, lambda: (leaf(4, 3), leaf(4))),
    "cholesky": (symmetric(cholesky), lambda: (spd(2, 3).requires_grad_(),)),
    "cholesky of one element": (symmetric(cholesky), lambda: (spd(1).requires_grad_(),)),
    "cholesky_ex": (symmetric(lambda A: cholesky_ex(A)[0]), lambda: (spd(3).requires_grad_(),)),
    "cholesky_solve": (
        lower(cholesky_solve),
        lambda: (leaf(2, 1, 3, 2), torch.linalg.cholesky(spd(4, 3)).requires_grad_()),
    ),
    "cholesky_solve, vector": (
        lower(cholesky_solve),
        lambda: (leaf(3), torch.linalg.cholesky(spd(3)).requires_grad_()),
    ),
    "solve_spd": (symmetric(solve_spd), lambda: (spd(2, 3).requires_grad_(), leaf(2, 3, 2))),
    "solve_spd, broadcasting": (symmetric(solve_spd), lambda: (spd(3).requires_grad_(), leaf(2, 3, 1))),
    "solve_spd_ex": (
        symmetric(lambda A, B: solve_spd_ex(A, B)[0]),
        lambda: (spd(2, 3).requires_grad_(), leaf(3, 1)),
    ),
}


@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
def test_other_functions_both_orders(name):
    function, inputs = OTHER_FUNCTIONS[name]
    check_first_order(function, inputs())
    check_second_order(function, inputs(), fast_mode=True)


@pytest.mark.parametrize("d", [34, 70])
def test_large_cholesky_both_orders(d):
    for function, inputs in [
        (symmetric(cholesky), (spd(d).requires_grad_(),)),
        (symmetric(solve_spd), (spd(d).requires_grad_(), leaf(d, 2))),
        (lower(cholesky_solve), (leaf(d, 2), torch.linalg.cholesky(spd(d)).requires_grad_())),
    ]:
        check_first_order(function, inputs, fast_mode=True)
        check_second_order(function, inputs, fast_mode=True)


# ---------------------------------------------------------------------------------------- against torch's own autograd


def assert_same_gradients(inputs, reference_inputs=None, **options):
    """First and second derivatives of solve_normal and the composite, along the same cotangents."""
    ours, theirs = leaves(inputs), leaves(inputs)
    W = solve_normal(ours[0], ours[1], weight=ours[2], ridge=0.0 if ours[3] is None else ours[3], **options)
    expected = composite(*theirs)
    torch.testing.assert_close(W, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(W)
    first = gradients(W, ours, cotangent, create_graph=True)
    first_expected = gradients(expected, theirs, cotangent, create_graph=True)
    torch.testing.assert_close(first, first_expected, rtol=1e-8, atol=1e-9)
    directions = [torch.randn_like(value) for value in first]
    second = gradients(first, ours, directions)
    second_expected = gradients(first_expected, theirs, directions)
    torch.testing.assert_close(second, second_expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize(
    ("n", "d", "k"),
    [(20, 1, 1), (20, 8, 3), (60, 40, 3), (300, 40, 1), (5, 8, 2), (6, 40, 2), (40, 32, 20), (5000, 8, 1)],
)
def test_agrees_with_composite(n, d, k, refine):
    assert_same_gradients(rows(n, d, k, batch=(3,)), refine=refine)


def test_without_weight_or_ridge():
    X, Y, *_ = rows(30, 8, 2, batch=(2,))
    assert_same_gradients((X, Y, None, None))


@pytest.mark.parametrize("d", [8, 40])
def test_no_rows(d):
    X, Y, weight, ridge = leaves(rows(0, d, 2, batch=(3,)))
    W = solve_normal(X, Y, weight=weight, ridge=ridge)
    grads = gradients(W, (X, Y, weight, ridge), torch.randn_like(W))
    assert [grad.shape for grad in grads] == [X.shape, Y.shape, weight.shape, ridge.shape]
    assert torch.equal(grads[3], torch.zeros_like(ridge))


@pytest.mark.parametrize("d", [8, 40])
def test_empty_batch(d):
    inputs = leaves(rows(10, d, 2, batch=(0,)))
    W = solve_normal(*inputs[:2], weight=inputs[2], ridge=inputs[3])
    grads = gradients(W, inputs, torch.ones_like(W))
    assert [grad.shape for grad in grads] == [value.shape for value in inputs]


@pytest.mark.parametrize("d", [8, 40])
def test_weights_with_zeros(d):
    X, Y, weight, ridge = rows(60, d, 2)
    weight[::3] = 0
    assert_same_gradients((X, Y, weight, ridge))


@pytest.mark.parametrize("d", [8, 40])
def test_zero_weight_has_the_gradient_of_the_row_it_hides(d):
    X, Y, weight, ridge = leaves(rows(50, d, 1))
    weight.data[7] = 0
    W = solve_normal(X, Y, weight=weight, ridge=ridge)
    grad_x, grad_y, grad_weight, _ = gradients(W, (X, Y, weight, ridge), torch.ones_like(W))
    assert grad_x[7].abs().max() == 0
    assert grad_y[7].abs().max() == 0
    assert grad_weight[7] != 0


@pytest.mark.parametrize("d", [8, 40])
def test_strided_inputs(d):
    X, Y, weight, ridge = rows(60, d, 2)
    base = leaves([torch.randn(2 * 60, d + 3, dtype=F64).T.contiguous().T])[0]
    base.data[::2, 1 : d + 1] = X
    plain = leaves([X])[0]
    W = solve_normal(base[::2, 1 : d + 1], Y, weight=weight, ridge=ridge)
    expected = composite(plain, Y, weight, ridge)
    cotangent = torch.randn_like(W)
    (grad,) = torch.autograd.grad(W, base, cotangent)
    (expected_grad,) = torch.autograd.grad(expected, plain, cotangent)
    torch.testing.assert_close(grad[::2, 1 : d + 1], expected_grad, rtol=1e-8, atol=1e-9)
    assert grad.sum().sub(grad[::2, 1 : d + 1].sum()).abs() < 1e-9


@pytest.mark.parametrize("d", [8, 40])
def test_expanded_inputs_sum_their_gradients(d):
    X, _, weight, ridge = rows(50, d, 2)
    inputs = leaves((X, torch.randn(4, 50, 2, dtype=F64), weight, ridge))
    expanded = [
        inputs[0].expand(4, 50, d),
        inputs[1],
        inputs[2].expand(4, 50),
        inputs[3].expand(4, d),
    ]
    W = solve_normal(expanded[0], expanded[1], weight=expanded[2], ridge=expanded[3])
    implicit = solve_normal(inputs[0], inputs[1], weight=inputs[2], ridge=inputs[3])
    expected = composite(*inputs)
    cotangent = torch.randn_like(W)
    expected_grads = gradients(expected, inputs, cotangent)
    torch.testing.assert_close(gradients(W, inputs, cotangent), expected_grads, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(gradients(implicit, inputs, cotangent), expected_grads, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("d", [8, 40])
@pytest.mark.parametrize("alone", range(4))
def test_one_input_alone_requires_grad(alone, d):
    values = list(rows(50, d, 2, batch=(2,)))
    values[alone].requires_grad_()
    W = solve_normal(values[0], values[1], weight=values[2], ridge=values[3])
    expected = composite(*values)
    cotangent = torch.randn_like(W)
    (grad,) = torch.autograd.grad(W, values[alone], cotangent)
    (expected_grad,) = torch.autograd.grad(expected, values[alone], cotangent)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-9)


def test_inputs_that_share_a_tensor_accumulate():
    (table,) = leaves([torch.randn(30, 6, dtype=F64)])

    def total(solve):
        first = solve(table[:, :5], table[:, 5:])
        second = solve(table.flip(0)[:, 1:], table[:, :2])
        return first.square().sum() + second.sin().sum()

    total(solve_normal).backward()
    total(solve_normal).backward()
    (expected,) = torch.autograd.grad(total(composite), table)
    torch.testing.assert_close(table.grad, 2 * expected, rtol=1e-9, atol=1e-9)


def test_input_changed_after_the_call_is_noticed():
    X, Y, *_ = rows(10, 3, 1)
    scaled = leaves([X])[0] * 2
    W = solve_normal(scaled, Y)
    scaled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        W.sum().backward()


def test_checkpointing():
    inputs = leaves(rows(10, 3, 1))

    def loss(X, Y, weight, ridge):
        return solve_normal(X, Y, weight=weight, ridge=ridge).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    again = torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(again, inputs), expected))


@pytest.mark.parametrize(("n", "d"), [(12, 4), (3, 35)])
def test_third_order(n, d):
    def third(solve, inputs):
        """A scalar, three times differentiated along fixed directions."""
        directions = [torch.linspace(-1, 1, value.numel(), dtype=F64).reshape(value.shape) for value in inputs]
        value = solve(*inputs).square().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum((grad * direction).sum() for grad, direction in zip(grads, directions, strict=True))
        return value

    inputs = rows(n, d, 2)
    ours = third(lambda X, Y, weight, ridge: solve_normal(X, Y, weight=weight, ridge=ridge), leaves(inputs))
    torch.testing.assert_close(ours, third(composite, leaves(inputs)), rtol=1e-8, atol=0)


# ------------------------------------------------------------------------------------------------- precision and dtypes


def gradient_errors(n, d, spread):
    """Errors of the fp32 gradients, ours and the composite's, against fp64, in Frobenius norm; one an input."""
    X, Y, weight, ridge = rows(n, d, 2, batch=(16,))
    inputs = [value.float() for value in (X * torch.logspace(0, -spread, d, dtype=F64), Y, weight, ridge * 1e-2)]
    cotangent = torch.randn(16, d, 2)
    exact = leaves(inputs)
    expected = gradients(composite(*exact), exact, cotangent.double())

    def errors(solve):
        values = leaves(inputs, torch.float32)
        grads = gradients(solve(*values), values, cotangent)
        return [(grad - right).norm() / right.norm() for grad, right in zip(grads, expected, strict=True)]

    return errors(lambda X, Y, weight, ridge: solve_normal(X, Y, weight=weight, ridge=ridge)), errors(composite)


@pytest.mark.parametrize("spread", [0, 1.5])
@pytest.mark.parametrize(("n", "d"), [(200, 8), (200, 24), (200, 40)])
def test_float32_gradients_are_as_good_as_the_composite(n, d, spread):
    ours, theirs = gradient_errors(n, d, spread)
    for our_error, their_error in zip(ours, theirs, strict=True):
        assert our_error <= 2 * their_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_get_gradients_in_their_dtype(dtype):
    X, Y, weight, ridge = (value.to(dtype).requires_grad_() for value in rows(20, 4, 1))
    W = solve_normal(X, Y, weight=weight, ridge=ridge)
    assert W.dtype == torch.float32
    W.sum().backward()
    exact = leaves((X, Y, weight, ridge))
    composite(*exact).sum().backward()
    for ours, theirs in zip((X, Y, weight, ridge), exact, strict=True):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-2, atol=2e-2)
