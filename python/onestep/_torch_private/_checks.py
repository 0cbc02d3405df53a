"""What onestep relies on of torch's private names, tried at import.

No check runs a backward pass: on a machine with GPUs the first one starts autograd's device threads, which a process
must be free to do after it has forked. tests/test_torch_private.py does.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from onestep import _torch_private as private


class _Square(private.SingleLevelFunction):
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
    allowed = private.get_single_level_allowed()
    private.set_single_level_allowed(True)
    try:
        result: Tensor = _Square.apply(x)  # type: ignore[attr-defined]
        return result
    finally:
        private.set_single_level_allowed(allowed)


def _number(value: float) -> Tensor:
    return torch.tensor(value, device="cpu", dtype=torch.float64)


def _reverse_mode() -> bool:
    x = _number(3.0).requires_grad_()
    square = _single_level(x)
    with private.below_autograd():
        below = x * x
    recorded = private.any_requires_grad(None, x, 1.0) and not private.any_requires_grad(None, _number(3.0))
    private.set_grad_enabled(False)
    try:
        off = not torch.is_grad_enabled()
    finally:
        private.set_grad_enabled(True)
    node: Any = square.grad_fn
    return recorded and off and not below.requires_grad and node.apply(_number(1.0)).item() == 6.0


def _forward_mode() -> bool:
    x = _number(3.0)
    before = private.forward_level()
    with forward_ad.dual_level():
        dual = private.make_dual(x, _number(1.0), level=0)
        tangent = private.unpack_dual(_single_level(dual), level=0)[1]
        private.set_forward_grad_enabled(False)
        off = not private.forward_grad_enabled()
        private.set_forward_grad_enabled(True)
        inside = (
            private.forward_level() >= 0
            and private.has_tangent(dual)
            and not private.has_tangent(x)
            and private.forward_grad_enabled()
        )
    return before == -1 and off and inside and tangent is not None and tangent.item() == 6.0


def _transforms() -> bool:
    seen: list[Any] = []

    def function(x: Tensor) -> Tensor:
        with private.temporarily_pop_interpreter_stack():
            outside = private.transforms_active()
        stack = private.interpreter_stack()
        seen.append((private.transforms_active(), outside, private.is_batched(x), len(stack or ())))
        seen.append((stack or [])[0].key() == private.TransformType.Vmap)
        seen.append(private.level_of(x) == private.current_level())
        seen.append(private.unwrapped(x).shape == (2,) and not private.is_tracking(x))
        seen.append(not private.is_tracked(x))
        return x * 2

    def followed(x: Tensor) -> Tensor:
        seen.append(private.is_tracked(x, now=True) and not private.is_tracked(outer))
        kept.append(x)
        return x * 2

    kept: list[Tensor] = []
    outer = _number(3.0)

    torch.func.vmap(function)(torch.zeros(2, device="cpu"))
    torch.func.jvp(followed, (outer,), (_number(1.0),))
    seen.append(private.is_tracked(kept[0]) and not private.is_tracked(kept[0], now=True))
    idle = not private.transforms_active() and private.current_level() is None and not private.interpreter_stack()
    # torch.func calls a single-level function once for its level.
    tangent: Tensor = torch.func.jvp(_single_level, (_number(3.0),), (_number(1.0),))[1]
    return idle and seen == [(True, False, True, 1), *[True] * 6] and tangent.item() == 6.0


def _own_level() -> bool:
    """A level that onestep opens is used by torch.func.jvp, which neither opens another nor closes this one."""
    counted: list[tuple[int, int]] = []

    def function(x: Tensor) -> Tensor:
        counted.append((private.counted_levels(), private.levels_in(traceback.walk_stack(None))))
        return _single_level(x)

    opened = private.open_level()
    try:
        tangent: Tensor = torch.func.jvp(function, (_number(3.0),), (_number(1.0),))[1]
        left_open = private.forward_level() == 0
    finally:
        closed = private.close_level()
    right = counted == [(2, 1)] and tangent.item() == 6.0
    return opened and left_open and closed and private.forward_level() == -1 and right


def _ended_from_outside() -> bool:
    """Transforms and function modes that an interrupt has left active."""
    before, mode = (private.transform_depth(), private.function_modes()), _Seen()
    private.begin_grad()
    mode.__enter__()
    during = private.transform_depth(), private.function_modes()
    last = private.pop_function_mode()
    private.pop_transforms(before[0])
    after = private.transform_depth(), private.function_modes()
    return (
        last is mode
        and during == (before[0] + 1, before[1] + 1)
        and after == before
        and not private.transforms_active()
    )


def _legacy_vmap() -> bool:
    inside: list[bool] = []

    def function(x: Tensor) -> Tensor:
        inside.append(private.in_legacy_vmap() and private.is_batched(x))
        return x

    private.legacy_vmap(function)(torch.zeros(2, device="cpu"))
    return inside == [True] and not private.in_legacy_vmap()


def _trees() -> bool:
    leaves, form = private.tree_flatten({"a": [1, (2.0,)], "b": None})
    mapped = private.tree_map_only(int, lambda n: n + 1, {"a": [1, (2.0,)]})
    back = private.tree_unflatten([n for n in leaves if n is not None] + [None], form)
    same = private.tree_leaves(back) == leaves and private.tree_map(lambda n: n, back) == back
    return leaves == [1, 2.0, None] and mapped == {"a": [2, (2.0,)]} and same


# The arguments of attention's ops that are called by position; those of CUDA's kernels cannot be run everywhere.
_ATTENTION_ARGUMENTS = {
    "flash_attention": "query key value dropout_p is_causal return_debug_mask scale",
    "flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
    "is_causal philox_seed philox_offset scale",
    "cudnn_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale",
    "cudnn_attention_backward": "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q "
    "cum_seq_k max_q max_k dropout_p is_causal scale",
    "attention_math": "query key value attn_mask dropout_p is_causal dropout_mask scale enable_gqa",
}


def _attention_ops() -> bool:
    return all(
        [argument.name for argument in getattr(private, op)._schema.arguments] == names.split()
        for op, names in _ATTENTION_ARGUMENTS.items()
    )


def _values() -> bool:
    v, g = torch.tensor([[3.0, 4.0]], device="cpu"), torch.tensor([[10.0]], device="cpu")
    before = private.version(v)
    v.add_(0)
    if not private.is_unwritten_zero(torch._efficientzerotensor(1)) or private.is_unwritten_zero(v):
        return False
    return bool(private.weight_norm(v, g, 0).tolist() == [[6.0, 8.0]]) and private.version(v) > before


def _hooks() -> bool:
    layer = nn.Identity()
    free = private.is_hooked(layer)
    layer.register_forward_hook(lambda *_: None)
    seen: list[int] = []
    for before in (True, False):
        hooks, with_kwargs = private.hook_tables(layer, before=before)
        with_kwargs["own"], hooks["own"] = True, lambda *given: seen.append(len(given))
    layer(_number(1.0))
    if seen != [3, 4]:
        return False
    return not free and private.is_hooked(layer) and private.number_of_outputs(torch.ops.aten.max.dim) == 2


def _parameters() -> bool:
    layer = nn.Linear(1, 1, bias=False, device="cpu", dtype=torch.float64)
    if private.reset_method(layer) is None or private.reset_method(nn.MultiheadAttention(1, 1, device="meta")) is None:
        return False
    private.own_parameters(layer)["weight"] = _number(3.0).reshape(1, 1)
    return bool(layer(_number(2.0).reshape(1, 1)).item() == 6.0)


def _children() -> bool:
    container = nn.ModuleList([nn.Identity()])
    private.own_children(container)["0"] = other = nn.Identity()
    return next(iter(container)) is other


class _Seen(TorchFunctionMode):
    """Notes the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def _modes() -> bool:
    class Nothing(private.TorchDispatchMode):
        pass

    outside, x = private.dispatch_modes(), _number(1.0)
    with Nothing():
        counted = private.dispatch_modes() == outside + 1
    with _Seen() as seen:
        values = private.nn_silu(x), private.nn_mish(x)
    same = values == (nn.functional.silu(x), nn.functional.mish(x))
    return counted and seen.functions == [private.nn_silu, private.nn_mish] and same


def _layers() -> bool:
    norm, dropout = nn.BatchNorm2d(1, device="meta"), nn.Dropout1d()
    return isinstance(norm, private.BatchNorm) and isinstance(dropout, private.DropoutNd)


_CHECKS: dict[str, Callable[[], bool]] = {
    "reverse mode through a single-level function (_SingleLevelFunction) is wrong": _reverse_mode,
    "a backward pass does not tell whether its graph is kept": lambda: isinstance(private.graph_is_kept(), bool),
    "forward mode through a single-level function (_SingleLevelFunction) is wrong": _forward_mode,
    "torch.func.jvp does not use a level of forward mode that is open": _own_level,
    "torch.func's interpreter stack is not as expected": _transforms,
    "transforms and modes cannot be ended from outside": _ended_from_outside,
    "the vmap of batched gradients is not seen": _legacy_vmap,
    "torch's dispatch modes are not counted, or function modes do not see nn.functional's kernels": _modes,
    "nn's layers have other base classes (_BatchNorm, _DropoutNd)": _layers,
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
                raise private.error(f"{failure} ({type(error).__name__}: {error})") from error
            if not passed:
                raise private.error(failure)
