"""The demo runs, compares and draws; its data is what the committed script makes."""

import csv
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HOUSES = EXAMPLES / "data" / "houses.csv"
CALIFORNIA = EXAMPLES.parent.parent / "shared" / "data" / "california_housing.csv"


def test_houses_csv_is_what_the_script_makes():
    houses = runpy.run_path(str(EXAMPLES / "make_houses.py"))["make"]()
    with HOUSES.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in row.items()} for row in houses]


@pytest.mark.long
def test_the_demo_runs_and_draws(monkeypatch, capsys):
    for name in ("matplotlib", "pandas", "rich", "safetensors", "sklearn"):
        pytest.importorskip(name)
    pictures = [EXAMPLES / "output" / name for name in ("house_prices.png", "house_networks.png")]
    for picture in pictures:
        picture.unlink(missing_ok=True)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["house_prices.py", "--quick"])
    import house_prices

    house_prices.main()
    written = capsys.readouterr().out
    assert written.count("picture: ") == len(pictures)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert written.count("$ python -m onestep fit") == 2
    assert written.count("intercept") == written.count("held out:") == 2
    differences = [float(value) for value in re.findall(r"([\d.e+-]+) \(relative\)", written)]
    assert len(differences) == 4 and max(differences) < 1e-6

    # The networks: with and without weight decay on the houses, and on California where it is there.
    races = written.split("\n=== ")[3:]
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
    # The price of one house by the network, for which torch alone is enough.
    network = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)).double()
    network.load_state_dict(pytest.importorskip("safetensors.torch").load_file(saved))
    with torch.no_grad():
        price = network(torch.tensor([[100.0, 30, 5, 100, 3, 0, 0, 0, 0, 0]], dtype=torch.float64)).item()
    assert 200_000 < price < 500_000
