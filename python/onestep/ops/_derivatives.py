"""How derivatives are attached to an op: at its Autograd key.

So a bare ``torch.ops.onestep.*`` call is differentiable in eager autograd, forward mode, every ``torch.func`` transform
and torch.compile alike, or raises; see docs/decisions/0001-derivatives-at-the-autograd-key.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from onestep._fork import safe_after_fork
from onestep._torch_private import (
    SingleLevelFunction,
    any_requires_grad,
    below_autograd,
    forward_grad_enabled,
    get_single_level_allowed,
    has_tangent,
    in_legacy_vmap,
    make_dual,
    number_of_outputs,
    set_forward_grad_enabled,
    set_grad_enabled,
    set_single_level_allowed,
    unpack_dual,
)
from onestep.ops._library import LIBRARY, Op, records_derivatives


def carries_tangents(args: tuple[Any, ...]) -> bool:
    """Whether an Autograd kernel's argument has a tangent at the level that is being computed.

    The tensors are asked: graphs of torch.compile enter forward-mode levels that forward_ad does not know of.
    """
    if forward_grad_enabled():
        for arg in args:
            if has_tangent(arg):
                return True
    return False


# The derivative modes (reverse, forward) of the op call that this thread is in.
_modes = threading.local()


class OpFunction(SingleLevelFunction):
    """Derivatives of one op: a subclass has ``setup_context``, ``backward`` and ``jvp``.

    It is a single-level autograd.Function, applied inside the op's Autograd kernel: torch.func calls that kernel once
    per transform level, with the tensors of that level, exactly as it does for torch's own ops. ``backward`` and
    ``jvp`` are written in differentiable ops, which gives derivatives of every order. ``backward`` returns the
    gradients of the tensors; None for the arguments after them is added.
    """

    op: ClassVar[Op]
    # ``apply``, safe in a forked child.
    applied: ClassVar[Callable[..., Any]]

    # What runs instead, in differentiable ops, where an argument carries a tangent; None: ``jvp`` has the derivative.
    forward_composite: ClassVar[Callable[..., Any] | None] = None

    # (arguments, their tangents or None) → (results, their tangents or None) in one op; what runs instead of the op and
    # ``jvp`` where no gradient of this level is recorded. None: there is no such op.
    forward_and_jvp: ClassVar[Callable[..., tuple[Any, Any]] | None] = None

    @classmethod
    def call(cls, *args: Any) -> Any:
        """The op's Autograd kernel. torch.func calls it at every level; most levels want no derivative of this op."""
        reverse = torch.is_grad_enabled()
        recorded = reverse and any_requires_grad(*args)
        if not recorded or cls.forward_composite is not None:
            if not carries_tangents(args):
                if not recorded:
                    return cls.op.below_autograd(*args)
            elif cls.forward_composite is not None:
                return cls.forward_composite(*args)
            elif cls.forward_and_jvp is not None and not in_legacy_vmap():
                return cls.call_dual(*args)
        outer = getattr(_modes, "value", None)
        _modes.value = reverse, forward_grad_enabled()
        allowed = get_single_level_allowed()
        set_single_level_allowed(True)
        try:
            return cls.applied(*args)
        finally:
            set_single_level_allowed(allowed)
            _modes.value = outer

    @classmethod
    def call_dual(cls, *args: Any) -> Any:
        """``forward_and_jvp`` of dual numbers; its op is one for the other levels, which may want derivatives of it."""
        assert cls.forward_and_jvp is not None
        duals = [unpack_dual(arg, level=0) if isinstance(arg, Tensor) else (arg, None) for arg in args]
        with below_autograd():
            results, tangents = cls.forward_and_jvp(
                tuple(primal for primal, _ in duals), tuple(tangent for _, tangent in duals)
            )
        return tuple(
            result if tangent is None else make_dual(result, tangent, level=0)
            for result, tangent in zip(results, tangents, strict=True)
        )

    @classmethod
    def run_below(cls, *args: Any) -> Any:
        """The op for the next transform level, or its kernel if this was the last."""
        # A Function switches both derivative modes off for its forward; the outer levels need the caller's.
        reverse, forward = _modes.value
        set_grad_enabled(reverse)
        set_forward_grad_enabled(forward)
        try:
            return cls.op.below_autograd(*args)
        finally:
            set_grad_enabled(False)
            set_forward_grad_enabled(False)


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


def _for_all_arguments(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` with a None for each argument after those that it returns a gradient for."""

    def for_all(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        found = backward(ctx, *cotangents)
        gradients: tuple[Any, ...] = found if isinstance(found, tuple) else (found,)
        return gradients + (None,) * (len(ctx.needs_input_grad) - len(gradients))

    return for_all


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
        set_forward_grad_enabled(True)
        try:
            if reverse and any_requires_grad(*ctx.saved_tensors, *tangents):
                return formula(_Primals(ctx), *tangents)
            # Nothing of this level is recorded: the formula is one for the outer levels, which see no tangent of this.
            with below_autograd():
                return formula(ctx, *tangents)
        finally:
            set_forward_grad_enabled(False)

    return jvp


def register_derivatives(op: Op, function: type[OpFunction]) -> None:
    """Attaches ``function`` to the op."""
    function.op, function.applied = op, safe_after_fork(function.apply)  # type: ignore[attr-defined]
    outputs = number_of_outputs(op.dispatched)
    if function.forward_composite is not None:
        function.forward_composite = staticmethod(safe_after_fork(function.forward_composite))
    # Derivatives are made of torch's ops, which wait for ever for threads that a fork has not kept.
    function.backward = staticmethod(_for_all_arguments(safe_after_fork(function.backward)))  # type: ignore[method-assign]
    function.jvp = staticmethod(safe_after_fork(function.jvp))  # type: ignore[method-assign]
    function.jvp = staticmethod(_forward_over_forward(function, outputs))  # type: ignore[method-assign]
    function.forward = staticmethod(function.run_below)  # type: ignore[method-assign]
    LIBRARY.impl(op.name, function.call, "Autograd")


def register_composite_derivative(op: Op, composite: Callable[..., Any]) -> None:
    """Where a derivative of the op is wanted, ``composite``, made of differentiable ops, runs instead of its kernel."""

    composite = safe_after_fork(composite)

    def autograd_kernel(*args: Any) -> Any:
        if records_derivatives(args) or carries_tangents(args):
            return composite(*args)
        return op.below_autograd(*args)

    LIBRARY.impl(op.name, autograd_kernel, "Autograd")


def register_values_and_tangents(op: Op, composite: Callable[..., Any]) -> None:
    """Attaches to an op of values and tangents ``composite``, made of two ops: it runs where a derivative is wanted."""

    composite = safe_after_fork(composite)

    def autograd_kernel(*args: Any) -> Any:
        recorded = torch.is_grad_enabled() and any_requires_grad(*args)
        if recorded or carries_tangents(args):
            return composite(*args)
        return op.below_autograd(*args)

    LIBRARY.impl(op.name, autograd_kernel, "Autograd")


def register_not_differentiable(op: Op, use_instead: str) -> None:
    """Makes an op raise where a derivative of it is wanted, rather than return a silent zero."""

    def autograd_kernel(*args: Any) -> Any:
        # Asked of the tensors: that a level of forward mode is open may be another thread's doing.
        if (torch.is_grad_enabled() and any_requires_grad(*args)) or carries_tangents(args):
            raise NotImplementedError(f"onestep::{op.name} has no derivative; {use_instead}")
        return op.below_autograd(*args)

    LIBRARY.impl(op.name, autograd_kernel, "Autograd")
