"""Second moments of what linear layers are given, collected by hooks that are there in one step of many."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from onestep._torch_private import forward_level, transforms_active
from onestep.optim._hidden import is_transposed


class _Hook:
    """Hands a layer's inputs to the collector, as long as there is one.

    A model may be copied, saved or exported between two steps: a copy's hook does nothing, and none keeps the optimiser
    alive.
    """

    def __init__(self, grams: weakref.ref[InputGrams] | None = None, identity: int = 0) -> None:
        self._grams, self._identity = grams, identity

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        grams = None if self._grams is None else self._grams()
        if grams is not None and inputs and isinstance(inputs[0], Tensor) and _is_training(inputs[0]):
            grams.add(self._identity, inputs[0].detach())


def _is_training(x: Tensor) -> bool:
    """Whether a pass may be one of training, which is neither traced nor a transform's, and is differentiated in."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    # A compiled pass traces this function, and is one of training for all that it knows.
    return torch.compiler.is_compiling() or (
        type(x) in (Tensor, nn.Parameter) and not transforms_active() and forward_level() < 0
    )


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


class InputGrams:
    """Sums of xxᵀ over the inputs x of linear layers, while it is collecting.

    Between two collections no hook is registered, so that a forward pass costs what it does without; nor is one once
    this object is gone.

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
        weakref.finalize(self, _remove, self._handles)

    @property
    def collecting(self) -> bool:
        """Whether hooks are registered."""
        return bool(self._handles)

    def begin(self) -> None:
        """Registers the hooks."""
        if not self._handles:
            for identity, module in self.layers.items():
                self._handles.append(module.register_forward_pre_hook(_Hook(weakref.ref(self), identity)))

    def add(self, identity: int, x: Tensor) -> None:
        """Adds a layer's inputs (…,d)."""
        x = x.reshape(-1, x.shape[-1])
        if identity in self._sums:
            self._sums[identity].addmm_(x.mT, x)
        else:
            self._sums[identity] = x.mT @ x
        self._counts[identity] = self._counts.get(identity, 0) + len(x)

    def take(self) -> tuple[dict[int, Tensor], dict[int, int]]:
        """The sums (d,d) and their numbers of rows, by the weight's identity. Removes the hooks."""
        _remove(self._handles)
        sums, counts = self._sums, self._counts
        self._sums, self._counts = {}, {}
        return sums, counts


def damped_inverse(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(G/s + damping·I)⁻¹ with s = tr G/d, which does not change a polar step, and the info of its factorisation."""
    wide = gram if gram.dtype == torch.float64 else gram.float()
    d = len(wide)
    mean = wide.diagonal().mean()
    identity = torch.eye(d, dtype=wide.dtype, device=wide.device)
    factor, info = torch.linalg.cholesky_ex(wide / mean + damping * identity)
    return torch.cholesky_inverse(factor), info
