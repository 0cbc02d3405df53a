"""Canvases of handwritten digits with their boxes, and how well a detector finds them: for object_detection.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIDE, STRIDE = 48, 4
CELLS = SIDE // STRIDE
BACKGROUND = 10
# Middles of the cells, (cells, 2) as x, y; a box is told by its middle, in units of STRIDE from there, and log sizes.
MIDDLES = torch.cartesian_prod(*(torch.arange(CELLS) * STRIDE + STRIDE / 2,) * 2).flip(1)


@dataclass
class Canvases:
    """Pixels (n, 1, SIDE, SIDE); what each cell should say, (n, cells, 5); boxes x0, y0, x1, y1 and digits of each."""

    pixels: Tensor
    targets: Tensor
    boxes: list[Tensor]
    digits: list[Tensor]


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (m, 4) and (n, 4): (m, n)."""
    low, high = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    area_a, area_b = (x[:, 2:] - x[:, :2] for x in (a, b))
    return shared / (area_a.prod(-1)[:, None] + area_b.prod(-1) - shared)


def encode(boxes: Tensor) -> Tensor:
    """Boxes (cells, 4) as the cells tell them."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    return torch.cat([((boxes[:, :2] + boxes[:, 2:]) / 2 - MIDDLES) / STRIDE, (sizes / 12).log()], 1)


def decode(told: Tensor) -> Tensor:
    """What ``encode`` gives, as boxes again."""
    middles, sizes = told[:, :2] * STRIDE + MIDDLES, 12 * told[:, 2:].clamp(-3, 3).exp()
    return torch.cat([middles - sizes / 2, middles + sizes / 2], 1)


def assign(boxes: Tensor, digits: Tensor) -> Tensor:
    """Targets (cells, 5), digit and box: those of the digit whose middle third the cell's middle is in, else none."""
    middles, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    distance = ((MIDDLES[:, None] - middles).abs() / sizes).amax(-1)
    nearest, which = distance.min(1)
    # The cell nearest to a middle always counts, however small the digit.
    near = nearest < 1 / 3
    near[((MIDDLES[:, None] - middles) ** 2).sum(-1).argmin(0)] = True
    labels = torch.where(near, digits[which], BACKGROUND)
    return torch.cat([labels[:, None].float(), encode(boxes[which])], 1)


def crop(image: np.ndarray) -> Tensor:
    """A digit (8, 8) without the empty rows and columns around it, from 0 to 1."""
    rows, columns = np.flatnonzero(image.max(1)), np.flatnonzero(image.max(0))
    return torch.tensor(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / 16, dtype=torch.float32)


def place(images: list[Tensor], labels: np.ndarray, count: int, seed: int) -> Canvases:
    """``count`` canvases of two to five digits that hardly overlap, about twice as large as they were, with noise."""
    rng = np.random.default_rng(seed)
    pixels, all_boxes, all_digits = torch.zeros(count, 1, SIDE, SIDE), [], []
    for canvas in pixels[:, 0]:
        boxes, digits = torch.empty(0, 4), []
        for index in rng.integers(len(images), size=rng.integers(2, 6)):
            sides = torch.tensor(images[index].shape) * torch.tensor(rng.uniform(1.6, 2.8, 2))
            height, width = (max(4, round(side)) for side in sides.tolist())
            x, y = (int(rng.integers(SIDE - side + 1)) for side in (width, height))
            box = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
            if len(boxes) and overlaps(box, boxes).max() > 0.05:
                continue
            ink = F.interpolate(images[index][None, None], (height, width), mode="bilinear")[0, 0]
            there = canvas[y : y + height, x : x + width]
            there.copy_(torch.maximum(there, ink * rng.uniform(0.6, 1.0)))
            boxes, digits = torch.cat([boxes, box]), [*digits, int(labels[index])]
        all_boxes.append(boxes)
        all_digits.append(torch.tensor(digits))
    pixels += torch.from_numpy(rng.normal(0.0, 0.15, pixels.shape).astype(np.float32))
    targets = torch.stack([assign(*pair) for pair in zip(all_boxes, all_digits, strict=True)])
    return Canvases(pixels, targets, all_boxes, all_digits)


def load(count: int, held_out: int) -> tuple[Canvases, Canvases]:
    """Canvases to train on and held-out ones, whose digits are other images."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    crops = [crop(images[i].reshape(8, 8)) for i in order]
    split = len(order) * 4 // 5
    return (
        place(crops[:split], labels[order[:split]], count, 1),
        place(crops[split:], labels[order[split:]], held_out, 2),
    )


def detect(model: nn.Module, pixels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes, digits and sureness for each canvas: the surest first, without those that overlap a surer one by half."""
    found = []
    with torch.no_grad():
        outputs = model(pixels)
    for told in outputs:
        sureness, digits = told[:, : BACKGROUND + 1].softmax(-1)[:, :BACKGROUND].max(1)
        order = sureness.argsort(descending=True)[:20]
        boxes, kept = decode(told[:, BACKGROUND + 1 :])[order], []
        shared = overlaps(boxes, boxes)
        for i in range(len(order)):
            if not kept or shared[i, kept].max() < 0.5:
                kept.append(i)
        found.append((boxes[kept], digits[order][kept], sureness[order][kept]))
    return found


def average_precision(right: Tensor, sureness: Tensor, total: int) -> float:
    """Area under precision against recall, precision made to fall: detections by sureness, of ``total`` true boxes."""
    hits = right[sureness.argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    return float((best_from_here * hits).sum() / total)


def mean_average_precision(found: list[tuple[Tensor, Tensor, Tensor]], canvases: Canvases) -> float:
    """mAP at an overlap of a half: the mean over digits of the area under precision against recall.

    Args:
        found: boxes, digits and sureness for each canvas, the surest first. A box is right if its overlap with the true
            one of its digit that it overlaps most is at least a half, and no surer one took that.
    """
    right: list[list[Tensor]] = [[] for _ in range(BACKGROUND)]
    sure: list[list[Tensor]] = [[] for _ in range(BACKGROUND)]
    for (boxes, digits, sureness), true, labels in zip(found, canvases.boxes, canvases.digits, strict=True):
        for digit in digits.unique().tolist():
            mine, theirs = digits == digit, true[labels == digit]
            hits, taken = torch.zeros(int(mine.sum()), dtype=torch.bool), torch.zeros(len(theirs), dtype=torch.bool)
            for i, shared in enumerate(overlaps(boxes[mine], theirs) if len(theirs) else []):
                best = int(shared.argmax())
                hits[i] = shared[best] >= 0.5 and not taken[best]
                taken[best] |= hits[i]
            right[digit].append(hits)
            sure[digit].append(sureness[mine])
    totals = torch.bincount(torch.cat(canvases.digits), minlength=BACKGROUND).tolist()
    areas = [
        average_precision(torch.cat(hits), torch.cat(sureness), total) if hits else 0.0
        for hits, sureness, total in zip(right, sure, totals, strict=True)
        if total
    ]
    return sum(areas) / len(areas)
