"""The demo runs, compares and draws; its data is what the committed script makes."""

import csv
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HOUSES = EXAMPLES / "data" / "houses.csv"


def test_houses_csv_is_what_the_script_makes():
    houses = runpy.run_path(str(EXAMPLES / "make_houses.py"))["make"]()
    with HOUSES.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in row.items()} for row in houses]


def test_the_demo_runs_and_draws():
    for name in ("matplotlib", "pandas", "rich", "safetensors", "sklearn"):
        pytest.importorskip(name)
    picture = EXAMPLES / "output" / "house_prices.png"
    picture.unlink(missing_ok=True)
    command = [sys.executable, str(EXAMPLES / "house_prices.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG") and "picture: " in done.stdout
    assert done.stdout.count("$ python -m onestep fit") == 2
    assert done.stdout.count("intercept") == done.stdout.count("held out:") == 2
    differences = [float(value) for value in re.findall(r"([\d.e+-]+) \(relative\)", done.stdout)]
    assert len(differences) == 4 and max(differences) < 1e-6
