"""The native module against its stub: the names and the order of every function's arguments."""

import ast
import re
import types
from pathlib import Path

import pytest
import torch

import onestep
from onestep import _native


def stub_arguments():
    """Name → argument names, as ``_native.pyi`` has them; ``f64 = f32`` is an alias."""
    tree = ast.parse((Path(onestep.__file__).parent / "_native.pyi").read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [argument.arg for argument in node.args.args]
        elif isinstance(node, ast.Assign) and node.targets[0].id[0] != "_":
            found[node.targets[0].id] = found[node.value.id]
    return found


def module_arguments():
    """The same, from the signatures that pybind11 writes into docstrings."""
    functions = {name: value for name, value in vars(_native).items() if isinstance(value, types.BuiltinFunctionType)}
    signatures = {name: function.__doc__.partition("->")[0] for name, function in functions.items()}
    return {name: re.findall(r"[(,] ?(\w+): ", signature) for name, signature in signatures.items()}


def test_the_stub_has_the_modules_functions_and_arguments():
    assert stub_arguments() == module_arguments()


def test_arguments_are_taken_by_keyword():
    A, L, info = 4 * torch.eye(2), torch.empty(2, 2), torch.empty((), dtype=torch.int32)
    arguments = {"batch": (), "d": 2, "factor": L.data_ptr(), "info": info.data_ptr()}
    _native.cholesky_f32(a=(A.data_ptr(), A.stride(), A), **arguments)
    assert info == 0
    assert torch.equal(L, 2 * torch.eye(2))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _native.cholesky_f32(matrix=(A.data_ptr(), A.stride(), A), **arguments)
