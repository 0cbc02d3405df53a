"""Models that call torch's attention, run on onestep's."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from onestep._fork import safe_after_fork
from onestep.functional.attention import scaled_dot_product_attention
from onestep.ops.attention import COMPUTE_DTYPES

_TORCH_ATTENTION = F.scaled_dot_product_attention
# Calls on other devices stay torch's, and the kernels take float16 on CUDA alone.
_DTYPES = set(COMPUTE_DTYPES) - {torch.float16}
_SIGNATURE = inspect.signature(scaled_dot_product_attention)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """onestep's attention where it takes the operands, else torch's."""
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    operands = [given.arguments[name] for name in ("query", "key", "value")]
    takes = given.arguments["dropout_p"] == 0 and all(
        operand.device.type == "cpu" and operand.dtype in _DTYPES and not operand.is_nested for operand in operands
    )
    out: Tensor = (scaled_dot_product_attention if takes else _TORCH_ATTENTION)(*args, **kwargs)
    return out


def _without_dispatch(function: Any, **names: Any) -> Callable[..., Any]:
    """The function with other values of names that it looks up in its module."""
    copy = types.FunctionType(function.__code__, function.__globals__ | names, function.__name__)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


# Once a mode has been asked about multi_head_attention_forward, it is not asked about the calls that this makes, that
# of scaled_dot_product_attention among them. So a copy calls ours, and does not ask the mode again.
_multi_head_attention_forward = safe_after_fork(
    _without_dispatch(
        F.multi_head_attention_forward,
        has_torch_function=lambda tensors: False,
        scaled_dot_product_attention=_attention,
    )
)


class replace_attention(TorchFunctionMode):
    """Within this context, ``torch.nn.functional.scaled_dot_product_attention`` is onestep's, in this thread.

    ``replace_attention()`` takes no arguments. It holds for every module that calls that function,
    ``torch.nn.MultiheadAttention`` and torch.nn's transformer layers among them, and for float32, float64 and bfloat16
    operands (…,T,D) on the CPU. Calls that onestep does not take (other devices and dtypes, dropout) stay torch's.

    Raises:
        ValueError, TypeError: in a call of attention that onestep takes, as ``scaled_dot_product_attention`` does:
            shapes or masks that do not go together.

    Examples:
        >>> import torch
        >>> from onestep.functional import replace_attention
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, dropout=0.0, batch_first=True)
        >>> with replace_attention():
        ...     layer(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _TORCH_ATTENTION:
            return _attention(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return _multi_head_attention_forward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
