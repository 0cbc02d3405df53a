"""The ``onestep`` operator library: how kernels become ``torch.ops.onestep.*``.

An op is a schema, a fake (shapes only, for torch.compile), a vmap rule, one kernel per device and, in most cases,
derivatives. ``define`` makes an ``Op`` of a schema (``ops/<family>/schema.py``), ``register`` gives it the kernel of
one device (``cpu.py``, ``cuda.py``), and ``ops/_derivatives.py`` attaches derivatives (``derivatives.py``). When all
families are imported, ``install_kernels`` hands the kernels to torch's dispatcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from onestep._torch_private import (
    any_requires_grad,
    below_autograd,
    dispatch_modes,
    forward_level,
    is_unwritten_zero,
    transforms_active,
)
from onestep.ops import _cuda

LIBRARY = torch.library.Library("onestep", "DEF")

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

# Device types that an op may have kernels for, with their dispatch keys.
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# Device types of torch on which an op without a kernel says so itself; the dispatcher's own message does not help.
# "privateuseone" stands for all backends of other packages, which give it a name of their own.
_OTHER_KEYS = {
    "mps": "MPS",
    "xpu": "XPU",
    "hpu": "HPU",
    "mtia": "MTIA",
    "xla": "XLA",
    "privateuseone": "PrivateUse1",
}


class Op:
    """One op. Calling it calls its kernel for the operands' device.

    ``op(*args)`` is ``torch.ops.onestep.<name>(*args)``, past torch's dispatcher where the dispatcher would only find
    the kernel: no derivative is recorded, and no transform, mode, tensor subclass or tracing wants to see the call.
    That saves about 20 µs, which is more than a small problem takes. ``op.dispatched(*args)`` always goes through the
    dispatcher; derivative formulas and compositions use it. ``op.below_autograd(*args)`` is for Autograd kernels.

    Attributes:
        name: the op's name, without the namespace.
        dispatched: ``torch.ops.onestep.<name>.default``.
        kernels: device type → kernel.
    """

    __slots__ = ("dispatched", "kernels", "name")

    def __init__(self, name: str, dispatched: Any) -> None:
        self.name = name
        self.dispatched: Callable[..., Any] = dispatched
        self.kernels: dict[str, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or records_derivatives(args):
            return self.dispatched(*args)
        return self._found(args)(*args)

    def below_autograd(self, *args: Any) -> Any:
        """The op without its Autograd kernel, which calls this where it has nothing to record, or has recorded it."""
        with below_autograd():
            return (self.dispatched if transforms_active() else self._found(args))(*args)

    def require(self, device: str) -> None:
        """Raises NotImplementedError, with the remedy, if there is no kernel for a device type."""
        if device not in self.kernels:
            _raise_without_kernel(self, device)

    def _found(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """What the dispatcher would call for these arguments, or the dispatcher, where something else wants the call.

        That is a mode, a tensor subclass, or a tensor whose negation or zeros torch has not written yet.
        """
        device = None
        for arg in args:
            kind = type(arg)
            if kind is Tensor or kind is Parameter:
                of_arg = "cpu" if arg.is_cpu else "cuda" if arg.is_cuda else "other"
                if (device is not None and device != of_arg) or arg.is_neg() or is_unwritten_zero(arg):
                    return self.dispatched
                device = of_arg
            elif kind not in _NO_TENSORS and isinstance(arg, Tensor):
                return self.dispatched
        return self.dispatched if device is None or dispatch_modes() else self.kernels.get(device, self.dispatched)


# Types of most plain arguments: asked for before Tensor, since isinstance takes 0.1 µs there.
_NO_TENSORS = frozenset((type(None), bool, int, float))

_OPS: dict[str, Op] = {}


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    own_dims: Sequence[int] | None = None,
    first_has_batch: bool = False,
    vmap: Callable[..., Any] | None = None,
) -> Op:
    """Defines one op.

    Args:
        schema: the op's schema, tensors first, then plain values.
        fake: what a kernel does, on shapes alone: checks the operands and returns empty results.
        own_dims: for each tensor argument, how many trailing dimensions are not batch dimensions. None: the op has no
            batch dimensions, and vmap calls it once per element.
        first_has_batch: the results have no batch dimensions but the first argument's, or may have none but those, so
            vmap over other arguments repeats the first one (a view).
        vmap: a rule of its own, as ``torch.library.register_vmap`` takes it.
    """
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    torch.library.register_fake(f"onestep::{name}", fake, lib=LIBRARY)
    op = _OPS[name] = Op(name, getattr(torch.ops.onestep, name).default)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if own_dims is None:
            return _loop_over_batch(op, fake, info.batch_size, in_dims, args)
        if first_has_batch and in_dims[0] is None:
            args = (args[0].expand(info.batch_size, *args[0].shape), *args[1:])
            in_dims = (0, *in_dims[1:])
        result = call_batched(op, args, in_dims, own_dims)
        return result, (0,) * len(result) if isinstance(result, tuple) else 0

    torch.library.register_vmap(f"onestep::{name}", vmap or rule, lib=LIBRARY)
    return op


def register(op: Op, *, device: str) -> Callable[[Kernel], Kernel]:
    """Decorates the op's kernel for a device type: allocate the results, call the native entry, return the results.

    The kernel gets the op's arguments by position; trailing ones that have their defaults may be missing. Where a
    composition of torch's ops is all that a device needs, that is registered in the same way.
    """
    assert device in _KEYS, device

    def decorate(kernel: Kernel) -> Kernel:
        assert device not in op.kernels, f"onestep::{op.name} has two kernels for {device}"
        op.kernels[device] = kernel
        return kernel

    return decorate


def install_kernels() -> None:
    """Hands every op's kernels to torch's dispatcher; on a device without a kernel the op raises.

    In emulation an op's CUDA implementation takes the place of its CPU kernel.
    """
    for op in _OPS.values():
        if _cuda.EMULATED and "cuda" in op.kernels:
            op.kernels["cpu"] = op.kernels.pop("cuda")
        for device, key in (_KEYS | _OTHER_KEYS).items():
            kernel = op.kernels.get(device, functools.partial(_raise_without_kernel, op, device))
            LIBRARY.impl(op.name, kernel, key)


def _raise_without_kernel(op: Op, device: str, *args: Any) -> None:
    """Raises NotImplementedError for a type of device that the op has no kernel for, named as the operands name it."""
    device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), device)
    remedy = "move the operands to the CPU with .cpu()"
    if device != "cuda":
        reason = f"onestep has kernels for {' and '.join(_KEYS)}"
    elif _cuda.native is None:
        reason = f"this build's CUDA kernels: {_cuda.status}"
        remedy += ", or, in onestep's sources, pip install . --config-settings=cmake.define.ONESTEP_CUDA=ON"
    else:
        reason = "it has a CPU kernel alone"
    raise NotImplementedError(f"onestep::{op.name} has no kernel for {device} tensors ({reason}): {remedy}")


def _loop_over_batch(
    op: Op, fake: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """vmap of an op without batch dimensions, one call after the other."""

    def element(index: int | None) -> list[Any]:
        """The arguments of one call; of a batch of none, tensors of the shapes that they would have."""

        def part(arg: Tensor, dim: int) -> Tensor:
            return arg.new_empty(arg.movedim(dim, 0).shape[1:]) if index is None else arg.select(dim, index)

        return [
            part(arg, dim) if isinstance(arg, Tensor) and dim is not None else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]

    if size == 0:
        one = fake(*element(None))
        none = tuple(result.new_empty((0, *result.shape)) for result in ((one,) if isinstance(one, Tensor) else one))
        return (none[0], 0) if isinstance(one, Tensor) else (none, (0,) * len(none))
    results = [op.dispatched(*element(index)) for index in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def call_batched(op: Op, args: tuple[Any, ...], in_dims: tuple[int | None, ...], own_dims: Sequence[int]) -> Any:
    """The op with the mapped dimension as its first batch dimension, which the results get."""
    return op.dispatched(*_align_batches(args, in_dims, own_dims))


def _align_batches(args: tuple[Any, ...], in_dims: tuple[int | None, ...], own_dims: Sequence[int]) -> list[Any]:
    """Puts the mapped dimension in front of every mapped tensor's batch dimensions, which all get the same number."""

    def batch_dims(arg: Tensor, in_dim: int | None, own: int) -> int:
        return arg.dim() - own - (in_dim is not None)

    tensors = [
        (arg, in_dim, own) for arg, in_dim, own in zip(args, in_dims, own_dims, strict=False) if isinstance(arg, Tensor)
    ]
    most = max(batch_dims(*entry) for entry in tensors)
    moved: list[Any] = list(args)
    for index, (arg, in_dim, own) in enumerate(zip(args, in_dims, own_dims, strict=False)):
        if isinstance(arg, Tensor) and in_dim is not None:
            front = arg.movedim(in_dim, 0)
            missing = most - batch_dims(arg, in_dim, own)
            moved[index] = front.reshape(front.shape[:1] + (1,) * missing + front.shape[1:])
    return moved


def records_derivatives(args: tuple[Any, ...]) -> bool:
    """Whether eager autograd, a forward-mode level or a torch.func transform may want a derivative of this call.

    Args:
        args: the arguments of an op, tensors and plain values.

    Returns:
        True where a transform or forward-mode level is active, or grad mode is on and a tensor requires a gradient.

    Raises:
        TypeError: ``args`` cannot be iterated over.

    Examples:
        >>> import torch
        >>> from onestep.ops import records_derivatives
        >>> records_derivatives((torch.ones(2),)), records_derivatives((torch.ones(2, requires_grad=True), 1.0))
        (False, True)
    """
    if transforms_active() or forward_level() >= 0:
        return True
    return torch.is_grad_enabled() and any_requires_grad(*args)
