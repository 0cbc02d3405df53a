"""The command line: bad files and usage in one line each, the program itself, and real data."""

import argparse
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import HOUSES, ROOT, besides_task, linear_model, pd, r2, small, train_test_split, weights, with_line
from processes import Child

import onestep
from onestep.cli import main
from onestep.cli.app import build_parser

CALIFORNIA = ROOT.parent / "shared" / "data" / "california_housing.csv"


Run = Callable[..., tuple[int, str, str]]


# --- bad files ------------------------------------------------------------------------------------


MANY = "a,street,y\n" + "".join(f"{i},Street {i},{i}\n" for i in range(100))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "is empty"),
        ("\n \n", [], "is empty"),
        ("a,y\n", [], "has a header but no rows"),
        ("a,a,y\n1,2,3\n", [], "names a column twice: a"),
        ("a;y\n1;2\n", [], "separated by ';'; pass --sep ';'"),
        ("a\ty\n1\t2\n", [], "pass --sep tab"),
        ('a,y\n"\r","1"\n', [], "has missing values in a (1)"),
        ('a,y\n1," "\n2," "\n', [], "missing values"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", [], "is not a text file"),
        ("name,y\nJosé,1\n".encode("latin-1"), [], "line 2 is not UTF-8 (byte 0xe9)"),
        (with_line(small(), 9, "1,2,u,3,4"), [], "line 9 has 5 fields, but the header has 4"),
        (with_line(small(), 2, "1,2,u,3,4"), [], "line 2 has 5 fields, but the header has 4"),
        (with_line(small(), 9, "1,2,u"), [], "line 9 has 3 fields, but the header has 4"),
        (with_line(small(), 9, "1,2,u"), ["--impute", "median"], "line 9 has 3 fields, but the header has 4"),
        (small().replace("\n", "\r"), [], "line 1: a carriage return inside the line"),
        (with_line(small(), 9, '1,2,"u,3'), [], "the record that begins on line 9 is never closed"),
        (with_line(small(), 9, "12a,2,u,3"), [], "'a' should hold numbers, but line 9 has '12a'; correct it, leave"),
        (with_line(small(), 9, "1,2,u,?"), [], "'y' should hold numbers, but line 9 has '?'; correct it, choose"),
        (with_line(small(), 9, "1,-inf,u,3"), [], "column 'b' holds an infinite value on line 9"),
        (with_line(small(), 9, "1,2,u,1e999"), [], "column 'y' holds an infinite value on line 9"),
        (small().replace(",y", ",price"), [], "has no column 'y' (the target); it has a, b, kind, price"),
        (small().replace(",y", ",yy"), [], "has no column 'y' (the target); did you mean 'yy'?"),
        (small(), ["--ignore", "c"], "has no column 'c' (in --ignore)"),
        (small(), ["--categorical", "knid"], "(in --categorical); did you mean 'kind'?"),
        (small(), ["--ignore", "a", "y"], "the target 'y' cannot also be in --ignore"),
        (small(), ["--categorical", "y"], "the target 'y' cannot also be in --categorical"),
        (small(), ["--ignore", "a", "b", "kind"], "there is no column to fit on"),
        (small(), ["--target", "kind", "--task", "regression"], "'kind' should hold numbers, but line 2 has"),
        (small(), ["--task", "classification", "--target", "c"], "has no column 'c' (the target)"),
        ("a,y\n" + "1,2\n" * 20, ["--task", "classification"], "the target 'y' has the one value 2"),
        (small(4), [], "4 rows with a target: too few to hold out 0.2 of them"),
        (small(1), ["--test-size", "0"], "1 row with a target: too few to fit on"),
        (MANY, [], "'street' is text with 80 different values in 80 training rows"),
        ("a,b,y\n" + "1,,2\n" * 20, ["--impute", "median"], "column 'b' has no value in the training rows"),
        ("a,y\n" + "1,2\n" * 20, [], "no column is left to fit on"),
        ("a,y\n" + "".join(f"{i}e300,{i}\n" for i in range(1, 30)), [], "too large or too close together"),
    ],
)
def test_bad_files(run, csv, content, options, message):
    code, out, err = run("fit", csv(content), "--target", "y", *options)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("error: ") and message in last
    # Notes may come before the one line of the error.
    assert all(line.startswith("note: ") for line in err.splitlines()[:-1])


def test_paths_that_are_not_files(run, tmp_path):
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "none.csv", "no such file")):
        code, _, err = run("fit", path, "--target", "y")
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required"),
        (["paint"], "invalid choice: 'paint'"),
        (["fit", "x.csv"], "--target"),
        (["fit", "x.csv", "--target", "y", "--alpha", "-1"], "argument --alpha: must be a finite number"),
        (["fit", "x.csv", "--target", "y", "--alpha", "much"], "argument --alpha: invalid number value: 'much'"),
        (["fit", "x.csv", "--target", "y", "--test-size", "1"], "argument --test-size: must be at least 0"),
        (["fit", "x.csv", "--target", "y", "--seed", "-1"], "argument --seed: must be between 0"),
        (["fit", "x.csv", "--target", "y", "--sep", ";;"], "argument --sep: must be one character"),
        (["fit", "x.csv", "--target", "y", "--impute", "mean"], "argument --impute: invalid choice: 'mean'"),
        (["fit", "x.csv", "--target", "y", "--model", "tree"], "argument --model: invalid choice: 'tree'"),
        (["fit", "x.csv", "--target", "y", "--hidden", "0"], "argument --hidden: must be between 1 and"),
        (["fit", "x.csv", "--target", "y", "--hidden", "8", "x"], "argument --hidden: invalid whole number value: 'x'"),
        (["fit", "x.csv", "--target", "y", "--max-steps", "0"], "argument --max-steps: must be between 1 and"),
    ],
)
def test_bad_usage(run, words, message):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and message in err and "--help" in err and err.count("\n") == 1


def test_options_of_the_network_are_refused_for_the_linear_model(run, csv):
    for option in ("--hidden", "--max-steps"):
        code, out, err = run("fit", csv(small()), "--target", "y", option, 5)
        assert (code, out, err) == (2, "", f"error: {option} is for --model mlp\n")


# --- the program ----------------------------------------------------------------------------------


def test_help_shows_examples(run):
    for words in (["--help"], ["fit", "--help"], ["predict", "--help"]):
        code, out, err = run(*words)
        assert (code, err) == (0, "") and "examples:" in out


def test_version_and_info(run):
    assert run("--version") == (0, f"onestep {onestep.__version__}\n", "")
    code, out, err = run("info")
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert (code, err) == (0, "") and list(lines) == list(onestep.info())
    assert len({line.index(re.split(r"  +", line, maxsplit=1)[1]) for line in out.splitlines()}) == 1


def test_module_runs_as_a_program(tmp_path):
    """A whole one, with an interpreter of its own."""
    words = ["fit", HOUSES, "--target", "price", "--save", tmp_path / "model.safetensors"]
    done = subprocess.run([sys.executable, "-m", "onestep", *map(str, words)], capture_output=True, timeout=120)
    assert done.returncode == 0 and "intercept" in done.stdout.decode() and besides_task(done.stderr.decode()) == ""


WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys(["pandas", "rich", "safetensors", "sklearn", "matplotlib"]))
from onestep.cli import main
from onestep.cli.app import build_parser
assert main(["info"]) == 0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_without_the_extras_info_works_and_fit_names_them():
    done = Child(WITHOUT_EXTRAS, "fit", HOUSES, "--target", "price").finish()
    assert done.returncode == 2 and done.output.startswith("version")
    assert done.errors.count("\n") == 1 and "pip install pandas rich safetensors scikit-learn" in done.errors


WITHOUT_A_READER = """
import os, sys
reader, writer = os.pipe()
os.close(reader)
sys.stdout = os.fdopen(writer, "w")
from onestep.cli import main
from onestep.cli.app import build_parser
sys.exit(main(sys.argv[1:]))
"""


def test_a_reader_that_leaves_early_sees_no_traceback(run, csv, tmp_path):
    saved = tmp_path / "model.safetensors"
    run("fit", csv(small()), "--target", "y", "--save", saved)
    done = Child(WITHOUT_A_READER, "predict", saved, csv("a,b,kind\n" + "1,2,u\n" * 10_000, "long.csv")).finish()
    assert (done.returncode, done.errors) == (141, "")


@pytest.mark.parametrize("option", ["--help", "--print-completion=bash"])
def test_a_reader_that_leaves_before_an_option_prints_sees_no_traceback(option):
    if option != "--help":
        pytest.importorskip("shtab")
    done = Child(WITHOUT_A_READER, option).finish()
    assert (done.returncode, done.errors) == (141, "")


def test_an_interrupt_and_lack_of_memory_end_in_one_line(run, csv, monkeypatch):
    for error, code, message in ((KeyboardInterrupt, 130, "interrupted"), (MemoryError, 2, "not enough memory")):

        def stop(*_: object, error: type[BaseException] = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("onestep.cli.fit.read_table", stop)
        found, out, err = run("fit", csv(small()), "--target", "y")
        assert (found, out) == (code, "") and message in err and err.count("\n") == 1


INTERRUPTED_WHILE_IT_IS_IMPORTED = """
import os, signal, sys
def interrupt(event, arguments):
    if event == "import" and arguments[0] == "torch":
        os.kill(os.getpid(), signal.SIGINT)
# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
if "info" not in sys.argv:
    sys.addaudithook(interrupt)
sys.argv[0] = sys.argv.pop(1)
sys.orig_argv = [sys.executable, "-m", "onestep"]
import onestep
from onestep.cli import main
from onestep.cli.app import build_parser
main(sys.argv[1:])
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize("name", ["-m", "/usr/bin/onestep"])
def test_an_interrupt_while_the_program_starts_shows_no_traceback(name):
    """As `python -m onestep` and as the script of pip; a program of the user's own gets KeyboardInterrupt."""
    words = [sys.executable, "-c", INTERRUPTED_WHILE_IT_IS_IMPORTED]
    done = subprocess.run([*words, name, "fit"], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
    if name == "-m":
        done = subprocess.run([*words, "train.py"], capture_output=True, timeout=120)
        assert b"KeyboardInterrupt" in done.stderr and done.returncode not in (0, 130)
        done = subprocess.run([*words, name, "info"], capture_output=True, timeout=120)
        assert done.stdout.endswith(b"True\n"), "main is told of an interrupt once it runs"


def test_a_target_that_is_not_there_ends_in_one_line(tmp_path):
    """As `python -m onestep` and as the script of pip, before a line of the program runs; `import onestep` raises."""
    script = tmp_path / "onestep"
    script.write_text("import sys\nfrom onestep.cli import main\nsys.exit(main())\n")
    supported = onestep.info()["cpu_targets_supported"]
    lacking = [target for target in ("amx", "avx512", "avx2") if target not in supported]
    expected = f"expected one of: {' '.join(supported)}, which this machine supports"
    tried = [(["-m", "onestep", "info"], "sse2", "is not known"), ([script, "--help"], "sse2", "is not known")]
    tried += [(["-m", "onestep", "fit"], target, "is not supported by this machine") for target in lacking[:1]]
    for words, target, reason in tried:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env=os.environ | {"ONESTEP_TARGET": target},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith(f"error: ONESTEP_TARGET='{target}': ")
        assert reason in done.stderr and expected in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", "import onestep"],
        env=os.environ | {"ONESTEP_TARGET": "sse2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: ONESTEP_TARGET='sse2': ") and expected in last


def test_an_ascii_terminal_can_show_the_report(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["fit", str(HOUSES), "--target", "price"]) == 0
    assert b"held out:  R? 0.9" in terminal.buffer.getvalue()


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.skipif(not CALIFORNIA.exists(), reason=f"needs {CALIFORNIA}")
def test_california_housing(run, tmp_path):
    target, saved = "median_house_value", tmp_path / "model.safetensors"
    code, _, err = run("fit", CALIFORNIA, "--target", target)
    assert code == 2 and "missing values in total_bedrooms (207)" in err and err.count("\n") == 1

    code, out, err = run("fit", CALIFORNIA, "--target", target, "--impute", "median", "--save", saved)
    assert code == 0 and "207 missing values of total_bedrooms filled with the median" in err
    frame = pd.read_csv(CALIFORNIA)
    y = frame.pop(target).to_numpy()
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0)
    frame = frame.fillna({"total_bedrooms": frame["total_bedrooms"].iloc[train].median()})
    X = pd.get_dummies(frame, prefix_sep=" = ").astype(float)
    found = weights(saved)
    X = X[[name for name in found if name]]
    peer = linear_model.LinearRegression().fit(X.iloc[train], y[train])
    assert list(found.values()) == pytest.approx([*peer.coef_, peer.intercept_], rel=1e-6)
    score = peer.score(X.iloc[test], y[test])
    assert 0.6 < score < 0.7 and f"held out:  R² {score:.4f}" in out

    code, out, _ = run("predict", saved, CALIFORNIA)
    predicted = np.array(out.splitlines()[1:], float)
    np.testing.assert_allclose(predicted, peer.predict(X), rtol=1e-6, atol=1e-3)


@pytest.mark.skipif(not CALIFORNIA.exists(), reason=f"needs {CALIFORNIA}")
def test_a_network_of_california_housing(run):
    network = ["--model", "mlp", "--hidden", 24, "--max-steps", 20]
    code, out, _ = run("fit", CALIFORNIA, "--target", "median_house_value", "--impute", "median", *network)
    score, linear = r2(out, "held out:")
    assert code == 0 and score > linear + 0.03 > 0.65


def test_bench_measures_and_compares(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from onestep.cli import bench

    monkeypatch.setattr(bench, "CASES", [lambda: bench._normal(50, 8, 4, 1)])
    monkeypatch.setattr(bench, "_limits", lambda: (100.0, 10.0))
    code, written, _ = run("bench", "--seconds", "1")
    assert code == 0
    assert re.search(r"solve_normal, 50 of 8 × 4 +\d+\.\d\d ms +\d+\.\d\d ms +\d+\.\d\d +\d+% of GEMM\n", written)
    # 4e9 bytes in a second, of 10 GB/s.
    monkeypatch.setattr(bench, "CASES", [lambda: bench.Case("rows", torch.zeros, torch.zeros, bytes=4e9)])
    monkeypatch.setattr(bench, "_measure", lambda *_: (1.0, 3.0))
    assert re.search(r"rows +1000\.00 ms 3000\.00 ms +3\.00 +40% of reading\n", run("bench", "--seconds", "1")[1])
    monkeypatch.undo()
    assert "of GEMM: the operations that the result needs" in written  # a share may be above 100%
    results = itertools.chain([torch.full((3,), 2.0)], itertools.repeat(torch.ones(3)))  # wrong from the second call on
    wrong = bench.Case("wrong", lambda: next(results), lambda: torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="wrong: the results differ"):
        bench._measure(wrong, 0.01)
    assert run("bench", "--seconds", "0")[0] == 2


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def test_help_of_every_command_has_an_example_that_its_parser_takes() -> None:
    parser = build_parser()
    assert set(commands_of(parser)) == {"info", "fit", "predict", "keras", "bench"}
    for name, command in commands_of(parser).items():
        lines = command.format_help().partition("\nexamples:\n")[2].splitlines()
        examples = [line.partition(" -m onestep ")[2].partition("  #")[0].partition(" > ")[0] for line in lines]
        assert examples, name
        for example in examples:
            assert parser.parse_args(shlex.split(example)).command == name, example
        # An option has one default at most.
        told = {action.dest: (action.help or "").count("default: ") for action in command._actions}
        assert [dest for dest, times in told.items() if times > 1] == [], name


def test_completion_of_the_shell(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    code, written, _ = run("--print-completion", "bash")
    assert code == 0
    # What bash offers for what has been typed so far: commands, options, choices and names of files.
    (tmp_path / "houses.csv").touch()
    ask = """
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
    _shtab_onestep onestep "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    echo "${COMPREPLY[@]}"
    """
    for typed, offered in {
        "onestep pre": "predict",
        "onestep fit --targ": "--target",
        "onestep fit --model m": "mlp",
        "onestep fit hou": "houses.csv",
        "onestep fit x.csv --save hou": "houses.csv",
        "onestep predict model.safetensors hou": "houses.csv",
        "onestep keras hou": "houses.csv",
        "onestep keras x.keras --data hou": "houses.csv",
    }.items():
        done = subprocess.run(
            ["bash", "-c", f"{written}\n{ask}", "bash", *typed.split()], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout.split() == [offered], (typed, done.stderr)


@pytest.mark.parametrize("columns", [60, 80, 130])
def test_help_is_as_wide_as_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prose is wrapped to it and says the same words; examples are lines that can be copied."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in commands_of(build_parser()).values():
        help, epilog = command.format_help(), command.epilog or ""
        written = epilog.partition("examples:\n")[0].split()
        prose = help.partition("\nexamples:\n")[0].partition("\noptions:\n")[2].partition("\n\n")[2].splitlines()
        assert " ".join(prose).split() == written
        widths = [len(line) for line in prose]
        assert all(width <= columns for width in widths)
        assert len(written) < 150 or max(widths) > columns - 12
        examples = [line for line in epilog.splitlines() if line.startswith("  ")]
        assert examples and set(examples) <= set(help.splitlines())
