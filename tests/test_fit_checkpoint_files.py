"""Files of checkpoints that are no regular files, were made by hand, or have long names."""

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onestep
from onestep import _files

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def fit(path: Path, steps: int = 2) -> onestep.FitResult:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    data = (X, X.sum(1, keepdim=True))
    options: dict[str, Any] = {"method": "gauss_newton", "tol": 0.0, "progress": False}
    return onestep.fit(model, data, max_steps=steps, checkpoint=path, **options)


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_refused_and_not_waited_for(linked: bool, tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    # Who reads the pipe waits until its other end, here, is closed.
    end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    closing = threading.Timer(5, os.close, [end])
    closing.start()
    with pytest.raises(ValueError, match=r"is no regular file, nor a link to one; pass the path of a file"):
        fit(link if linked else pipe)
    closing.cancel()
    closing.join()
    os.close(end)  # fails where the timer has done it


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no regular file"):
        fit(tmp_path)


def test_a_checkpoint_made_by_hand_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    fit(path)
    state = torch.load(path, weights_only=True)
    cases: list[tuple[Any, str]] = [
        ({"format": state["format"]}, "it has no 'method'"),
        ({"format": "onestep.fit/1"}, "its format is 'onestep.fit/1', not 'onestep.fit/"),
        ({"format": state["format"], "method": "gauss_newton"}, "it has no 'identity'"),
        (state | {"identity": 5}, "it has no 'identity'"),
        (state | {"run": {}}, "KeyError"),
        (state | {"run": state["run"] | {"optimizer": {}}}, "KeyError"),
        (state | {"result": {}}, "KeyError"),
        (state | {"result": state["result"] | {"history": [{"step": 1}]}}, "TypeError"),
        ([], ""),
        ({}, ""),
    ]
    for damaged, why in cases:
        torch.save(damaged, path)
        expected = f"checkpoint {path} was not written by onestep.fit, or is damaged: "
        with pytest.raises(ValueError, match=f"{re.escape(expected)}.*{re.escape(why)}.*pass another file"):
            fit(path, steps=3)
    torch.save({name: part for name, part in state.items() if name != "validation"}, path)
    assert fit(path, steps=3).steps == 3


@pytest.mark.parametrize("name", ["n" * 255, "\u00e4" * 127, "[*]" * 80, "x" * 247, "short[*]"])
def test_a_name_of_any_length(name: str, tmp_path: Path) -> None:
    """Nothing is left beside the file, also not by a process that was killed."""
    path = tmp_path / name
    left = path.with_name(_files._partial(path, "12345"))
    assert len(os.fsencode(left.name)) <= 255
    left.write_bytes(b"")
    assert fit(path, 2).steps == 2 and fit(path, 3).steps == 3
    assert list(tmp_path.iterdir()) == [path]
