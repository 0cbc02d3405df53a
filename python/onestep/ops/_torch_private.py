"""Every private name of torch that onestep uses.

Derivatives at an op's Autograd key, and the way past the dispatcher, need what torch does not export. All of it is
imported here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction

__all__ = [
    "SingleLevelFunction",
    "any_requires_grad",
    "below_autograd",
    "dispatch_modes",
    "forward_grad_enabled",
    "forward_level",
    "functorch",
    "get_single_level_allowed",
    "graph_is_kept",
    "in_legacy_vmap",
    "make_dual",
    "set_forward_grad_enabled",
    "set_grad_enabled",
    "set_single_level_allowed",
    "temporarily_pop_interpreter_stack",
    "transforms_active",
    "unpack_dual",
]

# Whether a torch.func transform is active.
transforms_active = torch._C._are_functorch_transforms_active
# Whether one of the arguments is a tensor that requires grad, at the level that is being computed.
any_requires_grad = torch._C._any_requires_grad
# The number of active TorchDispatchModes (FakeTensorMode and proxy tracing among them).
dispatch_modes = torch._C._len_torch_dispatch_stack

# A context in which a call of an op skips the Autograd key.
below_autograd = torch._C._AutoDispatchBelowAutograd

forward_grad_enabled = torch._C._is_fwd_grad_enabled
set_forward_grad_enabled = torch._C._set_fwd_grad_enabled
# torch.set_grad_enabled is a class whose construction takes a microsecond more.
set_grad_enabled = torch._C._set_grad_enabled

# unpack_dual(tensor, level=0) → (primal, tangent or None). It takes a third of the time of forward_ad.unpack_dual.
unpack_dual = torch._VF._unpack_dual
make_dual = torch._VF._make_dual

get_single_level_allowed = functorch.get_single_level_autograd_function_allowed
set_single_level_allowed = functorch.set_single_level_autograd_function_allowed

# Not among the names of torch._C.DispatchKey.
_LEGACY_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def forward_level() -> int:
    """The level of torch.autograd.forward_ad that is open; -1 if none is."""
    level: int = forward_ad._current_level
    return level


def in_legacy_vmap() -> bool:
    """Whether this is in the vmap of gradcheck and torch.autograd.functional, which has no rule for _make_dual."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_LEGACY_VMAP_MODE)


def graph_is_kept() -> bool:
    """Whether the backward pass that is running keeps its graph (``retain_graph=True``)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def has_tangent(value: Any) -> bool:
    """Whether the value is a tensor with a tangent at the level that is being computed."""
    return isinstance(value, Tensor) and unpack_dual(value, level=0)[1] is not None
