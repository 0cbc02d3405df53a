"""Fixtures that every family's tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path

import cases
import numpy as np
import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# A product of two parametrisations with more cases is thinned, too.
MOST_OF_TWO = 16


def choices(item: pytest.Item) -> tuple[tuple[int, str], ...]:
    """What each parametrisation of a case chose."""
    return tuple(enumerate(item.callspec._idlist)) if hasattr(item, "callspec") else ()


def pairwise(family: list[pytest.Item]) -> set[pytest.Item]:
    """Enough of a product of three or more parametrisations that every two choices meet in one case."""
    rest = {item: frozenset(combinations(choices(item), 2)) for item in family}
    missing, taken = frozenset().union(*rest.values()), set()
    while missing:
        best = max(rest, key=lambda item: len(rest[item] & missing))
        missing -= rest.pop(best)
        taken.add(best)
    return taken


def every_other(family: list[pytest.Item]) -> set[pytest.Item]:
    """Of a product of two, as on a chessboard: every choice is there, with half of the other's."""
    places: dict[tuple[int, str], int] = {}
    for item in family:
        for choice in choices(item):
            places.setdefault(choice, sum(place == choice[0] for place, _ in places))
    return {item for item in family if sum(places[choice] for choice in choices(item)) % 2 == 0}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that are marked as long, and most cases of large products of parametrisations.

    What fails is nearly always one choice or two together. ONESTEP_ALL_CASES=1 takes all, as .ci/run does. A long test
    is also taken where a test is asked for by its name.
    """
    if "ONESTEP_ALL_CASES" in os.environ:
        return
    named = any("::" in argument for argument in config.args)
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept: set[pytest.Item] = set()
    for family in families.values():
        taken, crossed = set(family), len(choices(family[0]))
        if crossed > 2:
            taken = pairwise(family)
        elif crossed == 2 and len(family) > MOST_OF_TWO:
            taken = every_other(family)
        kept |= {item for item in taken if named or not item.get_closest_marker("long")}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(params=cases.DTYPES, ids=["f32", "f64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both types that the kernels compute in."""
    return request.param


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that has kernels. With ONESTEP_CUDA_EMULATE=1 the CUDA kernels run on "cpu"."""
    return torch.device(request.param)


@pytest.fixture
def shared_data() -> Path:
    """The folder of data sets beside the checkout, which are not in the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data sets at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Sets torch's number of threads back after a test that changes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        from onestep.cli import main

        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def csv(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a CSV file."""

    def write(content: str | bytes, name: str = "data.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def table(csv: Callable[..., Path]) -> Callable[..., Path]:
    """Writes columns as a CSV file, every field quoted."""

    def write(columns: dict[str, Iterable[object]], name: str = "data.csv") -> Path:
        lines = [columns, *zip(*columns.values(), strict=True)]
        return csv("".join(",".join(f'"{field}"' for field in line) + "\n" for line in lines), name)

    return write


@pytest.fixture
def rng() -> np.random.Generator:
    """Numbers that are the same in every test."""
    return np.random.default_rng(0)
