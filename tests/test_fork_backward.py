"""Backward passes, of several orders, in a child that was forked after the parent used torch's threads.

The user starts them, but they run torch's operations that our functions have recorded: conversions of 16-bit tensors,
sums over what was broadcast, and the formulas of derivatives.
"""

import pytest
import torch
from forked import run_in_forked_child, use_threads

from onestep import _fork, linalg, nn
from onestep.curvature import ggnvp, glm, hvp
from onestep.functional import linear_cross_entropy, replace_attention, scaled_dot_product_attention

HALF, SINGLE = torch.bfloat16, torch.float32
torch.manual_seed(0)


def normal(*shape, dtype=HALF):
    return torch.randn(*shape).to(dtype)


def positive(*shape, dtype=HALF):
    return (torch.rand(*shape) + 0.5).to(dtype)


ROOT = torch.randn(190, 190)
SPD = ROOT @ ROOT.mT + 190 * torch.eye(190)
CLASSES, LABELS = torch.arange(1200) % 50, torch.rand(4000, 10).softmax(1)
ROWS = normal(4000, 40)
PROBABILITIES = torch.rand(1200, 300).softmax(1).to(HALF)
SEGMENTS = torch.tensor([0, 500, 1200])
TALL = normal(40_000, 2)
FIXED = normal(200, 200, dtype=SINGLE)
LAYER = nn.MultiheadAttention(64, 2, batch_first=True, dtype=HALF)
OF_TORCH = torch.nn.MultiheadAttention(64, 2, batch_first=True, dtype=HALF)
TRAINED = list(LAYER.parameters())


def replaced(query):
    with replace_attention():
        return OF_TORCH(query, query, query, need_weights=False)[0]


def hidden(weight):
    return (weight @ FIXED.to(weight.dtype)).tanh()


# What is differentiated, where, and how many times: 32,768 numbers are what torch shares between threads.
CASES = {
    "rows of 16 bits": (lambda X: linalg.gram(X)[0], [normal(1200, 30)], 2),
    "a weight of 16 bits": (lambda w: linalg.gram(TALL, weight=w)[0], [positive(40_000)], 2),
    "targets of 16 bits": (
        lambda X, Y: linalg.solve_normal(X, Y, ridge=1.0),
        [normal(1200, 30, dtype=torch.float16), normal(1200, 30, dtype=torch.float16)],
        2,
    ),
    "rows of 32 bits": (lambda X: linalg.gram(X)[0], [normal(1200, 30, dtype=SINGLE)], 3),
    "broadcast rows": (
        lambda X, Y: linalg.solve_normal(X, Y, ridge=1.0),
        [normal(1200, 30, dtype=SINGLE), normal(2, 1200, 3, dtype=SINGLE)],
        2,
    ),
    "segments": (
        lambda X, Y: linalg.solve_normal_segments(X, Y, SEGMENTS, ridge=1.0),
        [normal(1200, 30), normal(1200, 3)],
        2,
    ),
    "cholesky": (linalg.cholesky, [SPD.to(HALF)], 2),
    "inverse_cholesky": (lambda A: linalg.inverse_cholesky(A).U, [SPD], 2),
    "attention": (
        scaled_dot_product_attention,
        [normal(2, 300, 64), normal(1, 300, 64), normal(2, 300, 64)],
        2,
    ),
    "a mask": (
        lambda q, mask: scaled_dot_product_attention(q, q, q, mask),
        [normal(200, 8, dtype=torch.float64), normal(200, 200, dtype=SINGLE)],
        2,
    ),
    "classes": (lambda h, w: linear_cross_entropy(h, w, CLASSES), [normal(1200, 64), normal(300, 64)], 2),
    "probabilities": (
        lambda h, w: linear_cross_entropy(h, w, PROBABILITIES),
        [normal(1200, 64), normal(300, 64)],
        2,
    ),
    "MultiheadAttention": (
        lambda x, *trained: LAYER(x, x, x, need_weights=False)[0],
        [normal(2, 300, 64), *TRAINED],
        2,
    ),
    "replace_attention": (replaced, [normal(2, 300, 64)], 2),
    "glm": (
        lambda W, V: glm(ROWS, LABELS, W, "softmax").hvp(V),
        [normal(40, 10, dtype=SINGLE), normal(100, 40, 10, dtype=SINGLE)],
        2,
    ),
    "hvp": (lambda w: hvp(lambda p: hidden(p).square().sum(), w, w), [normal(200, 200)], 1),
    "ggnvp": (lambda w: ggnvp(hidden, lambda z: z.square().sum(), w, w), [normal(200, 200)], 2),
    "an op": (lambda X: torch.ops.onestep.gram(X, FIXED[:150, :0], None)[0], [normal(150, 230)], 3),
}


def numbers(*tensors):
    """What the test itself does by torch would hang, too."""
    with _fork.one_thread_after_fork():
        return torch.cat([tensor.reshape(-1).double() for tensor in tensors]).numpy()


def gradients(function, inputs, order, cotangents):
    """The gradients of the last order of ⟨the gradients of the order before, their cotangent⟩."""
    outputs, inputs = function(*inputs), list(inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    for number in range(order):
        if len(cotangents) == number:
            cotangents.append([torch.ones_like(output).requires_grad_() for output in outputs])
        found = torch.autograd.grad(
            outputs, inputs, cotangents[number], create_graph=number < order - 1, allow_unused=True
        )
        inputs += cotangents[number]
        outputs = [gradient for gradient in found if gradient is not None and gradient.requires_grad]
    return numbers(*(gradient for gradient in found if gradient is not None))


def jobs():
    def job(function, inputs, order):
        leaves = [value if value.requires_grad else value.detach().clone().requires_grad_() for value in inputs]
        cotangents = []
        return lambda: gradients(function, leaves, order, cotangents)

    return {
        f"{name}, order {order}": job(function, inputs, order)
        for name, (function, inputs, most) in CASES.items()
        for order in range(1, most + 1)
    }


def pulled_back_twice():
    """By torch.func, whose transforms have levels of their own."""
    X, cotangent, V = OPERANDS

    def gradient(rows):
        return torch.func.vjp(lambda X: linalg.gram(X)[0], rows)[1](cotangent)[0]

    return numbers(torch.func.vjp(gradient, X)[1](V)[0])


def added_up():
    """The engine adds 16-bit gradients."""
    LEAF.grad = None
    for _ in range(2):
        linalg.gram(LEAF)[0].sum().backward()
    return numbers(LEAF.grad)


OPERANDS = normal(1200, 30), normal(30, 30, dtype=SINGLE), normal(1200, 30)
LEAF = normal(1200, 30).requires_grad_()


def test_forked_child(restore_threads):
    use_threads()
    run_in_forked_child({**jobs(), "torch.func": pulled_back_twice, "sums": added_up}, rtol=2e-2, atol=1e-3)


class Threads:
    """A node that notes on how many threads torch is while a backward pass goes through it."""

    def __init__(self):
        self.seen = []

    def __call__(self, tensor):
        tensor.register_hook(lambda gradient: self.seen.append(torch.get_num_threads()))
        return tensor


@pytest.fixture
def as_if_forked(monkeypatch, restore_threads):
    torch.set_num_threads(2)
    monkeypatch.setattr(_fork, "_forked", True)


def test_threads_come_back_after_the_pass(as_if_forked):
    x, before, after = torch.ones(5, 2, requires_grad=True), Threads(), Threads()
    out = after(linalg.gram(before(x * 1.0))[0] * 1.0)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert (after.seen, before.seen, torch.get_num_threads()) == ([2, 2], [1, 1], 2)
    assert not _fork._passes


def test_threads_come_back_after_a_pass_that_fails(as_if_forked):
    def fail(gradient):
        assert torch.get_num_threads() == 1
        raise ValueError("a hook of the user's")

    x = torch.ones(5, 2, requires_grad=True) * 1.0
    x.register_hook(fail)
    with pytest.raises(ValueError, match="a hook"):
        linalg.gram(x)[0].sum().backward()
    assert torch.get_num_threads() == 2 and not _fork._passes


def test_a_pass_inside_a_pass(as_if_forked):
    """The inner one ends first, and the outer one stays on one thread."""
    seen = []

    def inner(gradient):
        with torch.enable_grad():
            linalg.gram(torch.ones(4, 2, requires_grad=True))[0].sum().backward()
        seen.append(torch.get_num_threads())

    x = torch.ones(5, 2, requires_grad=True) * 1.0
    x.register_hook(inner)
    linalg.gram(x)[0].sum().backward()
    assert seen == [1] and torch.get_num_threads() == 2


def test_results_may_be_written_over(as_if_forked):
    x = torch.ones(5, 2, requires_grad=True)
    products = linalg.gram(x)[0]
    products += 1
    products.mul_(3).sum().backward()
    assert x.grad.tolist() == [[12.0, 12.0]] * 5


def test_nothing_is_recorded_outside_a_fork():
    x = torch.ones(5, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(linalg.gram(x)[0].sum(), x, create_graph=True)
    names, nodes = set(), [gradient.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [below for below, _ in node.next_functions if below is not None]
    assert "ViewBackward0" not in names and "AliasBackward0" not in names
