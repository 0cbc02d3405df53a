"""CUDA kernels of the language-model head: torch's matrix products, and between them ours (csrc/lmhead/cuda).

Rows go by chunks whose logits, and tangents of logits, fit ``_CHUNK_BYTES``; classes by blocks that are taken into the
rows' statistics one after the other. g and ġ then replace the logits, in the operands' dtype, and
are multiplied back; sums over chunks are in the compute dtype. No N × V array exists, and nothing waits for the GPU: a
target that is no class makes its row's loss NaN, and what the row adds to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onestep.ops._cuda import entry, place
from onestep.ops._library import register
from onestep.ops._products import add_product, product_into
from onestep.ops.lmhead import schema
from onestep.ops.operands import Operand

# Logits of a chunk of rows, with their tangents: rows enough that reading the weights for each chunk costs little.
_CHUNK_BYTES = 1 << 30
# Logits of a block of classes, with their tangents. As many as fit: blocks of 32 MiB, which would stay in the L2 cache
# until the statistics have been taken, make products too small for the device (H200, N 16,384, D 2,048, V 50,304: the
# Gauss-Newton product took 37.9 ms with them and 33.6 without).
_BLOCK_BYTES = 1 << 30
# Rows of logits begin at a multiple of this many numbers; csrc/lmhead/cuda/lmhead.hpp.
_ALIGNMENT = 8
# csrc/lmhead/cuda/lmhead.hpp, kHeadStatistics
_STATISTICS = 11


def _vector(tensor: Tensor | None) -> Operand | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.stride(), tensor)


def _round_up(count: int, multiple: int) -> int:
    return (count + multiple - 1) // multiple * multiple


def _in_range(row_weight: Tensor, row_weight_tangent: Tensor | None) -> Tensor:
    """What float16 slopes are multiplied by so that they neither vanish nor overflow: 1/max|c|."""
    largest = row_weight.abs().amax()
    if row_weight_tangent is not None:
        largest = torch.maximum(largest, row_weight_tangent.abs().amax())
    return torch.where(largest.isfinite() & (largest > 0), largest.reciprocal(), 1.0)


class _Head:
    """One call: its operands as matrices, its buffers, and the chunks of rows in turn."""

    def __init__(
        self,
        row_weight: Tensor,
        row_weight_tangent: Tensor | None,
        operands: tuple[Tensor, Tensor, Tensor | None],
        target: Tensor,
        tangents: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
        options: tuple[int, float, bool],
        wanted: Sequence[bool],
    ) -> None:
        input, self.weight, self.bias = operands
        self.classes, features = self.weight.shape
        self.rows = target.numel()
        self.input = input.reshape(self.rows, features)
        self.target = target.reshape(-1)
        self.row_weight = row_weight.reshape(-1)
        self.row_weight_tangent = None if row_weight_tangent is None else row_weight_tangent.reshape(-1)
        self.tangent = tangents is not None
        input_tangent, self.weight_tangent, self.bias_tangent = tangents or (None, None, None)
        self.input_tangent = None if input_tangent is None else input_tangent.reshape(self.rows, features)
        self.ignore_index, self.label_smoothing, gauss_newton = options
        # Whether g is multiplied by tangents.
        has_tangents = self.input_tangent is not None or self.weight_tangent is not None
        self.cross = self.tangent and not gauss_newton and has_tangents
        self.wants = [wants and of is not None for wants, of in zip(wanted, operands, strict=True)]
        self.dtype = schema.accumulation_dtype(input.dtype)
        self.place = place(input)

        arrays = 2 if self.tangent else 1
        self.leading = _round_up(self.classes, _ALIGNMENT)
        affordable = _CHUNK_BYTES // (arrays * self.leading * self.dtype.itemsize)
        # Chunks of one size, of whole tiles of a matrix product.
        chunks = -(-self.rows // max(affordable, 1))
        self.chunk_rows = min(_round_up(-(-self.rows // max(chunks, 1)), 64), self.rows)
        per_class = arrays * max(self.chunk_rows, 1) * self.dtype.itemsize
        # Products of odd numbers of classes, as GPT-2's 50,257, are slow: what is beyond whole tiles is a block of its
        # own.
        whole_tiles = max(self.classes // 64 * 64, 64)
        self.block = min(max(_round_up(_BLOCK_BYTES // per_class, 256), 256), whole_tiles)

        self.losses = self._empty(self.rows)
        self.values = self._empty(self.rows, dtype=torch.float64)
        self.statistics = self._empty(_STATISTICS * self.chunk_rows)
        # A chunk's logits, and behind them their tangents.
        self.buffer = self._empty(arrays * self.chunk_rows, self.leading)
        self._stack_tangents()
        self.grad_input = self._empty(self.rows, features, dtype=input.dtype) if self.wants[0] else None
        self.grad_weight = self._zeros(self.classes, features) if self.wants[1] else None
        self.grad_bias = self._zeros(self.classes) if self.wants[2] else None
        self.scale = None
        if input.dtype == torch.float16 and (self.wants[0] or self.wants[1]) and self.rows > 0:
            self.scale = _in_range(self.row_weight, self.row_weight_tangent)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised numbers, of the compute dtype if no other is given."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.input.device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.input.device)

    def run(self) -> schema.Results:
        for first in range(0, self.rows, max(self.chunk_rows, 1)):
            self._chunk(slice(first, min(first + self.chunk_rows, self.rows)))
        value = self._empty()
        entry("head_value", self.dtype)(self.rows, self.values.data_ptr(), value.data_ptr(), **self.place)
        return value, self.losses, self._gradient(0), self._gradient(1), self._gradient(2)

    def _gradient(self, index: int) -> Tensor:
        gradient = (self.grad_input, self.grad_weight, self.grad_bias)[index]
        if gradient is None:
            return self._empty(0, dtype=self.input.dtype)
        if self.scale is not None and index == 1:
            gradient = gradient / self.scale
        return gradient.to(self.input.dtype)

    def _stack_tangents(self) -> None:
        """ḢWᵀ + HẆᵀ as one product, of (Ḣ, H) with (W, Ẇ): a sum of two would pass over ż twice more."""
        self.along: tuple[Tensor, Tensor] | None = None
        if self.input_tangent is not None and self.weight_tangent is not None:
            self.along = (
                torch.cat((self.input_tangent, self.input), dim=1),
                torch.cat((self.weight, self.weight_tangent), dim=1),
            )
        elif self.input_tangent is not None:
            self.along = self.input_tangent, self.weight
        elif self.weight_tangent is not None:
            self.along = self.input, self.weight_tangent

    def _native_chunk(self, rows: slice) -> Any:
        tangent = self.row_weight_tangent
        count = rows.stop - rows.start
        return entry("HeadChunk", self.input.dtype)(
            count,
            self.classes,
            self.buffer.data_ptr(),
            self.buffer[count:].data_ptr() if self.tangent else 0,
            self.leading,
            _vector(self.bias),
            _vector(self.bias_tangent),
            _vector(self.target[rows]),
            _vector(self.row_weight[rows]),
            None if tangent is None else _vector(tangent[rows]),
            self.ignore_index,
            self.label_smoothing,
            self.statistics.data_ptr(),
        )

    def _chunk(self, rows: slice) -> None:
        count = rows.stop - rows.start
        chunk = self._native_chunk(rows)
        self._score(rows, chunk)
        if self.grad_bias is not None:
            chunk.bias_gradient(self.grad_bias.data_ptr(), **self.place)
        if self.grad_input is None and self.grad_weight is None:
            return
        chunk.gradient(self.cross, 0 if self.scale is None else self.scale.data_ptr(), **self.place)
        # g or ġ, and both where g lies before ġ, where the rows of logits were.
        slopes = self.buffer.view(self.input.dtype)[:, : self.classes]
        main = slopes[count : 2 * count] if self.tangent else slopes[:count]
        if self.grad_input is not None:
            self._back_to_input(rows, main, slopes[:count])
        if self.grad_weight is not None:
            if self.cross and self.input_tangent is not None:
                given = torch.cat((self.input_tangent[rows], self.input[rows]))
                add_product(self.grad_weight, slopes[: 2 * count].mT, given)
            else:
                add_product(self.grad_weight, main.mT, self.input[rows])

    def _score(self, rows: slice, chunk: Any) -> None:
        """Logits and tangents of a chunk, block by block of classes, and the rows' statistics."""
        count = rows.stop - rows.start
        logits, tangents = self.buffer[:count], self.buffer[count : 2 * count]
        for first in range(0, self.classes, self.block):
            of = slice(first, min(first + self.block, self.classes))
            product_into(logits[:, of], self.input[rows], self.weight[of].mT)
            if self.along is not None:
                product_into(tangents[:, of], self.along[0][rows], self.along[1][of].mT)
            elif self.tangent:
                tangents[:, of] = 0
            chunk.statistics(
                first,
                of.stop - first,
                self.losses[rows].data_ptr(),
                self.values[rows].data_ptr(),
                **self.place,
            )

    def _back_to_input(self, rows: slice, main: Tensor, cross: Tensor) -> None:
        """∂H of a chunk: ġW + gẆ, or gW."""
        assert self.grad_input is not None
        both = self.cross and self.weight_tangent is not None
        if not both and self.scale is None:
            torch.mm(main, self.weight, out=self.grad_input[rows])
            return
        total = self._empty(rows.stop - rows.start, self.weight.shape[1])
        product_into(total, main, self.weight)
        if self.cross and self.weight_tangent is not None:
            add_product(total, cross, self.weight_tangent)
        if self.scale is not None:
            total /= self.scale
        self.grad_input[rows] = total


def _shaped(results: schema.Results, input: Tensor) -> schema.Results:
    value, losses, of_input, *others = results
    of_input = of_input.reshape(input.shape) if of_input.dim() == 2 else of_input
    return value, losses.reshape(input.shape[:-1]), of_input, others[0], others[1]


@register(schema.linear_cross_entropy, device="cuda")
def _linear_cross_entropy(
    row_weight: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    wanted: Sequence[bool],
) -> schema.Results:
    schema.check(row_weight, input, weight, bias, target)
    schema.check_targets(target, weight.shape[0], ignore_index)
    options = ignore_index, label_smoothing, False
    return _shaped(_Head(row_weight, None, (input, weight, bias), target, None, options, wanted).run(), input)


@register(schema.linear_cross_entropy_tangent, device="cuda")
def _linear_cross_entropy_tangent(*args: Any) -> schema.Results:
    given = schema.TangentArguments(*args)
    given.check()
    schema.check_targets(given.target, given.weight.shape[0], given.ignore_index)
    options = given.ignore_index, given.label_smoothing, given.gauss_newton
    head = _Head(
        given.row_weight, given.row_weight_tangent, given.operands, given.target, given.tangents, options, given.wanted
    )
    return _shaped(head.run(), given.input)
