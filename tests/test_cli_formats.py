"""The command line on files as people have them: other numerals, dates, codes, classes, standard input, Ctrl-C."""

import contextlib
import io
import os
import re
import sys
import threading

import numpy as np
import pytest
import torch
from cli_cases import besides_task, small

import onestep

pd = pytest.importorskip("pandas")
pytest.importorskip("rich")
safetensors_torch = pytest.importorskip("safetensors.torch")
linear_model = pytest.importorskip("sklearn.linear_model")


def weights(path):
    """The weights and the bias of a saved linear model of numbers, in one vector."""
    state = safetensors_torch.load_file(path)
    return torch.cat([state["weight"].flatten(), state["bias"]]).numpy()


AMOUNTS = 900 + 37 * np.arange(40)
TARGET = 3 * AMOUNTS + 5


@pytest.mark.parametrize(
    ("written", "value", "options"),
    [
        (lambda v: f"{v:,}", lambda v: v, ["--thousands", ","]),
        # 1,00,900: in India groups have two digits but for the last.
        (lambda v: f"1,0{v // 1000},{v % 1000:03}", lambda v: 100_000 + v, ["--thousands", ","]),
        (lambda v: f"{v:,}".replace(",", "."), lambda v: v, ["--thousands", ".", "--decimal", ","]),
        (lambda v: f"{v:,},50".replace(",", " ", v >= 1000), lambda v: v + 0.5, ["--thousands", " ", "--decimal", ","]),
        (lambda v: f"{v},5", lambda v: v + 0.5, ["--decimal", ","]),
        (lambda v: f"${v}", lambda v: v, []),
        (lambda v: f"-€ {v}.25", lambda v: -v - 0.25, []),
        (lambda v: f"{v} %", lambda v: v, []),
        (lambda v: f"£{v:,}", lambda v: v, ["--thousands", ","]),
        (lambda v: f"\u2212{v}", lambda v: -v, []),
        (lambda v: f"\u20b9{v}", lambda v: v, []),
        (lambda v: f"CHF {v}", lambda v: v, []),
        (lambda v: f"{v} usd", lambda v: v, []),
        (lambda v: f"US${v}", lambda v: v, []),
        (lambda v: f"{v}\u2030", lambda v: v, []),
        (lambda v: f"{v // 1000}\u2019{v % 1000:03}", lambda v: v, ["--thousands", "\u2019"]),
    ],
)
def test_numerals(run, table, tmp_path, written, value, options):
    """Each is read as the number that it says; predict reads the same without being told."""
    texts, y = [written(int(v)) for v in AMOUNTS], [round(4 * value(int(v)) + 5) for v in AMOUNTS]
    path, saved = table({"amount": texts, "y": y}), tmp_path / "model.safetensors"
    code, _, err = run("fit", path, "--target", "y", "--save", saved, *options)
    assert code == 0, err
    assert ("is left out" in err) == any(
        sign in texts[0] for sign in ("$", "€", "£", "%", "\u20b9", "CHF", "usd", "\u2030")
    )
    np.testing.assert_allclose(weights(saved), [4, 5], rtol=1e-7)
    code, out, _ = run("predict", saved, path)
    np.testing.assert_allclose([float(line) for line in out.splitlines()[1:]], y, rtol=1e-9)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([f"{v:,}" for v in 1000 + AMOUNTS], "such as '1,900' on line 2; pass --thousands ',' or --decimal ','"),
        ([f"{v},5" for v in AMOUNTS], "such as '900,5' on line 2; pass --decimal ','"),
        ([f"{v:,}" for v in AMOUNTS], "'amount' "),
        (["5 %", "$5"] * 20, "mixes the units $, %"),
        ([f"2021-03-{1 + v % 28:02}" for v in AMOUNTS], "dates, such as '2021-03-05' on line 2; pass --dates 'amount'"),
        ([f"{1 + v % 28}/3/2021" for v in AMOUNTS], "seems to hold dates"),
        ([f"20{10 + v % 9}-01" for v in AMOUNTS], "dates, such as '2010-01' on line 2; pass --dates 'amount'"),
        ([f"{1 + v % 28} Jan 2024" for v in AMOUNTS], "pass --dates 'amount' --date-format '%d %b %Y' for year"),
        ([2**53 + int(v) for v in AMOUNTS], "numbers beyond 2^53 (9007199254741892 on line 2)"),
        ([2**70 + int(v) for v in AMOUNTS], "numbers beyond 2^53"),
        (
            [f"({v})" for v in AMOUNTS],
            "seems to hold numbers, such as '(900)' on line 2; write negative numbers with a",
        ),
        ([f"(${v})" for v in AMOUNTS], "such as '($900)' on line 2; write negative numbers with a minus"),
        (["5k", "12k", "1.2M", "7"] * 10, "such as '5k' on line 2; write them with the digits"),
        ([f"1’{v % 1000:03}" for v in AMOUNTS], "such as '1’900' on line 2; pass --thousands '’'"),
        ([f"1,0{v // 1000},{v % 1000:03}" for v in AMOUNTS], "pass --thousands ','"),
        (["75.8%", "0.1234"] * 20, "has % beside some numbers and not others, such as '0.1234' on line 3 and '75.8%'"),
        (["CHF 5", "USD5"] * 20, "mixes the units CHF, USD"),
        (["9.007199254740993e15", *map(str, AMOUNTS[1:])], "beyond 2^53 (9.007199254740993e15 on line 2)"),
        ([f"{v}-" for v in AMOUNTS % 5], "such as '0-' on line 2"),
        ([hex(v) for v in AMOUNTS], "such as '0x384' on line 2"),
        ([f"{v}_000" for v in AMOUNTS], "such as '900_000' on line 2"),
        ([f"{v},5e3" for v in AMOUNTS], "such as '900,5e3' on line 2"),
        (["\u0661\u0662", "\uff11\uff12"] * 20, "seems to hold numbers"),
        (
            [f"{v} kg" for v in AMOUNTS],
            "such as '900 kg' on line 2; write the number alone, in one unit",
        ),
        (["", *(2**53 + int(v) for v in AMOUNTS[1:])], "numbers beyond 2^53"),
    ],
)
def test_columns_that_say_something_else(run, table, texts, message):
    """Refused with the column, an example and the option, rather than taken for categories or rounded."""
    path = table({"amount": texts, "b": np.arange(40) % 7, "y": TARGET})
    code, out, err = run("fit", path, "--target", "y", "--impute", "median")
    assert (code, out) == (2, "") and "'amount'" in err and message in err
    code, _, err = run("fit", path, "--target", "y", "--impute", "median", "--categorical", "amount")
    assert code == 0 or "different values" in err


@pytest.mark.parametrize(
    ("first", "options", "message"),
    [
        ("3,5", ["--thousands", ","], "'3,5' on line 2, which does not fit"),
        ("1.234", ["--decimal", ","], "pass --thousands '.' --decimal ','"),
        ("9,007,199,254,740,993", ["--thousands", ","], "beyond 2^53"),
        ("9007199254740993,00", ["--decimal", ","], "beyond 2^53"),
        ("$9007199254740993", [], "beyond 2^53"),
    ],
)
def test_numbers_that_options_do_not_fit(run, table, first, options, message):
    """A separator is not taken out wherever it stands, and digits are not lost behind one."""
    path = table({"amount": [first, *map(str, AMOUNTS[1:])], "y": TARGET})
    code, out, err = run("fit", path, "--target", "y", *options)
    assert (code, out) == (2, "") and "'amount'" in err and message in err


def test_dates(run, table, tmp_path):
    days = pd.date_range("2019-11-20", periods=120, freq="5D")
    y = 2 * days.year + 3 * days.month - days.day + 7 * days.day_of_week
    saved = tmp_path / "model.safetensors"
    for form, options in (("%Y-%m-%d", []), ("%d/%m/%Y", ["--date-format", "%d/%m/%Y"])):
        path = table({"when": days.strftime(form), "y": y})
        code, out, err = run("fit", path, "--target", "y", "--dates", "when", "--save", saved, *options)
        assert (code, besides_task(err)) == (0, "") and "when weekday" in out
        np.testing.assert_allclose(weights(saved), [2, 3, -1, 7, 0], atol=1e-6)
        code, out, err = run("predict", saved, path)
        np.testing.assert_allclose([float(line) for line in out.splitlines()[1:]], y, rtol=1e-9)
    code, _, err = run("fit", path, "--target", "y", "--dates", "when")
    assert code == 2 and "'when' should hold dates, but line 2 has '20/11/2019'" in err and "--date-format" in err


def test_the_day_of_a_time_is_the_day_written(run, table, tmp_path):
    """23:30 in New York is the next day in UTC."""
    days = pd.date_range("2019-11-20", periods=120, freq="5D")
    y = 2 * days.year + 3 * days.month - days.day + 7 * days.day_of_week
    times = [f"{day:%Y-%m-%d}T{'23:30:00-05:00' if k % 2 else '00:10+0530'}" for k, day in enumerate(days)]
    spoken = [f"{day:%d %b %Y 23:30} -0500" for day in days]
    for texts, options in ((times, []), (spoken, ["--date-format", "%d %b %Y %H:%M %z"])):
        saved = tmp_path / "model.safetensors"
        code, _, err = run(
            "fit", table({"when": texts, "y": y}), "--target", "y", "--dates", "when", "--save", saved, *options
        )
        assert (code, besides_task(err)) == (0, "")
        np.testing.assert_allclose(weights(saved), [2, 3, -1, 7, 0], atol=1e-6)


def test_what_is_advised_about_a_target_is_accepted(run, table):
    """A target's error names no option that refuses a target."""
    b = np.arange(40) % 7
    for texts in (
        [2**53 + int(v) for v in AMOUNTS],
        [f"{v}_000" for v in AMOUNTS],
        [f"20{10 + v % 9}-01" for v in AMOUNTS],
    ):
        code, _, err = run("fit", table({"y": texts, "b": b}), "--target", "y")
        assert code == 2 and "--task classification" in err, err
        assert not any(option in err for option in ("--ignore", "--categorical", "--dates")), err
    code, _, err = run("fit", table({"y": [4] * 40, "b": b}), "--target", "y")
    assert "different values" not in err


def test_codes_that_read_like_missing_values(run, table, tmp_path):
    """Namibia is NA."""
    path = table({"country": ["NA", "DE", "FR", "DE"] * 20, "y": [7.5, 3, 1, 3] * 20})
    code, _, err = run("fit", path, "--target", "y")
    assert code == 2 and "missing values in country (20)" in err
    saved = tmp_path / "model.safetensors"
    code, out, err = run("fit", path, "--target", "y", "--missing", "--save", saved)
    assert (code, besides_task(err)) == (0, "") and re.search(r"country = NA +\+4\.5", out)
    # As the file that it was fitted on.
    assert float(run("predict", saved, path)[1].splitlines()[1]) == pytest.approx(7.5)
    code, _, err = run(
        "fit", table({"a": [1, 2, "gone", 5] * 20, "y": [1, 2, 3, 4] * 20}), "--target", "y", "--missing", "gone"
    )
    assert code == 2 and "missing values in a (20)" in err


def test_standard_input(run, table, tmp_path, monkeypatch):
    path, saved = table({"a": AMOUNTS, "y": TARGET}), tmp_path / "model.safetensors"

    def feed(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    feed(path.read_bytes())
    code, out, err = run("fit", "-", "--target", "y", "--save", saved)
    assert (code, besides_task(err)) == (0, "") and out.startswith("standard input: 40 rows")
    feed(path.read_bytes())
    assert run("predict", saved, "-")[1] == run("predict", saved, path)[1]
    feed(b"a,y\n1,2\n3\n")
    assert "standard input: line 3 has 1 field," in run("fit", "-", "--target", "y")[2]
    # As the interpreter leaves it where the descriptor was closed: fit - <&-
    monkeypatch.setattr(sys, "stdin", None)
    code, out, err = run("fit", "-", "--target", "y")
    assert (code, out) == (2, "") and "standard input is closed" in err


def test_a_pipe_is_read_once(run, table, tmp_path):
    """What the shell makes of <(command)."""
    path, pipe = table({"a": AMOUNTS, "y": TARGET}), tmp_path / "pipe"
    os.mkfifo(pipe)
    done = threading.Event()

    def write():
        pipe.write_bytes(path.read_bytes())
        # Whoever opens the pipe again waits for a writer: he gets one that writes nothing.
        while not done.wait(2):
            with contextlib.suppress(OSError):
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))

    # A daemon: where nobody reads, it does not end.
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        code, out, err = run("fit", pipe, "--target", "y")
    finally:
        done.set()
    assert (code, besides_task(err)) == (0, "") and f"{pipe}: 40 rows" in out
    writer.join(10)
    assert not writer.is_alive()
    assert "is not a file, nor a pipe" in run("fit", "/dev/null", "--target", "y")[2]


def test_rows_with_unknown_categories_get_an_empty_prediction(run, tmp_path):
    data, saved = tmp_path / "data.csv", tmp_path / "model.safetensors"
    data.write_text(small())
    run("fit", data, "--target", "y", "--save", saved)
    data.write_text("a,b,kind,y\n1,2,u,4\n1,2,w,4\n0,0,v,15\n0,0,x,15\n")
    code, out, err = run("predict", saved, data)
    assert (
        code == 0
        and [round(float(line), 6) for line in out.splitlines()[1::2]] == [4, 15]
        and out.splitlines()[2::2] == ['""'] * 2
    )
    assert "2 rows without a prediction: column 'kind' has 'w' on line 3, which was not there" in err
    assert "R² 1.0000" in err and "(2 rows)" in err


@pytest.mark.parametrize("options", [[], ["--impute", "median"]])
def test_records_of_another_width_get_an_empty_prediction(run, tmp_path, options):
    """Too few fields or too many, quoted line breaks and blank lines beside them; fit refuses them."""
    data, saved = tmp_path / "data.csv", tmp_path / "model.safetensors"
    data.write_text(small())
    run("fit", data, "--target", "y", "--save", saved, *options)
    rows = '1,2,u,4\n1,"2\n",w\n\n0,0,v,15\n0,0,v,15,16\n0,0\n"0",0,v,15'
    data.write_text("\ufeffa,b,kind,y\n" + rows)
    code, out, err = run("predict", saved, data)
    assert code == 0 and [out.splitlines()[line] for line in (2, 4, 5)] == ['""'] * 3
    assert [round(float(out.splitlines()[line]), 6) for line in (1, 3, 6)] == [4, 15, 15]
    assert "3 rows without a prediction: line 3 has 3 fields, but the header has 4" in err
    assert err.count("without a prediction") == 1 and "(3 rows)" in err
    assert "line 3 has 3 fields, but the header has 4" in run("fit", data, "--target", "y")[2]
    # A model of one column, whose empty record is no blank line.
    data.write_text("a,y\n" + "".join(f"{v},{2 * v}\n" for v in range(9)))
    run("fit", data, "--target", "y", "--save", saved, *options)
    data.write_text("a\n3\n3,4\n5\n")
    code, out, err = run("predict", saved, data)
    assert (code, out.splitlines()[2]) == (0, '""') and "1 row without a prediction: line 3 has 2 fields" in err
    assert [round(float(line), 6) for line in out.splitlines()[1::2]] == [6, 10]


def test_rows_that_cannot_be_read_get_an_empty_prediction(run, table, tmp_path):
    """A missing value, a text for a number, a date that is none: each costs its own row, and is counted."""
    days = pd.date_range("2019-11-20", periods=40, freq="5D")
    saved, y = tmp_path / "model.safetensors", 3 * AMOUNTS + days.day
    run(
        "fit",
        table({"a": AMOUNTS, "when": days.strftime("%Y-%m-%d"), "y": y}),
        "--target",
        "y",
        "--dates",
        "when",
        "--save",
        saved,
    )
    rows = {
        "a": ["900", "", "x", "900", "inf", "900"],
        "when": ["2019-11-20", "2019-11-20", "2019-11-20", "2019-02-30", "2019-11-20", ""],
    }
    code, out, err = run("predict", saved, table(rows, "new.csv"))
    assert code == 0 and out.splitlines()[2:] == ['""'] * 5
    assert float(out.splitlines()[1]) == pytest.approx(2720)
    assert "1 row without a prediction: column 'a' has no value on line 3; a model fitted with --impute" in err
    assert "2 rows without a prediction: column 'a' has 'x' on line 4, which is no finite number" in err
    assert "1 row without a prediction: column 'when' has '2019-02-30' on line 5, which is not YYYY-MM-DD" in err
    assert "column 'when' has no value on line 7" in err


def test_units_are_those_of_the_fit(run, table, tmp_path):
    """A model of percentages does not take dollars, nor plain numbers, which may be fractions; 0 is 0 in all."""
    saved = tmp_path / "model.safetensors"
    run("fit", table({"a": [f"{v}%" for v in AMOUNTS], "y": TARGET}), "--target", "y", "--save", saved)
    for text, expected in (("900%", 2705), ("0", 5)):
        code, out, err = run("predict", saved, table({"a": [text]}, "new.csv"))
        assert code == 0 and float(out.splitlines()[1]) == pytest.approx(expected), err
    for text, found in (("$12", "$"), ("12", "nothing"), ("12.5", "nothing")):
        code, out, err = run("predict", saved, table({"a": [text]}, "new.csv"))
        assert (code, out) == (2, "") and f"column 'a' has {found} beside its numbers, but % in the file" in err


def flowers(classes):
    rng = np.random.default_rng(0)
    labels = np.array([f"kind {code}" for code in range(classes)])
    codes = rng.integers(classes, size=150)
    points = rng.normal(size=(150, 2)) + 1.5 * np.stack([codes, codes % 2], 1)
    return points, labels[codes]


@pytest.mark.parametrize("classes", [2, 3])
def test_classes(run, table, tmp_path, classes):
    """The model and its probabilities are scikit-learn's, on standardised columns."""
    points, labels = flowers(classes)
    path, saved = table({"a": points[:, 0], "b": 50 * points[:, 1], "kind": labels}), tmp_path / "model.safetensors"
    code, out, err = run("fit", path, "--target", "kind", "--test-size", 0, "--save", saved)
    assert code == 0 and f"the target 'kind' has {classes} classes: it is classified" in err
    assert ("log-odds of kind 1" in out) == (classes == 2)
    Z = points / points.std(0)
    peer = linear_model.LogisticRegression(tol=1e-10, max_iter=1000).fit(Z - Z.mean(0), labels)
    expected = peer.predict_proba(Z - Z.mean(0))
    assert re.search(r"training:  accuracy " + f"{peer.score(Z - Z.mean(0), labels):.4f}", out)
    code, out, err = run("predict", saved, path)
    lines = [line.split(",") for line in out.splitlines()]
    assert lines[0] == ["predicted_kind", "probability"]
    assert [line[0] for line in lines[1:]] == list(peer.classes_[expected.argmax(1)])
    np.testing.assert_allclose([float(line[1]) for line in lines[1:]], expected.max(1), atol=1e-5)
    assert "score: accuracy" in err and "(150 rows)" in err
    layer = torch.nn.Linear(2, classes, dtype=torch.float64)
    layer.load_state_dict(safetensors_torch.load_file(saved))
    scores = layer(torch.tensor(np.stack([points[:, 0], 50 * points[:, 1]], 1)))
    np.testing.assert_allclose(scores.softmax(1).detach().numpy(), expected, atol=1e-5)


def test_classes_by_a_network(run, table, tmp_path):
    points, labels = flowers(3)
    path, saved = table({"a": points[:, 0], "b": points[:, 1], "kind": labels}), tmp_path / "model.safetensors"
    code, out, _ = run("fit", path, "--target", "kind", "--model", "mlp", "--hidden", 8, "--alpha", 1, "--save", saved)
    assert code == 0 and "2-8-3 with relu" in out
    accuracy = float(re.search(r"training:  accuracy ([\d.]+)", out)[1])
    assert accuracy > 0.75
    assert run("predict", saved, path)[1].startswith("predicted_kind,probability\nkind ")


def test_what_counts_as_a_class(run, table):
    binary = table({"a": AMOUNTS, "y": (AMOUNTS > 1500).astype(int)})
    _code, out, err = run("fit", binary, "--target", "y")
    assert (
        "the target 'y' has 2 classes: it is classified, because it has two different values; pass --task regression"
        in err
        and "accuracy" in out
    )
    assert "R²" in run("fit", binary, "--target", "y", "--task", "regression")[1]
    stars = table({"a": AMOUNTS, "y": 1 + np.arange(40) % 5})
    _, out, err = run("fit", stars, "--target", "y")
    assert "pass --task classification if they are classes" in err and "R²" in out
    assert "accuracy" in run("fit", stars, "--target", "y", "--task", "classification")[1]


def test_an_interrupted_network_is_kept(run, table, tmp_path, monkeypatch):
    """What fit had reached is reported and saved, and the exit code is that of an interrupt."""
    path, saved = table({"a": AMOUNTS, "y": np.sin(AMOUNTS / 300)}), tmp_path / "model.safetensors"
    real = onestep.fit

    def interrupted(*args, **kwargs):
        result = real(*args, **kwargs | {"max_steps": 3})
        result.reason = "interrupted"
        return result

    monkeypatch.setattr(onestep, "fit", interrupted)
    code, out, err = run("fit", path, "--target", "y", "--model", "mlp", "--hidden", 4, "--save", saved)
    assert code == 130 and "interrupted after 3 steps: the network as it stood was kept" in err
    assert "saved to" in out and saved.exists()
    assert run("predict", saved, path)[0] == 0


def test_codes_with_leading_zeros_are_told(run, table):
    """A postcode is no number, but may be read as one."""
    codes = ["01067", "10115", "80331", "01069"] * 10
    code, _, err = run("fit", table({"zip": codes, "y": TARGET}), "--target", "y")
    assert (
        code == 0 and "'zip' is taken for numbers, although some begin with a zero, such as '01067': pass --cat" in err
    )
    code, out, err = run("fit", table({"zip": codes, "y": TARGET}), "--target", "y", "--categorical", "zip")
    assert (code, besides_task(err)) == (0, "") and "zip = 01069" in out
    # Neither decimals nor dates are codes.
    path = table(
        {"a": [f"0.{v}" for v in AMOUNTS], "day": ["05.03.2023", "06.03.2023"] * 20, "b": AMOUNTS, "y": TARGET}
    )
    code, _, err = run("fit", path, "--target", "y", "--dates", "day", "--date-format", "%d.%m.%Y")
    assert code == 0 and "begin with a zero" not in err
