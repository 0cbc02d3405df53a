"""The example runs on a text of one's own, solves and draws."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_example_solves_writes_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} plus {i} is {2 * i}.\n" for i in range(2000)), encoding="utf-8")
    picture = EXAMPLES / "output" / "text_generation.png"
    picture.unlink(missing_ok=True)
    command = [sys.executable, str(EXAMPLES / "text_generation.py"), str(text), "--quick"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    assert "picture: examples/output/text_generation.png" in done.stdout.replace("\\", "/")
    assert picture.read_bytes().startswith(b"\x89PNG")

    lines = done.stdout.splitlines()
    anew, adam, estimated, newton = (
        float(next(line for line in lines if line.strip().startswith(name)).split()[-2])
        for name in ("drawn anew", "Adam, 30 passes", "closed form", "+ ")
    )
    assert newton <= estimated < 1.1 * adam < anew
    *_, first, last = next(line for line in lines if line.strip().startswith("Gauss-Newton (onestep.fit)")).split()
    assert float(last) < float(first)
    assert done.stdout.count("writes:\n") == 4


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("Too short.", encoding="utf-8")
    command = [sys.executable, str(EXAMPLES / "text_generation.py"), str(text), "--quick"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, cwd=EXAMPLES.parent)
    assert done.returncode != 0
    assert "expected at least" in done.stderr
