"""The example trains on a text of one's own, writes and draws."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_example_trains_writes_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} plus {i} is {2 * i}.\n" for i in range(2000)), encoding="utf-8")
    picture = EXAMPLES / "output" / "text_generation.png"
    picture.unlink(missing_ok=True)
    command = [sys.executable, str(EXAMPLES / "text_generation.py"), str(text), "--quick", "--steps", "24"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    assert "picture: examples/output/text_generation.png" in done.stdout.replace("\\", "/")
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = done.stdout.split("held-out loss\n")[1].splitlines()[:3]
    assert [line.split()[0] for line in lines] == ["Adam,", "Muon,", "onestep.fit"]
    steps, _, loss = lines[2].split()[-3:]
    # Half of the others' steps; the alphabet's entropy is 3.1.
    assert int(steps) == 12
    assert float(loss) < 2.9
    assert done.stdout.count("writes:\n") == 3


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("Too short.", encoding="utf-8")
    command = [sys.executable, str(EXAMPLES / "text_generation.py"), str(text), "--quick"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, cwd=EXAMPLES.parent)
    assert done.returncode != 0
    assert "expected at least" in done.stderr
