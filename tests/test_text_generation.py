"""The example trains on a text of one's own, writes and draws."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import text_generation  # noqa: E402


@pytest.mark.long
def test_the_example_trains_writes_and_draws(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} plus {i} is {2 * i}.\n" for i in range(2000)), encoding="utf-8")
    picture = EXAMPLES / "output" / "text_generation.png"
    picture.unlink(missing_ok=True)
    # Of the quick path, a smaller network and fewer rates.
    effort = text_generation.Effort(48, 2, 24, 1, (8e-3,), (0.03,), 16, 20)
    monkeypatch.setattr(text_generation, "QUICK", effort)
    monkeypatch.setattr(sys, "argv", ["text_generation.py", str(text), "--quick"])
    text_generation.main()
    written = capsys.readouterr().out
    assert "text_generation.png" in written
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = written.split("held-out loss\n")[1].splitlines()[:3]
    assert [line.split()[0] for line in lines] == ["Adam,", "Muon,", "onestep.fit"]
    steps, _, loss = lines[2].split()[-3:]
    # Half of the others' steps; the alphabet's entropy is 3.1.
    assert int(steps) == 12
    assert float(loss) < 2.9
    assert written.count("writes:\n") == 3


def test_too_short_a_text_is_refused(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("Too short.", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["text_generation.py", str(text), "--quick"])
    with pytest.raises(SystemExit, match="expected at least"):
        text_generation.main()
