"""The command line on dates without a year, such as 09/02: refused or told with the options, never silently used."""

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from onestep.cli import days  # noqa: E402

# From 1 January to 30 December, in no order.
DAYS = pd.to_datetime("2023-01-01") + pd.to_timedelta((np.arange(60) * 37) % 364, unit="D")
HALVES = (1, 7, 12)
SEPTEMBER = [f"09/{day:02}" for day in range(1, 6)] * 12
Y = np.arange(60) % 7 + 0.5


@pytest.mark.parametrize("written", ["%m/%d", "%d/%m", "%m-%d", "%d.%m.", "%m. %d.", "%d / %m", "--%m-%d", "%m月%d日"])
def test_the_column_tells_the_order(run, table, tmp_path, written):
    texts = list(DAYS.strftime(written))
    path = table({"when": texts, "y": DAYS.day})
    code, out, err = run("fit", path, "--target", "y")
    assert (code, out) == (2, "") and "column 'when' seems to hold dates" in err and f"such as '{texts[0]}' on" in err
    joined = "=" if written.startswith("-") else " "
    assert f"pass --dates 'when' --date-format{joined}'{written}' for " in err and "--categorical 'when'" in err
    model = str(tmp_path / "model.safetensors")
    options = ["--dates", "when", f"--date-format={written}", "--test-size", "0", "--save", model]
    code, out, err = run("fit", path, "--target", "y", *options)
    assert code == 0 and "say no year and no weekday; month and day are used" in err
    # The day is what is predicted: its weight is 1 and the month's 0. There is a 29 February, and no 31 of September.
    leap, none = (written.replace("%m", month).replace("%d", day) for month, day in (("02", "29"), ("09", "31")))
    code, out, err = run("predict", model, table({"when": [leap, none]}, "more.csv"))
    first, second = out.splitlines()[1:]
    assert code == 0 and float(first) == pytest.approx(29) and second in ("", '""')


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (SEPTEMBER, "'%m/%d' if month and day are meant, or '%d/%m' if day and month, or '%m/%y' if month and year"),
        (
            [f"{month:02}/{year}" for month in HALVES for year in (21, 22, 23, 24)] * 5,
            "or '%m/%y' if month and yea",
        ),
        (
            [f"{month:02}/{year}" for month in HALVES for year in (96, 97)] * 10,
            "seems to hold dates, such as '01/96'",
        ),
        (
            [f"{year}-{month:02}" for month in HALVES for year in (96, 97)] * 10,
            "--date-format '%y-%m' for year and month",
        ),
        (list(DAYS.strftime("%m/%d %H:%M")), "--date-format '%m/%d %H:%M' for month and day"),
        (list(DAYS.strftime("%d-%mT%H:%M:%S")), "--date-format '%d-%mT%H:%M:%S' for month and day"),
        (list(DAYS.strftime("%m/%d 03:15 PM")), "--date-format '%m/%d %I:%M %p' for month and day"),
        (
            ["00/00", "09/21", "09/22", "09/25"] * 15,
            "such as '09/21' on line 3; pass --dates 'when' --date-format '%m/%d'",
        ),
        ([f"{day.month}/{day.day}" for day in DAYS], "--date-format '%m/%d' for month and day"),
        # As fractions they would be too many for categories.
        ([f"1/{day}" for day in range(1, 13)] * 5, "--date-format '%m/%d' if month and day are meant, or '%d/%m'"),
        (["2-1", "1-1", "1-3"] * 20, "dates, such as '2-1' on line 2"),
        # Of a few mistakes none is the example.
        (["13/32", *DAYS[1:].strftime("%m/%d")], f"such as '{DAYS[1].strftime('%m/%d')}' on line 3"),
        (["n.a.", "n.a.", *DAYS[2:].strftime("%m/%d")], "dates, such as "),
        # With a year in some of them.
        ([day.strftime("%m/%d/%Y" if at % 3 else "%m/%d") for at, day in enumerate(DAYS)], "seems to hold dates, such"),
        ([day.strftime("%m/%d" if at % 3 else "%m/%d/%Y") for at, day in enumerate(DAYS)], "seems to hold dates"),
    ],
)
def test_readings_are_named(run, table, texts, message):
    code, out, err = run("fit", table({"when": texts, "y": Y}), "--target", "y")
    assert (code, out) == (2, "") and message in err and "--dates 'when'" in err
    code, _, err = run("fit", table({"when": texts, "y": Y}), "--target", "when")
    assert code == 2 and "seems to hold dates" in err and "a target is a number or a class" in err


def test_missing_days_are_filled_with_one_without_a_year(run, table):
    texts = ["", *DAYS[1:].strftime("%m/%d")]
    options = ["--dates", "when", "--date-format", "%m/%d", "--impute", "median", "--test-size", "0"]
    code, _, err = run("fit", table({"when": texts, "y": Y}), "--target", "y", *options)
    middle = sorted(texts[1:])[29]
    assert code == 0 and f"1 missing value of when filled with '{middle}'" in err


@pytest.mark.parametrize("texts", [["1/2", "1/4", "3/4"], ["1-5", "6-10", "11-15"], ["8/10", "9/10", "10/10"]])
def test_fractions_and_ranges_are_categories_and_told(run, table, texts):
    path = table({"part": texts * 20, "y": Y})
    code, out, err = run("fit", path, "--target", "y")
    assert code == 0 and f"part = {texts[1]}" in out
    assert f"if texts such as '{texts[0]}' are dates without a year, pass --dates 'part' --date-format '%m" in err
    code, _, err = run("fit", path, "--target", "y", "--categorical", "part")
    assert code == 0 and "dates" not in err


@pytest.mark.parametrize(
    "texts", [["120/80", "110/70"], ["2-0", "0-0", "3-1"], ["16-20", "21-25", "1-5"], ["9/31", "0/9"]]
)
def test_other_pairs_are_no_dates(run, table, texts):
    code, _, err = run("fit", table({"pair": (texts * 60)[:60], "y": Y}), "--target", "y")
    assert code == 0 and "date" not in err and "begin or end with a number" in err


@pytest.mark.parametrize("written", ["%m.%d", "%d.%m", "%m%d", "%d%m"])
def test_numbers_that_may_be_days_are_told(run, table, written):
    texts = list(DAYS.strftime(written))
    path = table({"when": texts, "y": Y})
    code, _, err = run("fit", path, "--target", "y")
    told = f"although all may be dates without a year, such as {texts[0]}"
    assert code == 0 and f"{told}; pass --dates 'when' --date-format '{written}' for " in err
    code, out, err = run("fit", path, "--target", "y", "--dates", "when", "--date-format", written)
    assert code == 0 and "when month" in out and "when day" in out and "although" not in err
    _, _, err = run("fit", path, "--target", "when")
    assert told in err and "--dates" not in err


@pytest.mark.parametrize(
    "texts",
    [
        ["9.01", "9.02", "9.03"],  # no zero before them, and few
        ["9.5", "9.25", "10.75"],
        ["09.50", "09.25", "10.75"],
        ["0.05", "0.06", "0.07"],
        ["2009", "2010", "2011"],  # 20 September to 20 November
        ["0150", "0151", "0152"],
        ["-9.02", "09.03", "09.04"],
        ["09.02", "09.03", "9.040"],
        ["nan", "09.03", "1e9"],
        ["1", "2", "3"],
    ],
)
def test_numbers_that_are_no_days_are_not_told(run, table, texts):
    _, _, err = run("fit", table({"a": texts * 20, "y": Y}), "--target", "y", "--impute", "median")
    assert "date" not in err


def test_unpadded_numbers_are_days_if_many_are():
    assert days.format_of_numbers(np.array([9.02]), lambda: pd.Series(["9.02"])) is None
    texts = pd.Series([f"{day}.{month:02}" for day in (1, 7, 31) for month in (1, 5, 8, 10)])
    assert days.format_of_numbers(texts.astype(float).to_numpy(), lambda: texts) == "%d.%m"
    assert days.format_of_numbers(np.array([np.inf, 9.02]), lambda: texts) is None
    assert days.format_of_numbers(np.array([np.nan]), lambda: texts) is None
