"""Prints the bytes of peak RSS that one step adds; run in a fresh process. Usage: gradient|gauss_newton|newton_cg."""

from __future__ import annotations

import copy
import math
import sys

import torch
from ridge_memory import status
from torch import Tensor, nn

import onestep

ROWS, LENGTH, CLASSES, WIDTH = 64, 64, 96, 144


class Transformer(nn.Module):
    """About a million parameters, four layers: tokens (n,T) → scores (n,T,C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))


def main() -> None:
    torch.manual_seed(0)
    model = Transformer().eval()
    tokens, classes = torch.randint(CLASSES, (2, ROWS, LENGTH)).unbind()

    def loss(model: nn.Module, rows: int) -> Tensor:
        return nn.functional.cross_entropy(model(tokens[:rows]).reshape(-1, CLASSES), classes[:rows].reshape(-1))

    def gradient(rows: int) -> None:
        loss(model, rows).backward()

    def step(rows: int) -> float:
        data = tokens[:rows], classes[:rows]
        return onestep.fit(
            model,
            data,
            "cross_entropy",
            method=sys.argv[1],
            max_steps=1,
            cg_iterations=3,
            chunk_size=ROWS,
            progress=False,
        ).loss

    work = gradient if sys.argv[1] == "gradient" else step
    work(1)  # loads what is loaded on first use
    model.zero_grad(set_to_none=True)
    start = copy.deepcopy(model)
    before = status("VmRSS")
    found = work(ROWS)
    print(max(0, status("VmHWM") - before))
    if found is not None:  # a step has the loss that it says, and that is lower
        with torch.no_grad():
            before_step, after = loss(start, ROWS).item(), loss(model, ROWS).item()
        assert math.isclose(found, after, rel_tol=1e-4), f"{found} and {after}"
        assert after < before_step, f"{after} and {before_step}"


if __name__ == "__main__":
    main()
