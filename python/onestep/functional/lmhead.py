"""Cross-entropy of a linear layer's outputs, without the logits in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onestep._fork import safe_after_fork
from onestep.ops import lmhead
from onestep.ops.lmhead import accumulation_dtype, check_operands

_REDUCTIONS = ("none", "mean", "sum")


def _check_options(label_smoothing: float, reduction: str, reductions: Sequence[str]) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a number from 0 to 1")
    if reduction not in reductions:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(map(repr, reductions))}")


def _row_scale(input: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """What every row's loss is multiplied by: 1/m for the mean over the m rows that are not ignored, or 1."""
    dtype = accumulation_dtype(input.dtype)
    if reduction == "mean":
        return (target != ignore_index).sum().to(dtype).reciprocal()
    return torch.ones((), dtype=dtype, device=input.device)


class _SoftLabels(NamedTuple):
    """Probabilities as targets, taken apart: loss = Σ rowᵢ (logsumexp(zᵢ) − z̄ᵢ) + Σ rest∘z, with z̄ the mean score.

    The first sum is the loss of rows that are smoothed wholly (ε = 1), whatever their class; the second is linear in
    the scores, and needs none of them: Σ rest∘(HWᵀ) = Σ (rest W)∘H.

    Attributes:
        row: (…), the sum of a row's probabilities times what its loss is multiplied by.
        rest: (…,V).
    """

    row: Tensor
    rest: Tensor

    @staticmethod
    def of(
        input: Tensor, weight: Tensor, target: Tensor, ignore_index: int, smoothing: float, scale: float
    ) -> _SoftLabels:
        check_operands(input, weight, None)
        shape = (*input.shape[:-1], weight.shape[0])
        if target.shape != shape:
            raise ValueError(
                f"target has shape {tuple(target.shape)} and dtype {target.dtype}; expected probabilities "
                f"{shape}, one for each class, or classes {shape[:-1]}, torch.int64"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index={ignore_index} is given with probabilities as target; expected it with classes alone: "
                "give rows that are not to count probabilities of 0"
            )
        probabilities = scale * target.to(accumulation_dtype(input.dtype))
        sums = probabilities.sum(-1)
        # Smoothing adds ε/V of one to each probability, whatever their sum.
        row = sums + smoothing * (scale - sums)
        each = (row - smoothing * scale) / shape[-1]
        return _SoftLabels(row, each[..., None] - (1 - smoothing) * probabilities)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Σ rest∘z for each row (…)."""
        dtype = self.rest.dtype
        found = ((self.rest @ weight.to(dtype)) * input.to(dtype)).sum(-1)
        return found if bias is None else found + self.rest @ bias.to(dtype)


@safe_after_fork
def _of_soft_labels(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    smoothing: float,
    reduction: str,
) -> Tensor:
    rows = target.shape[:-1].numel()
    scale = 1.0 if reduction != "mean" else 1 / rows if rows else math.nan
    labels = _SoftLabels.of(input, weight, target, ignore_index, smoothing, scale)
    any_class = torch.zeros(target.shape[:-1], dtype=torch.int64, device=input.device)
    wanted = _wanted(input, weight, bias) if reduction != "none" else (False, False, False)
    ones = torch.ones_like(labels.row)
    row = ones if reduction == "none" else labels.row
    value: Tensor
    losses: Tensor
    value, losses = lmhead.linear_cross_entropy(row, input, weight, bias, any_class, -1, 1.0, wanted)[:2]
    linear = labels.linear(input, weight, bias)
    if reduction == "none":
        return labels.row * losses + linear
    # NaN for the mean of nothing, as torch has it.
    return value + linear.sum() + 0 * scale


def _wanted(*operands: Tensor | None) -> tuple[bool, ...]:
    """Of which operands a gradient will be asked for."""
    return tuple(torch.is_grad_enabled() and like is not None and like.requires_grad for like in operands)


@safe_after_fork
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Computes ``F.cross_entropy(F.linear(input, weight, bias), target)`` in chunks of rows.

    With z = HWᵀ + b, P = softmax(z) and q = (1 − ε)Y + ε/V, the loss of a row is logsumexp(z) − Σ q z, and its gradient
    by z is P − q (Bridle, 1990). The N × V logits are never in memory: some hundred rows at a time are multiplied out,
    which for ``"mean"`` and ``"sum"`` gives loss and gradient in one pass (Hsu et al., "Liger Kernel", 2024). The
    second derivatives are one more pass of the same kind.

    Differentiable in ``input``, ``weight`` and ``bias`` to every order, by autograd and torch.func alike; from the
    third on, and for ``jvp`` of ``jvp``, with the logits in memory.

    Args:
        input: H (…,D); float32, float64 or bfloat16, which is accumulated in float32.
        weight: W (V,D), same dtype. Strides of both are read in place.
        target: classes (…), int64, from 0 to V − 1, or ``ignore_index``; or probabilities (…,V), of any floating dtype,
            in which the loss is differentiable, too. These take the memory of logits themselves, and one product more.
        bias: b (V,), or None.
        ignore_index: rows with this target count for nothing.
        label_smoothing: ε from 0 to 1.
        reduction: ``"mean"`` over the rows that are not ignored (NaN if all are; all rows for probabilities),
            ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or the losses (…) for ``"none"``, 0 where ignored; float32 for bfloat16 input.

    Raises:
        ValueError: shapes do not match, a target is out of range, or an option is not one of those above.
        TypeError: a dtype is not one of those above, or differs between operands.

    Examples:
        >>> import torch
        >>> from onestep.functional import linear_cross_entropy
        >>> H, W = torch.zeros(3, 4), torch.zeros(10, 4)  # three rows, ten classes
        >>> linear_cross_entropy(H, W, torch.tensor([1, 2, -100]))  # ln 10
        tensor(2.3026)
    """
    _check_options(label_smoothing, reduction, _REDUCTIONS)
    if target.is_floating_point():
        return _of_soft_labels(input, weight, target, bias, ignore_index, float(label_smoothing), reduction)
    scale = _row_scale(input, target, ignore_index, reduction)
    operands = (scale.expand(target.shape), input, weight, bias, target, ignore_index, float(label_smoothing))
    if reduction == "none":
        losses: Tensor = lmhead.linear_cross_entropy(*operands, (False, False, False))[1]
        return losses
    value: Tensor = lmhead.linear_cross_entropy(*operands, _wanted(input, weight, bias))[0]
    # NaN for the mean of nothing, as torch has it.
    return value + 0 * scale if reduction == "mean" else value


def linear_cross_entropy_hvp(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    vector: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes the Hessian of ``linear_cross_entropy`` in (input, weight, bias), all blocks of it, times a vector.

    ∂H: ġW + gẆ, ∂W: ġᵀH + gᵀḢ, ∂b: colsum ġ, where g = (P − q)/m, ġ = P∘(ż − rowsum(P∘ż))/m and ż = ḢWᵀ + HẆᵀ + ḃ
    (Pearlmutter, Neural Computation 6, 1994). One pass of seven matrix products; a Hessian-vector product by autograd
    computes the gradient as well.

    Args:
        vector: (Ḣ, Ẇ, ḃ), in the shapes and the dtype of input, weight and bias. None leaves an operand out, as a
            constant.
        input, weight, target, bias, ignore_index, label_smoothing: as for ``linear_cross_entropy``.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        The product's parts, in the shapes of the vector's; None where that is None.

    Raises:
        ValueError, TypeError: as ``linear_cross_entropy``, and if the vector does not match.

    Examples:
        >>> import torch
        >>> from onestep.functional import linear_cross_entropy_hvp
        >>> H, W, V = torch.ones(1, 1), torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])
        >>> linear_cross_entropy_hvp(H, W, torch.tensor([0]), (None, V, None))
        (None, tensor([[ 0.2500], [-0.2500]]), None)
    """
    return _product(input, weight, target, vector, bias, ignore_index, label_smoothing, reduction, gauss_newton=False)


def linear_cross_entropy_ggnvp(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    vector: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes the Gauss-Newton matrix of ``linear_cross_entropy`` in (input, weight, bias) times a vector.

    JᵀAJ v with J = ∂z/∂(input, weight, bias) and A the Hessian with respect to z, which is positive semi-definite: the
    terms of ``linear_cross_entropy_hvp`` without g (Schraudolph, Neural Computation 14, 2002). Five matrix products.

    Args:
        vector: (Ḣ, Ẇ, ḃ), in the shapes and the dtype of input, weight and bias. None leaves an operand out, as a
            constant.
        input, weight, target, bias, ignore_index, label_smoothing: as for ``linear_cross_entropy``.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        The product's parts, in the shapes of the vector's; None where that is None.

    Raises:
        ValueError, TypeError: as ``linear_cross_entropy``, and if the vector does not match.

    Examples:
        >>> import torch
        >>> from onestep.functional import linear_cross_entropy_ggnvp
        >>> H, W, V = torch.ones(1, 1), torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])
        >>> linear_cross_entropy_ggnvp(H, W, torch.tensor([0]), (None, V, None))
        (None, tensor([[ 0.2500], [-0.2500]]), None)
    """
    return _product(input, weight, target, vector, bias, ignore_index, label_smoothing, reduction, gauss_newton=True)


@safe_after_fork
def _product(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    vector: Any,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    *,
    gauss_newton: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _check_options(label_smoothing, reduction, _REDUCTIONS[1:])
    wanted = tuple(part is not None for part in vector)
    if len(wanted) != 3:
        raise ValueError(f"vector has {len(wanted)} parts; expected 3: for input, weight and bias")
    labels = None
    if target.is_floating_point():
        rows = target.shape[:-1].numel()
        factor = 1 / max(1, rows) if reduction == "mean" else 1.0
        labels = _SoftLabels.of(input, weight, target, ignore_index, float(label_smoothing), factor)
        scale, label_smoothing, ignore_index = labels.row, 1.0, -1
        target = torch.zeros(target.shape[:-1], dtype=torch.int64, device=input.device)
    else:
        scale = _row_scale(input, target, ignore_index, reduction).expand(target.shape)
    options = (ignore_index, float(label_smoothing), gauss_newton, wanted)
    results = lmhead.linear_cross_entropy_tangent(scale, None, input, weight, bias, target, *vector, *options)[2:]
    of_input, of_weight, of_bias = (of if wants else None for of, wants in zip(results, wanted, strict=True))
    if labels is not None and not gauss_newton:
        # Σ rest∘(HWᵀ) has no second derivatives but those that mix H and W.
        along_input, along_weight = vector[0], vector[1]
        rest = labels.rest
        if of_input is not None and along_weight is not None:
            of_input = of_input + (rest @ along_weight.to(rest.dtype)).to(of_input.dtype)
        if of_weight is not None and along_input is not None:
            rows_of = rest.flatten(0, -2).mT @ along_input.to(rest.dtype).flatten(0, -2)
            of_weight = of_weight + rows_of.to(of_weight.dtype)
    return of_input, of_weight, of_bias
