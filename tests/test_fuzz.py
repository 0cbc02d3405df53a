"""A few hundred of the random calls of fuzz.py."""

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("pandas")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from fuzz import run_calls


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_calls_end_in_a_result_or_a_clear_error(seed):
    assert run_calls(100, seed) == 100
