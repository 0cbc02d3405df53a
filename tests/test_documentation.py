"""Examples in docstrings and in the README run, and print what they say."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import runpy
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import onestep

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# Modules of extras that need not be installed.
EXTRAS = {"keras", "lightning", "pytorch_lightning", "pandas", "rich", "safetensors", "sklearn", "transformers"}


def with_examples() -> list[str]:
    """Modules whose source has an example; the others need not be imported for that."""
    names = [found.name for found in pkgutil.walk_packages(onestep.__path__, "onestep.") if "_native" not in found.name]
    names = [name for name in names if not name.endswith("__main__")]
    sources = {name: importlib.util.find_spec(name) for name in names}
    return [name for name, spec in sources.items() if spec and spec.origin and ">>>" in Path(spec.origin).read_text()]


@pytest.mark.parametrize("name", with_examples())
def test_examples_of_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        pytest.skip(f"{error.name} is not installed")
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert tried > 0
    assert failed == 0


def test_code_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # progress bars
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            exec(compile(block, README.name, "exec"), names)
        promised = re.findall(r"^print\(.*\)  # (\S+)", block, re.MULTILINE)
        lines = [line for line in written.getvalue().splitlines() if line]
        assert len(lines) == block.count("print(")
        # The first word of each printed line; what follows depends on the machine's rounding.
        for line, first in zip(lines, promised, strict=False):
            if not first[0].isalpha() or first in ("True", "levenberg_marquardt"):
                assert line.startswith(first[:5])


PUBLIC = ("", "curvature", "estimators", "functional", "layerwise", "linalg", "nn", "ops", "optim", "training")
REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
# What an optimiser of its own would fill in; not for those who call one.
OPTIMISER_HOOKS = {"accepted", "form_again", "never_used", "quadratic_model", "read_state", "setting", "write_state"}


def raises(function: Any) -> bool:
    """Whether the function's own body raises an error that it makes."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except OSError:  # made by dataclasses
        return False
    tree = ast.parse(textwrap.dedent(source))
    made = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return any(isinstance(call.func, ast.Name) and call.func.id[0].isupper() for call in made)


def not_documented_method(method: Any, of_class: str) -> list[str]:
    """What a reader would miss in a method's docstring; shapes and dtypes may be told by the class's."""
    doc, signature = inspect.getdoc(method) or "", inspect.signature(method)
    missing = ["a docstring"] if not doc else []
    missing += ["Args"] if set(signature.parameters) - {"self"} and "Args:" not in doc else []
    missing += ["Raises"] if raises(method) and "Raises:" not in doc else []
    if "Tensor" in str(signature):
        missing += ["shapes"] if not SHAPE.search(doc + of_class) else []
        missing += ["dtypes"] if not DTYPE.search(doc + of_class) else []
    return [f"method {method.__name__}: {what}" for what in missing]


def own_methods(thing: type) -> list[Any]:
    """Public methods and properties, those of onestep's base classes, too."""
    found = {name: inspect.getattr_static(thing, name) for name in dir(thing) if not name.startswith("_")}
    functions = [member.fget if isinstance(member, property) else member for member in found.values()]
    return [function for function in functions
            if inspect.isfunction(function)
            and function.__module__.partition(".")[0] == thing.__module__.partition(".")[0]
            and function.__name__ not in OPTIMISER_HOOKS]  # fmt: skip


def not_documented(thing: object) -> list[str]:
    """What a reader would miss in a docstring: parameters, results, errors, methods."""
    doc = inspect.getdoc(thing) or ""
    missing = [] if doc else ["a docstring"]
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
        missing += [gap for method in own_methods(thing) for gap in not_documented_method(method, doc)]
    return missing


SHAPE = re.compile(r"\((?:…|\.\.\.|[A-Za-z](?: \+ 1)?)(?:, ?[^()]*)?\)|\((?:outputs|features),|\bshapes?\b")
DTYPE = re.compile(r"\b(?:float|int|uint|bfloat)(?:8|16|32|64)|\bdtypes?\b|\bfp32\b")
SOURCE = re.compile(r"\b(?:18|19|20)\d\d\b|\bLAPACK\b|\bBLAS\b")
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
}


# Functions of the ops' own page.
ELSEWHERE = {"build", "records_derivatives"}


def public_names() -> dict[str, object]:
    modules = [importlib.import_module(f"onestep.{name}".rstrip(".")) for name in PUBLIC]
    found = [(name, getattr(module, name)) for module in modules for name in module.__all__]
    return {name: thing for name, thing in found if not inspect.ismodule(thing)}


def not_told(thing: object, others: dict[str, object]) -> list[str]:
    """Shapes, dtypes, sources and examples that are not in a docstring, nor in those of the names that it refers to."""
    doc = inspect.getdoc(thing) or ""
    name = getattr(thing, "__name__", "")
    if inspect.isclass(thing):
        doc += "\n".join(inspect.getdoc(member) or "" for key, member in vars(thing).items() if not key.startswith("_"))
    told = doc + "".join(inspect.getdoc(other) or "" for key, other in others.items() if f"`{key}" in doc)
    missing = []
    if "Tensor" in str(inspect.signature(thing)):  # type: ignore[arg-type]
        missing += ["shapes"] if not SHAPE.search(told) else []
        missing += ["dtypes"] if not DTYPE.search(told) else []
    only_holds_results = inspect.isclass(thing) and (dataclasses.is_dataclass(thing) or hasattr(thing, "_fields"))
    if not only_holds_results:
        missing += ["a source"] if not SOURCE.search(told) and name not in NO_SOURCE else []
    missing += ["an example"] if "Examples:" not in doc and name not in ELSEWHERE else []
    return missing


def test_every_public_name_tells_shapes_dtypes_sources_and_has_an_example() -> None:
    pytest.importorskip("sklearn")
    names = public_names()
    things = {name: thing for name, thing in names.items() if callable(thing) and not inspect.ismodule(thing)}
    gaps = {
        name: not_told(thing, things)
        for name, thing in things.items()
        if not (inspect.isclass(thing) and issubclass(thing, BaseException))
    }
    assert {name: missing for name, missing in gaps.items() if missing} == {}


def test_lists_of_pages_are_in_step_with_the_package() -> None:
    """What a reader of a clone sees in place of the site's entries and tables: `python docs/lists.py` writes it."""
    pytest.importorskip("sklearn")
    written = runpy.run_path(str(ROOT / "docs" / "lists.py"))["written"]
    pages = {page: written(page) for page in (ROOT / "docs").rglob("*.md")}
    assert [str(page) for page, text in pages.items() if page.read_text() != text] == []
    assert sum("<!-- end -->" in text for text in pages.values()) > 10
    # Of classes and functions under decorators, it is their own file that is linked.
    assert "solve_normal(X, Y, *, weight, ridge, refine)`](../../python/onestep/linalg/_normal.py)" in REFERENCE
    links = [(page, link) for page, text in pages.items() for link in re.findall(r"\]\((\.\./[^)#]+)", text)]
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_code_of_pages_imports_what_a_clone_has() -> None:
    """A cell is typed in the repository's folder: `docs.plots` is found there, `plots` on the site alone."""
    known = {*sys.stdlib_module_names, *EXTRAS, "docs", "matplotlib", "numpy", "onestep", "scipy", "torch"}
    for page in (ROOT / "docs").rglob("*.md"):
        for block in re.findall(r"^```python.*?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            names = {name.partition(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", block, re.MULTILINE)}
            assert names <= known, f"{page}: {names - known}"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference_and_documented(module: str) -> None:
    path = f"onestep.{module}".rstrip(".")
    if module == "estimators":
        pytest.importorskip("sklearn")
    found = importlib.import_module(path)
    for name in found.__all__:
        thing = getattr(found, name)
        if inspect.ismodule(thing) or not callable(thing):
            continue
        listed = f"<!-- members of {path}.{name} -->" in REFERENCE or any(
            f"<!-- members of onestep.{other} -->" in REFERENCE
            and name in importlib.import_module(f"onestep.{other}").__all__
            for other in PUBLIC[1:]
        )
        assert listed, f"{path}.{name} is not in docs/reference"
        assert not_documented(thing) == [], f"{path}.{name}"


def test_a_docstring_with_gaps_is_found() -> None:
    def good(a: int, *, b: int) -> int:
        """Adds.

        Args:
            a, b: numbers.

        Returns:
            Their sum.

        Raises:
            TypeError: they are none.
        """
        return a + b

    def bad(a: int, c: int) -> int:
        """Adds a and c.

        Args:
            a: a number, not c: another.
        """
        return a + c

    def bare(a: torch.Tensor) -> torch.Tensor:
        """As ``known``."""
        return a

    def known(a: torch.Tensor) -> torch.Tensor:
        """Of (n,d) in float32 (Gauss 1809)."""
        return a

    class Bad:
        """Of (n,d) tensors in float32."""

        def __init__(self, a: int) -> None:
            raise ValueError("a")

        def push(self, a: torch.Tensor) -> None:
            """Adds."""
            if not len(a):
                raise ValueError("empty")

        def pull(self) -> torch.Tensor:
            """All (n,d), float32."""
            return torch.ones(1, 1)

    gaps = ["parameter a", "Raises", "method push: Args", "method push: Raises"]
    assert not_documented(Bad) == gaps
    Bad.__doc__ = None
    assert not_documented(Bad)[-2:] == ["method push: shapes", "method push: dtypes"]
    assert not_documented(good) == []
    assert not_told(good, {}) == ["a source", "an example"]
    assert not_told(bare, {}) == ["shapes", "dtypes", "a source", "an example"]
    assert not_told(bare, {"known": known}) == ["an example"]
    assert not_documented(bad) == ["parameter c", "Returns", "Raises"]
