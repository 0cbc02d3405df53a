"""Examples in docstrings and in the README run, and print what they say."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import onestep

README = Path(__file__).parents[1] / "README.md"
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
