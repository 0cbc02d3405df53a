"""Derivatives where problems fail: zeros there, and their neighbours as if they were alone."""

import pytest
import torch
import torch.utils.checkpoint
from derivative_cases import F64, composite, gradients, leaves, rows, spd
from torch.autograd import forward_ad

from onestep.linalg import (
    cholesky_ex,
    solve_normal_ex,
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


# ------------------------------------------------------------------------------------------------------ failed problems

GOOD, BAD = [0, 2, 4], [1, 3]


def partly_failed(n, d):
    """Five problems: 1 has a column of zeros and no ridge, 3 holds a NaN."""
    X, Y, weight, ridge = rows(n, d, 2, batch=(5,))
    X[1, :, 0] = 0
    ridge[1] = 0
    X[3, 1, d - 1] = torch.nan
    return X, Y, weight, ridge


def solve_ex(X, Y, weight, ridge):
    return solve_normal_ex(X, Y, weight=weight, ridge=ridge).solution


@pytest.mark.parametrize("cotangent_of_failed", [1.0, torch.nan, torch.inf])
@pytest.mark.parametrize(("n", "d"), [(20, 8), (60, 40)])
def test_failed_problems_have_zero_gradients(n, d, cotangent_of_failed):
    inputs = leaves(partly_failed(n, d))
    W = solve_ex(*inputs)
    assert W[BAD].isnan().all()
    cotangent = torch.randn_like(W)
    cotangent[BAD] = cotangent_of_failed
    grads = gradients(W, inputs, cotangent)
    alone = leaves([value[GOOD] for value in inputs])
    expected = gradients(solve_ex(*alone), alone, cotangent[GOOD])
    for grad, wanted in zip(grads, expected, strict=True):
        assert torch.equal(grad[BAD], torch.zeros_like(grad[BAD]))
        torch.testing.assert_close(grad[GOOD], wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("n", "d"), [(20, 8), (60, 40)])
def test_failed_problems_leave_their_neighbours_gradients_bitwise_alone(n, d):
    X, Y, weight, ridge = partly_failed(n, d)
    healthy = [value.clone() for value in (X, Y, weight, ridge)]
    healthy[0][BAD] = torch.randn(2, n, d, dtype=F64)
    broken, whole = leaves((X, Y, weight, ridge)), leaves(healthy)
    cotangent = torch.randn(5, d, 2, dtype=F64)
    grads = gradients(solve_ex(*broken), broken, cotangent)
    for grad, wanted in zip(grads, gradients(solve_ex(*whole), whole, cotangent), strict=True):
        assert torch.equal(grad[GOOD], wanted[GOOD])


@pytest.mark.parametrize(("n", "d"), [(20, 8), (60, 40)])
def test_failed_problems_in_double_backward(n, d):
    def second(inputs):
        W = solve_ex(*inputs)
        cotangent = torch.ones_like(W).requires_grad_()
        grads = gradients(W, inputs, cotangent, create_graph=True)
        return gradients(grads, [*inputs, cotangent], [torch.ones_like(grad) for grad in grads])

    inputs = leaves(partly_failed(n, d))
    expected = second(leaves([value[GOOD] for value in inputs]))
    for grad, wanted in zip(second(inputs), expected, strict=True):
        assert torch.equal(grad[BAD], torch.zeros_like(grad[BAD]))
        torch.testing.assert_close(grad[GOOD], wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("n", "d"), [(20, 8), (60, 40)])
def test_failed_problems_in_forward_mode(n, d):
    inputs = partly_failed(n, d)
    tangents = [torch.randn_like(value) for value in inputs]

    def tangent(values, directions):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(values, directions, strict=True)]
            return forward_ad.unpack_dual(solve_ex(*duals)).tangent

    whole = tangent(inputs, tangents)
    assert torch.equal(whole[BAD], torch.zeros_like(whole[BAD]))
    expected = tangent([value[GOOD] for value in inputs], [value[GOOD] for value in tangents])
    torch.testing.assert_close(whole[GOOD], expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["cholesky_ex", "solve_spd_ex"])
@pytest.mark.parametrize("d", [5, 40])
def test_failed_matrices_have_zero_derivatives(name, d):
    A = spd(5, d)
    A[1] = -A[1]
    A[3, 2, 1] = torch.nan
    B = torch.ones(d, 1, dtype=F64)

    def function(A):
        return cholesky_ex(A)[0] if name == "cholesky_ex" else solve_spd_ex(A, B)[0]

    def derivatives(A, direction):
        (A,) = leaves([A])
        out = function(A)
        cotangent = torch.ones_like(out).requires_grad_()
        (first,) = torch.autograd.grad(out, A, cotangent, create_graph=True)
        second = torch.autograd.grad(first, (A, cotangent), direction)
        with forward_ad.dual_level():
            forward = forward_ad.unpack_dual(function(forward_ad.make_dual(A.detach(), direction))).tangent
        return (first.detach(), *second, forward)

    direction = torch.randn_like(A)
    for ours, wanted in zip(derivatives(A, direction), derivatives(A[GOOD], direction[GOOD]), strict=True):
        assert torch.equal(ours[BAD], torch.zeros_like(ours[BAD]))
        torch.testing.assert_close(ours[GOOD], wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("n", "d"), [(20, 8), (60, 40)])
def test_jitter_is_a_constant(n, d):
    X, Y, weight, _ = rows(n, d, 2, batch=(3,))
    X[1, :, 0] = 0
    X, Y, weight = leaves((X, Y, weight))
    solved = solve_normal_ex(X, Y, weight=weight, jitter=1e-3)
    assert solved.info.tolist() == [0, 0, 0]
    assert [added > 0 for added in solved.jitter.tolist()] == [False, True, False]
    expected = composite(X, Y, weight, solved.jitter.unsqueeze(-1).expand(3, d))
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        gradients(solved.solution, (X, Y, weight), cotangent),
        gradients(expected, (X, Y, weight), cotangent),
        rtol=1e-8,
        atol=1e-8,
    )


def test_status_outputs_have_no_gradient():
    X, Y, *_ = leaves(rows(10, 3, 1))
    solved = solve_normal_ex(X, Y)
    assert solved.solution.requires_grad
    assert not any(output.requires_grad for output in solved[1:])
    assert not cholesky_ex(spd(3).requires_grad_())[1].requires_grad
