"""``python -m onestep keras``: fits the model of a .keras file, saved under any backend, and saves it again."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CliError, count, listed
from .help import HelpFormatter

EPILOG = """\
The model is loaded under Keras' torch backend, fitted by onestep.fit and saved; TensorFlow and JAX load what is saved
as ever. The arrays of the .npz file are the inputs, (rows, ...), by the names of the model's inputs or in their order;
--target names the one that holds what to predict. The loss is the one that the model was compiled with, or --loss.

examples:
  python -m onestep keras model.keras --data data.npz --target y
  python -m onestep keras model.keras --data data.npz --target y --loss cross_entropy --output fitted.keras
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser = commands.add_parser(
        "keras",
        help="fit the model of a .keras file",
        description="Fit a Keras model of any backend by solving for it, and save it.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("file", type=Path, help="the .keras file")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="the .npz file with the arrays")
    parser.add_argument("--target", required=True, metavar="NAME", help="the array to predict")
    parser.add_argument("--loss", metavar="NAME", help="mse, cross_entropy (of scores), bce (of scores) or poisson")
    parser.add_argument("--method", default="auto", metavar="NAME", help="of onestep.fit (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, default=50, metavar="N", help="at most so many (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to save (default: over the file itself)")


def run(args: argparse.Namespace) -> None:
    """Loads, fits and saves."""
    os.environ["KERAS_BACKEND"] = "torch"
    try:
        from onestep.integrations import keras as integration
    except ImportError as error:
        raise CliError(str(error)) from error
    output = args.output or args.file
    if output.suffix != ".keras":
        raise CliError(f"--output {output}: expected a name that ends in .keras")
    if not args.file.exists():
        raise CliError(f"{args.file}: there is no such file")
    inputs, target = _arrays(args.data, args.target)
    try:
        model: Any = integration.load(args.file)
    except (OSError, ValueError, TypeError) as error:
        raise CliError(f"{args.file}: {error}") from error
    rows = _in_order(model, inputs)
    from onestep import fit

    try:
        loss = args.loss or integration.as_loss(getattr(model, "loss", None))
        result = fit(model, (rows, target), loss, method=args.method, max_steps=args.max_steps)
    except (ValueError, TypeError) as error:
        raise CliError(str(error)) from error
    model.save(output)
    print(f"{args.file}: {count(len(target), 'row')}, {result.method}, {count(result.steps, 'step')}: {result.reason}")
    print(f"loss {result.initial_loss:.6g} -> {result.loss:.6g}, saved as {output}")


def _arrays(path: Path, target: str) -> tuple[dict[str, Any], Any]:
    """The arrays but for the target, and the target."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise CliError(f"{path}: {error}") from error
    if target not in arrays:
        raise CliError(f"{path} has no array {target!r}; it holds {listed(list(arrays))}")
    y = arrays.pop(target)
    if not arrays:
        raise CliError(f"{path} holds the target alone; expected the model's inputs, too")
    for name, array in arrays.items():
        if len(array) != len(y):
            raise CliError(f"{path}: {name!r} has {count(len(array), 'row')}, the target {count(len(y), 'row')}")
    return arrays, y


def _in_order(model: Any, arrays: dict[str, Any]) -> Any:
    """The model's inputs: by name where all names are known, else in the order of the file."""
    names = [tensor.name for tensor in model.inputs]
    if len(arrays) != len(names):
        raise CliError(
            f"the model takes {count(len(names), 'input')}, {listed(names)}; the data holds {listed(list(arrays))}"
        )
    values = [arrays[name] for name in names] if set(names) == set(arrays) else list(arrays.values())
    # A model of several inputs takes them as one list, and fit would unpack a tuple.
    return values[0] if len(values) == 1 else ([*values],)
