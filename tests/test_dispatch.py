"""Calls of ``torch.ops.onestep``: who sees them on their way to the kernel, where no derivative is recorded."""

import pytest
import torch
from processes import Child
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from onestep.ops._library import _OPS

CALLS = ["gram", "solve_normal", "solve_normal_ex", "solve_spd"]


def operands(name):
    """The op and two operands."""
    torch.manual_seed(0)
    X = torch.randn(3, 9, 4, dtype=torch.float64)
    first = X.mT @ X + torch.eye(4, dtype=torch.float64) if name == "solve_spd" else X
    return getattr(torch.ops.onestep, name), first, torch.randn(3, first.shape[-2], 2, dtype=torch.float64)


class Wrapped(torch.Tensor):
    """A tensor in a tensor; counts the ops of ours that it sees."""

    seen = 0

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen += func.namespace == "onestep"
        return func(*tree_map_only(cls, lambda wrapped: wrapped.inner, args), **(kwargs or {}))


class Count(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func.namespace == "onestep"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_the_dispatcher_is_passed_once(name, requires_grad):
    op, A, B = operands(name)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op(A.requires_grad_(requires_grad), B)
    assert sum(event.count for event in profile.key_averages() if event.key == f"onestep::{name}") == 1


@pytest.mark.parametrize("name", CALLS)
def test_modes_and_wrappers_see_a_call(name):
    op, A, B = operands(name)
    expected = op(A, B)
    mode = Count()
    with mode:
        seen_by_mode = op(A, B)
    before = Wrapped.seen
    seen_by_wrapper = op(Wrapped(A), B)
    assert mode.seen == 1
    assert Wrapped.seen == before + 1
    for one, other, third in zip(expected, seen_by_mode, seen_by_wrapper, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@pytest.mark.parametrize("name", CALLS)
def test_signs_and_zeros_are_written_before_the_kernel_reads(name):
    op, A, B = operands(name)
    negated = torch.complex(torch.zeros_like(B), -B).conj().imag
    zeros = torch._efficientzerotensor(B.shape, dtype=B.dtype)
    assert negated.is_neg()
    assert torch.equal(op(A, negated)[0], op(A, B)[0])
    assert torch.equal(op(A, zeros)[0], op(A, torch.zeros_like(B))[0])
    assert torch.equal(op(A, zeros)[1], op(A, torch.zeros_like(B))[1])
    public = _OPS[name]
    assert torch.equal(public(A, zeros)[1], op(A, zeros)[1])


def test_no_gradient_leaves_the_kernel_where_none_is_wanted():
    op, A, B = operands("solve_normal_ex")
    with torch.no_grad():
        assert not any(result.requires_grad for result in op(A.requires_grad_(), B))
    recorded = op(A, B)[0]
    recorded.sum().backward()
    assert recorded.requires_grad
    assert A.grad is not None


@pytest.mark.parametrize(("device", "key"), [("xla", "XLA"), ("mps", "MPS"), ("xpu", "XPU"), ("mtia", "MTIA")])
@pytest.mark.parametrize("name", ["gram", "attention", "polar", "sparse_multiply"])
def test_devices_without_kernels_are_told(name, device, key):
    """By the op, with the device's name and the remedy; torch's own message has neither."""
    op = _OPS[name]
    with FakeTensorMode():
        x = torch.empty(3, 2, device=device)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    values = {"Tensor": x, "int": 1, "float": 1.0, "bool": False, "SymInt": 1}
    arguments = [values.get(str(argument.type)) for argument in op.dispatched._schema.arguments]
    message = (
        rf"onestep::{name} has no kernel for {device} tensors \(onestep has kernels for cpu and cuda\): move .*cpu"
    )
    with pytest.raises(NotImplementedError, match=message):
        op.dispatched.redispatch(keys, *arguments)


def test_devices_of_other_packages_are_told_by_their_own_names():
    """A backend that torch does not know is a key of its own, under the name that its package gave it."""
    finished = Child("""if True:
        import torch
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
        from onestep.linalg import gram, solve_normal

        _setup_privateuseone_for_python_backend("abacus")
        X = torch._C._acc.create_empty_tensor((3, 2), torch.float32)
        recorded = torch._C._acc.create_empty_tensor((3, 2), torch.float32).requires_grad_()
        for call in (lambda: gram(X, X), lambda: solve_normal(X, X), lambda: gram(recorded, X)):
            try:
                call()
            except NotImplementedError as error:
                print(error)
    """).finish()
    reason = "has no kernel for abacus tensors (onestep has kernels for cpu and cuda): move the operands to the CPU"
    assert finished.returncode == 0, finished.errors
    assert [line.partition(" with")[0] for line in finished.output.splitlines()] == [
        f"onestep::{name} {reason}" for name in ("gram", "solve_normal", "gram")
    ]
