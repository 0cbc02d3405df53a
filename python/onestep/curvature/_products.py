"""Matrix-free products by torch.func."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from onestep._fork import one_thread_after_fork
from onestep.curvature._kernels import Kernels, differentiable_kernels, may_be_differentiated

# A tensor, or a mapping of names to tensors.
Parameters = TypeVar("Parameters", Tensor, dict[str, Tensor])


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


@one_thread_after_fork()
def hvp(loss_fn: Callable[[Parameters], Tensor], params: Parameters, v: Parameters) -> Parameters:
    """Computes Hv, H = ∂²loss/∂params², by forward mode over reverse mode (Pearlmutter, Neural Computation 6, 1994).

    Costs about two gradients, and one gradient's memory twice, or less under ``torch.no_grad``, whatever the number of
    parameters. torch's attention inside ``loss_fn`` is replaced by onestep's, which has second derivatives at O(T)
    memory, or by torch's mathematical form where onestep's does not take the operands (see
    ``onestep.functional.replace_attention``). Where the product may be differentiated itself, which ``torch.no_grad``
    rules out, norms are composed of elementary functions. Python threads take turns: torch's forward mode serves one at
    a time.

    Args:
        loss_fn: params → a scalar. For a module: ``lambda p: loss(functional_call(model, p, (x,)), y)``.
        params: a tensor or a dict of tensors.
        v: the same structure, shapes and dtypes.

    Returns:
        Hv, in the structure of ``params``. Differentiable.

    Raises:
        ValueError, TypeError: ``v`` does not match ``params``, or the loss is not a scalar.
    """
    v = _tangent(params, v)

    def scalar(p: Parameters) -> Tensor:
        loss = loss_fn(p)
        if loss.dim() != 0:
            raise ValueError(f"loss_fn returned shape {tuple(loss.shape)}; expected a scalar")
        if not loss.is_floating_point():
            raise TypeError(f"loss_fn returned dtype {loss.dtype}; expected a real floating-point scalar")
        return loss

    with differentiable_kernels(composed_norms=may_be_differentiated()) as kernels:
        gradient = _gradient_of(scalar, kernels)
        try:
            pushed: tuple[Parameters, Parameters] = jvp(gradient, (params,), (v,))  # type: ignore[assignment]
            return pushed[1]
        except RuntimeError as error:
            # Forward mode of mse_loss' gradient trips over a zero tensor that torch 2.13 makes itself. Elsewhere
            # reverse mode twice may be silently wrong, as it is for torch 2.13's weight_norm.
            if "ZeroTensors" not in str(error):
                raise
            # H is symmetric.
            pulled: tuple[Parameters, Any] = vjp(grad(scalar), params)  # type: ignore[assignment]
            product: Parameters = pulled[1](v)[0]
            return product


@one_thread_after_fork()
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
        params: a tensor or a dict of tensors.
        v: the same structure, shapes and dtypes.

    Returns:
        Jᵀ H J v, in the structure of ``params``. Differentiable.

    Raises:
        ValueError, TypeError: ``v`` does not match ``params``, or the loss is not a scalar.
    """
    return gauss_newton_products(model_fn, loss_fn, params)(v)


def gauss_newton_products(
    model_fn: Callable[[Parameters], Tensor], loss_fn: Callable[[Tensor], Tensor], params: Parameters
) -> Callable[[Parameters], Parameters]:
    """v ↦ Jᵀ H J v for many v: the pass that Jᵀ goes back through is made once, and keeps a gradient's memory."""
    composed_norms = may_be_differentiated()
    with differentiable_kernels(composed_norms=composed_norms):
        linearized: tuple[Tensor, Any] = vjp(model_fn, params)  # type: ignore[assignment]
    outputs, pullback = linearized

    def product(v: Parameters) -> Parameters:
        with differentiable_kernels(composed_norms=composed_norms):
            pushed: tuple[Tensor, Tensor] = jvp(model_fn, (params,), (_tangent(params, v),))  # type: ignore[assignment]
        result: Parameters = pullback(hvp(loss_fn, outputs, pushed[1]))[0]
        return result

    return product
