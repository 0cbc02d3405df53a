"""Files that are written: whole or not at all, with the mode of what they replace, behind links."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import onestep
from onestep import _files
from onestep.layerwise import LayerStatistics, save

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def statistics(path):
    LayerStatistics(nn.Sequential(nn.Linear(3, 2))).update(X).save(path)


def model(path):
    pytest.importorskip("safetensors")
    save(nn.Linear(3, 2), path)


def checkpoint(path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    onestep.fit(network, (X, X.sum(1, keepdim=True)), max_steps=2, progress=False, checkpoint=path)


WRITERS = (statistics, model, checkpoint)


@pytest.mark.parametrize("write", WRITERS)
def test_a_link_stays_and_the_file_behind_it_keeps_its_mode(write, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file, link, again = folder / "file", tmp_path / "link", tmp_path / "again"
    link.symlink_to(file)
    again.symlink_to(link.name)
    umask = os.umask(0o027)
    try:
        write(again)
    finally:
        os.umask(umask)
    first = file.stat()
    assert link.is_symlink() and again.is_symlink() and stat.S_IMODE(first.st_mode) == 0o640
    content = file.read_bytes()
    for mode in (0o600, 0o644, 0o755):
        file.chmod(mode)
        with file.open("rb") as before:
            # A checkpoint that is there is gone on from.
            write(again)
            # Who has the old file open sees it whole.
            assert before.read() == content
        assert stat.S_IMODE(file.stat().st_mode) == mode and file.stat().st_size > 100
        content = file.read_bytes()
    assert link.is_symlink() and again.is_symlink()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_an_error_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def full(state, file):
        file.write(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        statistics(path)
    assert path.read_bytes() == b"before" and [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", (statistics, model))
def test_a_folder_that_is_not_there_is_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"there is no such folder: '{tmp_path}/none'"):
        write(tmp_path / "none" / "file")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "none" / "file")
    with pytest.raises(FileNotFoundError, match=rf"there is no such folder: '{tmp_path}/none'"):
        write(link)


KILLED = """
import sys, time
from pathlib import Path
from onestep._files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"a part")
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_that_of_others_stays(tmp_path):
    path = tmp_path / "file [1]"
    path.write_bytes(b"before")
    environment = os.environ | {"PYTHONPATH": str(Path(onestep.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout.readline() == b"written\n"
        (partial,) = tmp_path.glob(".*.partial")
        statistics(path)
        assert partial.exists() and torch.load(path, weights_only=True)["batches"] == 1
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert partial.read_bytes() == b"a part"
        statistics(path)
        assert [found.name for found in tmp_path.iterdir()] == [path.name]
    finally:
        process.kill()
        process.stdout.close()
        process.wait(30)


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_written_to(linked, tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import load

    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    # Opened to read and to write, the pipe keeps what is written, and nobody waits.
    keep = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        layer = nn.Linear(3, 2)
        save(layer, link if linked else pipe)
        assert pipe.is_fifo() and link.is_symlink()
        assert torch.equal(load(os.read(keep, 1 << 16))["weight"], layer.weight)
    finally:
        os.close(keep)


def test_the_owner_is_kept_where_it_may_be(tmp_path, monkeypatch):
    path, given = tmp_path / "file", []
    path.write_bytes(b"before")
    monkeypatch.setattr(_files.os, "geteuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(_files.os, "fchown", lambda file, *owner: given.append(owner))
    statistics(path)
    assert given == [(path.stat().st_uid, path.stat().st_gid)]
