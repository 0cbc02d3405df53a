"""Trains a character GPT from scratch with onestep.fit, against Adam and Muon at their best rates, and lets them write.

    python examples/text_generation.py [text.txt] [--quick] [--seeds N] [--steps N]

The text is that of the Python documentation topics which CPython ships (pydoc_data), or a file. The GPT has four layers
and about a million parameters. Adam and torch.optim.Muon run at the best of several learning rates; onestep.fit has no
setting but its number of steps, half of theirs. All start from the same weights.

Prints held-out losses, how long onestep.fit took to where the others ended, and text drawn from each network; writes
examples/output/text_generation.png, loss against seconds.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from race import Problem, draw, race, table
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
HERE = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
PICTURE = HERE / "output" / "text_generation.png"
CONTEXT = 64
BATCH = 16


@dataclass(frozen=True)
class Effort:
    """How much to run; the rates are those that each optimiser is tried with."""

    width: int
    layers: int
    steps: int
    seeds: int
    adam: Sequence[float]
    muon: Sequence[float]
    held_out: int
    letters: int


FULL = Effort(144, 4, 400, 5, (2e-3, 4e-3, 8e-3), (0.02, 0.03, 0.05), 128, 400)
QUICK = Effort(96, 3, 160, 1, (4e-3, 8e-3), (0.03,), 32, 120)


class Block(nn.Module):
    """Attention to what came before, then two dense layers, each added to what it was given."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_dense = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, T, width)."""
        n, T, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(n, T, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, T, width))
        return x + self.down(F.gelu(self.up(self.norm_dense(x))))


class GPT(nn.Module):
    """Characters (n, T) → scores of the next one (n, T, characters)."""

    def __init__(self, characters: int, width: int, layers: int) -> None:
        super().__init__()
        self.character, self.place = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores."""
        return self.head(self.norm(self.blocks(self.character(input_ids) + self.place.weight[: input_ids.shape[1]])))


@dataclass(frozen=True)
class Text:
    """Sequences of CONTEXT characters with the ones that follow them: to train on, and held out."""

    alphabet: str
    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor


def characters(path: Path | None) -> str:
    """Those of a file, or of the topics of Python's documentation, which come with Python."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path | None, held_out: int) -> Text:
    """Cuts a text into sequences, in random order."""
    text = characters(path)
    alphabet = "".join(sorted(set(text)))
    place = {character: i for i, character in enumerate(alphabet)}
    codes = torch.tensor([place[character] for character in text])
    n = (len(codes) - 1) // CONTEXT
    if n < 8 * held_out:
        raise SystemExit(f"the text has {len(codes)} characters; expected at least {8 * held_out * CONTEXT + 1}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    inputs, targets = (codes[i : i + n * CONTEXT].view(n, CONTEXT)[order] for i in (0, 1))
    return Text(alphabet, inputs[held_out:], targets[held_out:], inputs[:held_out], targets[:held_out])


def write(model: nn.Module, alphabet: str, length: int) -> str:
    """Text drawn from the network, character by character."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.tensor([[alphabet.index("\n")]])
    with torch.no_grad():
        for _ in range(length):
            chances = (model(codes[:, -CONTEXT:])[:, -1] / 0.7).softmax(-1)
            codes = torch.cat([codes, torch.multinomial(chances, 1, generator=generator)], 1)
    return "".join(alphabet[code] for code in codes[0, 1:])


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description="Train a character GPT from scratch: onestep.fit, Adam and Muon.")
    parser.add_argument("text", nargs="?", type=Path, help="a text file (default: the Python documentation topics)")
    parser.add_argument("--quick", action="store_true", help="a smaller network, fewer steps, one run each")
    parser.add_argument("--seeds", type=int, help="runs of each, from other first weights")
    parser.add_argument("--steps", type=int, help="of Adam and Muon")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    steps, seeds = arguments.steps or effort.steps, arguments.seeds or effort.seeds
    text = read_text(arguments.text, effort.held_out)

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return GPT(len(text.alphabet), effort.width, effort.layers)

    problem = Problem(network, text.inputs, text.targets, text.held_inputs, text.held_targets, BATCH)
    parameters = sum(p.numel() for p in network(0).parameters())
    print(
        f"GPT of {parameters:,} parameters, {text.inputs.numel():,} characters to train on, {steps} steps of "
        f"{BATCH} sequences; {torch.get_num_threads()} threads"
    )
    runs = race(problem, steps, seeds, {"Adam": effort.adam, "Muon": effort.muon})
    table(runs)
    for own in runs.values():
        print(f"\n{own[0].name} writes:\n{write(own[0].model.eval(), text.alphabet, effort.letters)}")
    draw(runs, PICTURE, f"A character GPT of {parameters:,} parameters, from scratch")


if __name__ == "__main__":
    main()
