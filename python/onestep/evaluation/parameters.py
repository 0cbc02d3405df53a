"""The parameters that an optimiser trains, as one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from onestep._torch_private import tree_map_only, version


class ParameterVector:
    """Reads and writes tensors as one vector (p,), in their order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            raise ValueError("there is nothing to train: no parameter has requires_grad=True")
        dtypes, devices = {t.dtype for t in tensors}, {t.device for t in tensors}
        if len(dtypes) > 1 or len(devices) > 1:
            raise ValueError(f"parameters are on {devices} in {dtypes}; expected one device and one dtype")
        if not tensors[0].is_floating_point():
            raise TypeError(f"parameters have dtype {tensors[0].dtype}; expected a real floating-point type")
        if tensors[0].device.type == "meta":
            raise ValueError(
                "parameters are on the device 'meta', where they have no values; expected a device that holds them: "
                "load or initialise the model first, as by model.to_empty(device='cpu') and reset_parameters()"
            )
        self.tensors = list(tensors)
        self.sizes = [t.numel() for t in tensors]
        self.dtype, self.device = tensors[0].dtype, tensors[0].device

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self) -> Tensor:
        """A copy of the values (p,)."""
        return flatten([t.detach() for t in self.tensors])

    def write(self, vector: Tensor) -> None:
        """Sets the values."""
        with torch.no_grad():
            for tensor, part in zip(self.tensors, self.split(vector), strict=True):
                tensor.copy_(part)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector (p,), or of its last dimension, in the shapes of the parameters."""
        parts = vector.split(self.sizes, dim=-1)
        return [
            part.unflatten(-1, t.shape) if t.dim() else part.squeeze(-1)
            for part, t in zip(parts, self.tensors, strict=True)
        ]

    def versions(self) -> tuple[int, ...]:
        """Changes whenever a parameter does."""
        return tuple(version(t) for t in self.tensors)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all elements."""
    return torch.cat([t.reshape(-1) for t in tensors])


class _Substitute(TorchFunctionMode):
    """Hands every torch function other tensors in place of the parameters."""

    def __init__(self, replacements: dict[int, Tensor]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def replace(tensor: Tensor) -> Tensor:
            return self.replacements.get(id(tensor), tensor)

        args, kwargs = tree_map_only(Tensor, replace, (args, kwargs or {}))
        return func(*args, **kwargs)


def call_with(closure: Callable[[], Any], tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Any:
    """closure() as if ``tensors`` had other values, which may be those of a torch.func transform."""
    with _Substitute({id(t): value for t, value in zip(tensors, values, strict=True)}):
        return closure()
