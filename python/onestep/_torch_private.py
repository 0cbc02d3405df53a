"""Every private name of torch that onestep uses, each tried at import for the behaviour that onestep relies on.

Derivatives at an op's Autograd key, the way past the dispatcher and products under torch.func need what torch does not
export. A release of torch that changes one of these would make derivatives silently wrong. So each name is tried once,
in some 2 ms, and a change is an ImportError that says which versions of torch were tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from onestep._program import refused

__all__ = [
    "BatchNorm",
    "DropoutNd",
    "SingleLevelFunction",
    "TorchDispatchMode",
    "TransformType",
    "any_requires_grad",
    "attention_math",
    "below_autograd",
    "check",
    "compiled_calls",
    "cuda_stream",
    "cudnn_attention",
    "cudnn_attention_backward",
    "dispatch_modes",
    "enter_dual_level",
    "exit_dual_level",
    "flash_attention",
    "flash_attention_backward",
    "forward_ad",
    "forward_grad_enabled",
    "forward_level",
    "function_modes",
    "functorch",
    "functorch_python",
    "get_single_level_allowed",
    "graph_is_kept",
    "has_tangent",
    "hook_tables",
    "in_legacy_vmap",
    "interpreter_stack",
    "is_hooked",
    "is_tracked",
    "is_unwritten_zero",
    "make_dual",
    "nn_mish",
    "nn_silu",
    "number_of_outputs",
    "original_module",
    "own_children",
    "own_parameters",
    "pop_function_mode",
    "pop_transforms",
    "reset_method",
    "set_forward_grad_enabled",
    "set_grad_enabled",
    "set_single_level_allowed",
    "temporarily_pop_interpreter_stack",
    "transform_depth",
    "transforms_active",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "unpack_dual",
    "version",
    "weight_norm",
]

#: The releases of torch that were tried; pyproject.toml has the same range.
#: How much of the test suite ran on each: docs/decisions/0033-torch-private.md.
TESTED = "2.11 to 2.13"


def _error(what: str) -> ImportError:
    return refused(
        f"onestep was tested with torch {TESTED}; this is torch {torch.__version__}, where {what}. "
        "Install one of these (pip install 'torch>=2.11,<2.14'), or a version of onestep that was tested with this one."
    )


try:
    from torch._C import _functorch as functorch
    from torch._C._functorch import TransformType
    from torch._functorch import eager_transforms as functorch_python
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
    from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.dropout import _DropoutNd as DropoutNd
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

    # Whether a torch.func transform is active.
    transforms_active = torch._C._are_functorch_transforms_active
    # Whether one of the arguments is a tensor that requires grad, at the level that is being computed.
    any_requires_grad = torch._C._any_requires_grad
    # The number of active TorchDispatchModes (FakeTensorMode and proxy tracing among them).
    dispatch_modes = torch._C._len_torch_dispatch_stack
    # Whether a tensor is zeros that have no memory yet, as torch's derivative formulas make them.
    is_unwritten_zero = Tensor._is_zerotensor
    # The interpreters of the active torch.func transforms, outermost first, or None.
    interpreter_stack = functorch.get_interpreter_stack

    # Of a tensor inside a transform: whether a transform wraps it, whether that is one that differentiates, its level
    # (0 or less where the transform has ended), and what it wraps.
    _is_wrapped = functorch.is_functorch_wrapped_tensor
    _is_tracking = functorch.is_gradtrackingtensor
    _level_of = functorch.maybe_get_level
    _unwrapped = functorch.get_unwrapped

    # A context in which a call of an op skips the Autograd key.
    below_autograd = torch._C._AutoDispatchBelowAutograd

    # How many torch.func transforms are active in this thread, and ending those above a depth.
    transform_depth = functorch.get_dynamic_layer_stack_depth
    pop_transforms = functorch.pop_dynamic_layer_stack_and_undo_to_depth
    # How many TorchFunctionModes are active in this thread, and taking the last off.
    function_modes = torch._C._len_torch_function_stack
    pop_function_mode = torch._C._pop_torch_function_stack

    forward_grad_enabled = torch._C._is_fwd_grad_enabled
    set_forward_grad_enabled = torch._C._set_fwd_grad_enabled
    # torch.set_grad_enabled is a class whose construction takes a microsecond more.
    set_grad_enabled = torch._C._set_grad_enabled

    # Opening and closing forward mode's one level, which torch.autograd.forward_ad counts in _current_level.
    enter_dual_level = torch._C._enter_dual_level
    exit_dual_level = torch._C._exit_dual_level
    # How many torch.func.jvp the process is in; the first opens the level.
    _nesting: int = functorch_python.JVP_NESTING

    # unpack_dual(tensor, level) → (primal, tangent or None). It takes a third of the time of forward_ad.unpack_dual.
    unpack_dual = torch._VF._unpack_dual
    make_dual = torch._VF._make_dual

    get_single_level_allowed = functorch.get_single_level_autograd_function_allowed
    set_single_level_allowed = functorch.set_single_level_autograd_function_allowed

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
    _current_level = forward_ad._current_level
    # The vmap of gradcheck; for the check below.
    from torch._vmap_internals import _vmap as _legacy_vmap_of
except (ImportError, AttributeError) as error:
    raise _error(f"a private name is missing ({error})") from error


def forward_level() -> int:
    """The level of torch.autograd.forward_ad that is open; -1 if none is."""
    level: int = forward_ad._current_level
    return level


def in_legacy_vmap() -> bool:
    """Whether this is in the vmap of gradcheck and torch.autograd.functional, which has no rule for _make_dual."""
    return _is_key_included(_LEGACY_VMAP_MODE)


def is_tracked(tensor: Tensor, *, now: bool = False) -> bool:
    """Whether a transform that differentiates follows the tensor; ``now``: one that has not ended."""
    while _is_wrapped(tensor):
        if _is_tracking(tensor) and not (now and _level_of(tensor) <= 0):
            return True
        tensor = _unwrapped(tensor)
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


# ----------------------------------------------------------------------------------------------- what is relied on

# No check runs a backward pass: on a machine with GPUs the first one starts autograd's device threads, which a process
# must be free to do after it has forked. tests/test_torch_private.py does.


class _Square(SingleLevelFunction):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        twice: Tensor = 2 * ctx.saved_tensors[0] * grad
        return twice

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        twice: Tensor = 2 * ctx.saved_tensors[0] * tangent
        return twice


def _single_level(x: Tensor) -> Tensor:
    allowed = get_single_level_allowed()
    set_single_level_allowed(True)
    try:
        result: Tensor = _Square.apply(x)  # type: ignore[attr-defined]
        return result
    finally:
        set_single_level_allowed(allowed)


def _number(value: float) -> Tensor:
    return torch.tensor(value, device="cpu", dtype=torch.float64)


def _reverse_mode() -> bool:
    x = _number(3.0).requires_grad_()
    square = _single_level(x)
    with below_autograd():
        below = x * x
    recorded = any_requires_grad(None, x, 1.0) and not any_requires_grad(None, _number(3.0))
    set_grad_enabled(False)
    try:
        off = not torch.is_grad_enabled()
    finally:
        set_grad_enabled(True)
    node: Any = square.grad_fn
    return recorded and off and not below.requires_grad and node.apply(_number(1.0)).item() == 6.0


def _forward_mode() -> bool:
    x = _number(3.0)
    before = forward_level()
    with forward_ad.dual_level():
        dual = make_dual(x, _number(1.0), level=0)
        tangent = unpack_dual(_single_level(dual), level=0)[1]
        set_forward_grad_enabled(False)
        off = not forward_grad_enabled()
        set_forward_grad_enabled(True)
        inside = forward_level() >= 0 and has_tangent(dual) and not has_tangent(x) and forward_grad_enabled()
    return before == -1 and off and inside and tangent is not None and tangent.item() == 6.0


def _transforms() -> bool:
    seen: list[Any] = []

    def function(x: Tensor) -> Tensor:
        with temporarily_pop_interpreter_stack():
            outside = transforms_active()
        stack = interpreter_stack()
        seen.append((transforms_active(), outside, functorch.is_batchedtensor(x), len(stack or ())))
        seen.append((stack or [])[0].key() == TransformType.Vmap)
        seen.append(functorch.maybe_get_level(x) == functorch.maybe_current_level())
        seen.append(functorch.get_unwrapped(x).shape == (2,) and not functorch.is_gradtrackingtensor(x))
        seen.append(not is_tracked(x))
        return x * 2

    def followed(x: Tensor) -> Tensor:
        seen.append(is_tracked(x, now=True) and not is_tracked(outer))
        kept.append(x)
        return x * 2

    kept: list[Tensor] = []
    outer = _number(3.0)

    torch.func.vmap(function)(torch.zeros(2, device="cpu"))
    torch.func.jvp(followed, (outer,), (_number(1.0),))
    seen.append(is_tracked(kept[0]) and not is_tracked(kept[0], now=True))
    idle = not transforms_active() and functorch.maybe_current_level() is None and not interpreter_stack()
    # torch.func calls a single-level function once for its level.
    tangent: Tensor = torch.func.jvp(_single_level, (_number(3.0),), (_number(1.0),))[1]
    return idle and seen == [(True, False, True, 1), *[True] * 6] and tangent.item() == 6.0


def _legacy_vmap() -> bool:
    inside: list[bool] = []

    def function(x: Tensor) -> Tensor:
        inside.append(in_legacy_vmap())
        return x

    _legacy_vmap_of(function)(torch.zeros(2, device="cpu"))
    return inside == [True] and not in_legacy_vmap()


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


def _trees() -> bool:
    leaves, form = tree_flatten({"a": [1, (2.0,)], "b": None})
    mapped = tree_map_only(int, lambda n: n + 1, {"a": [1, (2.0,)]})
    back = tree_unflatten([n for n in leaves if n is not None] + [None], form)
    same = tree_leaves(back) == leaves and tree_map(lambda n: n, back) == back
    return leaves == [1, 2.0, None] and mapped == {"a": [2, (2.0,)]} and same


# The arguments of attention's ops that are called by position; those of CUDA's kernels cannot be run everywhere.
_ATTENTION_ARGUMENTS = {
    flash_attention: "query key value dropout_p is_causal return_debug_mask scale",
    flash_attention_backward: "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
    "is_causal philox_seed philox_offset scale",
    cudnn_attention: "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale",
    cudnn_attention_backward: "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q "
    "cum_seq_k max_q max_k dropout_p is_causal scale",
    attention_math: "query key value attn_mask dropout_p is_causal dropout_mask scale enable_gqa",
}


def _attention_ops() -> bool:
    return all(
        [argument.name for argument in op._schema.arguments] == names.split()
        for op, names in _ATTENTION_ARGUMENTS.items()
    )


def _values() -> bool:
    v, g = torch.tensor([[3.0, 4.0]], device="cpu"), torch.tensor([[10.0]], device="cpu")
    before = version(v)
    v.add_(0)
    if not is_unwritten_zero(torch._efficientzerotensor(1)) or is_unwritten_zero(v):
        return False
    return bool(weight_norm(v, g, 0).tolist() == [[6.0, 8.0]]) and version(v) > before


def _hooks() -> bool:
    layer = nn.Identity()
    free = is_hooked(layer)
    layer.register_forward_hook(lambda *_: None)
    seen: list[int] = []
    for before in (True, False):
        hooks, with_kwargs = hook_tables(layer, before=before)
        with_kwargs["own"], hooks["own"] = True, lambda *given: seen.append(len(given))
    layer(_number(1.0))
    if seen != [3, 4]:
        return False
    return not free and is_hooked(layer) and number_of_outputs(torch.ops.aten.max.dim) == 2


def _parameters() -> bool:
    layer = nn.Linear(1, 1, bias=False, device="cpu", dtype=torch.float64)
    if reset_method(layer) is None or reset_method(nn.MultiheadAttention(1, 1, device="meta")) is None:
        return False
    own_parameters(layer)["weight"] = _number(3.0).reshape(1, 1)
    return bool(layer(_number(2.0).reshape(1, 1)).item() == 6.0)


def _children() -> bool:
    container = nn.ModuleList([nn.Identity()])
    own_children(container)["0"] = other = nn.Identity()
    return next(iter(container)) is other


def _modes() -> bool:
    class Nothing(TorchDispatchMode):
        pass

    outside = dispatch_modes()
    with Nothing():
        return dispatch_modes() == outside + 1


_CHECKS: dict[str, Callable[[], bool]] = {
    "reverse mode through a single-level function (_SingleLevelFunction) is wrong": _reverse_mode,
    "a backward pass does not tell whether its graph is kept": lambda: isinstance(graph_is_kept(), bool),
    "forward mode through a single-level function (_SingleLevelFunction) is wrong": _forward_mode,
    "torch.func's interpreter stack is not as expected": _transforms,
    "the vmap of batched gradients is not seen": _legacy_vmap,
    "torch's dispatch modes are not counted": _modes,
    "the table of a module's own parameters (_parameters) is not used, or no method resets them": _parameters,
    "the table of a module's own children (_modules) is not used": _children,
    "torch.utils._pytree does not flatten and map as before": _trees,
    "the ops of scaled_dot_product_attention have other arguments": _attention_ops,
    "weight_norm, the versions of tensors or zeros without memory are not as expected": _values,
    "hooks of modules or the outputs of ops are not seen": _hooks,
}


def check() -> None:
    """Tries every private name; raises ImportError where one does not do what onestep relies on."""
    with torch.inference_mode(False), torch.enable_grad():
        for failure, test in _CHECKS.items():
            try:
                passed = test()
            except Exception as error:
                raise _error(f"{failure} ({type(error).__name__}: {error})") from error
            if not passed:
                raise _error(failure)


check()
