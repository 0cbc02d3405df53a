"""What the package promises (versions of Python and torch) is told alike everywhere, and public CI tries it."""

from __future__ import annotations

import re
import runpy
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from onestep import _runtime, _torch_private

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def pythons() -> list[str]:
    """The versions that pyproject.toml's classifiers name."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)


def torches() -> list[str]:
    """The releases of the range in pyproject.toml."""
    first, last = map(int, re.findall(r'"torch>=2\.(\d+),<2\.(\d+)"', PYPROJECT)[0])
    return [f"2.{minor}" for minor in range(first, last)]


def test_range_of_torch_is_told_alike() -> None:
    told = f"{torches()[0]} to {torches()[-1]}"
    assert told == _torch_private.TESTED
    for page in ("README.md", "docs/quick-start.md"):
        assert f"torch {told}" in (ROOT / page).read_text(), page
    # Each release of the range, and no other, has a row that says what ran.
    decision = (ROOT / "docs" / "decisions" / "0033-torch-private.md").read_text()
    assert sorted(re.findall(r"^\| (2\.\d+)\.\d+", decision, re.MULTILINE)) == torches()


def test_public_ci_runs_what_ci_runs_on_every_version() -> None:
    jobs = pytest.importorskip("yaml").safe_load(WORKFLOW.read_text())["jobs"]
    commands = {name: [step.get("run", "") for step in job["steps"]] for name, job in jobs.items()}
    assert "bash .ci/run" in commands["check"]
    # A wheel that nobody has installed and tried is no wheel: the quick tests run under every Python.
    assert any(re.fullmatch("make wheels .*WHEEL_OPTIONS=--test-all", command) for command in commands["wheels"])
    assert "make docs" in commands["documentation"]
    matrix = jobs["pythons"]["strategy"]["matrix"]
    assert [version.removesuffix(".*") for version in matrix["torch"]] == torches()
    assert matrix["python"] == pythons()


def test_wheels_are_built_for_every_python_that_is_promised() -> None:
    versions = runpy.run_path(str(ROOT / "cmake" / "wheels.py"))["VERSIONS"]
    assert set(pythons()) <= set(versions)
    assert f'requires-python = ">={pythons()[0]}"' in PYPROJECT


BY_NAME = re.compile(
    r"(?:pip|pipx|uv|poetry|conda) (?:install|add)(?: [^`\n#;:)]*?)? ['\"]?onestep(?=[\[=<>~!'\"`\s]|$)", re.MULTILINE
)


@pytest.mark.parametrize("command", ["pip install onestep", "pip install -U 'onestep[fit]>=0.1'", "uv add onestep"])
def test_an_install_by_name_is_found(command: str) -> None:
    assert BY_NAME.search(f"In a shell: `{command}`.") and BY_NAME.search(f"```\n{command}\n```")
    assert not BY_NAME.search("`pip install '.[fit]'` in the clone of onestep; `pip install onestep-0.1.0.whl`")


def test_nothing_installs_onestep_by_its_name() -> None:
    """On PyPI that is another project (decision 0265)."""
    kinds = ("*.md", "*.py", "*.toml", "*.yml", "*.txt", "*.cmake", "Makefile")
    folders = ("docs", "python", "examples", "bench", "cmake", ".github")
    files = [file for kind in kinds for folder in folders for file in (ROOT / folder).rglob(kind)]
    files += [file for kind in kinds for file in ROOT.glob(kind)]
    assert len(files) > 200
    assert [str(file) for file in files if BY_NAME.search(file.read_text())] == []
    for page in ("README.md", "docs/quick-start.md"):
        assert re.search(r"\*\*[^*]*on PyPI is\s+another project\*\*", (ROOT / page).read_text()), page


def test_a_clone_where_nothing_is_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`make native` builds the module in the tree and installs nothing."""

    def nothing_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_runtime, "version", nothing_installed)
    monkeypatch.setattr(_runtime, "__file__", str(ROOT / "python" / "onestep" / "_runtime.py"))
    assert _runtime.own_version() == re.findall('\nversion = "(.*)"', PYPROJECT)[0]
    monkeypatch.setattr(_runtime, "__file__", str(tmp_path / "python" / "onestep" / "_runtime.py"))
    with pytest.raises(PackageNotFoundError):
        _runtime.own_version()
