"""The command line on texts that read in two ways, on long ones, and on columns of many equal ones."""

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from onestep.cli import numerals, units  # noqa: E402

MONTHS = pd.date_range("2019-01-15", periods=60, freq="31D")
Y = np.arange(60) % 7 + 0.5
AMOUNTS = [950, 1030, 87, 2500, 12345, 640] * 10


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("%m/%Y", "year and month"),
        ("%m-%Y", "year and month"),
        ("%Y年%m月%d日", "year, month, day and weekday"),
        ("%Y년 %m월 %d일", "year, month, day and weekday"),
        ("%Y年%m月", "year and month"),
    ],
)
def test_the_format_of_dates_is_named(run, table, written, parts):
    path = table({"when": [day.strftime(written) for day in MONTHS], "y": Y})
    code, _, err = run("fit", path, "--target", "y")
    option = f"--dates 'when' --date-format '{written}'"
    assert code == 2 and f"seems to hold dates, such as '{MONTHS[0].strftime(written)}'" in err
    assert f"pass {option} for {parts}" in err
    code, out, err = run("fit", path, "--target", "y", "--dates", "when", "--date-format", written)
    assert code == 0 and "when year" in out and "when month" in out and ("when day" in out) == ("%d" in written)


def test_months_of_years_that_read_as_numbers_are_told(run, table):
    texts = MONTHS.strftime("%m.%Y")
    code, _, err = run("fit", table({"when": texts, "y": Y}), "--target", "y")
    assert code == 0
    assert "although all may be dates, such as 01.2019; pass --dates 'when' --date-format %m.%Y if they are" in err
    for others in (
        [*texts[:50], *["13.2019"] * 10],
        [*texts[:50], *["12.2019001"] * 10],
        [*texts[:50], *["7"] * 10],
        ["1.2019", "2.2019"] * 30,
    ):
        _, _, err = run("fit", table({"a": others, "b": AMOUNTS, "y": Y}), "--target", "y")
        assert "may be dates" not in err, others[-1]


@pytest.mark.parametrize("unit", ["", "€"])
def test_points_that_may_stand_between_thousands_are_told(run, table, unit):
    texts = [f"{unit}{v:,}".replace(",", ".") for v in AMOUNTS]
    told = "column 'a': 1.030 is read as 1.03, and 950 as it stands: pass --thousands '.' --decimal ','"
    code, _, err = run("fit", table({"a": texts, "y": np.arange(60)}), "--target", "y")
    assert code == 0 and told in err
    code, out, err = run(
        "fit", table({"a": texts, "y": AMOUNTS}), "--target", "y", "--thousands", ".", "--decimal", ","
    )
    assert code == 0 and "between thousands" not in err and "R² 1.0000" in out
    _, _, err = run("fit", table({"b": np.arange(60), "a": texts}), "--target", "a")
    assert told in err


@pytest.mark.parametrize(
    "texts",
    [
        ["1.031", "2", "3.5"],  # decimals of other lengths
        ["1.031", "2", "3.457"],  # none ends in 0: as programs write numbers
        ["1.030", "2.000", "3.500"],  # all have three decimals
        ["0.500", "2", "3.500"],
        ["1.030", "2000", "3.500"],
        ["1", "2", "3"],
    ],
)
def test_points_before_decimals_are_not_told(run, table, texts):
    _, _, err = run("fit", table({"a": texts * 20, "y": Y}), "--target", "y")
    assert "thousands" not in err


def test_digits_behind_a_large_number_are_not_lost_in_silence(run, table):
    texts = [f"{2**53 + v}.5" for v in range(1, 61)]
    code, out, err = run("fit", table({"a": texts, "y": Y}), "--target", "y")
    assert (code, out) == (2, "") and "beyond 2^53 (9007199254740993.5 on line 2)" in err


def test_long_texts_are_cut(run, table):
    long = "x" * 100_000
    columns = {"a": ["u\nv", long, "w"] * 20, "b": Y, "y": Y[::-1]}
    code, out, _ = run("fit", table(columns), "--target", "y")
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) < 1000
    assert any(line.split()[:4] == ["a", "=", "u", "v"] for line in lines) or "against a = u v" in out
    assert any("a = xxx" in line and "…" in line for line in lines)
    code, _, err = run("fit", table({"a": [f"{i}{long}" for i in range(60)], "y": Y}), "--target", "y")
    assert code == 2 and len(err) < 3000 and "too many" in err and "--ignore 'a'" in err[-200:]


def test_equal_texts_are_looked_at_once(run, table, monkeypatch):
    """In a file of 300,000 rows each pattern was tried on each value, several times."""
    asked, stripped = [], []
    is_notation, strip = numerals.is_notation, units.strip
    monkeypatch.setattr(numerals, "is_notation", lambda text: asked.append(text) or is_notation(text))
    monkeypatch.setattr(units, "strip", lambda texts: stripped.append(len(texts)) or strip(texts))
    columns = {"a": ["up", "down", "left"] * 100, "b": ["$5", "$7", ""] * 100, "y": np.arange(300)}
    code, _, _ = run("fit", table(columns), "--target", "y", "--impute", "median")
    assert code == 0 and sorted(asked) == ["down", "left", "up"]
    assert max(size for size in stripped) <= 3


def test_texts_keep_their_rows():
    """Also where values are missing, and where the index has gaps."""
    texts = pd.Series(["$5", None, "7%", "$5", "", "x"], index=[3, 1, 9, 4, 8, 5], dtype=object)
    found = numerals.to_numbers(texts, numerals.Conventions())
    assert list(found.index) == [3, 1, 9, 4, 8, 5]
    np.testing.assert_array_equal(found, [5, np.nan, 7, 5, np.nan, np.nan])
