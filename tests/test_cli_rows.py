"""Rows that look empty, scores of predictions, outputs that are no regular files, and messages that name what to do."""

import io
import math
import os
import socket
import stat

import numpy as np
import pytest
from cli_cases import pd

AMOUNTS = 900 + 37 * np.arange(40)
TARGET = 3 * AMOUNTS + 5


def predictions(out):
    """The predicted numbers, NaN for empty fields, as pandas reads them."""
    return pd.read_csv(io.StringIO(out), dtype=float).iloc[:, 0].to_numpy()


# --- rows that look empty --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ['""', '" "', ' ""', '  " " '])
@pytest.mark.parametrize("blank", ["", "\n", " \t\n\n"])
def test_a_quoted_empty_line_is_a_row(run, csv, tmp_path, empty, blank):
    """pandas reads it as one, and skips lines that are blank; lines are counted as the file has them."""
    saved = tmp_path / "model.safetensors"
    run("fit", csv("c,y\n" + "".join(f"{k},{v}\n" for k, v in zip(["AA", "BB"] * 9, range(18), strict=True))),
        "--target", "y", "--save", saved)  # fmt: skip
    code, out, err = run("predict", saved, csv(f"c\nAA\n{blank}{empty}\nXX\nBB\n", "new.csv"))
    skipped = blank.count("\n")
    assert code == 0 and np.isnan(predictions(out)).tolist() == [False, True, True, False]
    assert f"1 row without a prediction: column 'c' has no value on line {3 + skipped};" in err
    assert f"1 row without a prediction: column 'c' has 'XX' on line {4 + skipped}, which was not there" in err


def test_predictions_are_read_again(run, csv, table, tmp_path):
    """An empty prediction stands as a quoted empty line, which fit and predict take as a row, too."""
    saved, written = tmp_path / "model.safetensors", tmp_path / "predicted.csv"
    run("fit", table({"a": AMOUNTS, "y": TARGET}), "--target", "y", "--save", saved)
    run("predict", saved, table({"a": [900, "", 901, "", 902]}, "new.csv"), "--output", written)
    assert written.read_text().splitlines()[2] == '""'
    again = tmp_path / "again.safetensors"
    run("fit", table({"predicted_y": AMOUNTS, "y": TARGET}), "--target", "y", "--save", again)
    code, out, err = run("predict", again, written)
    assert code == 0 and "2 rows without a prediction: column 'predicted_y' has no value on line 3" in err
    np.testing.assert_allclose(predictions(out), [8120, math.nan, 8129, math.nan, 8138])
    # Beside a second column it is a record that is too short, on the line that it stands on.
    _, _, err = run("fit", csv('a,y\n1,2\n\n""\n3,4\n'), "--target", "y")
    assert "line 4 has 1 field, but the header has 2" in err
    code, out, err = run("predict", saved, csv('a,b\n900,2\n""\n901,4\n', "new.csv"))
    assert code == 0 and "1 row without a prediction: line 3 has 1 field, but the header has 2" in err
    np.testing.assert_allclose(predictions(out), [2705, math.nan, 2708])


def test_a_header_without_a_name(run, csv):
    code, out, err = run("fit", csv('""\na\n1\n'), "--target", "a")
    assert (code, out) == (2, "") and "the header, its first line that is not blank, names no column" in err


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fitted", "given", "units"),
    [
        ("{}%", "0.{:04}", ("nothing", "%")),
        ("{}", "{}%", ("%", "nothing")),
        ("${}", "€{}", ("€", "$")),
        ("{}", "{} USD", ("USD", "nothing")),
        ("{} kr", "{}", ("nothing", "kr")),
    ],
)
@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_a_target_in_another_unit_is_not_scored(run, table, tmp_path, fitted, given, units, model):
    saved = tmp_path / "model.safetensors"
    path = table({"a": AMOUNTS, "y": [fitted.format(v) for v in TARGET]})
    network = ["--hidden", 2, "--max-steps", 3] if model == "mlp" else []
    code, _, err = run("fit", path, "--target", "y", "--save", saved, "--model", model, *network)
    assert code == 0, err
    code, out, err = run("predict", saved, path)
    assert code == 0 and "score: R²" in err and "not scored" not in err
    code, again, err = run("predict", saved, table({"a": AMOUNTS, "y": [given.format(v) for v in TARGET]}, "new.csv"))
    assert (code, again) == (0, out) and "score:" not in err
    assert (
        "not scored" in err and f"the target 'y' has {units[0]} beside its numbers, but {units[1]} in the file" in err
    )


def test_a_target_of_zeros_and_unknown_numbers_has_every_unit(run, table, tmp_path):
    """0 is the same in all; rows without a target are not scored, and the others are."""
    saved = tmp_path / "model.safetensors"
    run("fit", table({"a": AMOUNTS, "y": [f"{v}%" for v in TARGET]}), "--target", "y", "--save", saved)
    _, _, err = run("predict", saved, table({"a": [900, 901, 902], "y": ["0", "", "0"]}, "new.csv"))
    assert "not scored" not in err and "(2 rows)" in err


@pytest.mark.parametrize(
    ("classes", "options", "kept"),
    [
        (["1,000", "2,000"], ["--thousands", ","], ["1000", "2000"]),
        (["0,5", "1,5"], ["--decimal", ","], ["0.5", "1.5"]),
        (["1.234", "1,234"], ["--thousands", ".", "--decimal", ","], ["1.234", "1234"]),
        (["1,000", "2,000"], ["--thousands", ",", "--task", "classification"], ["1,000", "2,000"]),
        (["0,5", "1,5", "2,5"], ["--decimal", ",", "--task", "classification"], ["0,5", "1,5", "2,5"]),
        (["5%", "6%"], [], ["5%", "6%"]),
        (["$1,000", "$2,000"], ["--thousands", ","], ["$1,000", "$2,000"]),
        (["1,000", "zwei"], ["--thousands", ","], ["1,000", "zwei"]),
    ],
)
def test_classes_are_scored_on_the_rows_of_the_fit(run, table, tmp_path, classes, options, kept):
    saved, places = tmp_path / "model.safetensors", [k * len(classes) // 40 for k in range(40)]
    path = table({"a": AMOUNTS, "y": [classes[place] for place in places]})
    code, report, err = run("fit", path, "--target", "y", "--test-size", 0, "--save", saved, *options)
    assert code == 0, err
    code, out, err = run("predict", saved, path)
    score = report.partition("training:  ")[2].splitlines()[0]
    assert code == 0 and f"score: {score} (40 rows)" in err and "not scored" not in err
    assert sorted(set(pd.read_csv(io.StringIO(out), dtype=str)["predicted_y"])) == kept


def test_classes_that_the_model_does_not_know_are_told(run, table, tmp_path):
    saved = tmp_path / "model.safetensors"
    run(
        "fit",
        table({"a": AMOUNTS, "y": ["1,5"] * 20 + ["2,5"] * 20}),
        "--target",
        "y",
        "--decimal",
        ",",
        "--save",
        saved,
    )
    rows = {"a": [900, 900, 901, "", 2000], "y": ["1,5", "3,5", "2.5", "7", ""]}
    code, _, err = run("predict", saved, table(rows, "new.csv"))
    assert code == 0 and "2 rows not scored: the target 'y' has '3,5' on line 3, which is none of the model's" in err
    assert "(1 row)" in err
    for cells in (["2%", "3%"], ["$1,5", "$2,5"]):
        _, _, err = run("predict", saved, table({"a": [900, 901], "y": cells}, "new.csv"))
        assert f"2 rows not scored: the target 'y' has '{cells[0]}' on line 2" in err and "score:" not in err


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (["1,5", "2,5"], ["--thousands", ","], "has '1,5' on line 2, which does not fit the --thousands and --decimal"),
        (["9007199254740993", "9007199254740996"], [], "holds whole numbers beyond 2^53"),
    ],
)
def test_classes_are_not_made_of_numbers_that_do_not_fit(run, table, classes, options, message):
    path = table({"a": AMOUNTS, "y": classes * 20})
    code, out, err = run("fit", path, "--target", "y", *options)
    assert (code, out) == (2, "") and message in err
    code, out, err = run("fit", path, "--target", "y", "--task", "classification", *options)
    assert code == 0 and "accuracy" in out


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(run, table, tmp_path):
    """Words that write to a file, by the command, and a file with what they write."""
    saved, path, plain = tmp_path / "model.safetensors", table({"a": AMOUNTS, "y": TARGET}), tmp_path / "plain.csv"
    run("fit", path, "--target", "y", "--save", saved)
    run("predict", saved, path, "--output", plain)
    return {
        "fit": (["fit", path, "--target", "y", "--save"], saved.read_bytes()),
        "predict": (["predict", saved, path, "--output"], plain.read_bytes()),
    }


def same(found, content):
    """Whether two files hold the same, whose metadata are in the order of a hash."""
    return sorted(found) == sorted(content)


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_regular_file_keeps_its_mode_and_is_replaced_whole(run, tmp_path, written, command):
    words, content = written[command]
    for mode in (0o600, 0o640, 0o755):
        path = tmp_path / f"{mode:o}"
        path.write_bytes(b"before")
        path.chmod(mode)
        with path.open("rb") as old:
            assert run(*words, path)[0] == 0
            # Who has the old file open sees it whole.
            assert old.read() == b"before"
        assert same(path.read_bytes(), content) and stat.S_IMODE(path.stat().st_mode) == mode
    umask = os.umask(0o027)
    try:
        assert run(*words, tmp_path / "new")[0] == 0
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_symbolic_link_stays(run, tmp_path, written, command):
    words, content = written[command]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "there").write_bytes(b"before")
    (folder / "there").chmod(0o600)
    for name in ("there", "not yet"):
        link, again = tmp_path / f"link to {name}", tmp_path / f"link to the link to {name}"
        link.symlink_to(folder / name)
        again.symlink_to(link.name)
        assert run(*words, again)[0] == 0
        assert link.is_symlink() and again.is_symlink() and same((folder / name).read_bytes(), content)
    assert stat.S_IMODE((folder / "there").stat().st_mode) == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["not yet", "there"]
    lost, circle = tmp_path / "lost", tmp_path / "circle"
    lost.symlink_to(tmp_path / "none" / "file")
    circle.symlink_to(circle.name)
    for path, message in ((lost, f"there is no directory {tmp_path / 'none'}"), (circle, "symbolic links")):
        code, out, err = run(*words, path)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and path.is_symlink()


@pytest.mark.parametrize("command", ["fit", "predict"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_written_to(run, tmp_path, written, command, linked):
    words, content = written[command]
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    link.symlink_to(pipe)
    os.mkfifo(pipe)
    # Opened to read and to write, the pipe keeps what is written, and nobody waits.
    keep = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        code, _, err = run(*words, link if linked else pipe)
        assert code == 0, err
        assert pipe.is_fifo() and link.is_symlink()
        assert same(os.read(keep, 1 << 16), content)
    finally:
        os.close(keep)


def test_an_open_file_without_a_name_is_written_to(run, tmp_path, written):
    """As /dev/stdout may be one."""
    words, content = written["predict"]
    with open(tmp_path / "gone", "w+b") as file:
        (tmp_path / "gone").unlink()
        assert run(*words, f"/proc/self/fd/{file.fileno()}")[0] == 0
        assert file.read() == content


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_socket_is_refused(run, tmp_path, monkeypatch, written, command):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        code, out, err = run(*written[command][0], "socket")
    assert (code, out) == (2, "") and "cannot write socket: it is a socket" in err
