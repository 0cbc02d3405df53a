"""Random calls of the command line: CSV files with numbers, units, dates, texts and what does not belong there."""

from __future__ import annotations

import contextlib
import csv
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from fuzz_draws import Call, ForeignError

from onestep.cli import main

MIXED = ("1", "2.5", "-3", "0", "1e3", "", "NA", "nan", "inf", "1,5", "1,037", "$4", "7%", "u", "v", "w", "a b")
MIXED += ("2021-03-05", "2023-01", "2023", "2023-W05", "5 kg", "<5", "Rs 5", "5 percent", "zone 3", "\u20ac5 USD", "-")
ODD = ('"', "\0", "é", "9007199254740993", "x" * 50, "1e999", "\r", "1" * 5000, "5\u202f%", "0x1F", "TRUE", "#DIV/0!")


def numbers(written: Callable[[int], str]) -> Any:
    return st.integers(-3, 2000).map(written)


def dates(written: str) -> Any:
    return st.dates().filter(lambda day: 1900 < day.year < 2100).map(lambda day: day.strftime(written))


# What the cells of a column are, but for a few that are something else, and the options that such a column needs.
TARGETS = (
    (st.floats(-100, 100).map(str), ""),
    (st.sampled_from(("u", "v", "w")), ""),
    (numbers(str), ""),
    (numbers(lambda v: f"${v}"), ""),
    (numbers(lambda v: f"{v} percent"), ""),
    (numbers(lambda v: f"{v},5"), "--decimal ,"),
    (numbers(lambda v: f"{v:,}".replace(",", ".") + ",25"), "--thousands . --decimal ,"),
)
KINDS = (
    *TARGETS,
    (st.sampled_from(MIXED), ""),
    (st.integers(1, 4).map(lambda k: f"zone {k}"), ""),
    (numbers(lambda v: f"{v} %"), ""),
    (numbers(lambda v: f"Rs. {v:,}/-"), "--thousands ,"),
    (numbers(lambda v: f"{v:,}"), "--thousands ,"),
    (numbers(lambda v: f"{v:,}".replace(",", "\u202f")), "--decimal ,"),
    (st.integers(1, 4).map(lambda v: f"{v} kg"), "--categorical {name}"),
    (st.integers(1, 4).map(lambda v: f"<{v}"), "--categorical {name}"),
    (dates("%Y-%m-%d"), "--dates {name}"),
    (dates("%Y-%m"), "--dates {name}"),
    (dates("%Y"), "--dates {name}"),
    (dates("%Y%m%d"), ""),
    (dates("%d.%m.%Y"), "--dates {name} --date-format %d.%m.%Y"),
    (dates("%m/%d"), "--dates {name} --date-format %m/%d"),
    (dates("%d.%m"), ""),
)
OPTIONS = ("--impute median", "--alpha 1", "--task classification", "--task regression", "--missing", "--dates c1")
OPTIONS += ("--thousands ,", "--decimal ,", "--thousands . --decimal ,", "--thousands .", "--dtype float32", "--sep ;")
OPTIONS += ("--date-format %d.%m.%Y", "--date-format %Y%m%d", "--date-format %Q", "--categorical c1", "--ignore c1")
OPTIONS += ("--model mlp --hidden 2 --max-steps 2",)


def table(draw: Any, kinds: list[Any], rows: int) -> str:
    """A CSV file, mostly one, with columns of these kinds."""
    others = st.sampled_from(MIXED + ODD if draw(st.integers(0, 3)) == 3 else MIXED)
    # Of 40 cells so many are of another kind.
    wrong = draw(st.sampled_from((0, 0, 0, 1, 3)))
    lines = [[f"c{i}" for i in range(len(kinds))]]
    for _ in range(rows):
        cells = [draw(others if draw(st.integers(0, 39)) >= 40 - wrong else kind) for kind in kinds]
        lines.append(cells[: len(cells) - (draw(st.integers(0, 60)) == 60)])
    quote, end = draw(st.integers(0, 3)) < 3, draw(st.sampled_from(("\n", "\n", "\r\n")))
    mark = draw(st.sampled_from(("", "", "\ufeff")))
    return mark + "".join(",".join(f'"{c}"' if quote else c for c in line) + end for line in lines)


@st.composite
def command_lines(draw: Any) -> Call:
    # Most of the time a file that can be fitted.
    kinds = [draw(st.sampled_from(TARGETS)), *draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))]
    kinds = kinds if draw(st.integers(0, 11)) < 11 else kinds[:1]
    cells = [kind for kind, _ in kinds]
    text = table(draw, cells, draw(st.sampled_from((12, 14, 10, 8, 6, 3, 1, 0))))
    # Other rows of the same kinds, or another number of columns, to predict for.
    change = draw(st.sampled_from((0, 0, 0, 0, -1, 1)))
    other = table(draw, cells[:change] or cells if change < 0 else cells + change * cells[:1], draw(st.integers(0, 5)))
    options = [
        needs.format(name=f"c{at}") for at, (_, needs) in enumerate(kinds) if needs and draw(st.integers(0, 7)) < 7
    ]
    options += draw(st.lists(st.sampled_from(OPTIONS), max_size=2)) if draw(st.booleans()) else []
    options = list(dict.fromkeys([*options, *(["--test-size 0"] if draw(st.integers(0, 3)) < 3 else [])]))
    use = draw(st.lists(st.sampled_from(("--missing", "--decimal ,", "--thousands .", "--sep ;")), max_size=1))
    use = use if draw(st.booleans()) else []
    broken = draw(st.integers(0, 9)) == 9

    def run(text: str, other: str, options: list[str], use: list[str]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path, rows = Path(folder) / "data.csv", Path(folder) / "other.csv"
            path.write_bytes(text.encode())
            rows.write_bytes(other.encode())
            model = path.with_suffix(".safetensors")
            codes = [call(["fit", str(path), "--target", "c0", "--save", str(model), *" ".join(options).split()])[0]]
            if model.exists():
                whole = model.read_bytes()
                if broken:
                    model.write_bytes(whole[: 40 * len(other) % 300])
                for file, content in ((path, text), (rows, other)):
                    code, out, err = call(["predict", str(model), str(file), *" ".join(use).split()])
                    codes.append(code)
                    check_predictions(content, code, out)
                    same = file == path and not use and not broken and "--sep ;" not in options
                    if same and code:
                        raise ForeignError(f"the file that the model was fitted on is refused: {err}")
        return codes

    return run, {"text": text, "other": other, "options": options, "use": use}, ()


def check_predictions(content: str, code: int, out: str) -> None:
    """There is one prediction, or an empty field, for each row."""
    if code or any(odd in content for odd in ("\r\r", "\r,", '\r"', '"""', "\0", ',","')):
        return
    found = csv.reader(io.StringIO(content.removeprefix("\ufeff"), newline=""), skipinitialspace=True)
    rows = sum(len(record) > 1 or bool(record and record[0].strip()) for record in found)
    lines = list(csv.reader(io.StringIO(out)))
    if len(lines) != rows or not all(len(line) == len(lines[0]) for line in lines):
        raise ForeignError(f"{rows - 1} rows, but {len(lines) - 1} predictions: {out}")


def call(words: list[str]) -> tuple[Any, str, str]:
    """What a command ends with (argparse leaves by SystemExit), and what it writes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    if code not in (0, 2) or "Traceback" in err.getvalue() or (code == 2) != ("error: " in err.getvalue()):
        raise ForeignError(f"exit code {code}: {err.getvalue()}")
    return code, out.getvalue(), err.getvalue()
