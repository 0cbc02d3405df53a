"""The demo runs, compares and draws."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import image_classification  # noqa: E402


@pytest.mark.long
def test_the_demo_runs_and_draws(monkeypatch, capsys, restore_threads):
    picture = EXAMPLES / "output" / "digits.png"
    picture.unlink(missing_ok=True)
    # Of the quick path, fewer steps and rates.
    monkeypatch.setattr(image_classification, "QUICK", image_classification.Effort(30, 1, (1e-2,), (0.03,)))
    monkeypatch.setattr(sys, "argv", ["image_classification.py", "--quick"])
    image_classification.main()
    written = capsys.readouterr().out
    assert "digits.png" in written
    assert picture.read_bytes().startswith(b"\x89PNG")
    rights = [float(line.split(": ")[1].split("%")[0]) for line in written.splitlines() if "digits right" in line]
    assert len(rights) == 3
    assert min(rights) > 85
