"""A device that is not the CPU, for machines without one: tensors that say they are on "cuda", and compute on the CPU.

As torch does, it refuses to compute with tensors of two devices, but for numbers (tensors without dimensions), indices
and copies. So code that makes a tensor on the wrong device fails here. onestep's ops run by their CPU kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from onestep.ops._library import Op

DEVICE = torch.device("cuda", 0)

# Ops that take tensors of several devices.
MIXED = ("copy_", "_to_copy", "index.Tensor", "index_put")


class Elsewhere(Tensor):
    """A tensor there.

    Attributes:
        here: its values.
    """

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        """Of a tensor on the CPU."""
        there = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device="meta", requires_grad=here.requires_grad
        )
        there.here = here.detach()
        result: Elsewhere = there
        return result

    # What Python sees. In C++ it is "meta", which torch knows in every build.
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self, *unused: Any, **more: Any) -> str:
        """The values."""
        return f"elsewhere({self.here})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each op."""
        return computed(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an op returns, on its device."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [leaf for leaf in given if isinstance(leaf, Elsewhere)]
    name = str(func).removeprefix("aten.")
    # A tensor there may have indices here, not the other way.
    indexed_here = name.startswith("index") and not isinstance(args[0], Elsewhere)
    if there and (indexed_here or not name.startswith(MIXED)):
        for leaf in given:
            if not isinstance(leaf, Elsewhere) and leaf.dim() > 0:
                raise RuntimeError(
                    f"{func}: expected all tensors on one device, but found {DEVICE} {[tuple(t.shape) for t in there]} "
                    f"and cpu {tuple(leaf.shape)}"
                )
    onto = kwargs.get("device")
    if onto is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    goes_there = bool(there) if onto is None else torch.device(onto).type != "cpu"
    if name.startswith("copy_"):
        goes_there = isinstance(args[0], Elsewhere)
    same = {id(leaf.here): leaf for leaf in there}
    result = func(*tree_map(_here, args), **tree_map(_here, kwargs))

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, Elsewhere):
            return value
        return same[id(value)] if id(value) in same else Elsewhere(value) if goes_there else value

    return tree_map(back, result)


def _here(value: Any) -> Any:
    return value.here if isinstance(value, Elsewhere) else value


def moved(model: nn.Module) -> nn.Module:
    """A copy of a model, on the device; what was tied stays so."""
    model = copy.deepcopy(model)
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Not Module.to, which keeps the parameters' objects, that are no tensors of this class.
            there = nn.Parameter(Elsewhere(parameter.detach()), parameter.requires_grad)
            setattr(module, name, parameters.setdefault(id(parameter), there))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, Elsewhere(buffer))
    return model


def _made(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *, device: Any = None, **more: Any) -> Tensor:
        if isinstance(data, Tensor):
            return data.to(device=device, **more)
        tensor = function(data, **more)
        return tensor if device is None or torch.device(device).type == "cpu" else Elsewhere(tensor)

    return made


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """While it is there, ``torch.device("cuda")`` is this device; only for builds of torch without CUDA."""
    changed = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        # Ops are computed on the CPU, where there are kernels of all.
        (Op, "require", lambda op, device: None),
        # Those two copy below the modes.
        (torch, "tensor", _made(torch.tensor)),
        (torch, "as_tensor", _made(torch.as_tensor)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    try:
        for owner, name, value in changed:
            setattr(owner, name, value)
        with _Device():
            yield DEVICE
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
