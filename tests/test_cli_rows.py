"""Rows that look empty, scores of predictions, outputs that are no regular files, and messages that name what to do."""

import io
import math
import os
import re
import shlex
import socket
import stat

import numpy as np
import pytest
from cli_cases import besides_task, pd, weights

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
        (["9007199254740993", "9007199254740996"], [], "holds numbers beyond 2^53"),
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


# --- dates -----------------------------------------------------------------------------------------------------------

DAYS = pd.date_range("2020-01-07", periods=120, freq="11D")


WHOLE = "year, month, day and weekday"


@pytest.mark.parametrize(
    ("written", "advised"),
    [
        ("%A, %-d %B %Y", {"%A, %d %B %Y": WHOLE}),
        ("%a %d %b %Y", {"%a %d %b %Y": WHOLE}),
        ("%A, %B %d, %Y", {"%A, %B %d, %Y": WHOLE}),
        ("%a, %d %b %Y %H:%M:%S +0000", {"%a, %d %b %Y %H:%M:%S %z": WHOLE}),
        ("%a %b %d %H:%M:%S %Y", {"%a %b %d %H:%M:%S %Y": WHOLE}),
        ("%Y-%b-%d", {"%Y-%b-%d": WHOLE}),
        ("%d/%b/%Y", {"%d/%b/%Y": WHOLE}),
        ("%d.%m.%Y.", {"%d.%m.%Y.": WHOLE}),
        ("%d. %m. %Y", {"%d. %m. %Y": WHOLE}),
        ("%Y. %m. %d.", {"%Y. %m. %d.": WHOLE}),
        ("%d.%m.", {"%d.%m.": "month and day"}),
        ("%-d. %B", {"%d. %B": "month and day"}),
        ("%B %-d", {"%B %d": "month and day"}),
        ("%d-%b", {"%d-%b": "month and day", "%y-%b": "year and month"}),
        ("%b-%y", {"%b-%y": "year and month", "%b-%d": "month and day"}),
        ("%b '%y", {"%b '%y": "year and month"}),
        ("%Y%m%dT%H%M", {None: WHOLE}),
    ],
)
def test_dates_are_recognised_and_the_advice_is_taken(run, table, tmp_path, written, advised):
    saved = tmp_path / "model.safetensors"
    values = {"year": DAYS.year, "month": DAYS.month, "day": DAYS.day, "weekday": DAYS.day_of_week}
    parts = re.findall("[a-z]{3,}", next(iter(advised.values())).replace(" and", ""))
    y = sum((k + 2) * values[part] for k, part in enumerate(parts))
    path = table({"when": DAYS.strftime(written), "y": y})
    code, out, err = run("fit", path, "--target", "y")
    readings = ", or ".join(f"{reading!r} for {said}" for reading, said in advised.items() if reading)
    advice = f"--dates 'when' --date-format {readings}" if readings else f"--dates 'when' for {WHOLE}"
    example = repr(DAYS[0].strftime(written))
    assert (code, out) == (2, "")
    assert f"hold dates, such as {example} on line 2; pass {advice}, or keep its texts as categories with" in err
    option = next(iter(advised))
    more = [] if option is None else ["--date-format", option]
    code, _, err = run("fit", path, "--target", "y", "--dates", "when", "--save", saved, *more)
    assert code == 0, err
    expected = {f"when {part}": k + 2 for k, part in enumerate(parts)} | {"": 0}
    assert weights(saved) == pytest.approx(expected, abs=1e-5)


def test_words_with_numbers_are_no_dates(run, table):
    """Genes and places that begin like months, months and weekdays alone, sections of a text."""
    for texts in (
        ["SEPT2", "MARCH1", "DEC1", "SEPT9"],
        ["Marble 10", "Mayfair 12", "Decker 3", "Junior 7"],
        ["March", "April", "May", "June"],
        ["Monday", "Tuesday", "Sunday", "Friday"],
        ["1.13.", "2.14.", "3.20.", "40.1."],
    ):
        path = table({"a": texts * 10, "y": [texts.index(text) for text in texts] * 10})
        code, _, err = run("fit", path, "--target", "y", "--task", "regression")
        assert code == 0 and "dates" not in err, err


def test_ordinals_are_told_to_be_written_in_another_way(run, table):
    path = table({"a": DAYS.strftime("%B %dth, %Y"), "y": DAYS.day})
    code, _, err = run("fit", path, "--target", "y")
    assert code == 2 and "days such as 1st are not read: write dates such as 2023-01-30, or keep" in err


def test_digits_with_the_day_or_the_month_first_may_be_dates(run, table, tmp_path):
    saved = tmp_path / "model.safetensors"
    for written in ("%d%m%Y", "%m%d%Y"):
        texts = DAYS.strftime(written)
        path = table({"when": texts, "y": DAYS.day})
        code, _, err = run("fit", path, "--target", "y")
        assert code == 0 and f"such as {texts[0]}; pass --dates 'when' --date-format {written} if they are dates" in err
        run("fit", path, "--target", "y", "--dates", "when", "--date-format", written, "--save", saved)
        assert weights(saved)["when day"] == pytest.approx(1)
        # Days up to the 12th may be months.
        early = DAYS[DAYS.day <= 12]
        _, _, err = run("fit", table({"when": early.strftime(written), "y": early.day}), "--target", "y")
        assert "--date-format %d%m%Y or %m%d%Y if they are dates" in err
        # 1032023 has seven digits in the file; numbers in a row; a month 13 in both orders.
        for others in (
            [text.lstrip("0") for text in texts],
            [f"{1012001 + k}" for k in range(90)],
            [*texts[:60], *["13132023"] * 60],
        ):
            _, _, err = run("fit", table({"when": others, "y": range(len(others))}), "--target", "y")
            assert "may be dates" not in err


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["--", "---", "-x", "-n/a-", "- -", "-", "?", "--missing"])
def test_the_option_that_is_advised_for_a_missing_value_is_taken(run, table, tmp_path, text):
    saved, cells = tmp_path / "model.safetensors", [str(v) for v in AMOUNTS]
    path = table({"a": [*cells[:-1], text], "y": TARGET})
    code, _, err = run("fit", path, "--target", "y")
    advice = err.partition("; pass --missing")[2].partition(" if it means")[0]
    assert code == 2 and advice, err
    options = shlex.split("--missing" + advice)
    code, _, err = run("fit", path, "--target", "y", "--impute", "median", *options)
    assert code == 0 and "1 missing value of a filled" in err
    run("fit", table({"a": cells, "y": TARGET}), "--target", "y", "--save", saved)
    code, out, err = run("predict", saved, table({"a": ["900", text]}, "new.csv"), *options)
    assert code == 0 and "column 'a' has no value on line 3" in err
    np.testing.assert_allclose(predictions(out), [2705, math.nan])


def test_several_texts_that_mean_a_missing_value(run, table):
    path = table({"a": [*map(str, AMOUNTS[3:]), "--", "-n", "?"], "y": TARGET})
    words = ["fit", path, "--target", "y", "--impute", "median"]
    code, _, err = run(*words, "--missing=--", "--missing=-n", "--missing", "?")
    assert code == 0 and "3 missing values of a filled" in err


def test_a_number_beyond_the_range_is_shown_as_it_is_written(run, table, tmp_path):
    saved = tmp_path / "model.safetensors"
    run("fit", table({"a": AMOUNTS, "y": TARGET}), "--target", "y", "--save", saved)
    for text in ("1e400", "-1e999", "inf"):
        code, out, err = run("predict", saved, table({"a": [900, text]}, "new.csv"))
        assert code == 0 and f"column 'a' has '{text}' on line 3, which is no finite number" in err
        np.testing.assert_allclose(predictions(out), [2705, math.nan])
    _, _, err = run("predict", saved, table({"a": [900], "y": [2705]}, "new.csv"))
    assert besides_task(err).startswith("score:")
