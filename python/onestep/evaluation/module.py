"""A module on a chunk of rows: calling it, in eval mode, and how much of it fits in memory."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import debug_unwrap

from onestep._restored import replaced
from onestep._torch_private import (
    BatchNorm,
    DropoutNd,
    TorchDispatchMode,
    compiled_calls,
    original_module,
    own_parameters,
    tree_leaves,
)
from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import summed_by_piece
from onestep.evaluation.errors import NonFiniteError
from onestep.evaluation.losses import Loss
from onestep.evaluation.parameters import ParameterVector, call_with, flatten
from onestep.evaluation.row_means import RowMeans

Result = TypeVar("Result")

# What one chunk may keep for its backward pass.
_CHUNK_BYTES = 256 * 2**20


def call_model(module: nn.Module, inputs: Any, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """module(inputs): a tuple or a dict of inputs is unpacked; with other parameters, by name, if given.

    A compiled module, and compiled parts of one, are evaluated uncompiled where the parameters are others.
    """
    kwargs = inputs if isinstance(inputs, dict) else {}
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else () if kwargs else (inputs,)
    if parameters is None:
        outputs = without_graph(lambda: module(*args, **kwargs))
    else:
        # The names are those of the compiled module.
        plain = module if _has_keras_layers(module) else original_module(module)
        outputs = evaluate_at(module, parameters, lambda: without_graph(lambda: plain(*args, **kwargs)))
    return outputs if isinstance(outputs, Tensor) else _tensor_of(outputs, own_loss="labels" in kwargs)


def evaluate_at(module: nn.Module, parameters: dict[str, Tensor], compute: Callable[[], Result]) -> Result:
    """compute() while the module's parameters have other values, by name."""
    if _has_keras_layers(module):
        own, values = [module.get_parameter(name) for name in parameters], list(parameters.values())
        result: Result = call_with(compute, own, values)
        return result
    with uncompiled(original_module(module)), _swapped(module, parameters):
        return compute()


def _tensor_of(outputs: Any, own_loss: bool) -> Tensor:
    """The scores that a model returns among other things, as those of transformers do; or its own loss, (1,)."""
    for name in ("loss", "logits") if own_loss else ("logits",):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found.reshape(1) if name == "loss" else found
    raise TypeError(f"the model returned {type(outputs).__name__}; expected a tensor, or something that has logits")


def _has_keras_layers(module: nn.Module) -> bool:
    """Whether a module is Keras' or holds such layers: they read their variables past torch's registered parameters.

    ``functional_call`` swaps those alone, without a word, so derivatives in them would be zeros.
    """
    if "keras" not in sys.modules:
        return False
    kinds = {kind for layer in module.modules() for kind in type(layer).__mro__}
    return any(kind.__module__.partition(".")[0] == "keras" for kind in kinds)


def uncompiled(module: nn.Module) -> AbstractContextManager[None]:
    """Lets what torch.compile has compiled in a module run as written.

    Inside torch.func and under hooks it would be compiled anew, with a wall of warnings.
    """
    return replaced(compiled_calls(module))


def without_graph(compute: Callable[[], Result]) -> Result:
    """compute(); under ``torch.no_grad`` with a graph if it differentiates by torch.autograd.grad inside."""
    if torch.is_grad_enabled():
        return compute()
    try:
        return compute()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        return compute()


def _swapped(module: nn.Module, values: dict[str, Tensor]) -> AbstractContextManager[None]:
    """The module's parameters have these values, by name, in every place that they are in.

    What ``torch.func.functional_call`` does, but that parameters are put back whatever interrupts it, and that a module
    which occurs twice in another is swapped once.
    """
    if isinstance(module, (torch.jit.ScriptModule, nn.DataParallel)):
        raise RuntimeError(
            f"model is {type(module).__name__}, whose parameters cannot be exchanged; expected the module that it was "
            "made of"
        )
    of_parameter = {id(module.get_parameter(name)): value for name, value in values.items()}
    return replaced(
        (own, name, of_parameter[id(parameter)])
        for own in map(own_parameters, module.modules())
        for name, parameter in own.items()
        if id(parameter) in of_parameter
    )


def parameter_names(module: nn.Module, parameters: ParameterVector) -> list[str]:
    """The module's names of the parameters, in their order."""
    by_identity = {id(value): name for name, value in module.named_parameters()}
    return [by_identity[id(tensor)] for tensor in parameters.tensors]


def warn_of_eval_mode(model: nn.Module, caller: str, stacklevel: int) -> None:
    """Warns where a layer in training mode will behave differently in eval mode."""
    warn_of_layers(noisy_layers(model), caller, stacklevel + 1)


def warn_of_layers(noisy: str, caller: str, stacklevel: int) -> None:
    """The warning for layers of these names, if there are any."""
    if noisy:
        warnings.warn(
            f"{caller} evaluates the model in eval mode: {noisy} neither drops nor learns statistics",
            stacklevel=stacklevel + 1,
        )


def noisy_layers(model: nn.Module) -> str:
    """Names of the layers in training mode that behave differently in eval mode."""
    noisy = {type(m).__name__ for m in model.modules() if m.training and isinstance(m, (DropoutNd, BatchNorm))}
    return ", ".join(sorted(noisy))


def chunk_rows(model: nn.Module, loss: Loss, chunk: Chunk) -> int:
    """How many rows keep ``_CHUNK_BYTES`` for the backward pass."""
    few = chunk.rows(slice(0, 8))

    def evaluate() -> Tensor:
        return loss.sum(call_model(model, few.inputs), few.target)

    with torch.enable_grad():
        try:
            kept = _saved_bytes(evaluate)
        except RuntimeError as error:
            # torch.func inside the model does not work with these hooks.
            if "saved tensor hooks" in str(error):
                kept = _computed_bytes(evaluate)
            elif type(error) is RuntimeError:
                raise RuntimeError(
                    f"model or loss fails on the first rows, {_described(few)}: {str(error) or repr(error)}"
                    f"{_hint(few, error)}"
                ) from error
            else:
                raise
    return max(1, _CHUNK_BYTES * len(few) // max(1, kept))


def without_gradient(model: nn.Module, loss: Loss, chunks: Iterable[Chunk], parameters: Sequence[Tensor]) -> str:
    """Why derivatives of the loss would all be zero; empty if of some chunk they are not."""
    for chunk in chunks:
        with torch.enable_grad():
            total = loss.sum(call_model(model, chunk.inputs), chunk.target)
            if total.requires_grad:
                parts = torch.autograd.grad(total, parameters, allow_unused=True)
                if any(part is not None for part in parts):
                    return ""
    return (
        "the loss carries no gradient of any trained parameter (forward detaches its outputs, or computes them under "
        "torch.no_grad, in NumPy, by torch.func.linearize, which takes parameters for constants, or in a checkpoint "
        "without use_reentrant=False): expected outputs that torch can differentiate"
    )


def parameters_in_loss(
    model: nn.Module, loss: Loss, chunk: Chunk, parameters: dict[str, Tensor]
) -> Literal["none", "of the model", "held"]:
    """Which of the model's parameters a loss reads beside the outputs, as one with a penalty of its own does.

    "of the model" are read off the model when the loss is called; "held" ones are kept by the loss itself.
    """
    if loss.name != "function":
        return "none"
    own = list(parameters.values())
    with torch.enable_grad():
        outputs = call_model(model, chunk.inputs).detach()

        def reads(total: Tensor) -> bool:
            if not total.requires_grad:
                return False
            return any(part is not None for part in torch.autograd.grad(total, own, allow_unused=True))

        if not reads(loss.sum(outputs, chunk.target)):
            return "none"
        others = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        return "held" if reads(evaluate_at(model, others, lambda: loss.sum(outputs, chunk.target))) else "of the model"


def check_first_rows(model: nn.Module, loss: Loss, some: Chunk) -> None:
    """Raises if a function as loss is no mean over these rows. The first pass over the data looks at all of them."""
    if loss.name == "function":
        with torch.no_grad():
            RowMeans(loss).add(call_model(model, some.inputs), some.target)


def _hint(chunk: Chunk, error: RuntimeError) -> str:
    """What to do about whole numbers that a layer cannot multiply by its weights."""
    whole = any(isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in tree_leaves(chunk.inputs))
    if not whole or "dtype" not in str(error):
        return ""
    return ". Integers stay integers, since they may be indices: pass X.astype('float32'), or X.float() of a tensor"


def _described(chunk: Chunk) -> str:
    """Shapes and dtypes of a chunk."""
    kinds = {
        name: " and ".join(
            f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)
        )
        for name, tree in (("inputs", chunk.inputs), ("target", chunk.target))
    }
    return ", ".join(f"{name} {kind}" for name, kind in kinds.items())


def _saved_bytes(evaluate: Callable[[], Tensor]) -> int:
    """What a graph keeps, besides parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = evaluate()
    del graph
    return sum(kept.values())


def _computed_bytes(evaluate: Callable[[], Tensor]) -> int:
    """What all operations gave: more than a graph keeps of it."""
    counter = _Counter()
    with counter:
        evaluate()
    return counter.bytes


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                # Inside vmap, this is one row of what is in memory.
                whole = debug_unwrap(leaf, recurse=True)
                self.bytes += whole.numel() * whole.element_size()
        return result


def summed_gradient(
    gradient_of: Callable[[Chunk], tuple[float, Tensor]],
    elements_of: Callable[[Chunk], float],
    chunks: Callable[[], Iterable[Chunk]],
    parameters: ParameterVector,
    pieces: int,
) -> tuple[float, Tensor, float]:
    """The loss and its gradient (p,), summed over the chunks of all processes, and the elements of the loss."""

    def terms() -> Iterator[tuple[int, Tensor, list[float]]]:
        for number, chunk in enumerate(chunks()):
            value, gradient = gradient_of(chunk)
            if not math.isfinite(value):
                raise NonFiniteError(explain(chunk, number, f"the loss is {value}"))
            if not math.isfinite(gradient.sum().item()):
                raise NonFiniteError(f"batch {number}: the gradient is NaN or infinite, the loss {value:g}")
            yield chunk.piece, gradient, [value, elements_of(chunk)]

    like = torch.empty(len(parameters), dtype=parameters.dtype, device=parameters.device)
    gradient, (total, count) = summed_by_piece(pieces, (like, 2), terms)
    if not count:
        raise ValueError("every target of the batch is ignored; there is no loss to minimise")
    return total, gradient, count


def autograd_gradient(loss: Callable[[], Tensor], parameters: ParameterVector) -> tuple[float, Tensor]:
    """A loss and its gradient (p,), which is zero where the loss is not finite."""
    with torch.enable_grad():
        total = loss()
        value = total.item()
        if not (total.requires_grad and math.isfinite(value)):
            return value, torch.zeros(len(parameters), dtype=parameters.dtype, device=parameters.device)
        return value, flatten(torch.autograd.grad(total, parameters.tensors, materialize_grads=True))


def explain(chunk: Chunk, number: int, finding: str) -> str:
    """Why a batch gave what is not finite: the row of its data that is not, or else ``finding``."""
    for name, tree in (("inputs", chunk.inputs), ("target", chunk.target)):
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                rows = (~leaf.reshape(len(leaf), -1).isfinite()).any(1).nonzero()
                if len(rows):
                    return (
                        f"batch {number}: its {name} hold NaN or infinity, first in row {rows[0].item()} of {len(leaf)}"
                    )
    remedy = "scale the inputs, start from smaller parameters, or pass float64"
    return f"batch {number}: {finding} although its data is finite; {remedy}"
