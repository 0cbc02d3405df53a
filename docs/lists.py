"""Writes the lists in pages that a reader of a clone needs, and the site has in another form (see `docs/hooks.py`).

    python docs/lists.py    # after a change of public names, of the first line of a docstring, or of bench/results/

A list stands between `<!-- members of onestep.linalg -->` (or `ops`, or `results`) and `<!-- end -->`.
`tests/test_documentation.py` fails where one is out of step.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import onestep

PACKAGE = Path(onestep.__path__[0])
DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "bench" / "results"
LIST = re.compile(r"<!-- (members of (\S+)|ops|results|decisions|changelog) -->\n(.*?)<!-- end -->", re.DOTALL)
# Titles of pictures and tables of benchmarks.
TITLES = {
    "ratios": "Ratios to the peers by family, with goals and limits",
    "table": "Every case: seconds, ratio, goal, share of the machine's limit",
    "busy_neighbour": "Every case beside a busy process",
    "compare_builds": "Every kernel before and after its rebuilding",
}


def title(file: Path) -> str:
    """What a picture or table is called: as above, by its own first heading, or as the file is."""
    heading = re.match(r"#+ (.*)", file.read_text()) if file.suffix == ".md" else None
    return TITLES.get(file.stem) or (heading[1] if heading else file.stem.replace("_", " "))


def names(path: str) -> list[str]:
    """The public names of a module that are no modules, with their path; a path that is no module is one name."""
    if not (PACKAGE.parent / path.replace(".", "/")).is_dir():
        return [path]
    module = importlib.import_module(path)
    return [f"{path}.{name}" for name in module.__all__ if not inspect.ismodule(getattr(module, name))]


def in_sources(full: str) -> str:
    """A name for mkdocstrings, which reads sources: there `onestep.curvature.glm` is a module, not its function."""
    is_module = (PACKAGE.parent / full.replace(".", "/")).with_suffix(".py").is_file()
    return f"{full}.{full.rpartition('.')[2]}" if is_module else full


class Entry(NamedTuple):
    """What a list says of a name: its parameters, where it is written, the first paragraph of its docstring."""

    parameters: str
    file: Path
    summary: str


def _described(thing: Any) -> Entry:
    """Of results and errors no parameters are told: users do not make them."""
    file, summary = Path(str(inspect.getsourcefile(inspect.unwrap(thing)))), inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and issubclass(thing, (tuple, BaseException)):
        return Entry("", file, summary)
    parameters, marked = [], False
    for name, parameter in inspect.signature(thing).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not marked:
            parameters.append("*")
            marked = True
        parameters.append(("**" if parameter.kind is parameter.VAR_KEYWORD else "") + name)
    return Entry(f"({', '.join(parameters)})", file, summary)


def _read(file: Path, name: str) -> Entry:
    """Of a module that cannot be imported without the library that it is for."""
    nodes = ast.parse(file.read_text()).body
    node = next(node for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name)
    maker = node
    if isinstance(node, ast.ClassDef):
        maker = next(part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__")
    assert isinstance(maker, ast.FunctionDef)
    parameters = ast.unparse(_without_annotations(maker.args)).removeprefix("self, ")
    return Entry(f"({parameters})", file, ast.get_docstring(node) or "")


def _without_annotations(arguments: ast.arguments) -> ast.arguments:
    for argument in (*arguments.args, *arguments.kwonlyargs, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    return arguments


def _members(path: str, page: Path) -> Iterable[str]:
    every = names(path)
    if every != [path]:
        yield f"In a clone this lists names. The site (`make docs`) has what `help({every[-1]})` tells in Python:"
        yield "arguments with shapes and dtypes, results, errors, the source, an example."
        yield ""
    for full in every:
        owner, _, name = full.rpartition(".")
        if owner.startswith("onestep.integrations."):
            entry = _read(PACKAGE.parent / f"{owner.replace('.', '/')}.py", name)
        else:
            entry = _described(getattr(importlib.import_module(owner), name))
        source = os.path.relpath(DOCS.parent / "python" / "onestep" / entry.file.relative_to(PACKAGE), page.parent)
        summary = entry.summary.partition("\n\n")[0].replace("\n", " ")
        yield f"- [`{name}{entry.parameters}`]({source}): {summary}"


def _ops() -> Iterable[str]:
    from onestep.ops import _library

    for name, op in sorted(_library._OPS.items()):
        family = op.kernels["cpu"].__module__.split(".")[2]
        schema = str(op.dispatched._schema).removeprefix("onestep::")
        assert schema.startswith(f"{name}("), schema
        yield f"- `{schema}` ({family})"


def _results(page: Path) -> Iterable[str]:
    yield "## Tables and pictures by machine"
    yield ""
    up = os.path.relpath(RESULTS, page.parent)
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        files = [*folder.glob("*.png"), *folder.glob("*.md")]
        files.sort(key=lambda file: ([*TITLES, file.stem].index(file.stem), file.stem))
        yield f"- {folder.name}"
        yield from (f"    - [{title(file)}]({up}/{folder.name}/{file.name})" for file in files)


def written(page: Path) -> str:
    """The page with its lists as they should be."""

    def block(found: re.Match[str]) -> str:
        if found[1] in ("decisions", "changelog"):
            return found[0]
        lines = _members(found[2], page) if found[2] else _ops() if found[1] == "ops" else _results(page)
        return "\n".join([f"<!-- {found[1]} -->", *lines, "<!-- end -->"])

    return LIST.sub(block, page.read_text())


if __name__ == "__main__":
    for page in DOCS.rglob("*.md"):
        page.write_text(written(page))
