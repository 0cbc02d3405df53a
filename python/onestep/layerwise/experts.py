"""Mixtures whose experts are stacked in one parameter (experts, outputs, features), as transformers 5 stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from onestep._restored import Entry

# What transformers calls them.
_NAMES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def stacks_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters that are a stack of weights, one for each expert, by name."""
    own = dict(module.named_parameters(recurse=False))
    return {name: parameter for name, parameter in own.items() if name in _NAMES and parameter.dim() == 3}


def refusal(module: nn.Module) -> str | None:
    """Why the stacks of a module cannot be solved for; None: they can."""
    if getattr(module, "is_transposed", False):
        return "are stored transposed (experts, features, outputs)"
    if getattr(module, "has_bias", False):
        return "have biases"
    return None


class ExpertCalls(TorchFunctionMode):
    """Sees each product of rows with one expert's weight, there for a ``with`` block, inside one of ``forwards``.

    Modules of transformers multiply all experts at once, or one after the other by torch.nn.functional.linear; here
    they do the latter.

    Args:
        names: of the experts that are looked for, by the address of their weights.
        modules: that have them.
        before: called with the name and the rows.
        after: called with the name, the rows and the result.
        others: called with the module and the expert (``expert_of``) and the rows, where no name is looked for.
    """

    def __init__(
        self,
        names: dict[int, str],
        modules: Iterable[nn.Module],
        *,
        before: Callable[[str, Tensor], None] | None = None,
        after: Callable[[str, Tensor, Any], None] | None = None,
        others: Callable[[tuple[int, int], Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._names, self._modules, self._before, self._after = names, list(modules), before, after
        self._others = others
        self._addresses = {
            part.data_ptr(): expert_of(module, index)
            for module in self._modules
            for stack in stacks_of(module).values()
            for index, part in enumerate(stack.detach())
        }
        self._products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each of its functions."""
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        address = (args[1] if len(args) > 1 else kwargs["weight"]).data_ptr()
        self._products += address in self._addresses
        name, rows = self._names.get(address), args[0] if args else kwargs["input"]
        if name is not None and self._before is not None:
            self._before(name, rows)
        if name is None and self._others is not None and address in self._addresses:
            self._others(self._addresses[address], rows)
        out = func(*args, **kwargs)
        if name is not None and self._after is not None:
            self._after(name, rows, out)
        return out

    def forwards(self) -> list[Entry]:
        """What ``onestep._restored.replaced`` takes for the modules to multiply expert by expert."""
        return [(vars(module), "forward", self._one_by_one(module)) for module in self._modules]

    def _one_by_one(self, module: nn.Module) -> Callable[..., Any]:
        # transformers' decorator, which chooses how experts are multiplied, keeps the plain loop as __wrapped__.
        plain = type(module).forward
        plain = getattr(plain, "__wrapped__", plain)

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            before = self._products
            out = plain(module, hidden, *args, **kwargs)
            if self._products == before and hidden.numel() > 0:
                raise NotImplementedError(
                    f"{type(module).__name__} does not multiply by one expert's weight at a time "
                    "(torch.nn.functional.linear): leave its layers out, such as by layers=['*', '!*.experts.*']"
                )
            return out

        return forward


def expert_of(module: nn.Module, index: int) -> tuple[int, int]:
    """The same for all weights of one expert."""
    return id(module), index
