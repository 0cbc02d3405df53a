"""CONTRIBUTING.md names files that exist, and decisions have a number each."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "onestep"


def expanded(name):
    """a/{b,c}.py → a/b.py, a/c.py"""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    return [found[1] + part + found[3] for part in found[2].split(",")] if found else [name]


def test_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    # A file among `folder/a.py`, `b.py` is in that folder.
    missing, folder = [], ""
    for quoted in re.findall(r"`([^`\s]+\.(?:py|pyi|cpp|hpp|cuh|cu|sh|cmake|toml|md))`", text):
        for name in expanded(quoted):
            # Patterns, and what a command writes.
            if re.search(r"[<>*…]|\.\.\.|^bench/results/", name):
                continue
            folders = (ROOT, PACKAGE, ROOT / folder, PACKAGE / folder)
            places = [path / name for path in folders if (path / name).exists()]
            # Among kernels a file is named by its place in the family.
            places += (ROOT / "csrc").rglob(name)
            places += (PACKAGE / "ops").rglob(name)
            if not places:
                missing.append(name)
            folder = name.rpartition("/")[0] or folder
    assert missing == []


def test_decisions_have_one_number_each_and_links_lead_to_them():
    decisions = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    numbers = [name[:4] for name in decisions]
    assert len(set(numbers)) == len(numbers)
    linked = re.findall(r"docs/decisions/(\S+?\.md)", (ROOT / "CONTRIBUTING.md").read_text())
    assert sorted(linked) == decisions
