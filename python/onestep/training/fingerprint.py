"""What tells one fit from another, so that a checkpoint is not taken for that of another problem."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onestep._torch_private import tree_leaves
from onestep.evaluation.data import Chunk, IndexedSource
from onestep.evaluation.digest import digest
from onestep.evaluation.losses import Loss
from onestep.training.facts import Facts, FirstPass, Settings

# Besides the first rows, about this many are compared, at equal distances.
_ROWS = 1024
# Settings that change the steps, so that they must be those of the checkpoint. Others say when to stop, and may change.
_SETTINGS = ("weight_decay", "damping", "batch_size", "curvature_batch_size", "cg_iterations", "seed")


def fingerprint(facts: Facts, settings: Settings) -> dict[str, Any]:
    """Settings and hashes by name; a hash is None where the data is not the same on each pass."""
    marks: dict[str, Any] = {name: getattr(settings, name) for name in _SETTINGS}
    marks |= {"loss": facts.described, "rows": facts.source.known_rows, "inputs": None, "target": None}
    # Without addresses, which another process has otherwise.
    marks["model"] = digest(re.sub("0x[0-9a-f]+", "", repr(facts.model)))
    # The checkpoint has all parameters, and would put its own in the place of those that are not trained.
    marks["frozen parameters"] = digest([p for p in facts.model.parameters() if not p.requires_grad])
    marks["buffers"] = digest(_constants(facts.model))
    first = facts.first
    again = FirstPass(facts.source, facts.share, shuffled=False)
    again.close()
    if digest(again.first.inputs) == digest(first.inputs) and digest(again.first.target) == digest(first.target):
        chunks = [first, *_spread(facts)]
        marks["inputs"] = digest([chunk.inputs for chunk in chunks])
        marks["target"] = digest([chunk.target for chunk in chunks])
    return marks


def _constants(model: nn.Module) -> list[Tensor]:
    """The buffers, which checkpoints have too, but for statistics of layers like BatchNorm, which training changes."""
    changing = {
        id(buffer)
        for module in model.modules()
        if getattr(module, "track_running_stats", False)
        for buffer in module.buffers(recurse=False)
    }
    return [buffer for buffer in model.buffers() if id(buffer) not in changing]


def described(loss: str | Callable[..., Any], function: Loss) -> str:
    """A loss by its name, a function by where it is defined and what it names and holds."""
    if function.name not in ("function", "weighted_cross_entropy"):
        return function.name
    kind = type(loss) if isinstance(loss, nn.Module) else loss
    name = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', type(loss).__qualname__)}"
    return f"{name} {digest(_held(loss))}"


def _held(loss: Any) -> list[Any]:
    """The settings of a module, the arguments of a partial, the names, constants and variables around a function.

    Numbers, texts and tensors alone: others may be printed with their addresses, which another process has otherwise.
    """
    if isinstance(loss, nn.Module):
        settings = [item for item in vars(loss).items() if not item[0].startswith("_") and item[0] != "training"]
        held: list[Any] = [*settings, *loss.state_dict().items()]
    elif isinstance(loss, partial):
        held = [*_held(loss.func), *loss.args, *sorted(loss.keywords.items(), key=lambda item: item[0])]
    elif (code := getattr(loss, "__code__", None)) is not None:
        held = [*code.co_names, *code.co_consts, *(getattr(loss, "__defaults__", None) or ())]
        held += [value for cell in getattr(loss, "__closure__", None) or () for value in _contents(cell)]
    else:
        held = []
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, (Tensor, int, float, str))]


def _contents(cell: Any) -> list[Any]:
    """The value of a variable around a function, if it has one yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def differences(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, as a clause; empty if nothing does."""
    found = []
    for name, value in now.items():
        before = saved.get(name)
        hashed = name in ("inputs", "target", "model", "frozen parameters", "buffers")
        if before == value or (hashed and None in (before, value)):
            continue
        found.append(f"other {name}" if hashed else f"{name}={value!r}, the checkpoint's is {before!r}")
    return "; ".join(found)


def _spread(facts: Facts) -> list[Chunk]:
    """Rows at equal distances over the data, where any row can be read."""
    source = facts.source
    if not isinstance(source, IndexedSource):
        return []
    return [source.take(torch.arange(0, source.rows, max(1, source.rows // _ROWS)))]
