"""What a reader would miss in a docstring: parameters, results, errors, shapes, dtypes, sources, examples, methods."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from types import ModuleType
from typing import Any

PUBLIC = ("", "curvature", "estimators", "functional", "layerwise", "linalg", "nn", "ops", "optim", "training")
# What an optimiser of its own would fill in; not for those who call one (mkdocs.yml leaves them out).
OPTIMISER_HOOKS = {"accepted", "form_again", "never_used", "quadratic_model", "read_state", "setting", "write_state"}
# What other libraries call: their documentation has the arguments.
CALLBACK_HOOKS = {"on_train_begin", "on_train_end", "on_train_start"}

SHAPE = re.compile(
    r"\((?:…|\.\.\.|[A-Za-z](?: \+ 1)?)(?:, ?[^()]*)?\)|\((?:outputs|features|folds|\d),|(?<!\w)\(\)|\bshapes?\b"
)
DTYPE = re.compile(r"\b(?:float|int|uint|bfloat)(?:8|16|32|64)|\bdtypes?\b|\bfp32\b")
SOURCE = re.compile(r"\b(?:18|19|20)\d\d\b|\bLAPACK\b|\bBLAS\b")
# An entry that says where the rest is told, or that it is no array.
ELSEWHERE_TOLD = re.compile(r"\bas (?:for|in|to) |\blikewise\b|``\w+\.\w+``|\bas ``")
NO_ARRAY = re.compile(r"\b(?:float|int|bool|str|scalar)\b|^None\b|^\"")
# What has no mathematics of its own, or is made by other names, which show how.
NO_SOURCE = {
    "info",
    "build",
    "records_derivatives",
    "save",
    "LayerStatistics",
    "Objective",
    "replace_attention",
    "MultiheadAttention",
    # of integrations
    "Solve",
    "as_loss",
    "load",
    "register_attention",
}
# Functions of the ops' own page.
ELSEWHERE = {"build", "records_derivatives"}


def raises(function: Any, owner: type | None = None) -> bool:
    """Whether the function's own body raises an error that it makes, or that of a private method which it calls."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except OSError:  # made by dataclasses
        return False
    tree = ast.parse(textwrap.dedent(source))
    made = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    if any(isinstance(call.func, ast.Name) and call.func.id[0].isupper() for call in made):
        return True
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    own = {f.attr for f in called if isinstance(f, ast.Attribute) and getattr(f.value, "id", "") == "self"}
    helpers = [inspect.getattr_static(owner, name, None) for name in sorted(own) if re.match("_[a-z]", name)]
    return any(raises(helper) for helper in helpers if inspect.isfunction(helper))


def torn_result(doc: str) -> list[str]:
    """Of the first line under Returns the site shows what stands before a colon as the type, which a name may be."""
    line = doc.partition("\nReturns:\n")[2].partition("\n")[0].strip()
    head, colon, _ = f"{line} ".partition(": ")
    return ["a type before the colon in Returns"] if colon and not re.fullmatch(r"``\w+(\([\w, ]+\))?``", head) else []


def not_documented_method(method: Any, owner: type) -> list[str]:
    """What a reader would miss in a method's docstring; shapes and dtypes may be told by the class's."""
    doc, of_class, signature = inspect.getdoc(method) or "", inspect.getdoc(owner) or "", inspect.signature(method)
    missing = ["a docstring"] if not doc else []
    missing += ["Args"] if set(signature.parameters) - {"self"} and "Args:" not in doc else []
    missing += ["Raises"] if raises(method, owner) and "Raises:" not in doc else []
    if "Tensor" in str(signature):
        missing += ["shapes"] if not SHAPE.search(doc + of_class) else []
        missing += ["dtypes"] if not DTYPE.search(doc + of_class) else []
    missing += torn_result(doc)
    return [f"method {method.__name__}: {what}" for what in missing]


def own_methods(thing: type) -> list[Any]:
    """Public methods and properties, those of onestep's base classes, too."""
    found = {name: inspect.getattr_static(thing, name) for name in dir(thing) if not name.startswith("_")}
    functions = [member.fget if isinstance(member, property) else member for member in found.values()]
    return [function for function in functions
            if inspect.isfunction(function)
            and function.__module__.partition(".")[0] == thing.__module__.partition(".")[0]
            and function.__name__ not in OPTIMISER_HOOKS | CALLBACK_HOOKS]  # fmt: skip


def entries(doc: str, section: str) -> dict[str, str]:
    """The entries of a section by name; "a, b: text" is one of each."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in doc.splitlines():
        if line and not line.startswith(" "):
            inside = line == f"{section}:"
        elif inside and (entry := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif inside and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def tensors_of(thing: type) -> list[str]:
    """The fields of a result that are tensors; none of other classes."""
    if dataclasses.is_dataclass(thing):
        annotations = {field.name: str(field.type) for field in dataclasses.fields(thing)}
    else:
        annotations = {name: str(thing.__annotations__[name]) for name in getattr(thing, "_fields", ())}
    return [name for name, annotation in annotations.items() if "Tensor" in annotation and "Callable" not in annotation]


def attributes_not_told(thing: type) -> list[str]:
    """What a reader would miss under Attributes: of results each tensor, of estimators what a fit leaves."""
    doc = inspect.getdoc(thing) or ""
    told, before = entries(doc, "Attributes"), doc.partition("Attributes:")[0]
    fitted = {name: text for name, text in told.items() if name.endswith("_")}
    missing = [f"attribute {name}" for name in tensors_of(thing) if name not in told]
    arrays = {name: told[name] for name in tensors_of(thing) if name in told}
    for name, text in (arrays | fitted).items():
        if ELSEWHERE_TOLD.search(text) or (name in fitted and NO_ARRAY.search(text)):
            continue
        missing += [f"attribute {name}: shapes"] if not SHAPE.search(text) else []
        missing += [f"attribute {name}: dtypes"] if not DTYPE.search(text + before) else []
    return missing


def not_documented(thing: object) -> list[str]:
    """What a reader would miss in a docstring: parameters, results, errors, methods."""
    doc = inspect.getdoc(thing) or ""
    missing = torn_result(doc) if doc else ["a docstring"]
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return missing
    signature = inspect.signature(thing)  # type: ignore[arg-type]
    for name in signature.parameters:
        if not re.search(rf"^\s+(?:[*\w]+, )*\*{{0,2}}{name}(?:, [*\w]+)*( \([^)]*\))?:", doc, re.MULTILINE):
            missing.append(f"parameter {name}")
    if inspect.isfunction(thing):
        returns_nothing = signature.return_annotation in (None, "None")
        missing += ["Returns"] if "Returns:" not in doc and not returns_nothing else []
        missing += ["Raises"] if "Raises:" not in doc and signature.parameters else []
    elif inspect.isclass(thing):
        missing += ["Raises"] if "__init__" in vars(thing) and raises(thing.__init__) and "Raises:" not in doc else []  # type: ignore[misc]
        missing += attributes_not_told(thing)
        missing += [gap for method in own_methods(thing) for gap in not_documented_method(method, thing)]
    return missing


def public_names() -> dict[str, object]:
    modules = [importlib.import_module(f"onestep.{name}".rstrip(".")) for name in PUBLIC]
    found = [(name, getattr(module, name)) for module in modules for name in module.__all__]
    return {name: thing for name, thing in found if not inspect.ismodule(thing)}


def not_told(thing: object, others: dict[str, object], *, arrays: bool | None = None) -> list[str]:
    """Shapes, dtypes, sources and examples that are not in a docstring, nor in those of the names that it refers to.

    ``arrays``: whether it takes or gives arrays; None where its signature says so.
    """
    doc = inspect.getdoc(thing) or ""
    name = getattr(thing, "__name__", "")
    if inspect.isclass(thing):
        doc += "\n".join(inspect.getdoc(member) or "" for key, member in vars(thing).items() if not key.startswith("_"))
    told = doc + "".join(inspect.getdoc(other) or "" for key, other in others.items() if f"`{key}" in doc)
    missing = []
    if "Tensor" in str(inspect.signature(thing)) if arrays is None else arrays:  # type: ignore[arg-type]
        missing += ["shapes"] if not SHAPE.search(told) else []
        missing += ["dtypes"] if not DTYPE.search(told) else []
    only_holds_results = inspect.isclass(thing) and (dataclasses.is_dataclass(thing) or hasattr(thing, "_fields"))
    if not only_holds_results:
        missing += ["a source"] if not SOURCE.search(told) and name not in NO_SOURCE else []
    missing += ["an example"] if "Examples:" not in doc and name not in ELSEWHERE else []
    return missing


def gaps_of_integration(module: ModuleType) -> dict[str, list[str]]:
    """The gaps of each public name of a module of ``onestep.integrations``; arrays go into all of them."""
    things = {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_") and callable(thing) and getattr(thing, "__module__", "") == module.__name__
    }
    assert things
    # A file's name is no array, and the model that is in it says what it takes.
    gaps = {
        name: not_documented(thing) + not_told(thing, public_names(), arrays=name != "load")
        for name, thing in things.items()
    }
    return {name: missing for name, missing in gaps.items() if missing}
