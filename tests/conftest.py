"""Fixtures that every family's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import cases
import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pairs_of(item: pytest.Item) -> frozenset[Any]:
    """Of the parametrisations of a case, two at a time: their places, and what they chose."""
    return frozenset(combinations(enumerate(item.callspec._idlist), 2))  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the product of three or more parametrisations, enough cases that every two choices meet in one.

    What fails is nearly always one choice or two together. ONESTEP_ALL_CASES=1 takes all, as .ci/run does.
    """
    if "ONESTEP_ALL_CASES" in os.environ:
        return
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        if hasattr(item, "callspec"):
            families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left = set()
    for family in families.values():
        rest = {item: pairs_of(item) for item in family}
        missing = frozenset().union(*rest.values())
        left |= rest.keys() if missing else set()
        while missing:
            best = max(rest, key=lambda item: len(rest[item] & missing))
            missing -= rest.pop(best)
            left.discard(best)
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


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
