"""The command line on columns of which many values are missing, and say so with a text."""

import numpy as np
import pytest
from cli_cases import weights

ROWS = 30


def column(codes, value):
    """A table of a column c, 18 of whose 30 fields are codes, and a target; the target's value is that of the row."""
    fields = [codes[row % len(codes)] if row % 5 < 3 else value(row) for row in range(ROWS)]
    return "c;y\n" + "".join(f"{field};{row * row % 17}\n" for row, field in enumerate(fields))


def fit(run, csv, content, *options):
    return run("fit", csv(content), "--sep", ";", "--target", "y", "--test-size", "0", "--task", "regression", *options)


@pytest.mark.parametrize(
    ("codes", "value", "message"),
    [
        (
            ["-"],
            lambda row: f"1,{row:03}",
            "numbers, such as '1,003' on line 5; pass --thousands ',' or --decimal ',', and pass --missing=- if '-' "
            "means that there is no value, or keep its texts as categories with --categorical 'c'",
        ),
        (
            ["n.a."],
            lambda row: f"{row + 4.11}",
            "numbers, such as '7.11' on line 5; pass --missing 'n.a.' if 'n.a.' means",
        ),
        (["?"], lambda row: f"${row}", "numbers, such as '$3' on line 5; pass --missing '?' if '?' means"),
        (
            ["-"],
            lambda row: f"2023-01-{row + 1:02}",
            "dates, such as '2023-01-04' on line 5; pass --dates 'c' for year",
        ),
        (["--"], lambda row: f"2023-01-{row + 1:02}", "weekday, and pass --missing=-- if '--' means that there is no"),
        (["Unknown"], lambda row: f"12:{row:02}", "for 18:30, and pass --missing 'Unknown' if 'Unknown' means"),
        (["#DIV/0!"], lambda row: f"{row} kg", "whole column, and pass --missing '#DIV/0!' if '#DIV/0!' means"),
        (["*"], lambda row: f"({row})", "minus before them, as in -1234.5, and pass --missing '*' if '*' means"),
        (
            ["-", "k.A."],
            lambda row: row,
            "pass --missing=- --missing 'k.A.' if '-', 'k.A.' mean that there is no value",
        ),
    ],
)
def test_more_missing_codes_than_numbers_are_no_categories(run, csv, codes, value, message):
    """18 of 30 values are a code: what the others are is asked of them alone."""
    code, out, err = fit(run, csv, column(codes, value))
    assert (code, out) == (2, "") and "column 'c' seems to hold " in err and message in err


def test_the_options_that_are_named_settle_it(run, csv, tmp_path):
    content, saved = column(["-"], lambda row: f"1,{row:03}"), tmp_path / "m.st"
    code, _, err = fit(run, csv, content, "--thousands", ",", "--missing=-", "--impute", "median", "--save", saved)
    assert code == 0, err
    given = np.array([1000 + row if row % 5 > 2 else np.nan for row in range(ROWS)])
    given[np.isnan(given)] = np.nanmedian(given)
    slope, intercept = np.polyfit(given, [row * row % 17 for row in range(ROWS)], 1)
    assert weights(saved) == pytest.approx({"c": slope, "": intercept})
    code, out, err = fit(run, csv, content, "--categorical", "c")
    assert code == 0 and "c = 1,003" in out, err


def test_the_target_may_be_one_of_them(run, csv):
    rows = "".join(f"{row},{'-' if row % 5 < 3 else row}\n" for row in range(ROWS))
    code, out, err = run("fit", csv("a,y\n" + rows), "--target", "y")
    assert (code, out) == (2, "")
    assert "pass --missing=- if '-' means that there is no value, or keep its texts as classes with --task class" in err


@pytest.mark.parametrize("word", ["studio", "on request"])
def test_another_word_beside_numbers_is_told(run, csv, word):
    """It may be a level of its own, and so may the numbers."""
    code, _, err = fit(run, csv, column([word], lambda row: row % 4 + 1))
    assert code == 0
    assert f"most of its values but {word!r} begin or end with a number, such as '4'" in err
    assert f"--missing {word!r} if that means that there is no value; --categorical 'c' ends this note" in err


@pytest.mark.parametrize(
    ("codes", "value"),
    [
        (["-"], lambda row: ["small", "large"][row % 2]),  # a code beside categories
        (["-", "+"], lambda row: "+/-"),  # signs alone
        (["yes"], lambda row: "type 2"),  # one level that ends in a number
        (["Attchd"], lambda row: ["Detchd", "BuiltIn", "2Types"][row % 3]),
    ],
)
def test_categories_stay_categories_without_a_word(run, csv, codes, value):
    code, _, err = fit(run, csv, column(codes, value))
    assert (code, err) == (0, "")


# Blanks around a code, also in quotation marks.
PADDED = ["{} ", "{}\t", " {}  ", '" {}"', '"{} "', '"\t{} "']


@pytest.mark.parametrize("field", PADDED)
@pytest.mark.parametrize(
    ("code", "options"), [("NA", []), ("?", ["--missing", "?"]), ("", []), ("x", ["--missing", "x "])]
)
def test_blanks_around_a_missing_code_change_nothing(run, csv, tmp_path, field, code, options):
    """In columns of numbers, of categories and of dates, of a fit and of what the model is applied to."""
    kinds = ["low", "high", "mid"]

    def content(missing):
        rows = [
            [row * 3 % 11, kinds[row % 3], f"2023-{row % 12 + 1:02}-01", row * row % 17, "aab"[row % 3]]
            for row in range(ROWS)
        ]
        for place in range(3):
            for row in (4 + place, 9, 20 + place):
                rows[row][place] = missing
        return "n,kind,day,y,group\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)

    found = []
    for name, missing in (("plain", code), ("padded", field.format(code))):
        path, saved = csv(content(missing), f"{name}.csv"), tmp_path / f"{name}.st"
        words = ["fit", path, "--target", "y", "--dates", "day", "--impute", "median", "--save", saved, *options]
        status, _, err = run(*words)
        assert status == 0, err
        assert "2 missing values" not in err and err.count("3 missing values of ") == 3
        predicted = run("predict", saved, path)
        found.append([weights(saved), predicted[:2]])
    assert found[0] == found[1]


def test_a_code_with_blanks_beside_numbers_is_not_refused_with_itself(run, csv):
    """They say what without blanks is said, and the column is numbers all the same, with what is told of numbers."""
    rows = "".join(f"{'NA ' if row == 7 else f'0{row}'},{row}\n" for row in range(ROWS))
    code, _, err = run("fit", csv("a,y\n" + rows), "--target", "y", "--task", "regression")
    assert code == 2 and "missing values in a (1); pass --impute median" in err
    code, _, err = run("fit", csv("a,y\n" + rows), "--target", "y", "--task", "regression", "--impute", "median")
    assert code == 0 and "some begin with a zero, such as '00'" in err and "1 missing value of a filled with" in err
