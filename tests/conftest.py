"""Fixtures that every family's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


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
