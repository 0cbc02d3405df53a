"""Figures in the README are those of the tables under bench/results, rounded."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MACHINES = {"2 cores, AVX2": "amd-epyc-avx2", "2 cores, AVX-512": "amd-epyc-avx512", "H200": "nvidia-h200"}
# How a row of the README begins, and the group and the case of the table that it is taken from.
SOURCES = {
    "10-64-1 network": ("fit", "10-64-1 network"),
    "solve 8,192 problems": ("forward + backward", "8,192 × (64, 32, 1)"),
    "solve 100,000 problems": (
        "normal equations and Cholesky, against torch",
        "solve_normal, 100,000 × (128 × 64), fp32",
    ),
    "polar factors of 24": ("polar factors", "24 × (144 × 576)"),
    "4096 × 4096 layer": ("layers of language models", "4096 × 4096 layer to 4 bits"),
    "logistic regression": ("LogisticRegression", "1,000,000 × 64, 2 classes"),
    "Hessian-vector product of attention, T 4096": ("attention, HVP against torch's math backend", "HVP beside math"),
    "head of 100 classes": (
        "Heads",
        "fit, 20,000 × 256, 100 classes, within 1e-4 of the minimum (tol 0.1); peer: Adam",
    ),
    "1 M GPT from scratch": ("whole networks", "1 M GPT from scratch: PolarGrad's 140 steps"),
    "Gauss-Newton product of an LM head": ("LM head, GGN product against torch", "16,384 × 2,048 × 50,304, bf16"),
    "`cholesky` of 64 × 512²": ("normal equations and Cholesky, against torch", "cholesky, 64 × 512², fp32"),
    "Hessian-vector product of attention, T 77": (
        "attention against math",
        "HVP beside math's HVP by double backward, T 77",
    ),
    "20 Gauss-Newton steps": ("fit", "1 M GPT: 20 Gauss-Newton steps"),
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def row_of(machine: str, group: str, case: str) -> dict[str, str]:
    """The row of a machine's table, by the names of its columns."""
    found, header = [], []
    for line in (RESULTS / machine / "table.md").read_text().splitlines():
        if line.startswith(("| group", "| what")):
            header = cells(line)
        elif line.startswith("|") and cells(line)[0] == group and cells(line)[1].startswith(case):
            found.append(dict(zip(header, cells(line), strict=True)))
    assert len(found) == 1, (machine, group, case, found)
    return found[0]


def seconds(row: dict[str, str], whose: str) -> float:
    return float((row.get(f"{whose}, ms") or row[whose].removesuffix(" ms")).replace(",", "")) / 1e3


def rounds_to(text: str, value: float) -> bool:
    """Whether the text is the value, rounded to as many decimals as it has; the value may have been rounded before."""
    unit = 10.0 ** -len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * unit * (1 + 1e-6)


def readme_rows() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Of each row of "Does it pay?" its cells, and the row of the table that it is taken from."""
    table = (ROOT / "README.md").read_text().partition("## Does it pay?")[2].partition("\n## ")[0]
    lines = [cells(line) for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["task", "compared with", "seconds", "ratio", "machine"]
    rows = {}
    for line in lines[2:]:
        names = [name for name in SOURCES if line[0].startswith(name)]
        assert len(names) == 1, line
        rows[names[0]] = line, row_of(MACHINES[line[4]], *SOURCES[names[0]])
    return rows


def test_figures_of_the_readme_are_in_the_tables() -> None:
    rows = readme_rows()
    assert rows.keys() == SOURCES.keys()
    for task, (line, row) in rows.items():
        peer, own = line[2].split(" → ")
        assert rounds_to(peer, seconds(row, "peer")), (task, line, row)
        assert rounds_to(own, seconds(row, "onestep")), (task, line, row)
        assert rounds_to(line[3], float(row.get("ratio") or row["times as fast"])), (task, line, row)
    ratios = [float(line[3]) for line, _ in rows.values()]
    assert ratios == sorted(ratios, reverse=True)  # the strongest first
    assert min(ratios) < 1 < max(ratios)


@pytest.mark.parametrize(
    ("task", "times"),
    [("Hessian-vector product of attention, T 4096", "60"), ("Gauss-Newton product of an LM head", "6")],
)
def test_memory_in_the_readme_is_in_the_tables(task: str, times: str) -> None:
    line, row = readme_rows()[task]
    assert f"{times} times the memory" in line[1]
    peer, own = (float(row[f"{whose} adds, MiB"].replace(",", "")) for whose in ("peer", "onestep"))
    assert rounds_to(times, peer / own)


def test_a_wrong_figure_is_found() -> None:
    assert rounds_to("0.043", 0.04258) and not rounds_to("0.042", 0.04258)
    assert rounds_to("0.0046", 0.00455) and not rounds_to("31", 31.6)


def test_the_gpus_table_has_the_peers_medians() -> None:
    """From the ratio where a file has that alone; as measured, where it has both."""
    pytest.importorskip("matplotlib")
    module = runpy.run_path(str(ROOT / "bench" / "gpu" / "table.py"))
    known = {"normal": "torch_ms", "glm": "torch_ms"}
    compared = 0
    for family, key in known.items():
        for row in json.loads((RESULTS / "nvidia-h200" / f"{family}.json").read_text())["rows"]:
            for figures in module["measured"](family, row):
                assert ("peer_seconds" in figures) == (key in row)
                if key in row:
                    assert figures["peer_seconds"] == pytest.approx(row[key] / 1e3, rel=1e-6)
                    compared += 1
    assert compared > 30
    (jvp, hvp) = module["measured"](
        "attention",
        {"case": "some", "jvp_ms": 3.0, "jvp_to_forward": 2.0, "hvp_ms": 8.0, "hvp_to_forward_backward": 4.0}
        | {"gradient_added_mib": 5.0, "hvp_added_mib": 7.0},
    )
    assert (jvp["peer_seconds"], hvp["peer_seconds"], hvp["ratio"]) == (1.5e-3, 2e-3, 0.25)
    assert (hvp["peer_mib"], hvp["mib"]) == (5.0, 7.0) and "mib" not in jvp
    (product,) = module["measured"](
        "polar", {"case": "some", "ms": 2.0, "ratio": 1.5, "share_of_gemm": 0.1, "added_bytes": 3 << 20}
    )
    assert product["peer_seconds"] == pytest.approx(3e-3) and product["mib"] == 3 and "peer_mib" not in product


def test_the_gpus_table_is_what_its_files_say() -> None:
    pytest.importorskip("matplotlib")
    module = runpy.run_path(str(ROOT / "bench" / "gpu" / "table.py"))
    folder = RESULTS / "nvidia-h200"
    rows = module["rows_of"](module["read"](folder))
    assert (folder / "table.md").read_text().partition("\n\n")[2] == module["as_table"](rows) + "\n"
