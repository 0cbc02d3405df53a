"""Every private name of torch that onestep uses, each tried at import for the behaviour that onestep relies on.

Derivatives at an op's Autograd key, the way past the dispatcher and products under torch.func need what torch does not
export. A release of torch that changes one of these would make derivatives silently wrong. So each name is tried once,
in some 2 ms, and a change is an ImportError that says which versions of torch were tested. Three are tried by the
tests alone: what torch.compile leaves in a module, since that loads the compiler; the current stream, which needs a
GPU; and run_backward, since a backward pass starts threads (see _checks.py).

What only some releases of torch can do is asked here, too, when it is first needed: ``adds_to_float32``.

No other file of the package has a private name of torch (tests/test_torch_private.py).
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterable
from threading import get_ident
from types import FrameType
from typing import Any

import torch
import torch.autograd.forward_ad as _forward_ad
from torch import Tensor, nn

from onestep._program import refused

#: The releases of torch that were tried; pyproject.toml has the same range.
#: How much of the test suite ran on each: docs/decisions/0033-torch-private.md.
TESTED = "2.11 to 2.13"


def error(what: str) -> ImportError:
    return refused(
        f"onestep was tested with torch {TESTED}; this is torch {torch.__version__}, where {what}. "
        "Install one of these (pip install 'torch>=2.11,<2.14'), or a version of onestep that was tested with this one."
    )


try:
    # `import X as X` where others import X from here, as mypy asks for.
    from torch import _vmap_internals
    from torch._C import _functorch
    from torch._C._functorch import TransformType as TransformType
    from torch._functorch import eager_transforms as _eager_transforms
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack as temporarily_pop_interpreter_stack
    from torch.autograd.function import _SingleLevelFunction
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map
    from torch.utils._pytree import tree_map_only as tree_map_only
    from torch.utils._pytree import tree_unflatten as tree_unflatten

    SingleLevelFunction = _SingleLevelFunction
    # Base classes of torch.nn's layers.
    BatchNorm, DropoutNd = _BatchNorm, _DropoutNd

    # Whether a torch.func transform is active.
    transforms_active = torch._C._are_functorch_transforms_active
    # Whether one of the arguments is a tensor that requires grad, at the level that is being computed.
    any_requires_grad = torch._C._any_requires_grad
    # The number of active TorchDispatchModes (FakeTensorMode and proxy tracing among them).
    dispatch_modes = torch._C._len_torch_dispatch_stack
    # Whether a tensor is zeros that have no memory yet, as torch's derivative formulas make them.
    is_unwritten_zero = Tensor._is_zerotensor
    # The interpreters of the active torch.func transforms, outermost first, or None.
    interpreter_stack = _functorch.get_interpreter_stack

    # The level of the innermost active transform, or None.
    current_level = _functorch.maybe_current_level
    # Of a tensor inside a transform: whether a transform wraps it, whether that is one that differentiates, its level
    # (0 or less where the transform has ended), and what it wraps.
    _is_wrapped = _functorch.is_functorch_wrapped_tensor
    is_tracking = _functorch.is_gradtrackingtensor
    level_of = _functorch.maybe_get_level
    unwrapped = _functorch.get_unwrapped

    # A context in which a call of an op skips the Autograd key.
    below_autograd = torch._C._AutoDispatchBelowAutograd

    # How many torch.func transforms are active in this thread, and ending those above a depth.
    transform_depth = _functorch.get_dynamic_layer_stack_depth
    pop_transforms = _functorch.pop_dynamic_layer_stack_and_undo_to_depth
    # How many TorchFunctionModes are active in this thread, and taking the last off.
    function_modes = torch._C._len_torch_function_stack
    pop_function_mode = torch._C._pop_torch_function_stack

    forward_grad_enabled = torch._C._is_fwd_grad_enabled
    set_forward_grad_enabled = torch._C._set_fwd_grad_enabled
    # torch.set_grad_enabled is a class whose construction takes a microsecond more.
    set_grad_enabled = torch._C._set_grad_enabled

    # Opening and closing forward mode's one level, which torch.autograd.forward_ad counts in _current_level.
    _enter_dual_level = torch._C._enter_dual_level
    _exit_dual_level = torch._C._exit_dual_level
    # torch.func counts in JVP_NESTING how many jvp the process is in; the first opens the level. For each of them this
    # code is in the stack of its thread.
    _JVP_CODE = _eager_transforms._jvp_with_argnums.__code__

    # unpack_dual(tensor, level) → (primal, tangent or None). It takes a third of the time of forward_ad.unpack_dual.
    unpack_dual = torch._VF._unpack_dual
    make_dual = torch._VF._make_dual

    get_single_level_allowed = _functorch.get_single_level_autograd_function_allowed
    set_single_level_allowed = _functorch.set_single_level_autograd_function_allowed

    # What torch.autograd.grad calls: (outputs, cotangents, whether the graph is kept, whether the gradients' own is
    # recorded, inputs, whether inputs may be unused, accumulate_grad=False) → gradients or None. Torch function modes
    # stay on, which are off while they handle torch.autograd.grad.
    run_backward = torch.autograd.graph._engine_run_backward

    # The number of the backward pass that is running, -1 if none is, and calling a function when it has ended well.
    backward_pass = torch._C._current_graph_task_id
    after_backward_pass = torch.autograd.Variable._execution_engine.queue_callback

    # What torch.nn.utils.parametrizations.weight_norm calls.
    weight_norm = torch._weight_norm
    # What F.scaled_dot_product_attention chooses from.
    attention_math = torch.ops.aten._scaled_dot_product_attention_math.default
    flash_attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    cudnn_attention = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    cudnn_attention_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default

    # The address of torch's current stream on the device of an index, without an object for it, which takes torch 5 µs.
    # Absent from torch built without CUDA, which has no CUDA tensors.
    cuda_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)

    # What torch.nn.functional.silu and mish call.
    nn_silu = torch._C._nn.silu
    nn_mish = torch._C._nn.mish

    # Not among the names of torch._C.DispatchKey.
    _LEGACY_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")
    _is_key_included = torch._C._dispatch_tls_is_dispatch_key_included
    _graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
    # For the checks: beginning a transform, and the vmap of gradcheck.
    begin_grad = _functorch._grad_increment_nesting
    legacy_vmap = _vmap_internals._vmap
except (ImportError, AttributeError) as missing:
    raise error(f"a private name is missing ({missing})") from missing


def forward_level() -> int:
    """The level of torch.autograd.forward_ad that is open; -1 if none is."""
    level: int = _forward_ad._current_level
    return level


# Whether the level that is open was opened by ``open_level``.
_level_is_ours = False


def open_level() -> bool:
    """Opens forward mode's level for onestep, or finds it as onestep left it open; False where it is somebody else's.

    torch.func.jvp counts the process's levels without a lock. Python changes threads,
    and raises interrupts, only after calls. So there is no call between the question and the last line's.
    """
    global _level_is_ours
    if _level_is_ours:
        return True
    if _eager_transforms.JVP_NESTING != 0 or _forward_ad._current_level >= 0:
        return False
    _eager_transforms.JVP_NESTING = 1
    _forward_ad._current_level = 0
    _level_is_ours = True
    _enter_dual_level()
    return True


def close_level() -> bool:
    """Closes the level that ``open_level`` opened; False where a torch.func.jvp uses it. As above, without a call."""
    global _level_is_ours
    if not _level_is_ours:
        return True
    if _eager_transforms.JVP_NESTING != 1:
        return False
    _eager_transforms.JVP_NESTING = 0
    _forward_ad._current_level = -1
    _level_is_ours = False
    _exit_dual_level(level=0)
    return True


def level_is_ours() -> bool:
    """Whether the level that is open was opened by ``open_level``."""
    return _level_is_ours


def counted_levels() -> int:
    """How many torch.func.jvp the process is in, as torch.func counts them."""
    count: int = _eager_transforms.JVP_NESTING
    return count


def levels_in(frames: Iterable[tuple[FrameType, int]]) -> int:
    """How many torch.func.jvp these frames of a stack or of a traceback are in."""
    return sum(frame.f_code is _JVP_CODE for frame, _ in frames)


def recount_levels(interrupt: BaseException) -> None:
    """Counts again after an interrupt that may have ended a torch.func.jvp of this thread, which is in none, uncounted.

    The stacks of other threads tell how many of them each is in.
    """
    stacks = [frame for thread, frame in sys._current_frames().items() if thread != get_ident()]
    others = sum(levels_in(traceback.walk_stack(frame)) for frame in stacks)
    # Another thread's may be about to be counted: without a cause nothing is changed beside it.
    if others == 0 or levels_in(traceback.walk_tb(interrupt.__traceback__)) > 0:
        _eager_transforms.JVP_NESTING = int(_level_is_ours) + others


def forget_levels() -> None:
    """Counts as if no torch.func.jvp were active and closes any level, in a process where nothing else runs."""
    global _level_is_ours
    if _eager_transforms.JVP_NESTING > 0:
        _eager_transforms.JVP_NESTING, _level_is_ours = 0, False
        if _forward_ad._current_level >= 0:
            _forward_ad._current_level = -1
            _exit_dual_level(level=0)


def is_batched(tensor: Tensor) -> bool:
    """Whether a vmap wraps the tensor: torch.func's, or that of gradcheck."""
    return _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def in_legacy_vmap() -> bool:
    """Whether this is in the vmap of gradcheck and torch.autograd.functional, which has no rule for _make_dual."""
    return _is_key_included(_LEGACY_VMAP_MODE)


def is_tracked(tensor: Tensor, *, now: bool = False) -> bool:
    """Whether a transform that differentiates follows the tensor; ``now``: one that has not ended."""
    while _is_wrapped(tensor):
        if is_tracking(tensor) and not (now and level_of(tensor) <= 0):
            return True
        tensor = unwrapped(tensor)
    return False


def graph_is_kept() -> bool:
    """Whether the backward pass that is running keeps its graph (``retain_graph=True``)."""
    return _graph_is_kept()


def has_tangent(value: Any) -> bool:
    """Whether the value is a tensor with a tangent at the level that is being computed."""
    return isinstance(value, Tensor) and unpack_dual(value, 0)[1] is not None


def version(tensor: Tensor) -> int:
    """Changes whenever the tensor is written to in place."""
    return tensor._version


def original_module(module: nn.Module) -> nn.Module:
    """What torch.compile was given for the module that it returned; any other module itself."""
    found: nn.Module = getattr(module, "_orig_mod", module)
    return found


def reset_method(module: nn.Module) -> Callable[[], None] | None:
    """What draws a module's parameters anew, which nn.MultiheadAttention and nn.Transformer call _reset_parameters."""
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


@functools.cache
def adds_to_float32(device: torch.device) -> bool:
    """Whether torch's addmm of 16-bit matrices on a GPU takes a float32 matrix to add to; torch 2.10's did not."""
    small, total = (torch.zeros(8, 8, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(total, small, small, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def number_of_outputs(op: Any) -> int:
    """How many tensors an op of torch.library returns."""
    return len(op._schema.returns)


def is_hooked(module: nn.Module) -> bool:
    """Whether something is called beside the module's forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The table in which a module looks its own parameters up, by name; some are None."""
    return module._parameters


def own_children(module: nn.Module) -> dict[str, Any]:
    """The modules that belong to a module itself, by name: what iterating over a container goes through."""
    return module._modules


def hook_tables(module: nn.Module, *, before: bool) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """A module's forward hooks by key, and the keys of those that are also called with keyword arguments."""
    if before:
        return module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    return module._forward_hooks, module._forward_hooks_with_kwargs


def compiled_calls(module: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """(attributes, name, value) that let the parts of a module which torch.compile has compiled run as written.

    Not tried at import, which would load the compiler: if torch changes these, its warnings come back, as a test sees.
    """
    found: list[tuple[dict[str, Any], str, Any]] = []
    for part in module.modules():
        own = vars(part)
        if own.get("_compiled_call_impl") is not None:
            found.append((own, "_compiled_call_impl", None))
        if "_orig_mod" in part._modules and "forward" in own:
            found.append((own, "forward", part._modules["_orig_mod"]))
    return found


from onestep._torch_private._checks import check  # noqa: E402  (the checks need all the names above)

check()
