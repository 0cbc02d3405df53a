"""Arguments, dispatch, and the one place where errors become a line on stderr and an exit code."""

import argparse
import fcntl
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from onestep._program import leave_interrupts_to_main

from .errors import CliError, Interrupted, say
from .help import HelpFormatter
from .keras import add_parser as add_keras

# As it was called: by the name that pip installs, or as a module.
PROGRAM = "onestep" if Path(sys.argv[0]).name == "onestep" else "python -m onestep"
EXTRAS = {"pandas": "pandas", "rich": "rich", "safetensors": "safetensors", "sklearn": "scikit-learn"}
# What a network is where the command line does not say.
HIDDEN, MAX_STEPS = 64, 50

EPILOG = """\
onestep and python -m onestep are the same program.

examples:
  python -m onestep fit houses.csv --target price
  python -m onestep fit houses.csv --target price --impute median --save model.safetensors
  python -m onestep fit houses.csv --target price --model mlp
  python -m onestep predict model.safetensors new.csv > prices.csv
  python -m onestep info
  python -m onestep bench

for the tab key in bash to complete commands, options and files:
  onestep --print-completion bash > ~/.onestep.bash && echo 'source ~/.onestep.bash' >> ~/.bashrc
"""

FIT_EPILOG = """\
Columns of numbers are used as they are; columns of text become categories, one feature (0 or 1) for each level but
the most frequent, which is the baseline; columns named in --dates become year, month, day and weekday. The first line
of the file names the columns. A file named - is standard input. It is UTF-8, or what its byte order mark says;
--encoding names another, such as cp1252.

Currency signs, codes such as USD, words such as Rs and percent, % and ‰ beside numbers are left out, with a note; they
must mean the same in all of a column, as $ and USD do. Numbers with other signs in them, such as 1,037 or 3,5, are
refused until --thousands or --decimal says what they mean; so are columns of numbers with a unit or a comparison, such
as 5 kg or <5, unless --categorical names them. The same holds where - or n.a. stands for most of the values: --missing
names such texts, blanks around which change nothing. Dates with a time and its distance from UTC are the day that is
written. Dates that say less, such as 2023-01, give no feature for what they do not say.

A target of text or of two values is classified: the linear model is then logistic regression, the network's loss is
cross-entropy, and predict gives a class and its probability. Any other target is fitted as a number. A note says which
it was, and why; --task says otherwise.

--model linear is solved for exactly, in one step. --model mlp is a relu network on the standardised features and
target, by Levenberg-Marquardt where it has up to about 2,000 parameters, else by matrix-free Gauss-Newton. It
minimises the sum of squared errors of the standardised target + alpha x the sum of squares of all weights and biases.
No rows are set aside to choose alpha: 10 keeps a network of 64 units from following the noise of a few
hundred rows, and matters little for tens of thousands. If the training R² is far above the held-out one, raise it; if
both are low, lower it. R² of the linear model on the same rows is shown beside.

--save writes a state_dict that torch loads by itself, for torch.nn.Linear(features, 1) or
torch.nn.Sequential(Linear, ReLU, ..., Linear): raw features in, the target in its own units out. The order of the
features is in the file's metadata.

examples:
  python -m onestep fit houses.csv --target price
  python -m onestep fit houses.csv --target price --ignore id street --categorical postcode
  python -m onestep fit houses.csv --target price --impute median --save model.safetensors
  python -m onestep fit houses.csv --target price --model mlp --hidden 32 16 --alpha 3 --save network.safetensors
"""

PREDICT_EPILOG = """\
Writes a CSV with the column predicted_TARGET (and probability, of a class), and one line for each row of the file. A
row with a category that the model does not know, with a value that is missing, or that is no number or date, gets an
empty field; how many is shown on stderr. An empty field that stands alone on its line is written "", since programs
that read CSV skip empty lines. Columns are read as the model has them: numbers in the unit, and written in the way, of
the file that it was fitted on. A column without one value of that kind is refused. Where the file has the target as
well, R² and RMSE, or accuracy and log loss, are shown on stderr; a target in another unit than the model's, and a class
that it does not know, are not scored, which is said. A file named - is standard input.

examples:
  python -m onestep predict model.safetensors new.csv
  python -m onestep predict model.safetensors new.csv --output predictions.csv
"""


INFO_EPILOG = """\
examples:
  python -m onestep info
  ONESTEP_TARGET=generic python -m onestep info    # the kernels without AVX: generic, avx2, avx512 or amx
"""

BENCH_EPILOG = """\
Every case is a line: milliseconds of onestep and of torch (medians), how many times as fast onestep is, and which share
of the rate of torch's own matrix product, or of reading memory, it reaches. Nothing else should run meanwhile.

examples:
  python -m onestep bench
  python -m onestep bench --seconds 30
  ONESTEP_TARGET=avx2 python -m onestep bench      # another CPU target; onestep info lists those of this machine
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        say("error", f"{message} (see {self.prog} --help)")
        sys.exit(2)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        # Imported only when asked for: --help need not wait for torch.
        import onestep

        print(f"onestep {onestep.__version__}")
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, files: object) -> None:
    """Names of files are offered for arguments that are paths, in sub-commands, too; shtab would offer nothing."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files)
        elif action.type is Path:
            action.complete = files  # type: ignore[attr-defined]


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: object, values: object, *__: object) -> NoReturn:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error("--print-completion needs shtab, which is not installed: pip install shtab")
        parser.prog = "onestep"
        _complete_files(parser, shtab.FILE)
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def _penalty(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number, 0 or more, not {text!r}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, not {text!r}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"must be between 1 and 3600, not {text!r}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and 2**32 - 1, not {text!r}")
    return value


def _size(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 10**6:
        raise argparse.ArgumentTypeError(f"must be between 1 and 1000000, not {text!r}")
    return value


def _separator(text: str) -> str:
    text = "\t" if text in ("\\t", "tab") else text
    if len(text) != 1 or text in '"\r\n ':
        raise argparse.ArgumentTypeError(f"must be one character such as ';', or 'tab', not {text!r}")
    return text


def _encoding(text: str) -> str:
    try:
        # Some codecs are of bytes, or of nothing.
        b"a".decode(text, "ignore")
    except (LookupError, UnicodeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"must be an encoding of text that Python knows, such as cp1252, latin-1 or utf-16, not {text!r}"
        ) from None
    return text


def _mark(text: str) -> str:
    if len(text) != 1 or text.isalnum() or text in '"\r\n':
        raise argparse.ArgumentTypeError(f"must be one character such as ',', not {text!r}")
    return text


# argparse drops -- wherever it stands, also from --missing=--. No argument of a program has this character.
_KEPT = "\0"

# argparse names the type in its own message for a value that does not parse.
_penalty.__name__ = _fraction.__name__ = _seconds.__name__ = "number"
_seed.__name__ = _size.__name__ = "whole number"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog=PROGRAM,
        description="Fit a linear model or a small network to a CSV file by solving for it, and predict with it.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=["bash", "zsh", "tcsh"],
        help="print a script for the shell's completion of `onestep`, and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,fit,predict,keras,bench}")

    commands.add_parser(
        "info",
        help="version, CPU target, thread source, CUDA build and devices",
        description="Show what runs here: onestep's version and CPU target, where its threads come from, "
        "torch's version, whether the CUDA kernels were built, and the devices.",
        epilog=INFO_EPILOG,
        formatter_class=HelpFormatter,
    )

    fit = commands.add_parser(
        "fit",
        help="fit a model to a CSV file",
        description="Fit a linear model to a CSV file exactly and in one step, or a relu network in a few dozen.",
        epilog=FIT_EPILOG,
        formatter_class=HelpFormatter,
    )
    fit.add_argument("file", type=Path, help="the CSV file")
    fit.add_argument("--target", required=True, metavar="COLUMN", help="the column to predict")
    fit.add_argument("--model", choices=["linear", "mlp"], default="linear", help="what to fit (default: %(default)s)")
    fit.add_argument(
        "--hidden",
        nargs="+",
        type=_size,
        metavar="UNITS",
        help=f"units of each hidden layer of the network (default: one layer of {HIDDEN})",
    )
    fit.add_argument(
        "--max-steps", type=_size, metavar="N", help=f"at most so many steps for the network (default: {MAX_STEPS})"
    )
    fit.add_argument(
        "--task",
        choices=["auto", "regression", "classification"],
        default="auto",
        help="whether the target is a number or a class (default: a class if it is text or has two values)",
    )
    fit.add_argument(
        "--dates", nargs="+", action="extend", default=[], metavar="COLUMN", help="columns that hold dates"
    )
    fit.add_argument(
        "--date-format", metavar="FORMAT", help="how dates are written, such as %%d/%%m/%%Y (default: YYYY-MM-DD)"
    )
    fit.add_argument("--ignore", nargs="+", action="extend", default=[], metavar="COLUMN", help="columns to leave out")
    fit.add_argument(
        "--categorical",
        nargs="+",
        action="extend",
        default=[],
        metavar="COLUMN",
        help="columns to treat as categories although they hold numbers, or texts that look like them",
    )
    fit.add_argument(
        "--impute",
        choices=["median"],
        help="fill missing values: the median of a column of numbers, the most frequent level of a categorical one, "
        "both of the training rows; rows without a target are dropped",
    )
    fit.add_argument(
        "--alpha",
        type=_penalty,
        help="ridge penalty on the weights of the standardised columns (default: 0, ordinary least squares; "
        "10 for the network, 1 for classes)",
    )
    fit.add_argument(
        "--test-size",
        type=_fraction,
        default=0.2,
        metavar="FRACTION",
        help="part of the rows held out for R² and RMSE; 0 fits on all rows (default: %(default)s)",
    )
    fit.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="seed of the split and of the network's first weights (default: %(default)s)",
    )
    fit.add_argument(
        "--dtype",
        choices=["float64", "float32"],
        default="float64",
        help="precision of the fit and of the saved weights (default: %(default)s)",
    )
    fit.add_argument("--save", type=Path, metavar="FILE", help="write the model to a safetensors file")

    predict = commands.add_parser(
        "predict",
        help="predict with a saved model",
        description="Predict the target for every row of a CSV file with a model saved by fit --save.",
        epilog=PREDICT_EPILOG,
        formatter_class=HelpFormatter,
    )
    predict.add_argument("model", type=Path, help="the file written by fit --save")
    predict.add_argument("file", type=Path, help="the CSV file")
    predict.add_argument("--output", type=Path, metavar="FILE", help="write the predictions here, not to stdout")
    add_keras(commands)

    bench = commands.add_parser(
        "bench",
        help="say which CPU target runs here, and how fast, beside torch alone",
        description="Measure typical calls beside torch's own way to the same result, in turn in one process, and say\n"
        "which CPU target runs.",
        epilog=BENCH_EPILOG,
        formatter_class=HelpFormatter,
    )
    bench.add_argument(
        "--seconds", type=_seconds, default=120, metavar="S", help="about how long to measure (default: %(default)s)"
    )

    for command in (fit, predict):
        command.add_argument(
            "--sep",
            type=_separator,
            default=",",
            metavar="CHAR",
            help="the character between fields (default: a comma); 'tab' for tabs",
        )
        command.add_argument(
            "--encoding",
            type=_encoding,
            metavar="NAME",
            help="the encoding of the file, such as cp1252 for one of Excel on Windows (default: by its byte order "
            "mark; UTF-8 without one)",
        )
        as_fitted = "" if command is fit else " (default: as for the file that the model was fitted on)"
        missing = " (default: NA, N/A, NaN, null, None and their like)" if command is fit else as_fitted
        command.add_argument(
            "--thousands",
            type=_mark,
            metavar="CHAR",
            help=f"the character between groups of digits, as in 1,037{as_fitted}",
        )
        command.add_argument(
            "--decimal", type=_mark, metavar="CHAR", help=f"the character before decimals, as in 3,5{as_fitted}"
        )
        command.add_argument(
            "--missing",
            nargs="*",
            action="extend",
            type=lambda text: text.removeprefix(_KEPT),
            metavar="TEXT",
            help="the texts that mean a missing value, beside the empty field: --missing alone takes NA for a text "
            f"like any other; --missing=-- for one that begins with a dash{missing}",
        )
    return parser


def _settle_model(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on the model; raises for an option of the other one."""
    network = args.model == "mlp"
    for option, value in (("--hidden", args.hidden), ("--max-steps", args.max_steps)):
        if value is not None and not network:
            raise CliError(f"{option} is for --model mlp")
    args.hidden, args.max_steps = args.hidden or [HIDDEN], args.max_steps or MAX_STEPS


def _dispatch(args: argparse.Namespace) -> None:
    # The commands import the extras at the top of their modules, so each is imported only when it is wanted.
    if args.command == "info":
        from .info import run
    elif args.command == "bench":
        from .bench import run
    elif args.command == "fit":
        _settle_model(args)
        from .fit import run
    elif args.command == "keras":
        from .keras import run
    else:
        from .predict import run
    run(args)


def _open_what_is_closed() -> None:
    """Makes standard streams that are closed lead nowhere: a file that is opened later must not be one of them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if fcntl.fcntl(2, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        # bash keeps a script that it runs in the place of a stderr that is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if sys.stderr is None:
        # Others write to it, too, such as progress bars and warnings.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the program ends)


def _require_stdout(args: argparse.Namespace) -> None:
    """Raises where what the command has to say would be lost, before any work is done for it."""
    if sys.stdout is not None:
        return
    if args.command == "predict":
        if args.output is None:
            raise CliError("standard output is closed; pass --output FILE for the predictions, or send them to a file")
        return
    raise CliError(f"standard output is closed, where {args.command} reports; send it to a file, such as > report.txt")


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 for bad usage or input. `argv` defaults to sys.argv[1:]."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # R² must not end in a UnicodeEncodeError where the terminal is ASCII.
            stream.reconfigure(errors="replace")
    _open_what_is_closed()
    leave_interrupts_to_main()
    words = sys.argv[1:] if argv is None else argv
    try:
        try:
            args = build_parser().parse_args(
                [f"--missing={_KEPT}--" if word == "--missing=--" else word for word in words]
            )
        finally:
            # What --help and --print-completion have printed, before they exit.
            _flush()
        _require_stdout(args)
        _dispatch(args)
        _flush()
    except CliError as error:
        say("error", str(error))
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        needed = f"{EXTRAS[package]}, which is not installed: pip install {' '.join(EXTRAS.values())}"
        say("error", f"{PROGRAM} {args.command} needs {needed}")
        return 2
    except BrokenPipeError:
        # The reader (head, say) has left. Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        say("error", f"{error.filename or 'output'}: {error.strerror or error}")
        return 2
    except MemoryError:
        say("error", f"not enough memory for {args.file}")
        return 2
    except Interrupted as kept:
        say("note", str(kept))
        return 130
    except KeyboardInterrupt:
        say("error", "interrupted")
        return 130
    return 0
