"""Matrix-free products by torch.func."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import grad, vjp

from onestep._forward_mode import BusyError, jvp
from onestep._interrupts import interrupt_behind, undisturbed
from onestep.curvature import _reverse_twice as reverse_twice
from onestep.curvature.kernels import Kernels, differentiable_kernels, may_be_differentiated
from onestep.evaluation.exclusive import exclusive

# A tensor, or a mapping of names to tensors.
Parameters = TypeVar("Parameters", Tensor, dict[str, Tensor])
Result = TypeVar("Result")


class Route:
    """Whether torch.func can differentiate a model, as far as is known; where it cannot, reverse mode twice can.

    torch.func refuses models that differentiate inside by torch.autograd.grad (where it would give zeros instead,
    ``differentiable_kernels`` refuses), gradient checkpointing, autograd functions without a forward mode, and autocast
    around some layers; forward mode is missing for some of torch's kernels and wrong for others, which
    ``differentiable_kernels`` refuses, and that of mse_loss' gradient trips over a zero tensor that torch 2.13 makes
    itself.
    """

    def __init__(self) -> None:
        self.reverse_twice = False

    def take(self, by_torch_func: Callable[[], Result], by_reverse_mode: Callable[[], Result]) -> Result:
        """The first, or the second where the first raised, now or before."""
        if not self.reverse_twice:
            try:
                return by_torch_func()
            except RuntimeError as error:
                first = error
                if interrupt_behind(error) is not None:
                    raise
                if "KeyboardInterrupt" in str(error):
                    # Torch runs some decompositions as compiled code, which makes an error of what Python raises in it.
                    raise KeyboardInterrupt from error
                _refuse_reentrant_checkpoints(error)
            try:
                result = by_reverse_mode()
            except RuntimeError as error:
                raise first from error
            # Another thread's forward mode passes; what torch.func cannot do stays so.
            self.reverse_twice = not isinstance(first, BusyError)
            return result
        return by_reverse_mode()


def _refuse_reentrant_checkpoints(error: RuntimeError) -> None:
    """Raises if the error came from one: their gradients by reverse mode are zeros where no input requires one."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint" and frame.f_locals.get("use_reentrant"):
            raise RuntimeError(
                "the model uses gradient checkpointing with use_reentrant=True, which has no second derivatives: pass "
                "use_reentrant=False (transformers: gradient_checkpointing_enable({'use_reentrant': False}))"
            ) from error
        trace = trace.tb_next


def _tangent(params: Any, v: Any) -> Any:
    """v in the order of params, once it is known to match."""
    if isinstance(params, Tensor):
        if not isinstance(v, Tensor):
            raise TypeError(f"v is {type(v).__name__}; expected a tensor, as params is")
        if v.shape != params.shape or v.dtype != params.dtype:
            raise ValueError(
                f"v has shape {tuple(v.shape)} and dtype {v.dtype}; "
                f"expected those of params, {tuple(params.shape)} and {params.dtype}"
            )
        return v
    if not isinstance(params, Mapping):
        raise TypeError(f"params is {type(params).__name__}; expected a tensor or a dict of tensors")
    if not isinstance(v, Mapping):
        raise TypeError(f"v is {type(v).__name__}; expected a dict of tensors, as params is")
    if params.keys() != v.keys():
        differing = sorted(map(str, params.keys() ^ v.keys()))
        raise ValueError(f"v and params hold different names: {', '.join(differing)}")
    for name, value in params.items():
        if v[name].shape != value.shape or v[name].dtype != value.dtype:
            raise ValueError(
                f"v[{name!r}] has shape {tuple(v[name].shape)} and dtype {v[name].dtype}; "
                f"expected {tuple(value.shape)} and {value.dtype}"
            )
    return type(params)((name, v[name]) for name in params)  # type: ignore[call-arg]


def _gradient_of(scalar: Callable[[Parameters], Tensor], kernels: Kernels) -> Callable[[Parameters], Parameters]:
    """params → the gradient of a scalar. Its graph, half of the memory, is recorded only where it is needed."""
    if may_be_differentiated():
        return grad(scalar)

    def gradient(params: Parameters) -> Parameters:
        linearized: tuple[Tensor, Any] = vjp(scalar, params)  # type: ignore[assignment]
        loss, pullback = linearized

        def pull(recorded: bool) -> Parameters:
            result: Parameters = pullback(torch.ones_like(loss), create_graph=recorded)[0]
            return result

        try:
            return pull(kernels.recorded_gradient)
        except NotImplementedError:
            # A backward kernel without forward mode that Kernels does not know of. The loss is not computed again.
            if kernels.recorded_gradient:
                raise
            return pull(True)

    return gradient


@undisturbed
def hvp(loss_fn: Callable[[Parameters], Tensor], params: Parameters, v: Parameters) -> Parameters:
    """Computes Hv, H = ∂²loss/∂params², by forward mode over reverse mode (Pearlmutter, Neural Computation 6, 1994).

    Costs about two gradients, and one gradient's memory twice, or less under ``torch.no_grad``, whatever the number of
    parameters. torch's attention inside ``loss_fn`` is replaced by onestep's, which has second derivatives at O(T)
    memory, or by torch's mathematical form where onestep's does not take the operands (see
    ``onestep.functional.replace_attention``). Where the product may be differentiated itself, which ``torch.no_grad``
    rules out, norms are composed of elementary functions. Python threads take turns: torch's forward mode serves one at
    a time. Where torch.func cannot differentiate ``loss_fn`` (checkpointing, torch.autograd.grad inside), or another
    thread is inside a ``torch.func.jvp`` of its own, it is reverse mode twice.

    Args:
        loss_fn: params → a scalar. For a module: ``lambda p: loss(functional_call(model, p, (x,)), y)``.
        params: a tensor of any shape (…), or a dict of such tensors; float32, float64 or bfloat16, on any device.
        v: the same structure, shapes and dtypes.

    Returns:
        Hv, in the structure, shapes and dtypes of ``params``. Differentiable.

    Raises:
        ValueError: ``v`` has other names, shapes or dtypes than ``params``, or the loss is no scalar.
        TypeError: ``params`` or ``v`` holds no tensors, or the loss is not of a real floating-point dtype.
        RuntimeError: ``loss_fn`` holds checkpoints with ``use_reentrant=True``, which have no second derivatives.

    Examples:
        >>> import torch
        >>> from onestep.curvature import hvp
        >>> hvp(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0]), torch.ones(2))
        tensor([ 6., 12.])
    """
    return hessian_product(loss_fn, params, v, Route())


def hessian_product(
    loss_fn: Callable[[Parameters], Tensor], params: Parameters, v: Parameters, route: Route
) -> Parameters:
    """``hvp`` that remembers, for many products of one function, which way works."""
    v = _tangent(params, v)

    def scalar(p: Parameters) -> Tensor:
        loss = loss_fn(p)
        if loss.dim() != 0:
            raise ValueError(f"loss_fn returned shape {tuple(loss.shape)}; expected a scalar")
        if not loss.is_floating_point():
            raise TypeError(f"loss_fn returned dtype {loss.dtype}; expected a real floating-point scalar")
        return loss

    with exclusive(), differentiable_kernels(composed_norms=may_be_differentiated()) as kernels:
        gradient = _gradient_of(scalar, kernels)

        def forward_over_reverse() -> Parameters:
            pushed: tuple[Parameters, Parameters] = jvp(gradient, (params,), (v,))
            return pushed[1]

        product: Parameters = route.take(forward_over_reverse, lambda: reverse_twice.hessian_product(scalar, params, v))
        return product


@undisturbed
def ggnvp(
    model_fn: Callable[[Parameters], Tensor],
    loss_fn: Callable[[Tensor], Tensor],
    params: Parameters,
    v: Parameters,
) -> Parameters:
    """Computes Jᵀ H J v: J = ∂outputs/∂params, H = ∂²loss/∂outputs² (Schraudolph, Neural Computation 14, 2002).

    The generalised Gauss-Newton matrix is positive semi-definite where the loss is convex in the outputs, and for
    cross-entropy it is the Fisher matrix. One forward-mode and one reverse-mode pass; kernels as for ``hvp``.

    Args:
        model_fn: params → outputs, a tensor of any shape.
        loss_fn: outputs → a scalar.
        params: a tensor of any shape (…), or a dict of such tensors; float32, float64 or bfloat16, on any device.
        v: the same structure, shapes and dtypes.

    Returns:
        Jᵀ H J v, in the structure, shapes and dtypes of ``params``. Differentiable.

    Raises:
        ValueError: ``v`` has other names, shapes or dtypes than ``params``, or the loss is no scalar.
        TypeError: ``params`` or ``v`` holds no tensors, or the loss is not of a real floating-point dtype.
        RuntimeError: ``model_fn`` holds checkpoints with ``use_reentrant=True``, which have no second derivatives.

    Examples:
        >>> import torch
        >>> from onestep.curvature import ggnvp
        >>> ggnvp(lambda p: p**2, lambda outputs: outputs.square().sum(), torch.tensor([1.0, 2.0]), torch.ones(2))
        tensor([ 8., 32.])
    """
    return gauss_newton_products(model_fn, loss_fn, params)(v)


def gauss_newton_products(
    model_fn: Callable[[Parameters], Tensor],
    loss_fn: Callable[[Tensor], Tensor],
    params: Parameters,
    *,
    route: Route | None = None,
) -> Callable[[Parameters], Parameters]:
    """v ↦ Jᵀ H J v for many v: the pass that Jᵀ goes back through is made once, and keeps a gradient's memory."""

    def outer(outputs: Tensor, tangent: Tensor) -> Tensor:
        return hvp(loss_fn, outputs, tangent)

    return outer_products(model_fn, outer, params, keep=True, route=route)


def outer_products(
    model_fn: Callable[[Parameters], Any],
    outer: Callable[[Any, Any], Any],
    params: Parameters,
    *,
    keep: bool,
    route: Route | None = None,
) -> Callable[[Parameters], Parameters]:
    """v ↦ Jᵀ C J v, with C given as (outputs, tangent) ↦ C tangent.

    Args:
        model_fn: params → outputs, a tensor or a tuple of tensors. ``outer`` takes and returns what is like them.
        keep: whether the pass that Jᵀ goes back through is kept for all products, each of which then takes another one
            in forward mode. Otherwise a product is one pass both ways, and keeps nothing.
    """
    composed_norms = may_be_differentiated()
    route = route or Route()

    @cache
    def kept_linearization() -> tuple[Any, Any]:
        both: tuple[Any, Any] = vjp(model_fn, params)  # type: ignore[assignment]
        return both

    @cache
    def kept_graph() -> reverse_twice.GaussNewtonProduct:
        return reverse_twice.GaussNewtonProduct(model_fn, params)

    def in_one_pass(v: Parameters) -> Parameters:
        def pushed(values: Parameters) -> tuple[Any, Any]:
            both: tuple[Any, Any] = jvp(model_fn, (values,), (v,))
            return both

        outputs, pullback, tangent = vjp(pushed, params, has_aux=True)  # type: ignore[misc]
        result: Parameters = pullback(outer(outputs, tangent), retain_graph=False)[0]
        return result

    def in_two_passes(v: Parameters) -> Parameters:
        outputs, pullback = kept_linearization()
        _, tangent = jvp(model_fn, (params,), (v,))
        result: Parameters = pullback(outer(outputs, tangent))[0]
        return result

    def product(v: Parameters) -> Parameters:
        v = _tangent(params, v)
        with exclusive(), differentiable_kernels(composed_norms=composed_norms):
            graph = kept_graph if keep else lambda: reverse_twice.GaussNewtonProduct(model_fn, params)
            result: Parameters = route.take(
                lambda: in_two_passes(v) if keep else in_one_pass(v), lambda: graph()(outer, v)
            )
        return result

    if keep:
        # Now, while the parameters are where the caller wants them.
        with exclusive(), differentiable_kernels(composed_norms=composed_norms):
            route.take(lambda: kept_linearization()[0], lambda: kept_graph().outputs)
    return product
