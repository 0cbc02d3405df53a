"""What columns are taken for: by the model in predict, by fit where texts and numbers may be something else."""

import io
import json
import math

import numpy as np
import pytest
import torch
from cli_cases import besides_task, pd, safe_open, small, weights, with_line

safetensors_torch = pytest.importorskip("safetensors.torch")

AMOUNTS = 900 + 37 * np.arange(40)
TARGET = 3 * AMOUNTS + 5
DAYS = pd.date_range("2019-11-20", periods=40, freq="15D")


def predictions(out):
    """The predicted numbers, NaN for empty fields, as pandas reads them."""
    return pd.read_csv(io.StringIO(out), dtype=float).iloc[:, 0].to_numpy()


# --- predict reads columns as the model has them ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "options", "cells", "why"),
    [
        (str, [], ["900", "x"], "has 'x' on line 3, which is no finite number"),
        (str, [], ["900", "x", "y", "z"], "3 rows without a prediction: column 'a' has 'x' on line 3"),
        (str, [], ["900", "$6"], "'$6' on line 3: the column has $ beside its numbers, but nothing in the file that"),
        (str, [], ["900", "9007199254740993"], "on line 3, a number beyond 2^53, of which float64 loses digits"),
        (str, [], ["900", "1" * 5000], "on line 3, a number beyond 2^53"),
        (str, [], ["900", "TRUE"], "has 'TRUE' on line 3, which is no finite number"),
        (str, [], ["900", "-inf"], "has '-inf' on line 3, which is no finite number"),
        (str, ["--impute", "median"], ["900", "x"], "has 'x' on line 3, which is no finite number"),
        (str, ["--impute", "median"], ["900", "inf"], "has 'inf' on line 3, which is no finite number"),
        (lambda v: f"{v}%", [], ["900%", "$6"], "the column has $ beside its numbers, but % in the file"),
        (lambda v: f"{v}%", [], ["900%", "6"], "the column has nothing beside its numbers, but % in the file"),
        (lambda v: f"{v}%", [], ["900 percent", "six"], "has 'six' on line 3"),
        (lambda v: f"Rs. {v}/-", [], ["rs 900", "$6"], "the column has $ beside its numbers, but Rs in the file"),
        (lambda v: f"{v},0", ["--decimal", ","], ["900", "9.5"], "with decimals behind ','"),
        (lambda v: f"{v},0", ["--decimal", ","], ["900,0", "x"], "which is no finite number"),
        (
            lambda v: f"{v:,}".replace(",", "."),
            ["--thousands", ".", "--decimal", ","],
            ["0.900", "9.5"],
            "has '9.5' on line 3, which is not written as the model reads numbers, with thousands apart by '.' and",
        ),
    ],
)
def test_a_value_that_does_not_read_costs_its_own_row(run, table, tmp_path, written, options, cells, why):
    saved = tmp_path / "model.safetensors"
    path = table({"a": [written(int(v)) for v in AMOUNTS], "y": TARGET})
    code, _, err = run("fit", path, "--target", "y", "--save", saved, *options)
    assert code == 0, err
    code, out, err = run("predict", saved, table({"a": cells}, "new.csv"))
    assert code == 0 and why in err and err.count("without a prediction") == 1
    np.testing.assert_allclose(predictions(out), [2705] + [math.nan] * (len(cells) - 1))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["x", "y"], "column 'a' should hold numbers, but line 2 has 'x', and 1 more like it; correct it"),
        (["$6", "$7"], "column 'a' has $ beside its numbers, but nothing in the file that the model was fitted on"),
        (["2023-01-05"], "column 'a' should hold numbers, but line 2 has '2023-01-05'"),
        (["1,5", "2,5"], "'1,5', and 1 more like it; pass --decimal ','"),
        (["-", "-"], "'-', and 1 more like it; correct it; pass --missing=- if it means that there is no value"),
    ],
)
def test_a_column_without_one_value_of_its_kind_is_refused(run, table, tmp_path, cells, message):
    saved = tmp_path / "model.safetensors"
    run("fit", table({"a": AMOUNTS, "y": TARGET}), "--target", "y", "--save", saved)
    code, out, err = run("predict", saved, table({"a": cells}, "new.csv"))
    assert (code, out) == (2, "") and message in err


def test_a_column_of_dates_without_one_is_refused(run, table, tmp_path):
    saved = tmp_path / "model.safetensors"
    path = table({"when": DAYS.strftime("%d.%m.%Y"), "y": DAYS.day})
    run("fit", path, "--target", "y", "--dates", "when", "--date-format", "%d.%m.%Y", "--save", saved)
    code, out, err = run("predict", saved, table({"when": ["2019-11-20", "x"]}, "new.csv"))
    assert (code, out) == (2, "") and "line 2 has '2019-11-20', which is not %d.%m.%Y; correct it" in err


def test_empty_predictions_keep_their_rows(run, table, tmp_path):
    """Programs skip empty lines of CSV files: an empty field alone is written as two quotation marks."""
    saved = tmp_path / "model.safetensors"
    run("fit", table({"a": AMOUNTS, "y": TARGET}), "--target", "y", "--save", saved)
    _, out, _ = run("predict", saved, table({"a": [900, "", 900]}, "new.csv"))
    np.testing.assert_allclose(predictions(out), [2705, math.nan, 2705])
    kinds = ["u" if v > 1500 else "v" for v in AMOUNTS]
    run("fit", table({"a": AMOUNTS, "y": kinds}), "--target", "y", "--save", saved)
    _, out, _ = run("predict", saved, table({"a": [900, "", 900]}, "new.csv"))
    assert out.splitlines()[2] == ","


def test_classes_are_scored_however_their_numbers_are_written(run, table, tmp_path):
    """A program that knows missing values writes the classes 0 and 1 as 0.0 and 1.0."""
    saved = tmp_path / "model.safetensors"
    path = table({"a": AMOUNTS, "y": [f"{float(v > 1500)}" for v in AMOUNTS]})
    run("fit", path, "--target", "y", "--save", saved)
    code, out, err = run("predict", saved, path)
    assert code == 0 and "score: accuracy 1.0000" in err and "(40 rows)" in err
    assert {line.partition(",")[0] for line in out.splitlines()[1:]} == {"0", "1"}


# --- dates that say less than a day ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "options", "parts", "said"),
    [
        ("%Y-%m", [], {"year": 2, "month": 3}, "say no day and no weekday; year and month are used"),
        ("%Y", [], {"year": 2}, "say no month and no day and no weekday; year is used"),
        ("%b %Y", ["--date-format", "%b %Y"], {"year": 2, "month": 3}, "say no day and no weekday"),
        ("%d.%m.", ["--date-format", "%d.%m."], {"month": 3, "day": -1}, "say no year and no weekday"),
        ("%Y%m%d", [], {"year": 2, "month": 3, "day": -1, "weekday": 7}, None),
        ("%Y%m", ["--date-format", "%Y%m"], {"year": 2, "month": 3}, "say no day and no weekday"),
        ("%G-W%V-%u", ["--date-format", "%G-W%V-%u"], {"year": 2, "month": 3, "day": -1, "weekday": 7}, None),
        ("%Y-%j", ["--date-format", "%Y-%j"], {"year": 2, "month": 3, "day": -1, "weekday": 7}, None),
    ],
)
def test_no_day_is_made_up(run, table, tmp_path, written, options, parts, said):
    """The weights are those of the parts that the dates say, and there are no others."""
    days = pd.date_range("2017-11-20", periods=150, freq="11D")
    values = {"year": days.year, "month": days.month, "day": days.day, "weekday": days.day_of_week}
    y = sum(weight * values[part] for part, weight in parts.items())
    path, saved = table({"when": days.strftime(written), "y": y}), tmp_path / "model.safetensors"
    code, _, err = run("fit", path, "--target", "y", "--dates", "when", "--save", saved, *options)
    assert code == 0 and (said is None or said in err), err
    assert (said is None) == (besides_task(err) == "")
    expected = {f"when {part}": weight for part, weight in parts.items()} | {"": 0}
    assert weights(saved) == pytest.approx(expected, abs=1e-6)
    code, out, _ = run("predict", saved, path)
    np.testing.assert_allclose(predictions(out), y, atol=1e-6)


def test_dates_that_say_more_or_less_than_the_models(run, table, tmp_path):
    saved, y = tmp_path / "model.safetensors", 2 * DAYS.year + 3 * DAYS.month - DAYS.day + 7 * DAYS.day_of_week
    run("fit", table({"when": DAYS.strftime("%Y-%m-%d"), "y": y}), "--target", "y", "--dates", "when", "--save", saved)
    code, out, err = run("predict", saved, table({"when": ["2019-11-20", "2019-11", "2019"]}, "new.csv"))
    assert code == 0 and "2 rows without a prediction: column 'when' has '2019-11' on line 3, which says no day" in err
    np.testing.assert_allclose(predictions(out), [y[0], math.nan, math.nan])
    # A day says the year and the month of which the model knows.
    months = 2 * DAYS.year + 3 * DAYS.month
    run(
        "fit", table({"when": DAYS.strftime("%Y-%m"), "y": months}), "--target", "y", "--dates", "when", "--save", saved
    )
    code, out, err = run("predict", saved, table({"when": ["2019-11", "2019-11-20", "2019"]}, "new.csv"))
    np.testing.assert_allclose(predictions(out), [months[0], months[0], math.nan])
    assert "which says no month" in err


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (
            ["2023-01"] * 20 + ["2023-01-05"] * 20,
            [],
            "has dates with and without a day, such as '2023-01-05' on line 22",
        ),
        (["2023", "2024-05"] * 20, [], "has dates with and without a month, such as '2024-05' on line 3 and '2023' on"),
        (["2023-1", "2023-2"] * 20, [], "line 2 has '2023-1', which is not YYYY-MM-DD"),
        (["202301", "202302"] * 20, [], "line 2 has '202301', which is not YYYY-MM-DD"),
        (["2023-W05", "2023-W06"] * 20, [], "line 2 has '2023-W05', which is not YYYY-MM-DD"),
        (["12:30", "12:45"] * 20, ["--date-format", "%H:%M"], "says no year, month or day"),
        (["2023-01-05", "2023-01-06"] * 20, ["--date-format", "%Q"], "--date-format '%Q' is no format of dates"),
        (["2023-01-05", "2023-01-06"] * 20, ["--date-format", "%d %d"], "--date-format '%d %d' is no format of dates"),
        (["2023-01-05", "2023-01-06"] * 20, ["--date-format", "%"], "--date-format '%' is no format of dates"),
    ],
)
def test_dates_that_cannot_be_read(run, table, texts, options, message):
    code, out, err = run("fit", table({"when": texts, "y": TARGET}), "--target", "y", "--dates", "when", *options)
    assert (code, out) == (2, "") and message in err


@pytest.mark.parametrize(
    ("written", "option"), [("%Y%m%d", "--dates 'day' if they are"), ("%Y%m", "--dates 'day' --date-format %Y%m if")]
)
def test_numbers_that_may_be_dates_are_told(run, table, written, option):
    texts = DAYS.strftime(written)
    code, _, err = run("fit", table({"day": texts, "y": TARGET}), "--target", "y")
    assert code == 0 and f"pass {option}" in err
    assert any(
        f"column 'day' is taken for numbers, although all may be dates, such as {text};" in err for text in texts
    )
    # One that is no date, and few that may be dates by chance.
    for others in ([*texts[:-1], "20231355"], ["202301", "202302"] * 20):
        _, _, err = run("fit", table({"day": others, "b": AMOUNTS, "y": TARGET}), "--target", "y")
        assert "may be dates" not in err
    code, _, err = run("fit", table({"day": AMOUNTS, "y": texts}), "--target", "y")
    assert code == 0 and "column 'y' is taken for numbers, although all may be dates" in err and "--dates" not in err


# --- texts with numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "note"),
    [
        (lambda v: f"Rs {v}", "Rs is left out (Rs 900 is read as 900)"),
        (lambda v: f"Rs.{v}", "Rs is left out (Rs.900 is read as 900)"),
        (lambda v: f"Rs. {v}/-", "Rs is left out (Rs. 900/- is read as 900)"),
        (lambda v: f"{v}/-", None),
        (lambda v: f"{v} percent", "% is left out (900 percent is read as 900)"),
        (lambda v: [f"{v} per cent", f"{v} Prozent", f"{v} %"][v % 3], "% is left out"),
        (lambda v: f"{v} pct.", "% is left out"),
        (lambda v: [f"{v} euros", f"EUR {v}"][v % 2], "EUR is left out"),
        (lambda v: f"{v} kr.", "kr is left out"),
        (lambda v: f"{v} zł", "is left out"),
        (lambda v: f"${v} USD", "$ and USD are left out ($900 USD is read as 900)"),
        (lambda v: f"US${v} USD", "US$ and USD are left out"),
        (lambda v: f"{v}\u202f%", "% is left out"),
    ],
)
def test_words_of_currencies_and_percent_are_read(run, table, tmp_path, written, note):
    path, saved = table({"a": [written(int(v)) for v in AMOUNTS], "y": TARGET}), tmp_path / "model.safetensors"
    code, _, err = run("fit", path, "--target", "y", "--save", saved)
    assert code == 0 and (besides_task(err) == "" if note is None else f"column 'a': {note}" in err or note in err)
    assert weights(saved) == pytest.approx({"a": 3, "": 5}, abs=1e-6)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([f"{v} kg" for v in AMOUNTS], "such as '900 kg' on line 2; write the number alone, in one unit for the whole"),
        (["5 kg", "300 g", "2 t", "7 lb"] * 10, "seems to hold numbers, such as '5 kg' on line 2"),
        (["5kg", "6kg", "", "7"] * 10, "such as '5kg' on line 2"),
        (["1.5 m²", "20 m²"] * 20, "such as '1.5 m²'"),
        (["1 room", "2 rooms", "3 rooms"] * 13 + ["4 rooms"], "such as '1 room'"),
        (["180 km/h", "90 km/h"] * 20, "such as '180 km/h'"),
        (["1,5 kg", "2,25 kg"] * 20, "such as '1,5 kg'"),
        (["<5", "7", "> 10", "≤3"] * 10, "such as '<5' on line 2; write the number alone"),
        (["ca. 5", "about 7"] * 20, "such as 'ca. 5'"),
        (["5 lakh", "2 crore"] * 20, "such as '5 lakh' on line 2; write them with the digits 0 to 9"),
        (
            ["2023-W05", "2023-W06"] * 20,
            "seems to hold dates, such as '2023-W05' on line 2; weeks and quarters are not",
        ),
        (["2023-Q1", "2023-Q2"] * 20, "weeks and quarters are not read: write a day of each, such as 2023-01-30"),
        (["25.03.2023", "26.03.2023"] * 20, "--dates 'a' --date-format '%d.%m.%Y' for year, month, day and weekday"),
        (["2023/03/25", "2023/03/26"] * 20, "--dates 'a' --date-format '%Y/%m/%d' for year"),
        (["2023-01", "2023-02"] * 20, "pass --dates 'a' for year and month, or keep"),
        (
            ["€5 USD", "€6 USD", "€7 USD", "€8 USD"] * 10,
            "column 'a' has € and USD beside one number, '€5 USD' on line 2; write it with one",
        ),
        (["$5%", "$6%", "$7%", "$8%"] * 10, "column 'a' has $ and % beside one number"),
        (["$1,037", "($2,100)"] * 20, "such as '$1,037' on line 2; pass --thousands ',' or --decimal ',', or keep"),
        (["$37", "($21)"] * 20, "such as '($21)' on line 3; write negative numbers with a minus before them"),
        (["1,00E+05", "2,50E+04"] * 20, "such as '1,00E+05' on line 2; pass --decimal ',', or keep"),
        (
            ["18:30", "7:05 pm"] * 20,
            "times of day, such as '18:30' on line 2; write them as numbers, such as 18.5 hours",
        ),
        (["1\u202f037", "2\u202f100"] * 20, "pass --thousands ' ', or keep"),
        (["1.037.000", "2.100.000"] * 20, "pass --thousands '.' --decimal ',', or keep"),
        (["1.037,50 €", "2.100,00 €"] * 20, "pass --thousands '.' --decimal ',', or keep"),
    ],
)
def test_texts_that_are_numbers_are_refused(run, table, texts, message):
    """With the column, an example and the option that keeps them; that option is taken."""
    path = table({"a": texts, "b": AMOUNTS, "y": TARGET})
    code, out, err = run("fit", path, "--target", "y", "--impute", "median")
    assert (code, out) == (2, "") and "column 'a'" in err and message in err
    code, _, err = run("fit", path, "--target", "y", "--impute", "median", "--categorical", "a")
    assert code == 0 or "different values" in err
    # As a target: its option is taken, too.
    path = table({"y": texts, "b": AMOUNTS})
    code, _, err = run("fit", path, "--target", "y", "--impute", "median")
    assert code == 2 and "column 'y'" in err and not any(name in err for name in ("--dates", "--categorical"))
    code, _, err = run("fit", path, "--target", "y", "--impute", "median", "--task", "classification")
    assert code == 0 or "no training row has the class" in err


def test_codes_with_numbers_are_categories_and_told(run, table, tmp_path):
    """Zone 3, 18-25 and 5A are no numbers: they are categories, which is said, and not where it was asked for."""
    saved = tmp_path / "model.safetensors"
    for texts in (
        ["zone 1", "zone 2", "zone 3", "zone 1"] * 10,
        ["18-25", "26-35", "36+", "18-25"] * 10,
        ["5A", "5B", "6C", "7D"] * 10,
        ["1st", "2nd", "3rd", "4th"] * 10,
        ["Euro 4", "Euro 5", "Euro 6", "Euro 4"] * 10,
    ):
        path = table({"a": texts, "y": [texts.index(text) for text in texts]})
        code, _, err = run("fit", path, "--target", "y", "--task", "regression", "--save", saved)
        assert code == 0 and "column 'a' is taken for categories, although most of its values" in err
        assert "begin or end with a number" in err and "--categorical 'a' ends this note" in err
        with safe_open(saved, framework="numpy") as file:
            assert json.loads(file.metadata()["columns"])[0]["kind"] == "category"
        code, _, err = run("fit", path, "--target", "y", "--task", "regression", "--categorical", "a")
        assert (code, err) == (0, "")
    code, _, err = run("fit", table({"a": ["u", "v", "w", "zone 1"] * 10, "y": TARGET}), "--target", "y")
    assert (code, besides_task(err)) == (0, "")


# --- the task --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "classes", "why"),
    [
        (["u", "v", "w", "u"] * 10, True, "has 3 classes: it is classified, because it is text"),
        (
            [0, 1, 1, 0] * 10,
            True,
            "has 2 classes: it is classified, because it has two different values; pass --task reg",
        ),
        ([0.5, 1, 1, 0.5] * 10, True, "has 2 classes"),
        ([0, 1, 2, 1] * 10, False, "it holds numbers, with 3 different values; pass --task classification"),
        ([0, 0.5, 1, 0] * 10, False, "it holds numbers, with 3 different values; pass --task classification"),
        (list(range(10)) * 4, False, "numbers, with 10 different values; pass --task classification"),
        (list(range(20)) * 2, False, "numbers, with 20 different values; pass --task classification"),
        (TARGET, False, "the target 'y' is fitted as a number, because it holds numbers, with 40 different values"),
        ([7] * 40, False, "numbers, with 1 different value;"),
    ],
)
def test_the_task_is_told_with_its_reason_and_the_other_option(run, table, values, classes, why):
    path = table({"a": AMOUNTS, "y": values})
    code, out, err = run("fit", path, "--target", "y")
    assert code == 0 and why in err and ("accuracy" in out) == classes and err.count("note: the target") == 1
    task = "classification" if classes else "regression"
    code, again, err = run("fit", path, "--target", "y", "--task", task)
    assert (code, err) == (0, "") and again.partition("time:")[0] == out.partition("time:")[0]


# --- messages --------------------------------------------------------------------------------------------------------


def test_codes_that_are_read_as_missing_are_named_with_the_option(run, table):
    """NA is Namibia: as a category, as a class beside another, and as one of two classes."""
    countries = ["NA", "DE", "FR", "DE"] * 20
    a = np.arange(80)
    option = "'NA' (line 2), read as missing; pass --missing without a text to read such texts as they stand"
    _, _, err = run("fit", table({"country": countries, "y": a}), "--target", "y")
    assert "missing values in country (20)" in err and f"column 'country' has {option}" in err
    code, _, err = run("fit", table({"country": countries, "y": a}), "--target", "y", "--impute", "median")
    assert code == 0 and f"note: column 'country' has {option}" in err
    for codes in (countries, ["NA", "DE", "DE", "NA"] * 20):
        path = table({"country": codes, "a": a})
        for more in ([], ["--impute", "median"], ["--task", "classification"]):
            _, _, err = run("fit", path, "--target", "country", *more)
            assert f"column 'country' has {option}" in err, (codes, more)
        code, out, err = run("fit", path, "--target", "country", "--missing")
        assert code == 0 and "accuracy" in out and "it is classified" in err
    # Empty fields, and NA among numbers, are missing.
    for column in (["", "DE", "FR", "DE"] * 20, ["NA", "1", "2", "3"] * 20):
        _, _, err = run("fit", table({"b": column, "y": a}), "--target", "y")
        assert "missing values in b (20)" in err and "--missing" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--thousands", "."],
            "--thousands '.' is also the character before decimals, unless --decimal names another; pass",
        ),
        (["--thousands", ",", "--decimal", ","], "pass --thousands '.', or leave it out"),
    ],
)
def test_one_character_for_thousands_and_decimals(run, table, tmp_path, options, message):
    path, saved = table({"a": [f"{v:,}".replace(",", ".") for v in AMOUNTS], "y": TARGET}), tmp_path / "m.safetensors"
    code, out, err = run("fit", path, "--target", "y", *options)
    assert (code, out) == (2, "") and message in err
    run("fit", table({"a": AMOUNTS, "y": TARGET}), "--target", "y", "--save", saved)
    code, out, err = run("predict", saved, path, *options)
    assert (code, out) == (2, "") and message in err
    code, out, err = run("fit", path, "--target", "y", "--thousands", ".", "--decimal", ",", "--save", saved)
    assert code == 0 and weights(saved) == pytest.approx({"a": 3, "": 5})


def test_a_target_of_dates_is_refused_in_a_whole_sentence(run, table):
    _, _, err = run("fit", table({"y": DAYS.strftime("%Y-%m-%d"), "a": AMOUNTS}), "--target", "y")
    assert err.partition("data.csv: ")[2] == (
        "column 'y' seems to hold dates, such as '2019-11-20' on line 2; a target is a number or a class: write it as "
        "a number, such as the days since the first date, or keep its texts as classes with --task classification\n"
    )


# --- float32 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_float32_gives_the_digits_or_refuses(run, table, tmp_path, model):
    """y = a - 100,000,003 has an intercept that float32 rounds to a multiple of 8."""
    i, saved = np.arange(40), tmp_path / "model.safetensors"
    words = ["--target", "y", "--save", saved, "--model", model, *(["--hidden", 3] if model == "mlp" else [])]
    path = table({"a": 100_000_003 + i, "y": i})
    code, out, err = run("fit", path, *words, "--dtype", "float32")
    assert (code, out) == (2, "") and not saved.exists()
    assert "float32 cannot hold these weights and intercepts: predictions would be off by up to" in err
    assert "pass --dtype float64, or subtract a constant" in err
    for dtype, shift in (("float64", 100_000_003), ("float32", 0), ("float32", 2000)):
        path = table({"a": shift + i, "y": i})
        code, _, err = run("fit", path, *words, "--dtype", dtype)
        assert code == 0, err
        code, out, _ = run("predict", saved, path)
        if model == "linear":
            np.testing.assert_allclose(predictions(out), i, atol=1e-3)


def test_float32_holds_classes_or_refuses(run, table, tmp_path):
    path = table({"a": 100_000_003 + np.arange(40), "y": ["u"] * 20 + ["v"] * 20})
    code, out, err = run("fit", path, "--target", "y", "--dtype", "float32")
    assert (code, out) == (2, "") and "float32 cannot hold these weights" in err
    assert run("fit", path, "--target", "y")[0] == 0


def test_separators_that_options_do_not_fit_are_told_before_lost_digits(run, table):
    """3.7579544029403023 is no whole number, whatever groups its digits are taken for."""
    path = table({"a": [f"{v / 7:.16f}" for v in AMOUNTS], "y": TARGET})
    code, _, err = run("fit", path, "--target", "y", "--thousands", ".", "--decimal", ",")
    assert code == 2 and "which does not fit the --thousands and --decimal given" in err


# --- files as spreadsheets write them --------------------------------------------------------------------------------


def german(value, decimals):
    return f"{value:,.{decimals}f}".translate(str.maketrans(",.", ".,"))


def test_a_german_spreadsheet(run, csv, tmp_path):
    """Semicolons, decimal commas, points between thousands, a byte order mark, CRLF, an empty last column."""
    rows = [f'"{german(v / 8, 3)}";{german(3 * v, 2)} €;{DAYS[k]:%d.%m.%Y};' for k, v in enumerate(AMOUNTS)]
    path, saved = csv("\ufeff" + "\r\n".join(["Fläche;Preis;Datum;", *rows, ""])), tmp_path / "model.safetensors"
    words = ["fit", path, "--target", "Preis", "--save", saved, "--dates", "Datum"]
    assert "separated by ';'; pass --sep ';'" in run(*words)[2]
    words += ["--sep", ";"]
    assert "pass --thousands '.' --decimal ','" in run(*words)[2]
    words += ["--thousands", ".", "--decimal", ","]
    assert "line 2 has '20.11.2019', which is not YYYY-MM-DD" in run(*words)[2]
    code, _, err = run(*words, "--date-format", "%d.%m.%Y")
    assert code == 0 and "column 4 has no name" in err and "column 'Preis': € is left out" in err
    found = weights(saved)
    assert found.pop("Fläche") == pytest.approx(24)
    assert list(found.values()) == pytest.approx([0] * len(found), abs=1e-3)
    code, out, err = run("predict", saved, path, "--sep", ";")
    np.testing.assert_allclose(predictions(out), 3 * AMOUNTS, rtol=1e-9)
    assert "score: R² 1.0000" in err


def test_a_french_spreadsheet(run, csv, tmp_path):
    """Narrow spaces between thousands, as no keyboard has them: the option is the plain space."""
    rows = [f"{v:,}".replace(",", "\u202f") + f",50\u202f€;{3 * v}" for v in AMOUNTS]
    path, saved = csv("\n".join(["prix;y", *rows])), tmp_path / "model.safetensors"
    words = ["fit", path, "--target", "y", "--save", saved, "--sep", ";"]
    for options in ([], ["--decimal", ","]):
        assert (
            "such as '1\\u202f011,50\\u202f€' on line 5; pass --thousands ' ' --decimal ','" in run(*words, *options)[2]
        )
    code, _, err = run(*words, "--decimal", ",", "--thousands", " ")
    assert code == 0, err
    assert weights(saved) == pytest.approx({"prix": 3, "": -1.5})


def test_an_indian_spreadsheet(run, table, tmp_path):
    texts = [f"Rs. {1 + v // 1000},00,{v % 1000:03}/-" for v in AMOUNTS]
    y = [100_000 * (1 + v // 1000) + v % 1000 for v in AMOUNTS]
    path, saved = table({"cost": texts, "y": y}), tmp_path / "model.safetensors"
    assert "pass --thousands ','" in run("fit", path, "--target", "y")[2]
    code, _, err = run("fit", path, "--target", "y", "--thousands", ",", "--save", saved)
    assert code == 0 and "Rs is left out (Rs. 1,00,900/- is read as 100900)" in err
    assert weights(saved) == pytest.approx({"cost": 1, "": 0}, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\ty\n1\t2\n".encode("utf-16"), "separated by tab; pass --sep tab"),
        ("sep=;\na;y\n1;2\n", "line 1 is 'sep=;', a note for spreadsheets; delete this line"),
        ("a|y\n1|2\n", "separated by '|'; pass --sep '|'"),
        ("a,y,a\n1,2,3\n", "names a column twice: a; rename one of them"),
        (with_line(small(), 9, "#DIV/0!,2,u,3"), "pass --missing '#DIV/0!' if it means that there is no value"),
        (with_line(small(), 9, "-,2,u,3"), "pass --missing=- if it means that there is no value"),
    ],
)
def test_what_spreadsheets_write_beside_tables(run, csv, content, message):
    code, out, err = run("fit", csv(content), "--target", "y")
    assert (code, out) == (2, "") and message in err


def test_a_torch_layer_of_float32_is_within_its_rounding(run, table, tmp_path):
    """What was not refused is right in torch, too."""
    i, saved = np.arange(40), tmp_path / "model.safetensors"
    run("fit", table({"a": 2000 + i, "y": i}), "--target", "y", "--dtype", "float32", "--save", saved)
    layer = torch.nn.Linear(1, 1)
    layer.load_state_dict(safetensors_torch.load_file(saved))
    np.testing.assert_allclose(layer(torch.tensor(2000.0 + i).float()[:, None])[:, 0].detach(), i, atol=1e-3)
