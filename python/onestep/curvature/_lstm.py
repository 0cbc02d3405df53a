"""torch.lstm made of elementary functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lstm(first: Tensor, second: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Both forms of torch.lstm: padded ``(input, hx, …, batch_first)`` and packed ``(data, batch_sizes, hx, …)``.

    oneDNN's kernel, which torch takes in single precision, has no forward mode; torch has no way to leave it out
    for one thread alone.
    """
    if isinstance(second, Tensor):
        return _packed(first, second, *rest)
    return _padded(first, second, *rest)


def _padded(
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    steps = input.transpose(0, 1) if batch_first else input
    length, batch = steps.shape[:2]
    data, h, c = _layers(
        steps.flatten(0, 1), [batch] * length, hx, weights, has_biases, num_layers, dropout, train, bidirectional
    )
    out = data.unflatten(0, (length, batch))
    return out.transpose(0, 1) if batch_first else out, h, c


def _packed(
    data: Tensor,
    batch_sizes: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _layers(data, batch_sizes.tolist(), hx, weights, has_biases, num_layers, dropout, train, bidirectional)


def _layers(
    data: Tensor,
    sizes: list[int],
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers on packed data (rows, features): of step t the next sizes[t] rows, which never grow."""
    h0, c0 = hx
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    last_h, last_c = [], []
    for layer in range(num_layers):
        if layer and dropout and train:
            data = F.dropout(data, dropout)
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            out, h, c = _direction(
                data,
                sizes,
                h0[index],
                c0[index],
                weights[index * each : (index + 1) * each],
                has_biases,
                direction == 1,
            )
            outputs.append(out)
            last_h.append(h)
            last_c.append(c)
        data = torch.cat(outputs, -1)
    return data, torch.stack(last_h), torch.stack(last_c)


def _direction(
    data: Tensor,
    sizes: list[int],
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool,
    backwards: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction (Hochreiter and Schmidhuber 1997); gates in torch's order i, f, g, o."""
    of_input, of_hidden = weights[:2]
    bias = weights[2] + weights[3] if has_biases else None
    projection = weights[-1] if len(weights) == (5 if has_biases else 3) else None
    steps = F.linear(data, of_input, bias).split(sizes)
    outputs: list[Tensor] = []
    finished: list[tuple[Tensor, Tensor]] = []
    # Forwards, sequences that have ended leave at the end of the batch; backwards, they join there.
    rows = sizes[-1] if backwards else sizes[0]
    h, c = h0[:rows], c0[:rows]
    for step in reversed(steps) if backwards else steps:
        if len(step) > rows:
            h, c = torch.cat([h, h0[rows : len(step)]]), torch.cat([c, c0[rows : len(step)]])
        elif len(step) < rows:
            finished.append((h[len(step) :], c[len(step) :]))
            h, c = h[: len(step)], c[: len(step)]
        rows = len(step)
        i, f, g, o = (step + F.linear(h, of_hidden)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if projection is not None:
            h = F.linear(h, projection)
        outputs.append(h)
    finished.append((h, c))
    finished.reverse()
    out = torch.cat(outputs[::-1] if backwards else outputs)
    return out, torch.cat([h for h, _ in finished]), torch.cat([c for _, c in finished])
