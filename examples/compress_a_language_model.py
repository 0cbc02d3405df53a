"""Compresses a language model by solving its layers one by one, and says what that costs in perplexity.

    python examples/compress_a_language_model.py [text.txt] [--model PATH] [--quick]

The model is a character GPT of six blocks, trained here for a while on the Python documentation topics that CPython
ships (or on a text), or any causal language model that transformers loads from a path. It is compressed five ways with
onestep.layerwise, each next to what is done without solving:

    4 bits, 3 bits             quantize              rounding to nearest on the same grids
    half of the weights, 2:4   prune                 the smallest weights removed
    two blocks less            replace_blocks        the blocks removed

Prints perplexities on held-out text; writes examples/output/compress_a_language_model.png.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from text_generation import CONTEXT, GPT, characters
from torch import Tensor, nn

from onestep.layerwise import LayerStatistics, prune, quantize, replace_blocks

HERE = Path(__file__).resolve().parent
HERE = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
PICTURE = HERE / "output" / "compress_a_language_model.png"


@dataclass(frozen=True)
class Effort:
    """How much to run."""

    width: int
    blocks: int
    steps: int
    batch: int
    calibration: int
    held_out: int


FULL = Effort(width=96, blocks=6, steps=400, batch=24, calibration=256, held_out=128)
QUICK = Effort(width=32, blocks=4, steps=50, batch=8, calibration=32, held_out=16)


@dataclass(frozen=True)
class Subject:
    """A model, its text in sequences of codes, and what of it is compressed.

    Attributes:
        train, held_out: (n, T + 1), so that each place has a next one.
        layers: patterns of the layers.
        container: the name of the container of its blocks.
    """

    model: nn.Module
    train: Tensor
    held_out: Tensor
    layers: list[str]
    container: str

    def scores(self, model: nn.Module, codes: Tensor) -> Tensor:
        """Of the next code at each place."""
        out = model(input_ids=codes[:, :-1])
        return out if isinstance(out, Tensor) else out.logits

    def loss(self, model: nn.Module, codes: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.scores(model, codes).flatten(0, 1), codes[:, 1:].flatten())

    def perplexity(self, model: nn.Module) -> float:
        """On the held-out text."""
        with torch.no_grad():
            return torch.stack([self.loss(model, codes) for codes in self.held_out.split(32)]).mean().exp().item()


def sequences(codes: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Sequences of CONTEXT + 1 codes in random order: to train on, and held out."""
    n = len(codes) // (CONTEXT + 1)
    if n < 4 * held_out:
        raise SystemExit(f"the text has {n} sequences of {CONTEXT + 1}; expected at least {4 * held_out}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    cut = codes[: n * (CONTEXT + 1)].view(n, CONTEXT + 1)[order]
    return cut[held_out:], cut[:held_out]


def character_gpt(text: str, effort: Effort) -> Subject:
    """A GPT that is trained here, by Adam with a rate that falls to zero."""
    places = {character: i for i, character in enumerate(sorted(set(text)))}
    train, held_out = sequences(torch.tensor([places[character] for character in text]), effort.held_out)
    torch.manual_seed(0)
    model = GPT(len(places), effort.width, effort.blocks)
    subject = Subject(model, train, held_out, ["blocks.*"], "blocks")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    begin = time.perf_counter()
    for step in range(effort.steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / effort.steps)
        loss = subject.loss(model, train[torch.randint(len(train), (effort.batch,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, trained for {effort.steps} steps", end=" ")
    print(f"in {time.perf_counter() - begin:.0f} s; {torch.get_num_threads()} threads")
    return subject


def pretrained(path: Path, text: str, effort: Effort) -> Subject:
    """A causal language model of transformers, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    codes = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt", verbose=False).input_ids[0]
    train, held_out = sequences(codes, effort.held_out)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    container = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))[0]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from {path}")
    return Subject(model, train, held_out, [f"{container}.*"], container)


def weights_of(model: nn.Module, subject: Subject) -> list[Tensor]:
    """The weights of the layers that onestep compresses, (outputs, features): linear layers and experts of mixtures."""
    found = []
    for name in LayerStatistics(model, subject.layers).names:
        if ".experts." in name and name.rpartition(".")[2].isdigit():
            stack, _, expert = name.rpartition(".")
            found.append(model.get_parameter(stack).detach()[int(expert)])
        else:
            module = model.get_submodule(name)
            weight = module.get_parameter("weight").detach()
            found.append(weight if isinstance(module, nn.Linear) else weight.mT)
    return found


def round_to_nearest(model: nn.Module, subject: Subject, bits: int, group_size: int | None = None) -> None:
    """Each row, or each group of a row's columns, on the grid of its own range."""
    for whole in weights_of(model, subject):
        for weight in whole.split(group_size or whole.shape[1], dim=1):
            low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low).clamp(min=1e-12) / (2**bits - 1)
            zero = (-low / scale).round()
            weight.copy_(scale * (((weight / scale).round() + zero).clamp(0, 2**bits - 1) - zero))


def remove_smallest(model: nn.Module, subject: Subject, kept: tuple[int, int] | None) -> None:
    """Half of each weight matrix, or all but n of m neighbours."""
    for weight in weights_of(model, subject):
        if kept is None:
            weight[weight.abs() <= weight.abs().median()] = 0
        else:
            runs = weight.reshape(len(weight), -1, kept[1])
            gone = runs.abs().argsort(-1)[..., : kept[1] - kept[0]]
            weight.copy_(runs.scatter(-1, gone, 0).reshape(weight.shape))


def remove_blocks(model: nn.Module, subject: Subject, blocks: list[str]) -> None:
    """Out of their container."""
    container: Any = model.get_submodule(subject.container)
    for name in reversed(blocks):
        del container[int(name.rpartition(".")[2])]


@dataclass(frozen=True)
class Row:
    """One way to compress: the perplexities without and with the solve, and the seconds that it took."""

    name: str
    plain: float
    solved: float
    seconds: float


def compress(subject: Subject, effort: Effort) -> tuple[float, list[Row]]:
    """The full model's perplexity, and the rows of the table."""
    count = len(subject.model.get_submodule(subject.container))  # type: ignore[arg-type]
    blocks = [f"{subject.container}.{count // 2 - 1 + i}" for i in range(2)]
    data = [{"input_ids": codes[:, :-1]} for codes in subject.train[: effort.calibration].split(32)]
    # Each layer mends what the layers before it have lost of the model's own outputs, which is the default.
    options: dict[str, Any] = {"layers": subject.layers, "progress": False}
    ways: list[tuple[str, Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = [
        (
            f"{bits} bits",
            lambda model, bits=bits: round_to_nearest(model, subject, bits),
            lambda model, bits=bits: quantize(model, data, bits, None, **options),
        )
        for bits in (4, 3)
    ]
    ways += [
        (
            "half of the weights" if kept is None else "2 of 4 weights",
            lambda model, kept=kept: remove_smallest(model, subject, kept),
            lambda model, kept=kept: prune(model, data, kept or 0.5, **options),
        )
        for kept in (None, (2, 4))
    ]
    ways.append(
        (
            "two blocks less",
            lambda model: remove_blocks(model, subject, blocks),
            lambda model: replace_blocks(model, data, blocks, progress=False),
        )
    )
    full = subject.perplexity(subject.model)
    print(
        f"{len(weights_of(subject.model, subject))} layers, {effort.calibration * CONTEXT:,} calibration places,",
        end=" ",
    )
    print(f"{subject.held_out.numel():,} held out; perplexity of the full model {full:.3f}")
    print(f"\n  {'':<22}{'without solve':>16}{'':>9}{'onestep':>12}{'':>9}{'seconds':>9}")
    rows = []
    for name, without, with_solve in ways:
        plain, solved = copy.deepcopy(subject.model), copy.deepcopy(subject.model)
        with torch.no_grad():
            without(plain)
        begin = time.perf_counter()
        with_solve(solved)
        seconds = time.perf_counter() - begin
        row = Row(name, subject.perplexity(plain), subject.perplexity(solved), seconds)
        rows.append(row)
        print(
            f"  {name:<22}{row.plain:>16.3f}{row.plain / full - 1:>+9.2%}"
            f"{row.solved:>12.3f}{row.solved / full - 1:>+9.2%}{seconds:>9.1f}"
        )
    return full, rows


def draw(full: float, rows: list[Row]) -> None:
    """What each way costs, without and with the solve."""
    figure, ax = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    for offset, color, label, values in (
        (0.2, "#c8553d", "without the solve", [row.plain / full - 1 for row in rows]),
        (-0.2, "#2a6f97", "onestep.layerwise", [row.solved / full - 1 for row in rows]),
    ):
        places = [len(rows) - 1 - i + offset for i in range(len(rows))]
        bars = ax.barh(places, [max(100 * value, 0.01) for value in values], 0.36, color=color, label=label)
        ax.bar_label(bars, [f"{value:+.2%}" for value in values], padding=3, fontsize=8)
    ax.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    ax.set_xscale("symlog", linthresh=1)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("perplexity over the full model's, per cent more")
    ax.margins(x=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)
    print(f"\npicture: {PICTURE}")


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description="Compress a language model by solving its layers one by one.")
    parser.add_argument("text", nargs="?", type=Path, help="a UTF-8 text; the Python documentation topics if absent")
    parser.add_argument(
        "--model", type=Path, help="a causal language model that transformers loads, with its tokenizer"
    )
    parser.add_argument("--quick", action="store_true", help="a smaller network, trained for less")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    text = characters(arguments.text)
    subject = character_gpt(text, effort) if arguments.model is None else pretrained(arguments.model, text, effort)
    draw(*compress(subject, effort))


if __name__ == "__main__":
    main()
