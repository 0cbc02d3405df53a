"""Perplexity of a small language model that is compressed with and without the solve of onestep.layerwise.

    python bench/compressed_perplexity.py [--seed N] [--steps N] [--model FILE]

A character GPT (3 blocks of width 48) learns lines such as "17 plus 17 is 34." until it does the sums, so that errors
of its layers show in its perplexity. It is then compressed as it is, and once more with outlying channels: of what each
layer norm puts out, 2 of 48 channels are made 8, 12 or 16 times larger, and the weights that read them as many times
smaller. That is the same function. Large language models have such channels by themselves, and rounding on one grid
loses the small weights. Both sides have the same bits and a grid for every 64 columns of a row, from the least to the
largest weight; `quantize` has its defaults.

Prints a Markdown table of what is lost, per cent of the full model's perplexity on 64 held-out sequences.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from compress_a_language_model import GPT, Subject, remove_blocks, remove_smallest, round_to_nearest, sequences

from onestep.layerwise import prune, quantize, refit, replace_blocks

WIDTH, BLOCKS, BATCH, RATE, CALIBRATION = 48, 3, 12, 4e-3, 512


def trained(seed: int, steps: int, path: Path | None) -> Subject:
    """The model, trained by Adam with a rate that falls to zero, or read from a file that an earlier run wrote."""
    text = "".join(f"{i} plus {i} is {2 * i}.\n" for i in range(4000))
    places = {character: i for i, character in enumerate(sorted(set(text)))}
    train, held_out = sequences(torch.tensor([places[character] for character in text]), 64)
    torch.manual_seed(seed)
    subject = Subject(GPT(len(places), WIDTH, BLOCKS), train, held_out, ["blocks.*"], "blocks")
    if path is not None and path.exists():
        subject.model.load_state_dict(torch.load(path))
        return subject
    optimizer = torch.optim.Adam(subject.model.parameters(), lr=RATE, betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 50) * (1 - step / steps)
        loss = subject.loss(subject.model, train[torch.randint(len(train), (BATCH,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if path is not None:
        torch.save(subject.model.state_dict(), path)
    return subject


def with_outlying_channels(model: nn.Module, factor: float, count: int = 2) -> nn.Module:
    """The same function with some channels of each layer norm larger, and what reads them smaller."""
    outlying: Any = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in outlying.blocks:
            for norm, reader in ((block.norm_attention, block.qkv), (block.norm_dense, block.up)):
                channels = torch.randperm(WIDTH, generator=generator)[:count]
                norm.weight[channels] *= factor
                norm.bias[channels] *= factor
                reader.weight[:, channels] /= factor
    return outlying


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description="Perplexity of a compressed language model, with and without solving.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--model", type=Path, help="a file for the trained model: read if it is there, else written")
    arguments = parser.parse_args()
    subject = trained(arguments.seed, arguments.steps, arguments.model)
    data = [{"input_ids": codes[:, :-1]} for codes in subject.train[:CALIBRATION].split(64)]
    full = subject.perplexity(subject.model)
    print(f"seed {arguments.seed}, {arguments.steps} steps, full model {full:.4f}\n")
    print("| compressed | without the solve | onestep.layerwise | seconds |\n| --- | --- | --- | --- |")

    def row(name: str, base: nn.Module, plain: Callable[[nn.Module], Any], solve: Callable[[nn.Module], Any]) -> None:
        lost, seconds = [], 0.0
        for change in (plain, solve):
            model = copy.deepcopy(base)
            begin = time.perf_counter()
            with torch.no_grad():
                change(model)
            seconds = time.perf_counter() - begin
            lost.append(subject.perplexity(model) / full - 1)
        print(f"| {name} | {lost[0]:+.2%} | {lost[1]:+.2%} | {seconds:.1f} |", flush=True)

    options: dict[str, Any] = {"layers": subject.layers, "progress": False}
    for bits, factor in ((4, 1), (3, 1), (4, 8), (4, 12), (4, 16)):
        row(
            f"{bits} bits" + (f", channels {factor} times larger" if factor > 1 else ""),
            with_outlying_channels(subject.model, factor),
            lambda model, bits=bits: round_to_nearest(model, subject, bits, 64),
            lambda model, bits=bits: quantize(model, data, bits=bits, group_size=64, **options),
        )

    def pruned(model: nn.Module, sparsity: Any) -> None:
        prune(model, data, sparsity, **options)
        refit(model, data, subject.model, layers=subject.layers, progress=False)

    for name, kept in (("half of the weights", None), ("2 of 4 weights", (2, 4))):
        row(
            name,
            subject.model,
            lambda model, kept=kept: remove_smallest(model, subject, kept),
            lambda model, kept=kept: pruned(model, kept or 0.5),
        )
    for name, blocks in (("one block of three less", [1]), ("the last block less", [2]), ("two blocks less", [1, 2])):
        names = [f"blocks.{index}" for index in blocks]
        row(
            name,
            subject.model,
            lambda model, names=names: remove_blocks(model, subject, names),
            lambda model, names=names: replace_blocks(model, data, names, progress=False),
        )


if __name__ == "__main__":
    main()
