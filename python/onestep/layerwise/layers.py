"""The linear layers of a model by the patterns of their names, and batches as the model takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from onestep._restored import Entry, eval_mode
from onestep.layerwise.experts import refusal, stacks_of
from onestep.ops.compensated import compensated_sweep

# What a layer pattern is: "*.mlp.*", or several, of which those that begin with "!" leave layers out.
Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    Attributes:
        name: its name in the model.
        module: an nn.Linear; a Conv1D of transformers, whose weight is transposed; or a module of stacked experts.
        stack, expert: of stacked experts, the name of the parameter and the place in it.
    """

    name: str
    module: nn.Module
    stack: str | None = None
    expert: int = 0

    @property
    def weight(self) -> Tensor:
        """(outputs, features), a view of the module's parameter without its graph."""
        weight: Tensor = getattr(self.module, self.stack or "weight").detach()
        if self.stack is not None:
            return weight[self.expert]
        return weight if isinstance(self.module, nn.Linear) else weight.mT

    @property
    def bias(self) -> Tensor | None:
        """(outputs,), or None."""
        bias = None if self.stack is not None else self.module.bias
        return bias.detach() if isinstance(bias, Tensor) else None

    def write(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replaces the values of the weight, and of the bias where one is given, in place."""
        with torch.no_grad():
            self.weight.copy_(weight)
            if bias is not None and self.bias is not None:
                self.bias.copy_(bias)

    def stored(self, weight: Tensor) -> Tensor:
        """What becomes of a weight of another dtype when it is written to the layer, in that other dtype again."""
        return weight.to(self.weight.dtype).to(weight.dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an nn.Linear or a Conv1D of transformers."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def find_layers(model: nn.Module, patterns: Patterns, *, what: str = "model") -> dict[str, Layer]:
    """The linear layers whose names match, in the order of the model.

    Experts that are stacked in one parameter are a layer each: "…experts.down_proj.3". A layer whose weight is also
    another module's parameter, such as a head that is tied to an embedding, is left out unless it is named in full.

    Args:
        model: any nn.Module.
        patterns: of names.
        what: the argument that the model is, for messages.

    Raises:
        TypeError: the model is no nn.Module, a pattern no string, or a weight no floating-point parameter.
        ValueError: a pattern matches no layer.
        NotImplementedError: a layer that matches has a weight that is computed, or stacked in another way.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} is {type(model).__name__}; expected torch.nn.Module")
    listed = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else [None]
    if not listed or not all(isinstance(pattern, str) for pattern in listed):
        raise TypeError(f"layers is {patterns!r}; expected a pattern such as '*.mlp.*', or several")
    texts = [str(pattern) for pattern in listed]
    wanted = [pattern for pattern in texts if not pattern.startswith("!")] or ["*"]
    unwanted = [pattern[1:] for pattern in texts if pattern.startswith("!")]
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    every = every_layer(model)
    tied = {
        name
        for name, layer in every.items()
        if layer.stack is None and uses[id(layer.module.weight)] > 1 and name not in wanted
    }
    found = {
        name: layer
        for name, layer in every.items()
        if name not in tied and _matches(name, wanted) and not _matches(name, unwanted)
    }
    for pattern in wanted:
        if not any(_matches(name, [pattern]) for name in every if name not in tied) or not found:
            shown = pattern if found else texts[0] if len(texts) == 1 else texts
            some = ", ".join(list(every)[:4]) or "none"
            shared = "; a layer that shares its weight must be named in full" if tied else ""
            raise ValueError(
                f"no linear layer of the {what} matches {shown!r}; it has {len(every)} ({some}, ...){shared}"
            )
    for layer in found.values():
        _check(layer)
    return found


def every_layer(model: nn.Module) -> dict[str, Layer]:
    """All linear layers of a model by name, in its order."""
    return {layer.name: layer for layer in _linear_layers(model)}


def _linear_layers(model: nn.Module) -> Iterator[Layer]:
    for name, module in model.named_modules():
        if is_linear(module):
            yield Layer(name, module)
        for stack, parameter in stacks_of(module).items():
            for expert in range(len(parameter)):
                yield Layer(f"{name}.{stack}.{expert}".lstrip("."), module, stack, expert)


def _check(layer: Layer) -> None:
    module = layer.module
    if layer.stack is not None:
        reason = refusal(module)
        if reason is not None:
            raise NotImplementedError(
                f"the experts of {layer.name!r} ({type(module).__name__}) {reason}, which is not supported: leave them "
                f"out, such as by layers=['*', '!*{layer.stack}.*']"
            )
        return
    if "weight" not in dict(module.named_parameters(recurse=False)):
        raise NotImplementedError(
            f"the weight of layer {layer.name!r} is computed from other parameters (a parametrization, or a mask of "
            "torch.nn.utils.prune), so that it cannot be written to: make it a parameter first, such as by "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if not layer.weight.is_floating_point():
        raise TypeError(
            f"the weight of layer {layer.name!r} is {layer.weight.dtype}; expected a floating-point dtype: layers that "
            "are quantised already have no weights to solve for"
        )


def check_devices(layers: Iterable[Layer]) -> None:
    """Refuses layers that are neither on the CPU nor on a CUDA GPU that there are kernels for.

    Raises:
        NotImplementedError: naming the layer, or what the build lacks.
    """
    for layer in layers:
        device = layer.weight.device
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError(
                f"layer {layer.name!r} is on {device}; layers are solved on the CPU or on a CUDA GPU: model.cpu()"
            )
        compensated_sweep.require(device.type)


def check_finite(layers: Mapping[str, Layer], whose: str = "") -> None:
    """Refuses weights and biases of NaN or infinity.

    Args:
        layers: by name; those that are no linear layers, but blocks, are let pass.
        whose: for messages.

    Raises:
        ValueError: naming the layer.
    """
    for name, layer in layers.items():
        if layer.stack is None and not is_linear(layer.module):
            continue
        for what, values in (("weight", layer.weight), ("bias", layer.bias)):
            if values is not None and not bool(values.isfinite().all()):
                raise ValueError(
                    f"the {what} of the {whose}layer {name!r} holds NaN or infinity; expected finite values"
                )


def check_untied(layers: Mapping[str, Layer]) -> None:
    """Refuses two layers with one weight: each would overwrite what the other was solved for.

    Raises:
        ValueError: naming both.
    """
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = None if layer.stack is not None else first.setdefault(id(layer.module.weight), name)
        if other is not None and other != name:
            raise ValueError(
                f"layers {other!r} and {name!r} share one weight; expected one of them: the weight is solved with "
                "the inputs of the layer that is named"
            )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def batches_of(data: Any) -> Iterable[Any]:
    """The batches of ``data``, which can be gone through again: a tensor or a mapping is one batch.

    Raises:
        TypeError: an iterator, which would be used up by the first pass.
    """
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if isinstance(data, (Iterator, str, bytes)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data is {type(data).__name__}; expected batches that can be gone through more than once: a list, a "
            "DataLoader, a tensor, or a mapping of the model's keyword arguments"
        )
    return data


def count_of(batches: Iterable[Any]) -> int | None:
    """How many batches there are, where that is known."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def call(model: nn.Module, batch: Any) -> Any:
    """The model on one batch: a tensor, the positional arguments in a tuple or list, or a mapping of keywords."""
    keywords = dict(batch) if isinstance(batch, Mapping) else {}
    arguments = tuple(batch) if isinstance(batch, (tuple, list)) else () if isinstance(batch, Mapping) else (batch,)
    try:
        return model(*arguments, **keywords)
    except (TypeError, AttributeError) as error:
        kinds = [type(value).__name__ for value in arguments] or list(keywords)
        raise TypeError(
            f"the model does not take a batch ({', '.join(kinds)}): {error}. A batch is what the model is called "
            "with, without targets"
        ) from error


def padded(models: Iterable[nn.Module]) -> list[Entry]:
    """What ``replaced`` takes so that torch's encoders call their layers with padded tensors, not with nested ones."""
    encoders = [module for model in models for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    return [(vars(encoder), "use_nested_tensor", False) for encoder in encoders]


def evaluating(*models: nn.Module) -> AbstractContextManager[None]:
    """Eval mode; afterwards each module is in the mode that it was in."""
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; expected torch.nn.Module")
    return eval_mode(*models)
