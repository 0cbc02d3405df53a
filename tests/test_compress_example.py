"""The example compresses a model that it trains on a text of one's own, and draws."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_solved_layers_lose_less(tmp_path):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} plus {i} is {2 * i}.\n" for i in range(1000)), encoding="utf-8")
    picture = EXAMPLES / "output" / "compress_a_language_model.png"
    picture.unlink(missing_ok=True)
    command = [sys.executable, str(EXAMPLES / "compress_a_language_model.py"), str(text), "--quick"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    full = float(next(line for line in done.stdout.splitlines() if "full model" in line).split()[-1])
    for name in ("half of the weights", "2 of 4 weights", "two blocks less"):
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith(name))
        without, _, solved, *_ = line.strip().removeprefix(name).split()
        assert full < float(solved) < float(without)
