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
CALIFORNIA = EXAMPLES.parent.parent / "shared" / "data" / "california_housing.csv"

# Loads the network without onestep, and predicts the price of one house.
LOAD = """
import sys, torch
from safetensors.torch import load_file
network = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).double()
network.load_state_dict(load_file(sys.argv[1]))
assert not [name for name in sys.modules if name.startswith("onestep")]
with torch.no_grad():
    print(network(torch.tensor([[100.0, 30, 5, 100, 3, 0, 0, 0, 0, 0]], dtype=torch.float64)).item())
"""


def test_houses_csv_is_what_the_script_makes():
    houses = runpy.run_path(str(EXAMPLES / "make_houses.py"))["make"]()
    with HOUSES.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in row.items()} for row in houses]


def test_the_demo_runs_and_draws():
    for name in ("matplotlib", "pandas", "rich", "safetensors", "sklearn"):
        pytest.importorskip(name)
    pictures = [EXAMPLES / "output" / name for name in ("house_prices.png", "house_networks.png")]
    for picture in pictures:
        picture.unlink(missing_ok=True)
    command = [sys.executable, str(EXAMPLES / "house_prices.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("picture: ") == len(pictures)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert done.stdout.count("$ python -m onestep fit") == 2
    assert done.stdout.count("intercept") == done.stdout.count("held out:") == 2
    differences = [float(value) for value in re.findall(r"([\d.e+-]+) \(relative\)", done.stdout)]
    assert len(differences) == 4 and max(differences) < 1e-6

    # The networks: with and without weight decay on the houses, and on California where it is there.
    races = done.stdout.split("\n=== ")[3:]
    assert len(races) == 2 + CALIFORNIA.exists()
    for race in races:
        rows = {line.split()[0]: line.split() for line in race.splitlines() if re.search(r" 0\.\d{4}$", line)}
        assert set(rows) == {"linear", "Adam,", "Levenberg-Marquardt"}
        r2 = {name: float(row[-1]) for name, row in rows.items()}
        assert all(value > 0.5 for value in r2.values())
        if "‖θ‖²" not in race:
            assert r2["Levenberg-Marquardt"] > r2["linear"]
            assert float(rows["Levenberg-Marquardt"][-2]) < float(rows["Adam,"][-2])
            assert "not reached" not in race
        assert float(re.search(r"predictions differ by (\S+)", race)[1]) == 0

    saved = EXAMPLES / "output" / "houses_network.safetensors"
    loaded = subprocess.run([sys.executable, "-c", LOAD, saved], capture_output=True, encoding="utf-8", timeout=120)
    assert loaded.returncode == 0, loaded.stderr
    assert 200_000 < float(loaded.stdout) < 500_000
