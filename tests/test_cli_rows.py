"""Rows that look empty, scores of predictions, outputs that are no regular files, and messages that name what to do."""

import io
import math

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
