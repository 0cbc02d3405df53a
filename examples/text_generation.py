"""Trains a character GPT by solving for it, and lets it write.

    python examples/text_generation.py [text.txt] [--quick]

The text is that of the Python documentation topics which CPython ships (pydoc_data), or a file. A GPT of four layers
and about a million parameters is pre-trained briefly with Adam, and from there on the same weights go two ways:

(a) Its head is drawn anew and estimated in one pass over the data by onestep.fit(method="closed_form"), then Newton
    steps close the rest. The baseline is the same head trained by Adam over many passes, its rate falling to zero.
(b) The whole network goes on by Gauss-Newton, onestep.fit(method="gauss_newton"). The baseline is Adam with the best of
    several learning rates, which fall to zero over the run.

Prints both tables and text sampled from each network; writes examples/output/text_generation.png, loss against seconds
and against passes over the data.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onestep

HERE = Path(__file__).resolve().parent
HERE = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
OUTPUT = HERE / "output"
PICTURE = OUTPUT / "text_generation.png"
CONTEXT = 64
ADAM_BATCH = 16
# The best of 0.02, 0.05, 0.1 and 0.2 for the head alone.
HEAD_RATE = 0.2


@dataclass(frozen=True)
class Effort:
    """How much to run."""

    width: int
    layers: int
    pretraining: int
    head_sequences: int
    head_epochs: int
    newton_steps: int
    adam_steps: int
    rates: tuple[float, ...]
    gauss_newton_steps: int
    batch: int
    curvature_batch: int
    held_out: int


FULL = Effort(144, 4, 120, 800, 60, 3, 40, (1e-3, 2e-3, 4e-3), 8, 112, 40, 128)
QUICK = Effort(32, 2, 40, 100, 30, 2, 20, (2e-3, 4e-3), 4, 32, 16, 32)


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

    def features(self, x: Tensor) -> Tensor:
        """What the head is given."""
        return self.norm(self.blocks(self.character(x) + self.place.weight[: x.shape[1]]))

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        return self.head(self.features(x))


@dataclass(frozen=True)
class Text:
    """Sequences of CONTEXT characters with the ones that follow them: to train on, and held out."""

    alphabet: str
    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor


def read_text(path: Path | None, held_out: int) -> Text:
    """Cuts a text into sequences, in random order."""
    if path is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        text = path.read_text(encoding="utf-8")
    alphabet = "".join(sorted(set(text)))
    place = {character: i for i, character in enumerate(alphabet)}
    codes = torch.tensor([place[character] for character in text])
    n = (len(codes) - 1) // CONTEXT
    if n < 8 * held_out:
        raise SystemExit(f"the text has {len(codes)} characters; expected at least {8 * held_out * CONTEXT + 1}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    inputs, targets = (codes[i : i + n * CONTEXT].view(n, CONTEXT)[order] for i in (0, 1))
    return Text(alphabet, inputs[held_out:], targets[held_out:], inputs[:held_out], targets[:held_out])


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy."""
    with torch.no_grad():
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten()).item()


@dataclass
class Run:
    """A trained network, and the held-out loss along the way with the seconds and passes over the data it took."""

    name: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    steps: int = 0


def adam(model: nn.Module, text: Text, rate: float, steps: int, name: str, every: int) -> Run:
    """Adam with a short warm-up and a rate that falls to zero; measuring the loss is not in its seconds."""
    run = Run(name, model, [loss_of(model, text.held_inputs, text.held_targets)], [0.0], [0.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)
    spent = 0.0
    for step in range(steps):
        begin = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        rows = torch.randint(len(text.inputs), (ADAM_BATCH,), generator=generator)
        loss = F.cross_entropy(model(text.inputs[rows]).flatten(0, -2), text.targets[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spent += time.perf_counter() - begin
        if (step + 1) % every == 0 or step + 1 == steps:
            run.losses.append(loss_of(model, text.held_inputs, text.held_targets))
            run.seconds.append(spent)
            run.passes.append((step + 1) * ADAM_BATCH / len(text.inputs))
    run.steps = steps
    return run


def gauss_newton(
    model: nn.Module,
    text: Text,
    checkpoint: Path,
    goal: float = 0.0,
    *,
    steps: int,
    batch: int,
    curvature: int,
    cg: int,
) -> Run:
    """onestep.fit two steps at a time until the held-out loss is down to ``goal``; measuring it is not in its seconds.

    Each call goes on from the checkpoint of the last. A step computes the gradient over ``batch`` sequences, is judged
    on as many others, and takes curvature over ``curvature`` of them: by at most ``cg`` iterations.
    """
    run = Run("Gauss-Newton (onestep.fit)", model, [loss_of(model, text.held_inputs, text.held_targets)], [0.0], [0.0])
    checkpoint.unlink(missing_ok=True)
    while run.steps < steps and run.losses[-1] > goal:
        run.steps += 2
        result, seconds = timed(
            lambda: onestep.fit(
                model,
                (text.inputs, text.targets),
                "cross_entropy",
                method="gauss_newton",
                max_steps=run.steps,
                batch_size=batch,
                curvature_batch_size=curvature,
                cg_iterations=cg,
                progress=False,
                checkpoint=checkpoint,
            )
        )
        run.losses.append(loss_of(model, text.held_inputs, text.held_targets))
        run.seconds.append(run.seconds[-1] + seconds)
        # A product goes through its rows about as a gradient does, and the preconditioner is made of one more pass; a
        # step is judged on as many rows as it is made of.
        passes = sum(record.cg_iterations + 1 for record in result.history)
        run.passes.append((2 * run.steps * batch + passes * curvature) / len(text.inputs))
    checkpoint.unlink(missing_ok=True)
    return run


def new_head(model: GPT) -> GPT:
    """A copy of which only the head is trained, drawn anew."""
    model = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(2)
    model.head.reset_parameters()
    model.head.requires_grad_(True)
    return model


def head_by_adam(head: nn.Linear, features: Tensor, targets: Tensor, epochs: int) -> float:
    """Mini-batches with a rate that falls to zero; returns the loss over all rows."""
    optimizer = torch.optim.Adam(head.parameters(), lr=HEAD_RATE)
    generator = torch.Generator().manual_seed(3)
    steps, size = 0, 2048
    a_pass = -(-len(features) // size)
    for _ in range(epochs):
        for rows in torch.randperm(len(features), generator=generator).split(size):
            optimizer.param_groups[0]["lr"] = HEAD_RATE * (1 - steps / (epochs * a_pass))
            optimizer.zero_grad()
            F.cross_entropy(head(features[rows]), targets[rows]).backward()
            optimizer.step()
            steps += 1
    return loss_of(head, features, targets)


def timed(compute: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the seconds it took."""
    begin = time.perf_counter()
    result = compute()
    return result, time.perf_counter() - begin


def heads(pretrained: GPT, text: Text, effort: Effort) -> GPT:
    """Part (a): prints the table, and returns the network with the solved head."""
    x, y = text.inputs[: effort.head_sequences], text.targets[: effort.head_sequences]
    model = new_head(pretrained)
    start = loss_of(model, x, y)
    _, one_pass = timed(
        lambda: onestep.fit(model, (x, y), "cross_entropy", method="closed_form", progress=False, seed=1)
    )
    estimated = loss_of(model, x, y)
    # What the frozen body computes does not change: from here on it is data.
    with torch.no_grad():
        features, frozen = timed(lambda: model.features(x).flatten(0, 1))
    newton, by_newton = timed(
        lambda: onestep.fit(
            model.head,
            (features, y.flatten()),
            "cross_entropy",
            method="newton_cg",
            max_steps=effort.newton_steps,
            cg_iterations=15,
            progress=False,
        )
    )
    baseline = new_head(pretrained).head
    converged, by_adam = timed(lambda: head_by_adam(baseline, features, y.flatten(), effort.head_epochs))
    print(f"\n(a) the head alone, drawn anew: {sum(p.numel() for p in baseline.parameters()):,} parameters,")
    print(f"    {y.numel():,} characters; the loss is over those; {frozen:.1f} s for the frozen body count with each")
    print(f"  {'':<40}{'passes':>8}{'seconds':>9}{'loss':>9}{'over Adam':>11}")
    for name, passes, seconds, loss in (
        ("drawn anew", 0, 0.0, start),
        (f"Adam, {effort.head_epochs} passes", effort.head_epochs, frozen + by_adam, converged),
        ("closed form, one pass (onestep.fit)", 1, one_pass, estimated),
        (f"+ {len(newton.history)} Newton steps", "", one_pass + by_newton, newton.loss),
    ):
        print(f"  {name:<40}{passes:>8}{seconds:>9.1f}{loss:>9.4f}{loss / converged - 1:>+11.1%}")
    return model


def whole_network(pretrained: GPT, text: Text, effort: Effort) -> tuple[Run, Run]:
    """Part (b): prints the table, and returns both runs."""
    every = max(1, effort.adam_steps // 12)
    tried = [
        adam(copy.deepcopy(pretrained), text, rate, effort.adam_steps, f"Adam, learning rate {rate:g}", every)
        for rate in effort.rates
    ]
    best = min(tried, key=lambda run: run.losses[-1])
    ours = gauss_newton(
        copy.deepcopy(pretrained),
        text,
        OUTPUT / "text_generation.fit",
        steps=effort.gauss_newton_steps,
        batch=effort.batch,
        curvature=effort.curvature_batch,
        cg=5,
    )
    print(f"\n(b) the whole network, {sum(p.numel() for p in pretrained.parameters()):,} parameters; held-out loss")
    print("    Adam's last losses: " + ", ".join(f"{r.losses[-1]:.4f} at {r.name.split()[-1]}" for r in tried))
    print(f"  {'':<40}{'steps':>8}{'passes':>9}{'seconds':>9}{'first':>9}{'last':>9}")
    for run in (best, ours):
        print(
            f"  {run.name:<40}{run.steps:>8}{run.passes[-1]:>9.2f}{run.seconds[-1]:>9.1f}"
            f"{run.losses[0]:>9.4f}{run.losses[-1]:>9.4f}"
        )
    reached = next((i for i, loss in enumerate(ours.losses) if loss <= best.losses[-1]), None)
    if reached is None:
        print(f"  Gauss-Newton did not reach Adam's last loss in {ours.steps} steps")
    else:
        ratio = ours.seconds[reached] / best.seconds[-1]
        print(f"  Gauss-Newton reached Adam's last loss after {2 * reached} steps, in {ratio:.1f} times Adam's seconds")
    return best, ours


def write(model: nn.Module, alphabet: str, length: int = 120) -> str:
    """Text drawn from the network, character by character."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.tensor([[alphabet.index("\n")]])
    with torch.no_grad():
        for _ in range(length):
            chances = (model(codes[:, -CONTEXT:])[:, -1] / 0.8).softmax(-1)
            codes = torch.cat([codes, torch.multinomial(chances, 1, generator=generator)], 1)
    return "".join(alphabet[code] for code in codes[0, 1:])


def draw(adam_run: Run, ours: Run) -> None:
    """Loss against seconds, and against passes."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    for ax, what, label in ((axes[0], "seconds", "seconds"), (axes[1], "passes", "passes over the training text")):
        for run, color, marker in ((adam_run, "#c8553d", "."), (ours, "#2a6f97", "o")):
            ax.plot(getattr(run, what), run.losses, color=color, marker=marker, markersize=4, label=run.name)
        ax.set(xlabel=label)
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out loss (nats per character)")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle("A character GPT from the same pre-trained weights", fontsize=11)
    figure.savefig(PICTURE, dpi=150, bbox_inches="tight", pad_inches=0.2)
    print(f"\npicture: {PICTURE}")


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(
        description="Pre-train a character GPT, then solve for its head, and for all of it."
    )
    parser.add_argument(
        "text", nargs="?", type=Path, help="a UTF-8 text file; the Python documentation topics if absent"
    )
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer steps")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    OUTPUT.mkdir(exist_ok=True)
    text = read_text(arguments.text, effort.held_out)
    torch.manual_seed(0)
    model = GPT(len(text.alphabet), effort.width, effort.layers)
    rows = len(text.inputs)
    print(
        f"{rows:,} sequences of {CONTEXT} characters, {len(text.alphabet)} different; {effort.held_out} held out;",
        end=" ",
    )
    print(f"{torch.get_num_threads()} threads")
    first = adam(model, text, 3e-3, effort.pretraining, "pre-training", effort.pretraining)
    print(f"pre-trained: {effort.pretraining} steps of Adam, {first.seconds[-1]:.1f} s, loss {first.losses[-1]:.4f}")
    solved = heads(model, text, effort)
    adam_run, ours = whole_network(model, text, effort)
    writers = (
        ("pre-trained", model),
        ("solved head", solved),
        (adam_run.name, adam_run.model),
        (ours.name, ours.model),
    )
    for name, writer in writers:
        print(f"\n--- {name} writes:\n{write(writer, text.alphabet)}")
    draw(adam_run, ours)


if __name__ == "__main__":
    main()
