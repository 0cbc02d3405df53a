"""Every example finds what it imports from the others and from the package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "pandas", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    before = set(sys.modules)
    try:
        module = importlib.import_module(name)
    except SystemExit as missing:
        assert "is not installed: pip install" in str(missing)
        pytest.skip(str(missing))
    assert module.__doc__
    # Names such as "common" are the examples' own.
    for imported in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[imported], "__file__", "")):
            del sys.modules[imported]
