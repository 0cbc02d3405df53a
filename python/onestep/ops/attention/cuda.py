"""Scaled dot-product attention on CUDA: torch's fused kernels where they fit, and csrc/attention/cuda.

Values and gradients of bfloat16 and float16 without a mask are computed by torch's flash attention, or on Hopper and
later by cuDNN's, which is up to twice as fast (``why_not_flash`` says where not). Everything else is computed by our
kernels: masks, float32, other lengths, and all tangents. Sizes that no kernel takes run as the formulas in torch's ops,
at O(T²) memory; ``path`` says which of the three runs, and why.

Results have the dtype of q, and L is float64. Our kernels add up in a fixed order: the same call gives the same bits.
torch's gradient does so where ``torch.use_deterministic_algorithms`` asks for it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onestep._torch_private import cudnn_attention, cudnn_attention_backward, flash_attention, flash_attention_backward
from onestep.ops import _cuda
from onestep.ops._library import register
from onestep.ops.attention import schema
from onestep.ops.attention.arguments import NO_TANGENTS, as_tangents, plain_arguments
from onestep.ops.attention.formulas import formula_backward, formula_backward_jvp, formula_forward, formula_jvp
from onestep.ops.attention.schema import Batch, EightGrads, Grads, Optional, Sizes
from onestep.ops.operands import ELEMENTS

# Whether Hopper's own matrix instructions are used where kernels have them (csrc/attention/cuda/attention.hpp).
WARP_GROUPS = True
# Operands' rows start at multiples of it.
_ALIGNMENT = 16


class Path(NamedTuple):
    """What computes a call: "flash", "kernel" or "formulas"; and why not the one before it."""

    name: str
    reason: str


# Neither changes, and torch looks the first one up anew for each call.
@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _supported(dtype: torch.dtype, d: int, dv: int, device: int) -> bool:
    """Whether our kernels take operands with this many features, padded."""
    assert _cuda.native is not None
    return bool(_cuda.native.attention_supported(ELEMENTS[dtype], d, dv, device))


def why_not_flash(q: Tensor, k: Tensor, v: Tensor, mask: Optional, scale: float, causal: bool, sizes: Sizes) -> str:
    """Why torch's flash kernels do not take these operands; empty if they do."""
    if not q.is_cuda:
        return "operands are not on a GPU"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"they take bfloat16 and float16, not {q.dtype}"
    if mask is not None:
        return "they take no mask"
    if sizes.d != sizes.dv or sizes.d % 8 != 0 or sizes.d > 256:
        return f"they take as many features in v as in q, a multiple of 8, 256 at most, not {sizes.d} and {sizes.dv}"
    if causal and sizes.queries != sizes.keys:
        return "their causal mask ends in the last corner where lengths differ"
    if not scale > 0:
        return f"they take a positive scale, not {scale}"
    if len(sizes.batch) != 1 or any(tensor.dim() != 4 or tensor.shape[0] != sizes.batch[0] for tensor in (q, k, v)):
        return "they take one batch dimension"
    if sizes.queries == 0 or sizes.keys == 0 or sizes.batch[0] == 0 or sizes.heads == 0:
        return "they take no empty operands"
    if _capability(q.device) < (8, 0):
        return "the device is older than Ampere"
    return ""


def why_not_kernel(q: Tensor, sizes: Sizes) -> str:
    """Why our kernels do not take these operands; empty if they do."""
    if _cuda.native is None:
        return f"CUDA kernels: {_cuda.status}"
    padded = (_padded(size, q.dtype) for size in (sizes.d, sizes.dv))
    if not _supported(q.dtype, *padded, _cuda.place(q)["device"]):
        return f"they do not take {sizes.d} and {sizes.dv} features in {q.dtype}"
    return ""


def path(q: Tensor, k: Tensor, v: Tensor, mask: Optional, scale: float, causal: bool, tangents: bool) -> Path:
    """What computes values and gradients, or tangents, of these operands."""
    sizes = schema.check_operands(q, k, v, mask)
    reason = "they give no tangents" if tangents else why_not_flash(q, k, v, mask, scale, causal, sizes)
    if not reason:
        return Path("flash", "")
    reason = f"not torch's flash kernels: {reason}"
    unfit = why_not_kernel(q, sizes)
    return Path("formulas", f"{reason}; not ours: {unfit}") if unfit else Path("kernel", reason)


def _padded(size: int, dtype: torch.dtype) -> int:
    """Features as the kernels take them: whole units of 16 bytes."""
    each = _ALIGNMENT // dtype.itemsize
    return -(-size // each) * each


class _Call:
    """One call of our kernels: operands as they take them."""

    def __init__(self, sizes: Sizes, q: Tensor, scale: float, causal: bool) -> None:
        self.sizes = sizes
        self.dtype = q.dtype
        padded = sizes._replace(d=_padded(sizes.d, q.dtype), dv=_padded(sizes.dv, q.dtype))
        self.plain = {
            **plain_arguments(padded, scale, causal),
            "element": ELEMENTS[q.dtype],
            "warp_groups": WARP_GROUPS,
            **_cuda.place(q),
        }

    def operand(self, name: str, tensor: Optional, shape: Batch) -> Any:
        """A tensor in the kernels' dtype as they take it; most are read in place."""
        if tensor is None:
            return None
        if tensor.dtype != self.dtype:
            tensor = tensor.to(self.dtype)
        tensor = _expanded(name, tensor, shape)
        cols = _padded(shape[-1], self.dtype)
        if cols != shape[-1]:
            tensor = torch.nn.functional.pad(tensor, (0, cols - shape[-1]))
        return _native_operand(_aligned(tensor))

    def mask(self, mask: Optional) -> Any:
        if mask is None:
            return None
        batch, heads, _, queries, keys = self.sizes[:5]
        return _native_operand(_expanded("mask", mask, (*batch, heads, queries, keys)))

    def rows(self, name: str, tensor: Optional) -> Any:
        """L or its like, which gets a dimension of columns."""
        if tensor is None:
            return None
        batch, heads, _, queries = self.sizes[:4]
        tensor = _expanded(name, tensor, (*batch, heads, queries)).double().contiguous()
        return _native_operand(tensor.unsqueeze(-1))

    def tensors(
        self,
        q: Optional,
        k: Optional,
        v: Optional,
        mask: Optional,
        out: Optional = None,
        lse: Optional = None,
        grad: Optional = None,
        grad_lse: Optional = None,
    ) -> dict[str, Any]:
        batch, heads, kv_heads, queries, keys, d, dv = self.sizes[:7]
        rows, key_rows = (*batch, heads, queries), (*batch, kv_heads, keys)
        return {
            "q": self.operand("q", q, (*rows, d)),
            "k": self.operand("k", k, (*key_rows, d)),
            "v": self.operand("v", v, (*key_rows, dv)),
            "mask": self.mask(mask),
            "out": self.operand("out", out, (*rows, dv)),
            "lse": self.rows("lse", lse),
            "grad": self.operand("grad", grad, (*rows, dv)),
            "grad_lse": self.rows("grad_lse", grad_lse),
        }

    def result(self, like: Tensor) -> Tensor:
        """Memory for a result with the kernels' number of features."""
        cols = _padded(like.shape[-1], self.dtype)
        return like if cols == like.shape[-1] else like.new_empty((*like.shape[:-1], cols))

    def run(self, kernel: str, primal: dict[str, Any], tangent: dict[str, Any], **arguments: Any) -> None:
        assert _cuda.native is not None
        getattr(_cuda.native, kernel)(**primal, **tangent, **self.plain, **arguments)


def _native_operand(tensor: Tensor) -> tuple[int, list[int], int, Tensor]:
    """(address, strides, element type, what keeps the memory)."""
    return tensor.data_ptr(), _strides(tensor), ELEMENTS[tensor.dtype], tensor


def _expanded(name: str, tensor: Tensor, shape: Batch) -> Tensor:
    if tensor.shape == shape:
        return tensor
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}") from None


def _strides(tensor: Tensor) -> list[int]:
    """The strides, 0 where a dimension has one element: what they say there is not an address."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor with columns next to each other and rows that start at whole units of 16 bytes; most are so."""
    each = _ALIGNMENT // tensor.dtype.itemsize
    *outer, last = _strides(tensor)
    if last != 1 or any(stride % each != 0 for stride in outer) or tensor.data_ptr() % _ALIGNMENT != 0:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _take(results: tuple[Tensor, ...], computed: tuple[Tensor, ...]) -> None:
    """Drops the features that were added for the kernels."""
    for result, padded in zip(results, computed, strict=True):
        if padded is not result:
            result.copy_(padded[..., : result.shape[-1]])


# ------------------------------------------------------------------------------------------------- values and tangents


def _prefers_cudnn(q: Tensor, sizes: Sizes) -> bool:
    """Whether cuDNN's kernels run instead of flash attention's; both give L as the natural logarithm."""
    return (
        sizes.heads == sizes.kv_heads
        and sizes.d <= 128
        and _capability(q.device) >= (9, 0)
        and torch.backends.cudnn.is_available()
        and not torch.are_deterministic_algorithms_enabled()
    )


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, sizes: Sizes) -> tuple[Tensor, Tensor]:
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    if _prefers_cudnn(q, sizes):
        out, lse, *_ = cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out, lse.double().view(out.shape[:-1])
    out, lse, *_ = flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse.double()


@register(schema.attention, device="cuda")
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Optional, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    sizes = schema.check_operands(q, k, v, mask)
    if not why_not_flash(q, k, v, mask, scale, causal, sizes):
        return _flash_forward(q, k, v, scale, causal, sizes)
    if why_not_kernel(q, sizes):
        return formula_forward(q, k, v, mask, scale, causal)
    out, lse = schema.empty_outputs(sizes, q)
    call = _Call(sizes, q, scale, causal)
    computed = call.result(out)
    call.run(
        "attention_forward",
        call.tensors(q, k, v, mask),
        NO_TANGENTS,
        to_out=computed.data_ptr(),
        to_lse=lse.data_ptr(),
    )
    _take((out,), (computed,))
    return out, lse


@register(schema.attention_jvp, device="cuda")
def _attention_jvp(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, mask, out, lse, dq, dk, dv, dmask, scale, causal = args
    sizes = schema.check_operands(q, k, v, mask, out, dq, dk, dv, dmask)
    if why_not_kernel(q, sizes):
        return formula_jvp(q, k, v, mask, dq, dk, dv, dmask, scale, causal)
    dout, dlse = schema.empty_outputs(sizes, q)
    call = _Call(sizes, q, scale, causal)
    computed = call.result(dout)
    call.run(
        "attention_jvp",
        call.tensors(q, k, v, mask, out, lse),
        as_tangents(call.tensors(dq, dk, dv, dmask)),
        to_out=computed.data_ptr(),
        to_lse=dlse.data_ptr(),
    )
    _take((dout,), (computed,))
    return dout, dlse


@register(schema.attention_and_jvp, device="cuda")
def _attention_and_jvp(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, mask, dq, dk, dv, dmask, scale, causal = args
    out, lse = _attention(q, k, v, mask, scale, causal)
    return out, lse, *_attention_jvp(q, k, v, mask, out, lse, dq, dk, dv, dmask, scale, causal)


# ---------------------------------------------------------------------------------------------------------- gradients


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    sizes: Sizes,
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor]
    grad, q, k, v, out = (_aligned(x) for x in (grad, q, k, v, out))
    lengths = (q.shape[-2], k.shape[-2])
    # Without dropout nothing is drawn; the state of the generator is an empty argument.
    if _prefers_cudnn(q, sizes):
        state = torch.empty((), dtype=torch.int64, device=q.device)
        grads = cudnn_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse.float().unsqueeze(-1),
            state,
            state,
            None,
            None,
            None,
            *lengths,
            0.0,
            causal,
            scale=scale,
        )
        return grads
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    grads = flash_attention_backward(
        grad, q, k, v, out, lse.float(), None, None, *lengths, 0.0, causal, state, unused, scale=scale
    )
    return grads


def _gradients(tensors: tuple[Any, ...], tangents: bool, scale: float, causal: bool, mask_grad: bool) -> Grads:
    """attention_backward, or with ``tangents`` attention_backward_jvp, by our kernels."""
    grad, grad_lse, q, k, v, mask, out, lse, dgrad, dgrad_lse, dq, dk, dv, dmask, dout, dlse = tensors
    sizes = schema.backward_jvp_sizes(tensors)
    grads = schema.empty_grads(sizes, q, mask, mask_grad)
    call = _Call(sizes, q, scale, causal)
    computed = call.result(grads[0]), call.result(grads[1]), call.result(grads[2])
    if sizes.keys == 0 or sizes.queries == 0:
        for result in grads:
            result.zero_()
        return grads
    by_scores = None
    if mask_grad:
        shape = (*sizes.batch, sizes.heads, sizes.queries, sizes.keys)
        by_scores = torch.zeros(shape, dtype=sizes.dtype, device=q.device)
    assert _cuda.native is not None
    size = _cuda.native.attention_gradients_workspace(
        element=ELEMENTS[q.dtype], batch=sizes.batch, heads=sizes.heads, queries=sizes.queries
    )
    workspace = _cuda.workspace(q, size)
    # A cotangent that is absent is zero; the kernels take it as an operand.
    if grad is None:
        grad = q.new_zeros(1).expand((*sizes.batch, sizes.heads, sizes.queries, sizes.dv))
    tangent = NO_TANGENTS
    if tangents:
        tangent = as_tangents(call.tensors(dq, dk, dv, dmask, dout, dlse, dgrad, dgrad_lse))
    call.run(
        "attention_gradients",
        call.tensors(q, k, v, mask, out, lse, grad, grad_lse),
        tangent,
        tangents=tangents,
        to_q_grad=computed[0].data_ptr(),
        to_k_grad=computed[1].data_ptr(),
        to_v_grad=computed[2].data_ptr(),
        to_score_grad=0 if by_scores is None else by_scores.data_ptr(),
        workspace=workspace.data_ptr(),
    )
    _take(grads[:3], computed)
    if by_scores is not None:
        # One gradient for each query head and problem until here: O(T²) memory, like the mask itself.
        grads[3].copy_(by_scores.sum_to_size(grads[3].shape))
    return grads


@register(schema.attention_backward, device="cuda")
def _attention_backward(*args: Any) -> Grads:
    grad, grad_lse, q, k, v, mask, out, lse, scale, causal, mask_grad = args
    sizes = schema.check_operands(q, k, v, mask, out, grad, schema.column(grad_lse))
    if (
        grad is not None
        and grad_lse is None
        and not why_not_flash(q, k, v, mask, scale, causal, sizes)
        and grad.shape == out.shape == q.shape
    ):
        grads = _flash_backward(grad.to(q.dtype), q, k, v, out.to(q.dtype), lse, scale, causal, sizes)
        return *grads, q.new_empty((*sizes.batch, 0), dtype=sizes.dtype)
    if why_not_kernel(q, sizes):
        return formula_backward(grad, grad_lse, q, k, v, mask, scale, causal, mask_grad)
    return _gradients((grad, grad_lse, q, k, v, mask, out, lse, *(None,) * 8), False, scale, causal, mask_grad)


@register(schema.attention_backward_jvp, device="cuda")
def _attention_backward_jvp(*args: Any) -> Grads:
    tensors, (scale, causal, mask_grad) = args[:16], args[16:]
    if why_not_kernel(args[2], schema.backward_jvp_sizes(tensors)):
        return formula_backward_jvp(*args[:6], *args[8:14], *args[16:])
    return _gradients(tensors, True, scale, causal, mask_grad)


@register(schema.attention_backward_and_jvp, device="cuda")
def _attention_backward_and_jvp(*args: Any) -> EightGrads:
    return *_attention_backward(*args[:8], *args[16:]), *_attention_backward_jvp(*args)
