"""What onestep relies on in torch without its being exported."""

import ast
import builtins
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onestep
from onestep import _torch_private as private
from onestep._torch_private import _checks


def test_every_check_passes():
    private.check()


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("transforms_active", lambda: False, "interpreter stack"),
        ("is_tracked", lambda tensor, now=False: False, "interpreter stack"),
        ("is_tracked", lambda tensor, now=False: True, "interpreter stack"),
        ("any_requires_grad", lambda *args: True, "reverse mode"),
        ("forward_level", lambda: -1, "forward mode"),
        ("dispatch_modes", lambda: 0, "dispatch modes"),
        ("in_legacy_vmap", lambda: False, "vmap of batched gradients"),
        ("unpack_dual", lambda tensor, level: (tensor, None), "forward mode"),
        ("tree_map_only", lambda kind, function, tree: tree, "_pytree"),
        ("tree_leaves", lambda tree: [], "_pytree"),
        ("flash_attention", private.attention_math, "scaled_dot_product_attention"),
        ("transform_depth", lambda: 0, "from outside"),
        ("pop_transforms", lambda depth: None, "from outside"),
        ("function_modes", lambda: 0, "from outside"),
        ("nn_silu", private.nn_mish, "function modes"),
        ("BatchNorm", nn.Dropout, "base classes"),
        ("DropoutNd", nn.BatchNorm2d, "base classes"),
        ("is_batched", lambda tensor: False, "interpreter stack"),
        ("level_of", lambda tensor: -1, "interpreter stack"),
        ("is_tracking", lambda tensor: True, "interpreter stack"),
        ("unwrapped", lambda tensor: torch.zeros(3), "interpreter stack"),
        ("counted_levels", lambda: 1, "level of forward mode"),
        ("levels_in", lambda frames: 0, "level of forward mode"),
        ("_enter_dual_level", lambda: None, "level of forward mode"),
        ("close_level", lambda: True, "level of forward mode"),
        ("weight_norm", lambda v, g, dim: v, "weight_norm"),
        ("version", lambda tensor: 0, "versions of tensors"),
        ("is_hooked", lambda module: False, "hooks of modules"),
        ("number_of_outputs", lambda op: 1, "outputs of ops"),
        ("is_unwritten_zero", lambda tensor: False, "zeros without memory"),
    ],
)
def test_changed_behaviour_is_an_import_error(monkeypatch, name, broken, message):
    monkeypatch.setattr(private, name, broken)
    try:
        with pytest.raises(ImportError, match=rf"tested with torch {private.TESTED}.*{message}"):
            private.check()
    finally:
        monkeypatch.undo()
        while private.function_modes():
            private.pop_function_mode()
        private.pop_transforms(0)
        private.forget_levels()


def test_missing_name_is_an_import_error(monkeypatch):
    monkeypatch.delattr(torch._C, "_any_requires_grad")
    with pytest.raises(ImportError, match=r"onestep was tested with torch .*_any_requires_grad"):
        runpy.run_path(private.__file__)


def test_inside_a_backward_pass():
    """What the checks at import leave out, since a backward pass starts autograd's threads."""
    x = torch.ones(2, requires_grad=True)
    seen = []
    y = x * 1.0
    y.register_hook(lambda _: seen.append((private.graph_is_kept(), private.in_legacy_vmap())))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [(True, True), (False, False)]
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    found = private.run_backward((3 * a,), (torch.ones(2),), True, False, (a, b), True, accumulate_grad=False)
    assert found[0].tolist() == [3.0, 3.0] and found[1] is None and a.grad is None
    assert torch.func.grad(_checks._single_level)(torch.tensor(3.0)) == 6.0
    events: list[Any] = []
    y = x * 2.0
    y.register_hook(lambda _: events.append(private.backward_pass()))
    y.register_hook(lambda _: private.after_backward_pass(lambda: events.append("ended")))
    x.register_hook(lambda _: events.append("at x"))
    y.sum().backward()
    assert events[0] >= 0 and events[1:] == ["at x", "ended"] and private.backward_pass() == -1


# Private attributes of tensors, modules and optimisers: others' objects may have such names of their own.
ATTRIBUTES = {
    name
    for of in (torch.Tensor, nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), torch.autograd.graph.Node)
    for name in dir(of)
    if name.startswith("_") and not name.startswith("__")
}


def names_of_torch(tree: ast.Module) -> set[str]:
    """The names that a module imports from torch, or from _torch_private."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or "torch" for alias in node.names if alias.name.partition(".")[0] == "torch"}
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ("torch", "onestep"):
            own = node.module != "onestep._torch_private" and str(node.module).startswith("onestep")
            found |= set() if own else {alias.asname or alias.name for alias in node.names}
    return found - set(dir(builtins))


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines of a module and what is private in torch there."""

    def is_private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__")

    known = names_of_torch(tree)
    for node in ast.walk(tree):
        names: list[Any] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "torch"]
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root: Any = node
            while isinstance(root, ast.Attribute):
                root = root.value
            of_torch = isinstance(root, ast.Name) and root.id in known
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if of_torch or (node.attr in ATTRIBUTES and not of_self):
                names = [ast.unparse(node)]
        for name in names:
            if any(map(is_private, name.split("."))):
                yield node.lineno, name


@pytest.mark.parametrize(
    "code",
    [
        "import torch._C",
        "from torch._C import _functorch",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "import torch\ntorch._weight_norm",
        "import torch.autograd.forward_ad as f\nf._current_level",
        "from onestep._torch_private import forward_ad\nforward_ad._current_level = 0",
        "module._parameters",
    ],
)
def test_private_names_are_found(code: str) -> None:
    assert list(private_names(ast.parse(code)))


def test_no_other_file_has_private_names() -> None:
    """Of torch; those that were made public here have no private parts of their own, either."""
    package = Path(onestep.__file__).parent
    others = [path for path in package.rglob("*.py") if path.parent.name != "_torch_private"]
    assert len(others) > 200
    assert not [
        f"{path.relative_to(package)}:{line}: {name}"
        for path in others
        for line, name in private_names(ast.parse(path.read_text()))
    ]
