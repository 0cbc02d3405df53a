"""The command line on minuses of typesetters, prices, dates without zeros and targets of many digits."""

import numpy as np
import pytest
from cli_cases import weights


def table(values, target=None):
    target = [row * row % 17 for row in range(len(values))] if target is None else target
    return "c;y\n" + "".join(f"{value};{number}\n" for value, number in zip(values, target, strict=True))


def fit(run, csv, content, *options):
    return run("fit", csv(content), "--sep", ";", "--target", "y", "--test-size", "0", *options)


def test_a_minus_of_typesetters_before_a_unit(run, csv, tmp_path):
    """The unit is told as it is behind a plain minus, and is the same as that beside other numbers."""
    saved = tmp_path / "m.st"
    numbers = [3 * row % 11 - 5 for row in range(20)]
    for texts in ([f"\u2212${k}" for k in range(20)], [f"\u2212${-k}" if k < 0 else f"${k}" for k in numbers]):
        code, _, err = fit(run, csv, table(texts), "--save", saved)
        assert code == 0 and "note: column 'c': $ is left out" in err, err
    found = weights(saved)
    slope, intercept = np.polyfit(numbers, [row * row % 17 for row in range(20)], 1)
    assert found == pytest.approx({"c": slope, "": intercept})
    new = csv("c\n\u2212$4\n-$4\n", "new.csv")
    lines = run("predict", saved, new)[1].splitlines()
    assert lines[1] == lines[2] and float(lines[1]) == pytest.approx(intercept - 4 * slope)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("\u22121,0{:02}", "pass --thousands ',' or --decimal ','"),
        ("\u22123,{}", "pass --decimal ','"),
        ("\u2212{} kg", "write the number alone, in one unit"),
        ("\u2212{}k", "write them with the digits 0 to 9"),
    ],
)
def test_a_minus_of_typesetters_before_what_is_no_plain_number(run, csv, value, message):
    code, _, err = fit(run, csv, table([value.format(row) for row in range(20)]))
    assert code == 2 and "seems to hold numbers" in err and message in err


@pytest.mark.parametrize(
    ("value", "without", "whole"),
    [
        ("\u20ac {},-", "5", "5,-"),
        ("{},-", "5", "5,-"),
        ("{},-- \u20ac", "5", "5,--"),
        ("{}.\u2014", "5", "5.\u2014"),
        ("Fr. 1'00{}.--", "1'005", "1'005.--"),
        ("{},\u2013 Euro", "5", "5,\u2013"),
    ],
)
def test_a_price_without_cents_is_no_negative_number(run, csv, value, without, whole):
    code, _, err = fit(run, csv, table([value.format(5 + row % 5) for row in range(20)]))
    assert code == 2 and f"write prices without the dash behind them, {without} for {whole}, or keep" in err


def test_a_number_with_its_minus_behind_is_negative_still(run, csv):
    code, _, err = fit(run, csv, table([f"{row + 1}-" for row in range(20)]))
    assert code == 2 and "write negative numbers with a minus before them" in err


@pytest.mark.parametrize("form", ["{}-{}-{}", "{}-{}-{} 7:05", "{}-{}-{}T11:05:09", "{}-{:02}-{}"])
def test_dates_without_zeros(run, csv, tmp_path, form):
    """The options that are named read them, whatever date is first; so do those of who passed --dates alone."""
    dates = [form.format(2020 + row % 4, (row + 9) % 12 + 1, (row + 15) % 28 + 1) for row in range(60)]
    content = table(dates)
    code, _, err = fit(run, csv, content)
    assert code == 2 and "pass --dates 'c' --date-format '%Y-%m-%d" in err
    written = err.split("--date-format '")[1].split("'")[0]
    code, _, alone = fit(run, csv, content, "--dates", "c")
    assert code == 2 and f"with --date-format, such as '{written}'" in alone
    saved = [tmp_path / name for name in ("given.st", "padded.st")]
    code, _, err = fit(run, csv, content, "--dates", "c", "--date-format", written, "--save", saved[0])
    assert code == 0, err
    padded = [f"{2020 + row % 4}-{(row + 9) % 12 + 1:02}-{(row + 15) % 28 + 1:02}" for row in range(60)]
    assert fit(run, csv, table(padded), "--dates", "c", "--save", saved[1])[0] == 0
    assert weights(saved[0]) == weights(saved[1])


def test_classes_that_are_numbers_keep_all_digits(run, csv, tmp_path):
    """Up to 2**53 whole numbers are exact, and so are the classes that are named and predicted."""
    saved, first, second = tmp_path / "m.st", 1000000000000001, 1000000000000002
    target = [second if row > 9 else first for row in range(20)]
    code, _, err = fit(run, csv, table(range(20), target), "--save", saved)
    assert code == 0, err
    code, out, err = run("predict", saved, csv(table(range(20), target), "new.csv"), "--sep", ";")
    assert code == 0 and [line.split(",")[0] for line in out.splitlines()[1:]] == list(map(str, target))
    assert "accuracy 1.000" in err or "accuracy 100" in err


def test_classes_that_differ_behind_all_digits(run, csv):
    target = [("0.12345678901234561", "0.12345678901234565")[row > 9] for row in range(20)]
    code, _, err = fit(run, csv, table(range(20), target))
    assert code == 2 and "differ only behind their 15th digit" in err and "pass --task classification to take" in err
    assert fit(run, csv, table(range(20), target), "--task", "classification")[0] == 0
