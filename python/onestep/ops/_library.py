"""The ``onestep`` operator library: how kernels become ``torch.ops.onestep.*``.

An op is a schema, a CPU kernel, a fake (shapes only, for torch.compile), a vmap rule and, in most cases, derivatives.
Derivatives are attached at the op's Autograd key, so that a bare ``torch.ops.onestep.*`` call is differentiable in
eager autograd, forward mode, every ``torch.func`` transform and torch.compile alike, or raises; see
CONTRIBUTING.md, Decisions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import (
    get_single_level_autograd_function_allowed,
    set_single_level_autograd_function_allowed,
)
from torch.autograd.function import _SingleLevelFunction

LIBRARY = torch.library.Library("onestep", "DEF")

_CPU_KERNELS: dict[str, Callable[..., Any]] = {}


def define(
    schema: str,
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    own_dims: Sequence[int] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> None:
    """Defines one op.

    Args:
        schema: the op's schema, named parameters first tensors, then plain values.
        cpu: its CPU kernel.
        fake: the same on shapes alone.
        own_dims: for each tensor argument, how many trailing dimensions are not batch dimensions. None: the op has no
            batch dimensions, and vmap calls it once per element.
        vmap: a rule of its own, as ``torch.library.register_vmap`` takes it.
    """
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _CPU_KERNELS[name] = cpu
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"onestep::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.onestep, name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if own_dims is None:
            return _loop_over_batch(op, info.batch_size, in_dims, args)
        result = call_batched(op, args, in_dims, own_dims)
        return result, (0,) * len(result) if isinstance(result, tuple) else 0

    torch.library.register_vmap(f"onestep::{name}", vmap or rule, lib=LIBRARY)


def _loop_over_batch(op: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap of an op with several results, one call after the other."""

    def element(index: int) -> list[Any]:
        return [
            arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]

    results = zip(*(op(*element(index)) for index in range(size)), strict=True)
    stacked = tuple(torch.stack(result) for result in results)
    return stacked, (0,) * len(stacked)


def call_batched(op: Any, args: tuple[Any, ...], in_dims: tuple[int | None, ...], own_dims: Sequence[int]) -> Any:
    """The op with the mapped dimension as its first batch dimension, which the results get."""
    return op(*_align_batches(args, in_dims, own_dims))


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
    """Whether eager autograd, a forward-mode level or a torch.func transform may want a derivative of this call."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def carries_tangents(args: tuple[Any, ...]) -> bool:
    """Whether an Autograd kernel's argument has a tangent at the level that is being computed.

    The tensors are asked: graphs of torch.compile enter forward-mode levels that forward_ad does not know of.
    """
    if not torch._C._is_fwd_grad_enabled():
        return False
    return any(isinstance(arg, Tensor) and _unpack_dual(arg, level=0)[1] is not None for arg in args)


# A third of the time of forward_ad.unpack_dual.
_unpack_dual = torch._VF._unpack_dual
_make_dual = torch._VF._make_dual


def _in_legacy_vmap() -> bool:
    """Whether this is in the vmap of gradcheck and torch.autograd.functional, which has no rule for _make_dual."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_LEGACY_VMAP_MODE)


# Not among the names of torch._C.DispatchKey.
_LEGACY_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def call(name: str, *args: Any) -> Any:
    """``torch.ops.onestep.<name>(*args)``, past the dispatcher where it would do nothing but find the CPU kernel.

    That saves about 20 µs of a call, which is more than a small problem takes.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() != 0 or records_derivatives(args):
        return getattr(torch.ops.onestep, name).default(*args)
    for arg in args:
        if isinstance(arg, Tensor) and not (arg.is_cpu and type(arg) in _PLAIN and not arg.is_neg()):
            return getattr(torch.ops.onestep, name).default(*args)
    return _CPU_KERNELS[name](*args)


_PLAIN = (Tensor, torch.nn.Parameter)


# The derivative modes (reverse, forward) of the op call that this thread is in.
_modes = threading.local()


class OpFunction(_SingleLevelFunction):
    """Derivatives of one op: a subclass names the op and has ``setup_context``, ``backward`` and ``jvp``.

    It is a single-level autograd.Function, applied inside the op's Autograd kernel: torch.func calls that kernel once
    per transform level, with the tensors of that level, exactly as it does for torch's own ops. ``backward`` and
    ``jvp`` are written in differentiable ops, which gives derivatives of every order.
    """

    op: ClassVar[Any]

    # What runs instead, in differentiable ops, where an argument carries a tangent; None: ``jvp`` has the derivative.
    forward_composite: ClassVar[Callable[..., Any] | None] = None

    # (arguments, their tangents or None) → (results, their tangents or None) in one op; what runs instead of the op and
    # ``jvp`` where no gradient of this level is recorded. None: there is no such op.
    forward_and_jvp: ClassVar[Callable[..., tuple[Any, Any]] | None] = None

    @classmethod
    def call(cls, *args: Any) -> Any:
        """The op's Autograd kernel, which torch.func calls at every level, most of which want no derivative of it."""
        reverse = torch.is_grad_enabled()
        recorded = reverse and torch._C._any_requires_grad(*args)
        if not recorded or cls.forward_composite is not None:
            if not carries_tangents(args):
                if not recorded:
                    with torch._C._AutoDispatchBelowAutograd():
                        return cls.op(*args)
            elif cls.forward_composite is not None:
                return cls.forward_composite(*args)
            elif cls.forward_and_jvp is not None and not _in_legacy_vmap():
                return cls.call_dual(*args)
        outer = getattr(_modes, "value", None)
        _modes.value = reverse, torch._C._is_fwd_grad_enabled()
        allowed = get_single_level_autograd_function_allowed()
        set_single_level_autograd_function_allowed(True)
        try:
            return cls.apply(*args)  # type: ignore[attr-defined]
        finally:
            set_single_level_autograd_function_allowed(allowed)
            _modes.value = outer

    @classmethod
    def call_dual(cls, *args: Any) -> Any:
        """``forward_and_jvp`` of dual numbers; its op is one for the other levels, which may want derivatives of it."""
        assert cls.forward_and_jvp is not None
        duals = [_unpack_dual(arg, level=0) if isinstance(arg, Tensor) else (arg, None) for arg in args]
        with torch._C._AutoDispatchBelowAutograd():
            results, tangents = cls.forward_and_jvp(
                tuple(primal for primal, _ in duals), tuple(tangent for _, tangent in duals)
            )
        return tuple(
            result if tangent is None else _make_dual(result, tangent, level=0)
            for result, tangent in zip(results, tangents, strict=True)
        )

    @classmethod
    def run_below(cls, *args: Any) -> Any:
        """The op for the next transform level, or its kernel if this was the last."""
        # A Function switches both derivative modes off for its forward; the outer levels need the caller's.
        reverse, forward = _modes.value
        torch._C._set_grad_enabled(reverse)
        torch._C._set_fwd_grad_enabled(forward)
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return cls.op(*args)
        finally:
            torch._C._set_grad_enabled(False)
            torch._C._set_fwd_grad_enabled(False)


class _Primals:
    """The context that ``jvp`` sees, whose saved tensors carry no tangent of the level that is being computed."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = tuple(
            None if saved is None else forward_ad.unpack_dual(saved, level=0).primal for saved in ctx.saved_tensors
        )

    def __getattr__(self, name: str) -> Any:
        """What ``setup_context`` left beside the tensors."""
        return getattr(self._ctx, name)


def _forward_over_forward(function: type[OpFunction], outputs: int) -> Callable[..., Any]:
    """``function.jvp`` as torch would run it if it supported forward mode over forward mode.

    torch calls ``jvp`` with forward mode switched off, so that an outer torch.func.jvp would take the tangents for
    constants, without an error.
    """
    formula = function.jvp

    def jvp(ctx: Any, *tangents: Any) -> Any:
        reverse, forward = _modes.value
        if not forward:
            return None if outputs == 1 else (None,) * outputs
        torch._C._set_fwd_grad_enabled(True)
        try:
            if reverse and torch._C._any_requires_grad(*ctx.saved_tensors, *tangents):
                return formula(_Primals(ctx), *tangents)
            # Nothing of this level is recorded: the formula is one for the outer levels, which see no tangent of this.
            with torch._C._AutoDispatchBelowAutograd():
                return formula(ctx, *tangents)
        finally:
            torch._C._set_fwd_grad_enabled(False)

    return jvp


def register_derivatives(name: str, function: type[OpFunction]) -> None:
    """Attaches ``function`` to the op ``onestep::name``."""
    function.op = getattr(torch.ops.onestep, name).default
    outputs = len(function.op._schema.returns)
    function.jvp = staticmethod(_forward_over_forward(function, outputs))  # type: ignore[method-assign]
    function.forward = staticmethod(function.run_below)  # type: ignore[method-assign]
    LIBRARY.impl(name, function.call, "Autograd")


def register_composite_derivative(name: str, composite: Callable[..., Any]) -> None:
    """Where a derivative of the op is wanted, ``composite``, made of differentiable ops, runs instead of its kernel."""
    op = getattr(torch.ops.onestep, name).default

    def autograd_kernel(*args: Any) -> Any:
        if records_derivatives(args) or carries_tangents(args):
            return composite(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(name, autograd_kernel, "Autograd")


def register_values_and_tangents(name: str, composite: Callable[..., Any]) -> None:
    """Attaches to an op of values and tangents ``composite``, made of two ops: it runs where a derivative is wanted."""
    op = getattr(torch.ops.onestep, name).default

    def autograd_kernel(*args: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if recorded or carries_tangents(args):
            return composite(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(name, autograd_kernel, "Autograd")


def register_not_differentiable(name: str, use_instead: str) -> None:
    """Makes an op raise where a derivative of it is wanted, rather than return a silent zero."""
    op = getattr(torch.ops.onestep, name).default

    def autograd_kernel(*args: Any) -> Any:
        if records_derivatives(args) or carries_tangents(args):
            raise NotImplementedError(f"onestep::{name} has no derivative; {use_instead}")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(name, autograd_kernel, "Autograd")
