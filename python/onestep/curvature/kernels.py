"""Which of torch's kernels run inside products, so that the derivatives that those need exist and are right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from onestep._torch_private import (
    TransformType,
    attention_math,
    interpreter_stack,
    is_tracked,
    nn_mish,
    nn_silu,
    run_backward,
    tree_leaves,
    weight_norm,
)
from onestep.curvature._lstm import lstm
from onestep.functional import replace_attention

_NO_GRADIENT = (
    "{} is called inside a transform of torch.func, for a tensor from outside of it, of which it gives no gradient: "
    "expected torch.func.grad or jvp there"
)
# Between a function and what called it are no more frames than this, of modes.
_FRAMES = 8


def differentiable_kernels(*, composed_norms: bool = False) -> Kernels:
    """Attention by onestep, LSTMs made of elementary functions, and norms too if asked for: in this thread, alone.

    What onestep's attention does not take runs in torch's mathematical form. While a torch function mode is on, as
    here, torch.nn's encoder layers do not take their fused path.

    torch 2.13's flash attention, fused encoder layers and oneDNN LSTM have no forward mode, and the LSTM's graph can be
    gone through only once. The forward mode of its layer, batch and instance norm takes mean and deviation for
    constants when it is differentiated again: derivatives of a product would be wrong without a word.

    Gradients inside that torch.func would take for zeros raise: see ``_gradient`` and ``_view_as``.

    Forward mode needs ``exclusive`` around it, one context before this one.
    """
    return Kernels(_SUBSTITUTES | _NORMS if composed_norms else _SUBSTITUTES)


def may_be_differentiated() -> bool:
    """Whether what is computed now may be differentiated, by autograd or by torch.func's transforms but vmap."""
    return torch.is_grad_enabled() or _is_differentiating()


def _is_differentiating() -> bool:
    """Whether a transform of torch.func other than vmap is active."""
    return any(level.key() != TransformType.Vmap for level in interpreter_stack() or [])


class Kernels(TorchFunctionMode):
    """Calls other functions in place of some of torch's.

    Attributes:
        recorded_gradient: whether a function of ``_RECORDED`` was called.
    """

    def __init__(self, substitutes: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.substitutes = substitutes
        self.recorded_gradient = False
        self._attention = replace_attention()

    def __enter__(self) -> Kernels:
        super().__enter__()
        self._attention.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._attention.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RECORDED:
            self.recorded_gradient = True
        return self.substitutes.get(func, func)(*args, **(kwargs or {}))


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, recorded: bool = False
) -> list[Tensor]:
    """torch.autograd.grad, with the graph kept, under which torch function modes stay on.

    A checkpoint computes its part of the model anew during the backward pass, and must find the same kernels as before:
    under torch.autograd.grad, which the modes see themselves, they would be off. On CUDA they are: there the pass runs
    in another thread.

    Args:
        recorded: whether the gradients can be differentiated.
    """
    _check_followed(outputs, inputs)
    found = run_backward(tuple(outputs), tuple(cotangents), True, recorded, tuple(inputs), True, accumulate_grad=False)
    return [
        torch.zeros_like(leaf, requires_grad=recorded) if part is None else part
        for part, leaf in zip(found, inputs, strict=True)
    ]


def _gradient(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.autograd.grad, where it can be right."""
    _check_followed(outputs, inputs)
    return torch.autograd.grad(outputs, inputs, *args, **kwargs)


def _check_followed(outputs: Any, inputs: Any) -> None:
    """Raises where torch.autograd.grad of outputs with respect to inputs is wrong inside a transform.

    A transform of torch.func follows what depends on the parameters. A tensor from outside of it, such as a model's
    inputs, is not connected to that, and its gradient is None, or zeros: then all derivatives are wrong.
    """
    followed = any(is_tracked(output, now=True) for output in _tensors(outputs))
    if followed and not all(is_tracked(leaf) for leaf in _tensors(inputs)):
        raise RuntimeError(_NO_GRADIENT.format("torch.autograd.grad"))


def _view_as(tensor: Tensor, other: Tensor) -> Tensor:
    """Tensor.view_as, by which torch.autograd.functional prepares its inputs; it gives zeros in the same case."""
    if tensor is other and _is_differentiating() and not is_tracked(tensor) and _is_for_functional():
        raise RuntimeError(_NO_GRADIENT.format("torch.autograd.functional"))
    return tensor.view_as(other)


def _is_for_functional() -> bool:
    """Whether torch.autograd.functional is what called the function that a mode has intercepted."""
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_globals.get("__name__") == "torch.autograd.functional":
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _reverse_mode_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, of which torch 2.13's forward mode is wrong: it raises there, and reverse mode is taken."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        _refuse_forward_mode(function)
        return function(*args, **kwargs)

    return checked


def _reverse_mode_only_of_products(scatter: Callable[..., Any]) -> Callable[..., Any]:
    """The same for one of the ways to call scatter_reduce: of its reductions only "prod" is wrong."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        if "prod" in (kwargs.get("reduce"), *(value for value in args if isinstance(value, str))):
            _refuse_forward_mode(scatter)
        return scatter(*args, **kwargs)

    return checked


def _refuse_forward_mode(function: Callable[..., Any]) -> None:
    if any(level.key() == TransformType.Jvp for level in interpreter_stack() or []):
        raise RuntimeError(f"torch's forward mode of {function.__name__} is wrong: expected reverse mode alone")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's attention in its mathematical form, which has derivatives of every order."""
    if query.is_nested or key.is_nested or value.is_nested:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = query.new_full((), -torch.inf)
        attn_mask = torch.where(attn_mask, query.new_zeros(()), hidden)
    out: Tensor = attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖, the norm over all dimensions but one: torch 2.13's kernel has wrong second derivatives."""
    norm: Tensor = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *cudnn: bool,
) -> Tensor:
    # Its checks of the arguments.
    torch.layer_norm(input, normalized_shape, weight, bias, eps)
    return _normalised(input, range(-len(normalized_shape), 0), weight, bias, eps)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    # Its checks of the arguments, and the running statistics.
    outputs = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return outputs
    dims = [0, *range(2, input.dim())]
    return _normalised(input, dims, _by_channel(weight, input), _by_channel(bias, input), eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    outputs = F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        return outputs
    return _normalised(input, range(2, input.dim()), _by_channel(weight, input), _by_channel(bias, input), eps)


def _weight_first(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.*_norm's order of arguments for torch.nn.functional's."""

    def reordered(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    return reordered


def _by_channel(vector: Tensor | None, input: Tensor) -> Tensor | None:
    """A vector (C,) in a shape that fits an input (n,C,…)."""
    return None if vector is None else vector.reshape(-1, *[1] * (input.dim() - 2))


def _normalised(input: Tensor, dims: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / √(variance + eps) · weight + bias, mean and variance over ``dims``, halves in float32."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    x = x - x.mean(list(dims), keepdim=True)
    x = x * (x.square().mean(list(dims), keepdim=True) + eps).rsqrt()
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    return x.to(input.dtype)


# Their backward kernels have no forward mode; where the gradient's own graph is recorded torch takes elementary
# functions.
_RECORDED = {F.silu, nn_silu, F.mish, nn_mish, F.group_norm, torch.group_norm}
_RECORDED |= {torch.logit, Tensor.logit, torch.special.logit}
# Their backward functions use the LU factors that were kept, which forward mode takes for constants; where the
# gradient's own graph is recorded they do not. Nothing raises.
_RECORDED |= {torch.det, Tensor.det, torch.linalg.det, torch.logdet, Tensor.logdet}
_RECORDED |= {torch.slogdet, Tensor.slogdet, torch.linalg.slogdet}
_RECORDED |= {torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve}

_SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    torch.lstm: lstm,
    weight_norm: _weight_norm,
    F.scaled_dot_product_attention: _attention,
    torch.autograd.grad: _gradient,
    Tensor.view_as: _view_as,
}
_SUBSTITUTES |= {
    function: _reverse_mode_only(function)
    for function in (
        torch.cholesky_inverse,
        Tensor.cholesky_inverse,
        torch.triangular_solve,
        Tensor.triangular_solve,
    )
}
_SUBSTITUTES |= {
    function: _reverse_mode_only_of_products(function)
    for function in (torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_)
}

_NORMS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _weight_first(_batch_norm),
    F.instance_norm: _instance_norm,
    torch.instance_norm: _weight_first(_instance_norm),
}
