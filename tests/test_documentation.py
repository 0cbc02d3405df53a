"""Examples in docstrings and in the README run, and print what they say."""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from docstrings import PUBLIC, attributes_not_told, gaps_of_integration, not_documented, not_told, public_names

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
def test_examples_of_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "KERAS_BACKEND" not in os.environ:
        monkeypatch.setenv("KERAS_BACKEND", "torch")
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
    # Four doors, ten lines each.
    assert len(blocks) == 4 and max(block.count("\n") for block in blocks) <= 10
    assert len(README.read_text().splitlines()) <= 110
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


def test_the_site_takes_nothing_from_elsewhere_and_is_searched_without_a_server() -> None:
    settings = pytest.importorskip("yaml").safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False and "offline" in settings["plugins"]
    # The plugin adds a script of another site where none of ours has this name.
    scripts = settings["extra"]["polyfills"]
    assert any("iframe-worker" in script for script in scripts)
    files = [*scripts, *settings["extra_css"], *settings.get("extra_javascript", [])]
    assert [file for file in files if not (ROOT / "docs" / file).is_file()] == []


REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))


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


def test_an_entry_of_the_reference_is_the_function_not_its_module() -> None:
    """The site's entries are read from sources, where a module may have the name of the function in it."""
    in_sources = runpy.run_path(str(ROOT / "docs" / "lists.py"))["in_sources"]
    assert in_sources("onestep.training.fit") == "onestep.training.fit.fit"
    assert in_sources("onestep.curvature.glm") == "onestep.curvature.glm.glm"
    assert in_sources("onestep.curvature.hvp") == "onestep.curvature.hvp"
    # Whatever is added later: what the name is in Python is what is asked for.
    for module in PUBLIC[1:]:
        if module == "estimators":
            pytest.importorskip("sklearn")
        for name in importlib.import_module(f"onestep.{module}").__all__:
            asked = in_sources(f"onestep.{module}.{name}")
            owner, _, last = asked.rpartition(".")
            assert not (ROOT / "python" / asked.replace(".", "/")).with_suffix(".py").is_file(), asked
            assert last == name and (owner == f"onestep.{module}" or owner.endswith(f".{name}"))


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


def test_tables_in_docstrings_are_markdown() -> None:
    """The site reads docstrings as Markdown, to which a table between lines of = is a paragraph."""
    pytest.importorskip("sklearn")
    texts = {name: inspect.getdoc(thing) or "" for name, thing in public_names().items()}
    assert "| family |" in texts["glm"]
    assert [name for name, text in texts.items() if re.search(r"^\s*={3,}( |$)|^\.\. ", text, re.MULTILINE)] == []


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

        def step(self) -> None:
            """Steps, if what a private method looks at is right."""
            self._look()

        def _look(self) -> None:
            raise ValueError("empty")

    def torn(a: int) -> int:
        """Adds.

        Args:
            a: a number.

        Returns:
            (n,d) in the order of a: rising.

        Raises:
            ValueError: never.
        """
        return a

    assert not_documented(torn) == ["a type before the colon in Returns"]
    torn.__doc__ = str(torn.__doc__).replace("(n,d) in the order of a:", "``Moments(a, b)``:")
    assert not_documented(torn) == []
    gaps = ["parameter a", "Raises", "method push: Args", "method push: Raises", "method step: Raises"]
    assert not_documented(Bad) == gaps
    Bad.__doc__ = None
    told_by_class = ["method push: shapes", "method push: dtypes", "method step: Raises"]
    assert not_documented(Bad)[-3:] == told_by_class
    assert not_documented(good) == []
    assert not_told(good, {}) == ["a source", "an example"]
    assert not_told(bare, {}) == ["shapes", "dtypes", "a source", "an example"]
    assert not_told(bare, {"known": known}) == ["an example"]
    assert not_documented(bad) == ["parameter c", "Returns", "Raises"]


def test_an_attribute_with_gaps_is_found() -> None:
    @dataclasses.dataclass
    class Result:
        """A result.

        Attributes:
            good: (n, d) float32.
            same: as ``other.thing`` has it.
            shapeless: float32.
            typeless: (n,),
                one for each row.
            length: of it.
        """

        good: torch.Tensor
        same: torch.Tensor
        shapeless: torch.Tensor
        typeless: torch.Tensor
        forgotten: torch.Tensor | None
        length: float

    gaps = ["attribute forgotten", "attribute shapeless: shapes", "attribute typeless: dtypes"]
    assert attributes_not_told(Result) == gaps

    class Estimator:
        """An estimator.

        Attributes:
            scores_: (folds, A).
            C_: the best.
            n_iter_, path_: an int.
        """

    assert attributes_not_told(Estimator) == [
        f"attribute {gap}" for gap in ("scores_: dtypes", "C_: shapes", "C_: dtypes")
    ]


def test_a_name_of_an_integration_with_gaps_is_found() -> None:
    module = types.ModuleType("onestep.integrations.some")

    def load(path: str) -> int:
        """Loads."""
        return len(path)

    def convert(X: object) -> object:
        """Converts.

        Args:
            X: rows.

        Returns:
            Rows.

        Raises:
            ValueError: they are none.

        Examples:
            >>> convert(1)
            1
        """
        return X

    for function in (load, convert):
        function.__module__ = module.__name__
        setattr(module, function.__name__, function)
    gaps = gaps_of_integration(module)
    assert gaps == {
        "load": ["parameter path", "Returns", "Raises", "an example"],
        "convert": ["shapes", "dtypes", "a source"],
    }
