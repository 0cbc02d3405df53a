"""The demo runs, compares and draws."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_demo_runs_and_draws():
    for name in ("matplotlib", "sklearn"):
        pytest.importorskip(name)
    picture = EXAMPLES / "output" / "digits.png"
    picture.unlink(missing_ok=True)
    command = [sys.executable, str(EXAMPLES / "image_classification.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    assert "picture: examples/output/digits.png" in done.stdout.replace("\\", "/")
    assert picture.read_bytes().startswith(b"\x89PNG")
    rights = [float(line.split(": ")[1].split("%")[0]) for line in done.stdout.splitlines() if "digits right" in line]
    assert len(rights) == 3
    assert min(rights) > 90
