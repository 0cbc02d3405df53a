"""Second moments of what linear layers are given, collected by hooks that are there in one step of many."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onestep.optim._hidden import is_transposed


class InputGrams:
    """Sums of xxᵀ over the inputs x of linear layers, while it is collecting.

    Between two collections no hook is registered, so that a forward pass costs what it does without.

    Args:
        model: whose layers are looked at.
        wanted: the weights, by identity, whose inputs count.
    """

    def __init__(self, model: nn.Module, wanted: set[int]) -> None:
        self.layers: dict[int, nn.Module] = {}
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if id(weight) in wanted and (isinstance(module, nn.Linear) or is_transposed(module)):
                self.layers[id(weight)] = module
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._handles: list[Any] = []

    @property
    def collecting(self) -> bool:
        """Whether hooks are registered."""
        return bool(self._handles)

    def begin(self) -> None:
        """Registers the hooks."""
        if not self._handles:
            for identity, module in self.layers.items():
                self._handles.append(module.register_forward_pre_hook(partial(self._add, identity)))

    def _add(self, identity: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Passes that nothing is differentiated in are not training, such as those over held-out data.
        if not torch.is_grad_enabled() or not inputs or not isinstance(inputs[0], Tensor):
            return
        x = inputs[0].detach()
        x = x.reshape(-1, x.shape[-1])
        if identity in self._sums:
            self._sums[identity].addmm_(x.mT, x)
        else:
            self._sums[identity] = x.mT @ x
        self._counts[identity] = self._counts.get(identity, 0) + len(x)

    def take(self) -> tuple[dict[int, Tensor], dict[int, int]]:
        """The sums (d,d) and their numbers of rows, by the weight's identity. Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        sums, counts = self._sums, self._counts
        self._handles, self._sums, self._counts = [], {}, {}
        return sums, counts


def damped_inverse(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(G/s + damping·I)⁻¹ with s = tr G/d, which does not change a polar step, and the info of its factorisation."""
    wide = gram if gram.dtype == torch.float64 else gram.float()
    d = len(wide)
    mean = wide.diagonal().mean()
    identity = torch.eye(d, dtype=wide.dtype, device=wide.device)
    factor, info = torch.linalg.cholesky_ex(wide / mean + damping * identity)
    return torch.cholesky_inverse(factor), info
