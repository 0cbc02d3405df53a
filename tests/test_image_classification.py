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

    table = done.stdout.split("held-out accuracy\n")[1].splitlines()[:2]
    adam, ours = (line.split()[-3:] for line in table)
    assert table[0].split()[0] == "Adam," and table[1].split()[0] == "Gauss-Newton"
    assert adam[0] == ours[0], "both start from the same weights"
    for first, last, accuracy in (adam, ours):
        assert float(last) < float(first) / 4
        assert float(accuracy) > 0.8
    assert done.stdout.count("a training loss of") == 2
