"""The command line on text that is not UTF-8, units in several spellings, and days without a year."""

import codecs
import io
import json
import os
import sys
import threading

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("rich")
safetensors_torch = pytest.importorskip("safetensors.torch")

NAMES = ["José", "Zoë", "Ägir"]
KINDS = [NAMES[k % 3] for k in range(60)]
A = np.arange(60) % 7
Y = 2 * A + 5 * np.array([name == "Zoë" for name in KINDS]) - 3 * np.array([name == "Ägir" for name in KINDS])
TABLE = "größe,name,y\r\n" + "".join(f"{a},{name},{y}\r\n" for a, name, y in zip(A, KINDS, Y, strict=True))


def state(path):
    """The weights by the names of their features, and the bias."""
    with pytest.importorskip("safetensors").safe_open(path, framework="numpy") as file:
        features = json.loads(file.metadata()["features"])
        return dict(zip(features, file.get_tensor("weight")[0], strict=True)) | {"": file.get_tensor("bias")[0]}


EXPECTED = {"größe": 2, "name = Zoë": 5, "name = Ägir": -3, "": 0}


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (TABLE.encode("utf-8-sig"), []),
        (TABLE.encode("utf-8-sig"), ["--encoding", "utf-8"]),
        (TABLE.encode("cp1252"), ["--encoding", "cp1252"]),
        (TABLE.encode("latin-1"), ["--encoding", "latin-1"]),
        (TABLE.encode("mac_roman"), ["--encoding", "mac_roman"]),
        (TABLE.encode("utf-16"), []),
        (TABLE.encode("utf-16"), ["--encoding", "utf-16"]),
        (codecs.BOM_UTF16_BE + TABLE.encode("utf-16-be"), []),
        (codecs.BOM_UTF16_BE + TABLE.encode("utf-16-be"), ["--encoding", "utf-16-be"]),
        (TABLE.encode("utf-16-le"), ["--encoding", "utf-16-le"]),
        (TABLE.encode("utf-32"), []),
    ],
)
def test_encodings(run, csv, tmp_path, content, options):
    """Names in the file are the letters that were written, in fit and in predict."""
    path, saved = csv(content), tmp_path / "model.safetensors"
    code, _, err = run("fit", path, "--target", "y", "--save", saved, *options)
    assert code == 0, err
    found = state(saved)
    assert found.keys() == EXPECTED.keys() and found == pytest.approx(EXPECTED, abs=1e-9)
    # What a model is applied to may be in another encoding.
    expected = run("predict", saved, csv(TABLE, "plain.csv"))[1]
    code, out, err = run("predict", saved, path, *options)
    assert (code, out) == (0, expected) and len(out.splitlines()) == 61, err


def test_text_longer_than_what_is_read_at_once(run, csv, tmp_path, monkeypatch):
    """A letter of several bytes may lie on the border of two readings; the error counts the lines of all of them."""
    from onestep.cli import source

    saved = tmp_path / "model.safetensors"
    for at_once in (1, 7, 64):
        monkeypatch.setattr(source, "_AT_ONCE", at_once)
        code, _, err = run("fit", csv(TABLE.encode("utf-16")), "--target", "y", "--save", saved)
        assert code == 0 and state(saved) == pytest.approx(EXPECTED, abs=1e-9), err
        # 0x81 is no letter in cp1252.
        broken = TABLE.encode("cp1252").replace(b"\r\n6,", b"\r\n\x81,", 1)
        code, out, err = run("fit", csv(broken), "--target", "y", "--encoding", "cp1252")
        message = "line 8 is not cp1252 (byte 0x81); pass the encoding of the file with --encoding"
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_standard_input_and_pipes(run, csv, tmp_path, monkeypatch):
    saved = tmp_path / "model.safetensors"
    for content, options in ((TABLE.encode("cp1252"), ["--encoding", "cp1252"]), (TABLE.encode("utf-16"), [])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        code, _, err = run("fit", "-", "--target", "y", "--save", saved, *options)
        assert code == 0 and state(saved) == pytest.approx(EXPECTED, abs=1e-9), err
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        keep = os.open(pipe, os.O_RDWR)
        try:
            os.write(keep, content)
            # The one who reads sees its end once nobody has it open to write.
            threading.Timer(0.5, os.close, [keep]).start()
            code, _, err = run("predict", saved, pipe, *options)
        finally:
            pipe.unlink()
        assert code == 0 and "R² 1.0000" in err, err


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            TABLE.encode("cp1252"),
            [],
            "line 1 is not UTF-8 (byte 0xf6); pass the encoding of the file, such as --enc",
        ),
        (
            TABLE.encode("utf-16-le"),
            [],
            "(it holds NUL bytes); pass --encoding utf-16-le if it is UTF-16",
        ),
        (
            "a,y\n1,2\n".encode("utf-16-be"),
            [],
            "(it holds NUL bytes); pass --encoding utf-16-be if it is UTF-16",
        ),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", [], "is not a text file (it holds NUL bytes)\n"),
        (
            TABLE.encode("utf-16"),
            ["--encoding", "cp1252"],
            "begins with the byte order mark of utf-16-le, and --encoding is cp1252; leave the option out",
        ),
        (
            TABLE.encode("utf-8-sig"),
            ["--encoding", "latin-1"],
            "byte order mark of utf-8, and --encoding is latin-1",
        ),
        (TABLE.encode("utf-16")[:-1], [], "line 61 is not utf-16-le"),
        (
            TABLE.encode(),
            ["--encoding", "utf8000"],
            "such as cp1252, latin-1 or utf-16, not 'utf8000'",
        ),
        (TABLE.encode(), ["--encoding", "base64"], "must be an encoding of text that Python knows"),
    ],
)
def test_what_is_in_another_encoding_is_refused_with_the_option(run, csv, content, options, message):
    code, out, err = run("fit", csv(content), "--target", "y", *options)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


# --- units -----------------------------------------------------------------------------------------------------------

AMOUNTS = 900 + 37 * np.arange(40)
TARGET = 3 * AMOUNTS + 5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("€{}", "{} EUR"),
        ("{} €", "{} euros"),
        ("${}", "{} USD"),
        ("${}", "US${}"),
        ("${}", "{} dollars"),
        ("$ {} USD", "${}"),
        ("£{}", "{} GBP"),
        ("C${}", "{} CAD"),
        ("$ {} CAD", "CAD {}"),
        ("₹{}", "Rs. {}"),
        ("{} zł", "{} PLN"),
        ("￥{}", "¥{}"),
        ("＄{} USD", "${}"),
        ("kr {} SEK", "{} SEK"),
    ],
)
def test_spellings_of_one_unit_are_one_unit(run, table, tmp_path, one, other):
    """In one column, and in a file that is predicted from."""
    mixed = [(one, other)[k % 2].format(v) for k, v in enumerate(AMOUNTS)]
    saved = tmp_path / "model.safetensors"
    code, _, err = run("fit", table({"a": mixed, "y": TARGET}), "--target", "y", "--save", saved)
    assert code == 0 and " left out (" in err, err
    np.testing.assert_allclose(safetensors_torch.load_file(saved)["weight"][0], [3], rtol=1e-9)
    for first, second in ((one, other), (other, one)):
        run("fit", table({"a": map(first.format, AMOUNTS), "y": TARGET}), "--target", "y", "--save", saved)
        code, out, err = run("predict", saved, table({"a": map(second.format, AMOUNTS)}))
        np.testing.assert_allclose(np.array(out.splitlines()[1:], float), TARGET, rtol=1e-9)
        assert code == 0 and err == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("€{}", "{} USD"),
        ("${}", "{} CAD"),
        ("${}", "$ {} CAD"),
        ("£{}", "{} EGP"),
        ("¥{}", "{} CNY"),
        ("¥{}", "{} JPY"),
        ("kr {}", "{} NOK"),
        ("{} %", "{}"),
        ("{} %", "{} ‰"),
    ],
)
def test_units_that_may_differ_are_refused(run, table, tmp_path, one, other):
    mixed = [(one, other)[k % 2].format(v) for k, v in enumerate(AMOUNTS)]
    code, out, err = run("fit", table({"a": mixed, "y": TARGET}), "--target", "y")
    assert (code, out) == (2, "") and ("mixes the units" in err or "beside some numbers and not others" in err)
    saved = tmp_path / "model.safetensors"
    run("fit", table({"a": map(one.format, AMOUNTS), "y": TARGET}), "--target", "y", "--save", saved)
    code, out, err = run("predict", saved, table({"a": map(other.format, AMOUNTS)}))
    assert (code, out) == (2, "") and "in the file that the model was fitted on" in err


# --- days without a year ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "form"), [("%d.%m.", "%d.%m."), ("%d %b", "%d %b"), ("%m/%d %H:%M %z", "%m/%d 23:30 -0500")]
)
def test_the_29_february_of_no_year(run, table, tmp_path, written, form):
    """Each day of a leap year is read; 30 February is in none."""
    days = pd.date_range("2020-01-01", "2020-12-31")
    y = 3 * days.month - days.day
    path, saved = table({"when": days.strftime(form), "y": y}), tmp_path / "model.safetensors"
    words = ("fit", path, "--target", "y", "--dates", "when", "--date-format", written)
    code, _, err = run(*words, "--save", saved)
    assert code == 0 and "say no year and no weekday; month and day are used" in err
    np.testing.assert_allclose(safetensors_torch.load_file(saved)["weight"][0], [3, -1], rtol=1e-9)
    texts = [days[59].strftime(form), days[59].strftime(form).replace("29", "30")]
    code, out, err = run("predict", saved, table({"when": texts}, "new.csv"))
    assert code == 0 and float(out.splitlines()[1]) == pytest.approx(3 * 2 - 29)
    assert out.splitlines()[2] == '""' and f"column 'when' has {texts[1]!r} on line 3, which is not {written}" in err
