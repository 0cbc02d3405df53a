"""The command line with closed standard streams, and with models that come through a pipe."""

import os
import socket
import sys
import threading

import pytest
from cli_cases import HOUSES, small
from processes import Child

WITH_CLOSED = """
import os, sys
# What Python makes of descriptors that are closed when it starts.
for number in map(int, sys.argv[1]):
    os.close(number)
    setattr(sys, ["stdin", "stdout", "stderr"][number], None)
from onestep.cli import main
from onestep.cli.app import build_parser
code = main(sys.argv[2:])
# A file that the command opened would have had the number of the stream.
assert all(os.path.realpath(f"/proc/self/fd/{number}") == os.devnull for number in map(int, sys.argv[1]))
sys.exit(code)
"""


@pytest.fixture
def saved(run, csv, tmp_path):
    path = tmp_path / "model.st"
    assert run("fit", csv(small()), "--target", "y", "--save", path)[0] == 0
    return path


def test_with_stderr_closed_notes_and_score_are_not_among_the_predictions(run, csv, saved):
    """Nor is an error, of which the exit code is left."""
    new = csv("a,b,kind,other,y\n1,2,u,3,4\n5,6,new,7,8\n", "new.csv")
    code, expected, err = run("predict", saved, new)
    assert code == 0 and err.count("note: ") == 2 and "score: " in err and expected.count("\n") == 3
    done = Child(WITH_CLOSED, "2", "predict", saved, new).finish()
    assert (done.returncode, done.output, done.errors) == (0, expected, "")
    done = Child(WITH_CLOSED, "2", "predict", saved, new.with_name("none.csv")).finish()
    assert (done.returncode, done.output) == (2, "")


WITH_A_SCRIPT = """
import os, sys
os.dup2(os.open(sys.argv[1], os.O_RDONLY), 2)
from onestep.cli import main
from onestep.cli.app import build_parser
sys.exit(main(sys.argv[2:]))
"""


def test_a_script_of_bash_may_be_in_the_place_of_stderr(run, csv, saved):
    """Started with 2>&-, bash opens its script under this number, and its commands inherit it."""
    new = csv("a,b,kind,other,y\n1,2,u,3,4\n5,6,new,7,8\n", "new.csv")
    done = Child(WITH_A_SCRIPT, new, "predict", saved, new).finish()
    assert (done.returncode, done.output) == (0, run("predict", saved, new)[1])


def test_a_network_is_fitted_with_stderr_closed(csv, tmp_path):
    words = ["fit", csv(small()), "--target", "y", "--model", "mlp", "--hidden", 2, "--max-steps", 2]
    done = Child(WITH_CLOSED, "2", *words, "--save", tmp_path / "m.st").finish()
    assert done.returncode == 0 and "saved to" in done.output and "note" not in done.output


def test_with_stdout_closed_one_line_says_so(run, csv, saved, tmp_path):
    new, written, other = csv("a,b,kind\n1,2,u\n", "new.csv"), tmp_path / "out.csv", tmp_path / "other.st"
    done = Child(WITH_CLOSED, "1", "predict", saved, new).finish()
    assert done.returncode == 2 and done.errors.count("\n") == 1
    assert "error: standard output is closed; pass --output FILE for the predictions" in done.errors
    for command in (["fit", HOUSES, "--target", "price", "--save", other], ["info"]):
        done = Child(WITH_CLOSED, "1", *command).finish()
        assert done.returncode == 2 and done.errors.count("\n") == 1 and not other.exists()
        assert f"error: standard output is closed, where {command[0]} reports; send it to a file" in done.errors
    done = Child(WITH_CLOSED, "1", "predict", saved, new, "--output", written).finish()
    assert (done.returncode, done.errors) == (0, "")
    assert written.read_text() == run("predict", saved, new)[1]


def test_with_all_closed_the_file_is_written(csv, saved, tmp_path):
    new, written = csv("a,b,kind,other\n1,2,u,3\n", "new.csv"), tmp_path / "out.csv"
    done = Child(WITH_CLOSED, "012", "predict", saved, new, "--output", written).finish()
    assert done.returncode == 0 and written.read_text().count("\n") == 2


def test_an_import_that_is_refused_says_nothing_on_stdout(monkeypatch, capsys):
    from onestep import _program

    monkeypatch.setattr(_program, "_is_program", lambda: True)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as stop:
        _program.refused("not here")
    assert stop.value.code == 2 and capsys.readouterr().out == ""


def test_a_model_may_come_through_a_pipe(run, csv, saved, tmp_path):
    """As the shell's <(command) gives one; what cannot be read is said of the model, not of the output."""
    new, pipe = csv("a,b,kind\n1,2,u\n", "new.csv"), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(saved.read_bytes()))
    writer.start()
    assert run("predict", pipe, new) == run("predict", saved, new)
    writer.join()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        code, _, err = run("predict", tmp_path / "s", new)
    assert code == 2 and err == f"error: {tmp_path / 's'} is not a file, nor a pipe\n"
